"""The configs, their variants and papers: python -m jaxtok.configs"""

import argparse
import importlib
import re

from . import NAMES


def about(name):
    """(arXiv number, what it is, its variants) of a config, from its docstring."""
    config = importlib.import_module(f"{__package__}.{name}")
    title = " ".join(config.__doc__.split("\n\n")[0].split()).rstrip(".")
    paper = re.search(r"arXiv (\d{4}\.\d{5})", title)
    return paper[1] if paper else "", re.sub(r",? ?\(?arXiv [\d.]+(\)?)", r"\1", title), list(config.VARIANTS)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m jaxtok.configs",
        description="Lists what --config= takes by name: a config, and behind a colon one of its variants.",
        epilog="example: python -m jaxtok.train --config=flextok:tiny --workdir=runs/flextok_tiny",
    )
    parser.parse_args(argv)
    for name in NAMES:
        paper, title, variants = about(name)
        print(f"{name:16} arXiv {paper:10}  {title}\n{'':16} {', '.join(filter(None, variants))}")


if __name__ == "__main__":
    main()
