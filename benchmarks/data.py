"""How fast pictures arrive: python -m benchmarks.data [--pictures=2000] [--size=256] [--workers=0,1,2,4] [--json=FILE]

Pictures a second of the training pipeline alone, nothing computed on them: a folder of JPEGs, one of PNGs, the same as
ArrayRecord files of encoded JPEGs, and pictures drawn by the program; cropped to `size` and flipped.
"""

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from jaxtok.data import pipeline, transforms
from jaxtok.data.records import write_array_record
from jaxtok.data.shapes import Shapes
from jaxtok.data.sources import ArrayRecord, Folder
from jaxtok.metrics import format_table

SECONDS = 5.0  # of each measurement, behind the first batches


def pictures(n, size, seed=0):
    """n smooth pictures, uint8 [h w 3] a little larger than `size`: noise would be no fair JPEG."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        yield small.resize((size * 5 // 4, size * 9 // 8), Image.Resampling.BICUBIC)


def encoded(picture, kind):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **(dict(quality=90) if kind == "JPEG" else {}))
    return buffer.getvalue()


def sources(folder, n, size):
    """{name: source} of the same pictures, written below `folder`."""
    for kind in ("JPEG", "PNG"):
        (folder / kind / "a").mkdir(parents=True)
        for i, picture in enumerate(pictures(n, size)):
            (folder / kind / "a" / f"{i:06d}.{kind.lower()}").write_bytes(encoded(picture, kind))
    examples = (dict(image=encoded(p, "JPEG"), label=0, caption="") for p in pictures(n, size))
    write_array_record(folder / "jpeg.array_record", examples, ("a",))
    return {
        "folder of JPEG": Folder(folder / "JPEG"),
        "folder of PNG": Folder(folder / "PNG"),
        "ArrayRecord of JPEG": ArrayRecord(folder / "jpeg.array_record"),
        "drawn shapes": Shapes(size=size * 9 // 8, n=n),
    }


def rate(source, change, batch_size, workers, seconds=SECONDS):
    """Pictures a second once the pipeline is warm."""
    with pipeline.train_batches(source, change, batch_size=batch_size, workers=workers) as batches:
        for _ in range(2 + 2 * workers):
            next(batches)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            count += len(next(batches)["image"])
        return count / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", default="0,1,2,4", help="worker processes, with commas between")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # Grain's worker processes ask absl
    workers = [int(w) for w in options.workers.split(",")]
    change = transforms.random_crop(size=options.size), transforms.flip()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        found = sources(Path(folder), options.pictures, options.size)
        with tqdm(total=len(found) * len(workers), unit="measurement") as bar:
            for name, source in found.items():
                rows.append({"source": name})
                for w in workers:
                    rows[-1][f"{w} workers"] = rate(source, change, options.batch, w)
                    bar.update()
    title = f"Pictures a second, {options.size} px, batches of {options.batch}"
    print(format_table(title, [{k: v if isinstance(v, str) else f"{v:.0f}" for k, v in row.items()} for row in rows]))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
