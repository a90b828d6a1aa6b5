"""One file, one published system. `--config=` takes their names; `python -m jaxtok.configs` lists them.

In a wheel this package is jaxtok.configs, so that it meets no other `configs`; here jaxtok/configs is a link to it. Its
files say `from configs import common` in either place.
"""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "common" and path.stem[0] != "_")

if importlib.util.find_spec("configs") is None:
    sys.modules["configs"] = sys.modules[__name__]


def find(name):
    """flextok:tiny -> its path with :tiny behind it. The path of a file stays as it is, with a variant or without.

    ValueError lists the names where there is neither.
    """
    stem, colon, variant = name.partition(":")
    if stem in NAMES:
        sys.modules["configs"] = sys.modules[__name__]  # whatever else has that name in the folder at hand
        return f"{FOLDER / stem}.py{colon}{variant}"
    if not Path(stem).is_file():
        raise ValueError(f'There is no config "{stem}": give the path of a file, or one of {", ".join(NAMES)}.')
    return name
