"""Codes on disk, as python -m jaxtok.tokenize writes them (docs/codes.md): `Tokenized` reads them.

config.json           whose codes of what they shall be; a folder begun as another is refused
000000.array_record   a shard: the examples of one range of positions
000000.json           its entry, written after it: it is complete, and what is in it
manifest.json         all of that; written last
"""

import copy
import hashlib
import json
import os
import warnings
import zlib
from pathlib import Path

import numpy as np

from jaxtok.data import pipeline
from jaxtok.data.images import BadRecord
from jaxtok.data.records import ArrayRecord, write_array_record

FORMAT = "jaxtok codes 1"
MANIFEST = "manifest.json"


class Tokenized:
    """A split of a tokenized data set: `codes` int32 [k] or [k G], or `latents` float32 [k D] or [h w D]; no pictures.

    `label` and `caption` are those of the pictures. `manifest` (dict) says whose codes they are, `verify()` whether
    they are still what was written.

    Args:
      path: the folder of a split, which holds manifest.json.

    Raises:
      FileNotFoundError: no manifest, because the codes are not there or not complete; or a shard is missing.
      ValueError: the manifest or a shard is not what was written; names it.
    """

    read_threads = 8

    def __init__(self, path):
        self.folder = Path(path).expanduser()
        self.manifest = read_manifest(self.folder)
        shards = self.manifest["shards"]
        again = "Run the command that wrote them again: it writes what is missing."
        missing = [s["file"] for s in shards if not (self.folder / s["file"]).is_file()]
        if missing:
            raise FileNotFoundError(f"{self.folder} lacks {listed(missing)} of {len(shards)} shards. {again}")
        sizes = {s["file"]: (self.folder / s["file"]).stat().st_size for s in shards}
        differ = [
            f"{s['file']} ({sizes[s['file']]} bytes, not {s['bytes']})"
            for s in shards
            if sizes[s["file"]] != s["bytes"]
        ]
        if differ:
            raise ValueError(f"{self.folder}: {listed(differ)} changed since the manifest was written. {again}")
        filled = [s for s in shards if s["examples"]]
        if not filled:
            raise ValueError(f"{self.folder} holds no example: every record of the data set was bad.")
        self.records = ArrayRecord([self.folder / s["file"] for s in filled])
        counts = dict(zip(self.records.files, self.records.lengths, strict=True))
        for shard in filled:
            if (count := counts[str(self.folder / shard["file"])]) != shard["examples"]:
                raise ValueError(
                    f"{self.folder / shard['file']} holds {count} examples, and the manifest says "
                    f"{shard['examples']}: delete that file. {again}"
                )
        self.class_names = tuple(self.manifest["class_names"])

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        example = self.records[i]
        if "codes" in example:  # on disk in as few bytes as hold the vocabulary
            return example | {"codes": example["codes"].astype(np.int32)}
        return example | {"latents": example["latents"].astype(np.float32)}

    def describe(self, i):
        return self.records.describe(i)

    def verify(self):
        """Reads every shard whole; ValueError names those whose sha256 is not that of the manifest."""
        shards = self.manifest["shards"]
        differ = [s["file"] for s in shards if sha256(self.folder / s["file"]) != s["sha256"]]
        if differ:
            raise ValueError(
                f"{self.folder}: {listed(differ)} of {len(shards)} shards are damaged, their sha256 is not that of the "
                "manifest: delete them and run the command that wrote them again."
            )


