"""What the commands share: flags, how they begin, and how they end."""

import ast
import contextlib
import os
import re
import sys
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxtok import configs, distributed
from jaxtok.build import check_keys


@contextlib.contextmanager
def one_line(program):
    """What jaxtok itself finds wrong ends a command with one line; what nobody foresaw, with its traceback."""
    try:
        yield
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = Path(last.filename).is_relative_to(Path(__file__).parent) and last.line.startswith("raise ")
        if not ours and getattr(error, "filename", None) is None:  # nor a file that cannot be read or written
            raise
        print(f"{program}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def pair(text):
    """steps=20 -> ("steps", 20). ValueError without an =."""
    key, found, value = text.partition("=")
    if not found:
        raise ValueError(f'Options are KEY=VALUE, and not "{text}".')
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def define_config(text, values=flags.FLAGS):
    """The flag --config, which takes whatever `configs.find` does, and --config.KEY=VALUE."""
    config_flags.DEFINE_config_file("config", None, text, flag_values=values)
    flag = values["config"]
    read, parse = flag.parser.parse, flag._parse
    flag.parser.parse = lambda path: read(configs.find(path))

    def parse_or_say(path):
        try:
            return parse(path)
        except (KeyError, AttributeError, IndexError, ValueError) as error:  # a KEY that is none
            config, said = flag.parser.parse(path), error
            try:
                for name in flag._GetOverrides(flag._GetArgv()):
                    check_path(config, name)
            except TypeError as better:
                said = better
            raise flags.IllegalFlagValueError(f"--config: {said}") from None

    flag._parse = parse_or_say


def check_path(config, path):
    """TypeError for a path such as schedule.peak_lr or samplers[0].title that is not in the config."""
    where = "the config"
    for key in re.findall(r"[^.\[\]]+", path):
        if isinstance(config, (tuple, list)):
            config = {str(i): item for i, item in enumerate(config)}
        check_keys([key], config if isinstance(config, (dict, ConfigDict)) else (), where)
        config, where = config[key], f"{where}.{key}".removeprefix("the ")


def define_processes():
    """The flags by which this process becomes one of several, for `together`."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, or auto; see jaxtok/distributed.py.")
    flags.DEFINE_integer("processes", None, "How many processes there are.")
    flags.DEFINE_integer("process", None, "Which of them this is, from 0 on.")


@contextlib.contextmanager
def together():
    """One of several processes from here on, as the flags or the cluster say; an error then ends all of them."""
    given = flags.FLAGS
    distributed.join(given.coordinator, given.processes, given.process)
    with distributed.end_together():
        yield


def use_huge_pages():
    """Starts the process again with glibc's allocator on huge pages, unless the user set GLIBC_TUNABLES.

    The setting is read before a process begins. On a CPU the default run's step takes 135 instead of 195 ms with it:
    XLA allocates and frees its buffers in every step, and small pages are faulted in one by one.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
