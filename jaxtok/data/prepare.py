"""Downloads and prepares a TFDS data set as ArrayRecord, which `data.sources.TFDS` then reads without tensorflow.

python -m jaxtok.data.prepare --name=imagenet2012 --data_dir=/data/tfds
"""

import argparse
from importlib.util import find_spec


def prepare(name, data_dir=None):
    """Prepares the data set `name` under `data_dir` (None: TFDS's default) and returns its folder."""
    missing = [package for package in ("tensorflow", "importlib_resources") if find_spec(package) is None]
    if missing:
        raise SystemExit(
            f'Preparing a TFDS data set needs {" and ".join(missing)}: pip install "jaxtok[tfds-prepare]" '
            "(reading it afterwards does not)."
        )
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="TFDS name, such as cifar10 or imagenet2012")
    parser.add_argument("--data_dir", help="where to put it; the default is that of TFDS")
    arguments = parser.parse_args()
    print(f"Prepared: {prepare(arguments.name, arguments.data_dir)}")