class Positions:
    """The pictures of some shards through transforms, whose draws depend on the picture and the pass alone.

    The examples of all passes are numbered through, position t being example t % n in pass t // n; shard s holds
    positions s * size ... s * size + size - 1. An example has `image`, `label`, `caption` and `bad`: "", or why it is
    a blank.
    """

    def __init__(self, source, transforms, passes, size, max_bad):
        self.source, self.transforms, self.size, self.max_bad = source, transforms, size, max_bad
        self.read_threads = getattr(source, "read_threads", 1)
        self.total = passes * len(source)
        self.shards = range(-(-self.total // size))
        pipeline.local_batch_size(source, 1, 0, 1)  # it is not empty
        good, _ = pipeline.next_good(source, 0, len(source), max_bad)
        self.blank = pipeline.blank(self.look(good, (0,)))

    def only(self, shards):
        """The same, of these shards, in ascending order."""
        view = copy.copy(self)
        view.shards = shards
        return view

    def __len__(self):
        return sum(map(self.count, self.shards))

    def count(self, shard):
        """How many positions a shard has: only the last of all may have fewer than others."""
        return min(self.size, self.total - shard * self.size)

    def position(self, i):
        return self.shards[i // self.size] * self.size + i % self.size

    def __getitem__(self, i):
        turn, index = divmod(self.position(i), len(self.source))
        try:
            return self.look(self.source[index], (index, turn))  # in pass 0, what evaluation draws
        except BadRecord as error:
            return self.blank | {"bad": str(error)}

    def look(self, example, key):
        example = pipeline.augment(example, self.transforms, key)
        return {name: example[name] for name in ("image", "label", "caption")} | {"bad": ""}

    def describe(self, i):
        return pipeline.which(self.source, {"index": self.position(i) % len(self.source)})


def report(reasons, view):
    """Warns of the last bad record of some Positions; ValueError if there are too many."""
    n = len(reasons)
    if n > view.max_bad * view.total:
        raise pipeline.too_many_bad(view.source, reasons, view.total, view.max_bad)
    if n <= pipeline.NAMED or n & (n - 1) == 0:
        warnings.warn(f"Bad record left out ({n} of {view.total} so far): {reasons[-1]}", stacklevel=2)


# ---- what is in a folder ----


def write_shard(folder, plan, shard, examples, bad):
    """Writes one shard and then its entry.

    Args:
      plan: what will be the manifest; its vocabulary says how small an integer holds a code.
      examples: with `codes` or `latents`, `label` and `caption`.
      bad: (position, reason) of what was left out; a list that may grow while examples are read.
    """
    vocabulary, used = plan["vocabulary"], []

    def packed():
        for example in examples:
            if vocabulary is not None:
                small = np.min_scalar_type(int(np.max(vocabulary)) - 1)
                example = example | {"codes": example["codes"].astype(small)}
                used.append(example["codes"].reshape(-1, np.size(vocabulary)))
            yield example

    file = folder / f"{shard:06d}.array_record"
    count = write_array_record(file, packed(), plan["class_names"])
    distinct = [squeeze(np.unique(column)) for column in np.concatenate(used).T] if used else []
    entry = dict(file=file.name, examples=count, bytes=file.stat().st_size, sha256=sha256(file), bad=bad)
    write_json(folder / f"{shard:06d}.json", entry | dict(distinct=distinct))


def read_entry(folder, shard):
    """The entry of a shard that is complete; None of another."""
    file = folder / f"{shard:06d}.json"
    if not file.exists():
        return None
    entry = json.loads(file.read_text())
    written = folder / entry["file"]
    return entry if written.exists() and written.stat().st_size == entry["bytes"] else None


def write_manifest(folder, plan, shards):
    """Writes the manifest from the plan and the entries of all shards, a number of them."""
    entries = [read_entry(folder, shard) for shard in range(shards)]
    if lacking := [f"{shard:06d}" for shard, entry in enumerate(entries) if entry is None]:
        raise RuntimeError(
            f"{folder} lacks the shards {listed(lacking)}, which other processes write: let them end first, and give "
            "all the same folder."
        )
    distinct = None
    if plan["vocabulary"] is not None:
        columns = zip(*(entry["distinct"] for entry in entries if entry["examples"]), strict=True)
        distinct = [len(np.unique(np.concatenate([*map(expand, column)]))) for column in columns]  # [G]
        distinct = sum(distinct) if np.ndim(plan["vocabulary"]) == 0 else distinct
    counts = dict(
        examples=sum(entry["examples"] for entry in entries),
        bad=sum(len(entry["bad"]) for entry in entries),
        distinct=distinct,
    )
    shards = [{key: value for key, value in entry.items() if key != "distinct"} for entry in entries]
    write_json(folder / MANIFEST, plan | dict(counts=counts, shards=shards))


def squeeze(numbers):
    """Ascending whole numbers as short text: their differences, compressed; 64,000 codes are 30 kB at most."""
    return zlib.compress(np.diff(numbers, prepend=0).astype("<u4").tobytes()).hex()


def expand(text):
    """The inverse of `squeeze`."""
    return np.cumsum(np.frombuffer(zlib.decompress(bytes.fromhex(text)), "<u4"))


def write_json(file, value):
    """All of a file or nothing."""
    half = file.with_name(f"{file.name}.unfinished")
    half.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(half, file)


def read_manifest(folder):
    """manifest.json of a split, checked to be one."""
    file = folder / MANIFEST
    if not file.is_file():
        if not (folder / "config.json").is_file():
            inside = [child.parent.name for child in sorted(folder.glob(f"*/{MANIFEST}"))]
            hint = f"; but {' and '.join(inside)} inside it: give the path of one" if inside else ""
            raise FileNotFoundError(f"{folder} holds no {MANIFEST} of python -m jaxtok.tokenize{hint}.")
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST} yet: its codes are not complete. Run the command that writes them again: it "
            "goes on where it stopped."
        )
    manifest = json.loads(file.read_text())
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{file} has the format {manifest.get('format')!r}, not {FORMAT!r}.")
    return manifest


def listed(names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def sha256(file):
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
