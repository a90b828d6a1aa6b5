"""A data set into its codes: python -m jaxtok.tokenize --checkpoint=runs/flextok --out=runs/codes

out/train and out/eval get ArrayRecord shards and a manifest each, which data.sources.Tokenized reads (docs/codes.md).
The examples of all passes are numbered through: position t is example t % n in pass t // n. Shard s holds a range of
positions, and process s % P writes it unless it is there. So a command that was killed and is given again, on any
number of processes, writes exactly what is missing.
"""

import functools
import itertools
import json
import sys
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

import jaxtok
from jaxtok import build, command, sharding
from jaxtok.bound import BoundTokenizer, encode_arrays
from jaxtok.checkpoint import Checkpoints, claim_workdir, fingerprint
from jaxtok.data import codes, pipeline
from jaxtok.metrics import format_table
from jaxtok.step import transforms


def tokenize(
    checkpoint, out, *, tokens=None, passes=0, batch=64, shard=4096, data=None, process_index=None, process_count=None
):
    """Writes the codes of a data set, or what is missing of them. Returns {split: manifest}.

    Args:
      checkpoint: workdir of a tokenizer: a run's, or what jaxtok.pretrained.convert wrote.
      out: a folder that all processes see. One begun with another tokenizer or other options is refused.
      tokens: keep the first k of each picture; None: all.
      passes: over the training data, with the run's training transforms, drawn from (example, pass); 0: one pass with
        those of evaluation, which the held-out data get in any case.
      batch: pictures at a time, over the devices of this process.
      shard: positions a file, a multiple of `batch`.
      data: the section of that name of a config; None: the run's own.
      process_index, process_count: which of how many processes this is; None: as jax says. Process 0 writes the
        manifests when all are done; a split without one is not in the result.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if passes < 0 or batch < 1 or shard < 1 or shard % batch:
        raise ValueError(f"passes={passes} must be 0 or more, and shard={shard} a multiple of batch={batch}.")
    mesh = sharding.make_mesh(devices=jax.local_devices())
    sharding.check_batch_size(batch, mesh)
    workdir = epath.Path(checkpoint).expanduser()
    if not (workdir / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"{checkpoint} is no workdir with checkpoints/: python -m jaxtok.train makes one, and of published weights "
            "python -m jaxtok.pretrained.convert."
        )
    data = data or json.loads((workdir / "config.json").read_text()).get("data", {})
    data = data.to_dict() if isinstance(data, ConfigDict) else data
    if lacking := [f"data.{split}.source" for split in ("train", "eval") if "source" not in data.get(split, {})]:
        raise ValueError(
            f"The config has no {' and no '.join(lacking)}; that of converted weights names no data at all. Name it "
            "with --config=FILE, a config whose section `data` is taken."
        )
    recipes, views = {}, {}
    for split in ("train", "eval"):
        turns = passes if split == "train" else 0
        seen = data["train" if turns else "eval"].get("transforms", ())
        recipes[split] = dict(split=split, passes=turns, source=data[split]["source"], transforms=seen, shard=shard)
        source, looks = build.build(data[split]["source"]), transforms(recipes[split])
        views[split] = codes.Positions(source, looks, max(1, turns), shard, data.get("max_bad", 0.01))

    who = dict(path=str(checkpoint), step=Checkpoints(workdir).latest(), fingerprint=fingerprint(workdir))
    with jax.set_mesh(mesh):
        tokenizer = jaxtok.load(workdir)
    if not isinstance(tokenizer, BoundTokenizer):
        raise ValueError(f"{checkpoint} holds a generator, which reads codes: give the workdir of its tokenizer.")
    if fingerprint(workdir) != who["fingerprint"]:
        raise RuntimeError(f"{checkpoint} saved a new step meanwhile: wait for the end of its run, then start again.")
    plans = {}
    for split, view in views.items():  # all are claimed before the first is worked on
        plans[split] = dict(tokenizer=who, **recipes[split], **said(view, tokenizer, tokens))
        claim_workdir(Path(out) / split, ConfigDict(plans[split]), free=(r"tokenizer\.path",))

    rows = sharding.batch_sharding(mesh)
    encode = jax.jit(functools.partial(encode_arrays, tokenizer.model), static_argnames="tokens", out_shardings=rows)
    manifests = {}
    for split, view in views.items():
        folder, k = Path(out) / split, plans[split]["tokens"]
        put_and_encode = lambda images, k=k: encode(tokenizer.variables, jax.device_put(images, rows), tokens=k)
        write_shards(folder, plans[split], view, view.shards[index::count], batch, put_and_encode)
        multihost_utils.sync_global_devices(f"jaxtok.tokenize: shards of {split}")
        if index == 0:
            codes.write_manifest(folder, plans[split], len(view.shards))
        multihost_utils.sync_global_devices(f"jaxtok.tokenize: manifest of {split}")
        if (folder / codes.MANIFEST).exists():
            manifests[split] = codes.read_manifest(folder)
    return manifests


def said(view, tokenizer, tokens):
    """What a manifest says of the codes and of the pictures. ValueError if a picture has not so many tokens."""
    image = tokenizer.check_images(view.blank["image"][None])
    found = jax.eval_shape(functools.partial(tokenizer.model.apply, method="encode"), tokenizer.variables, image)
    n = found.keep.shape[1]
    k = n if tokens is None else tokens
    if not 1 <= k <= n:
        raise ValueError(f"tokens={tokens}: a picture has 1 to {n} tokens.")
    model = dict(vocabulary=tokenizer.vocabulary, tokens=k, grid=found.grid if k == n else None)
    return model | dict(pictures=len(view.source), class_names=tuple(view.source.class_names), format=codes.FORMAT)


def write_shards(folder, plan, view, mine, batch, encode):
    """Writes those of my shards that are not there."""
    entries = {shard: codes.read_entry(folder, shard) for shard in view.shards}
    reasons = [reason for entry in entries.values() if entry for _, reason in entry["bad"]]
    todo, total = view.only([shard for shard in mine if not entries[shard]]), len(view.only(mine))
    name = "latents" if plan["vocabulary"] is None else "codes"

    def examples(batches, bad):
        for (rows, found), _ in batches:
            found = np.asarray(found)
            for i in np.flatnonzero(rows["mask"]):
                if reason := rows["bad"][i]:
                    bad.append((todo.position(int(rows["index"][i])), reason))
                    reasons.append(reason)
                    codes.report(reasons, view)
                else:
                    yield {name: found[i], "label": rows["label"][i], "caption": rows["caption"][i]}
            bar.update(int(rows["mask"].sum()))

    if not todo.shards:
        return
    options = dict(unit=" pictures", disable=mine.start != 0, mininterval=0.1 if sys.stderr.isatty() else 30)
    with (
        pipeline.eval_batches(todo, batch_size=batch) as batches,
        tqdm(desc=str(folder), total=total, initial=total - len(todo), **options) as bar,
    ):
        running = ((rows, encode(rows["image"])) for rows in batches)
        ahead = itertools.pairwise(itertools.chain(running, [None]))  # the next batch runs while one is written
        for shard in todo.shards:
            bad = []
            own = itertools.islice(ahead, -(-view.count(shard) // batch))
            codes.write_shard(folder, plan, shard, examples(own, bad), bad)


@command.one_line("python -m jaxtok.tokenize")
def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}: --help lists the options.")
    logging.set_verbosity(logging.WARNING)  # Orbax narrates
    data = FLAGS.config and FLAGS.config.data
    options = {name: FLAGS[name].value for name in ("tokens", "passes", "batch", "shard")}
    with command.together():
        manifests = tokenize(FLAGS.checkpoint, FLAGS.out, data=data, **options)
    if jax.process_index() == 0:
        print(format_table(f"Codes of {FLAGS.checkpoint} in {FLAGS.out}", list(map(row, manifests.values()))))


def row(manifest):
    """Of the table at the end."""
    counts, vocabulary = manifest["counts"], manifest["vocabulary"]
    distinct = "continuous" if vocabulary is None else f"{np.sum(counts['distinct'])} of {np.sum(vocabulary)}"
    shards = manifest["shards"]
    size = sum(shard["bytes"] for shard in shards)
    numbers = dict(pictures=counts["examples"], bad=counts["bad"], tokens=manifest["tokens"], shards=len(shards))
    return dict(split=manifest["split"]) | numbers | {"bytes": size, "distinct codes": distinct}


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("checkpoint", None, "Workdir of the tokenizer.")
    flags.DEFINE_string("out", None, "Where the codes go.")
    flags.DEFINE_integer("tokens", None, "Keep the first so many tokens of a picture; all, if not given.")
    flags.DEFINE_integer("passes", 0, "So many passes over the training data with its random transforms.")
    flags.DEFINE_integer("batch", 64, "Pictures at a time, on each process.")
    flags.DEFINE_integer("shard", 4096, "Examples a file.")
    command.define_config("A config whose `data` takes the place of the run's.")
    command.define_processes()
    flags.mark_flags_as_required(["checkpoint", "out"])
    app.run(main)
