"""The commands of jaxtok. `jaxtok train ...` is `python -m jaxtok.train ...`, and so are the others.

What one takes, with an example:

    jaxtok COMMAND --help

Completion of commands, configs and their variants by Tab, a line for ~/.bashrc:

    complete -o default -C "jaxtok --complete" jaxtok
"""

import ast
import importlib
import os
import re
import sys
from pathlib import Path


def commands():
    """{name: what it does} of the modules that can be run. Their files are read, and not imported."""
    folder = Path(__file__).parent
    files = {path.stem: path for path in folder.glob("*.py") if path.stem[0] != "_"}
    files |= {path.parent.name: path for path in folder.glob("*/__main__.py")}
    texts = {name: files[name].read_text(encoding="utf-8") for name in sorted(files)}
    runs = {name: text for name, text in texts.items() if '\nif __name__ == "__main__":' in text}
    docs = {name: ast.get_docstring(ast.parse(text)) for name, text in runs.items()}
    return {name: re.split(r": python -m|\n", doc)[0].rstrip(".") for name, doc in docs.items()}


def complete(line):
    """What may stand at the end of a command line, in place of its last word. Words end at = and : too, as in bash."""
    before, word = re.fullmatch(r"(.*[\s=:])?(.*)", line, re.S).groups()
    config = re.search(r"--config[=\s](?:(\w+):)?$", before or "")
    if re.fullmatch(r"\S+\s+", before or ""):
        known = commands()
    elif config:
        configs = importlib.import_module("jaxtok.configs")
        chosen = config[1] in configs.NAMES and importlib.import_module(f"jaxtok.configs.{config[1]}")
        known = chosen.VARIANTS if chosen else () if config[1] else configs.NAMES
    else:
        known = ()  # bash then completes names of files
    return [name for name in known if name and name.startswith(word)]


def main():
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        shown = "\n".join(f"    {name:12} {what}" for name, what in commands().items())
        print(f"usage: jaxtok COMMAND ...\n\n{shown}\n\n{__doc__.strip()}")
    elif name == "--complete":
        print(*complete(os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]), sep="\n")
    elif name in commands():
        os.execv(sys.executable, [sys.executable, "-m", f"jaxtok.{name}", *rest])
    else:
        print(f'jaxtok: there is no command "{name}"; there are {", ".join(commands())}.', file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
