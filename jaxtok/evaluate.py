"""What a run is worth on held-out pictures: python -m jaxtok.evaluate --checkpoint=runs/flextok

Writes WORKDIR/evaluation: its pictures, report.html, one file that opens anywhere, and at last metrics.json.
Several tokenizers on one screen, on the same pictures: python -m jaxtok.evaluate --compare runs/a runs/b --out=DIR
docs/metrics.md says what each number is. Read evaluate() and of_tokenizer() from top to bottom.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxtok import build, command, hub, sharding
from jaxtok.bound import check_sampler, picture_shape
from jaxtok.checkpoint import Checkpoints
from jaxtok.data import pipeline
from jaxtok.eval import compare as together
from jaxtok.eval import frechet, generation, perturbation, report, sections, streaming
from jaxtok.eval.classifier import train_classifier
from jaxtok.eval.probe import latents, prefix, probe
from jaxtok.eval.report import Section
from jaxtok.metrics import format_table
from jaxtok.pretrained import perceptual
from jaxtok.pretrained.extractors import extractor
from jaxtok.quantizers.perturb import perturb
from jaxtok.step import numbered, transforms
from jaxtok.tasks import TokenizerTask

PROBED = 4000  # pictures a side of the probe, at most
KNOWN = 100_000  # training examples among which copies are looked for, at most
JUDGED = (
    "The class is named by a small classifier, trained here on the {n} real training pictures but {tenth}, which "
    "checked it. What it says of held-out pictures is what perfect samples would get, and of their own codes, what the "
    "tokenizer allows. {samples} samples a row."
)


class Run(NamedTuple):
    """What is evaluated, and on what."""

    task: Any
    variables: dict  # as model.apply takes them, on the mesh
    data: ConfigDict  # a config's section of that name
    mesh: jax.sharding.Mesh
    out: Path


def evaluate(checkpoint, out=None, config=None, mesh=None, **options):
    """Evaluates the run in the workdir `checkpoint`, writes the folder `out` and returns the metrics.

    Args:
      out: default: evaluation/ in the workdir.
      config: its data section replaces that of the run.
      mesh: default: all devices, over which pictures and parameters are split.
      options: of `of_tokenizer` or `of_generator`, whichever it is.
    """
    path = hub.workdir(checkpoint)
    if "://" in str(out := out or path / "evaluation"):
        raise ValueError(f"{out} is not on this machine: set --out to a local folder.")
    spec = json.loads((path / "config.json").read_text())
    data = (config or ConfigDict(spec)).get("data")
    if not data:
        raise ValueError(f"{path}/config.json names no data: give --config=FILE, a config whose data section counts.")
    mesh = mesh or sharding.make_mesh(data=1, fsdp=-1)
    task, out, step = build.build(spec.get("task")), Path(out), Checkpoints(path).latest()
    run = Run(task, hub.restore(path, mesh)[1], data, mesh, out)
    of = of_tokenizer if isinstance(task, TokenizerTask) else of_generator
    build.check_keys(options, build.parameters(of), f"The evaluation of a {type(task).__name__}")
    if jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").unlink(missing_ok=True)  # it is there when all else is
    metrics, parts = of(run, **options)
    if jax.process_index():
        return metrics
    metrics = {"run": path.name, "step": step, **metrics}
    about = f"{metrics['pictures']} held-out pictures of {json.dumps(data.eval.source.to_dict())}. Averaged weights."
    publish(out, f"{path.name} at step {step}", about, metrics["notes"], parts, metrics)
    return metrics


def compare(checkpoints, out, config=None, **options):
    """Evaluates tokenizers on the same held-out pictures; writes out/report.html and returns the metrics of each.

    Args:
      checkpoints: workdirs of runs; each one's own evaluation goes to a folder of its name in `out`.
      config: whose data section counts; default: that of the first run.
      options: of `of_tokenizer`.
    """
    names = [Path(checkpoint).name for checkpoint in checkpoints]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"--compare takes two or more runs whose folders have different names, not {names}.")
    if config is None:
        config = ConfigDict(json.loads((hub.find(checkpoints[0]) / "config.json").read_text()))
    found, out, notes = {}, Path(out), []
    for name, checkpoint in zip(names, checkpoints, strict=True):
        found[name] = evaluate(checkpoint, out / name, config, **options)
        notes += [note for note in found[name].get("notes", ()) if note not in notes]
    if jax.process_index():
        return found
    if strange := [name for name, metrics in found.items() if "reconstruction" not in metrics]:
        raise ValueError(f"--compare is for tokenizers; {strange} are generators.")
    parts = [together.everything(found)]
    if equal := together.at_equal_bytes(found, out, notes):
        parts.append(equal[1])
    about = f"Held-out pictures of {json.dumps(config.data.eval.source.to_dict())}. Averaged weights."
    publish(out, ", ".join(names), about, notes, parts, found)
    return found


def of_tokenizer(
    run,
    limit=None,
    batch=None,
    tokens=(),
    sampler=None,
    all_samplers=False,
    net="alexnet",
    inception=None,
    lpips="alex",
    perturbed=False,
):
    """(metrics, sections of the report) of a tokenizer.

    Args:
      limit: so many held-out pictures, spread over the set; default: all.
      batch: pictures at a time, over all devices; default: the config's.
      tokens: token counts k; default: the task's.
      sampler: options of the decoder's `sample`, instead of the task's first sampler.
      all_samplers: all of the task's.
      net: the name of the extractor for the Fréchet distance.
      inception: the file of weights with which it is FID.
      lpips: the net of LPIPS.
      perturbed: also rebuild pictures from perturbed codes, see eval.perturbation.
    """
    samplers = run.task.samplers if all_samplers else run.task.samplers[:1]
    if sampler:
        check_sampler(run.task.model.decoder, sampler)
        samplers = ({"title": ", ".join(f"{k}={v}" for k, v in sampler.items()), **sampler},)
    task = dataclasses.replace(run.task, token_counts=tuple(tokens) or run.task.token_counts, samplers=samplers)
    source, change = streaming.Spread(build.build(run.data.eval.source), limit), transforms(run.data.eval)
    batch, notes = batch or run.data.eval.batch_size, []
    example = pipeline.next_good(source, 0, len(source), 1.0)[0]
    shape = pipeline.augment(example, change, (0,))["image"].shape
    if (made_for := picture_shape(task.model) or shape) != shape:
        raise ValueError(f"The run is made for pictures {list(made_for)}; data.eval gives {list(shape)}: crop them.")
    judge = distance_of(lpips, shape, notes)
    features = features_of(net, inception, notes)

    tools = judge, features and features.features, streaming.wanted(len(source))
    tools = jax.device_put(tools, NamedSharding(run.mesh, PartitionSpec()))
    found = over(run, source, change, batch, "Rebuilding pictures", functools.partial(streaming.look, task), *tools)
    passed = streaming.collect(found, streaming.labels(task))
    found, probed = probe_codes(task, run, source, change, batch, notes)
    wrong = {}
    if perturbed:
        cells = perturbation.grid(task.model.quantizer.vocabulary)
        look = functools.partial(perturbation.look, task, perturb, cells)
        batches = over(run, source, change, batch, "Perturbing codes", look, tools[1], jax.random.key(0))
        whole = passed[2] and frechet.merge(*passed[2]["originals"])
        wrong["perturbed"], part = perturbation.section(batches, cells, whole, features and features.title)
        probed = [*probed, part]
    if jax.process_index():
        return {}, []
    read = lambda i: pipeline.augment(source[i], change, (i,))["image"]
    metrics, parts = sections.tokenizer(
        task, passed, judge, features, lpips, task.scales, read, source.number, run.out, notes
    )
    n = len(passed[0]["index"])
    return {"pictures": n, "bad": len(source) - n, **metrics, **wrong, "probe": found, "notes": notes}, [
        *parts,
        *probed,
    ]


def of_generator(run, limit=None, batch=None, samples=2, net="alexnet", inception=None):
    """(metrics, sections of the report) of a generator: what held-out codes cost, and samples for their conditions.

    Args:
      limit, batch, net, inception: as of a tokenizer.
      samples: of each of the run's samplers, for each held-out example.
    """
    task, notes = run.task, []
    source, change = streaming.Spread(build.build(run.data.eval.source), limit), transforms(run.data.eval)
    batch, titles = batch or run.data.eval.batch_size, [generation.OWN, *task.titles()[1:]]
    features = features_of(net, inception, notes)
    train = build.build(run.data.train.source)
    known, augment = pictures_of(train, run.data.train)
    truth, seen = pictures_of(source.source, run.data.eval)
    truth, names = streaming.Spread(truth, limit), source.source.class_names
    judge = None
    if getattr(task.model, "classes", 0) > 1:
        print("Training a classifier on the real pictures ...", flush=True)
        apply, params, _ = train_classifier(known, transforms(augment), len(names))
        judge = jax.tree_util.Partial(lambda params, x: apply(params, x).argmax(-1), params)
    tools = jax.device_put((judge, features and features.features), NamedSharding(run.mesh, PartitionSpec()))

    look = lambda variables, judge, features, batch: generation.real(judge, features, batch)
    found = over(run, truth, transforms(seen), batch, "Looking at real pictures", look, *tools)
    real, halves, _ = generation.collect(found, [generation.REAL])
    look, passes = functools.partial(generation.look, task), []
    for turn in range(samples):
        title = f"Drawing samples, {turn + 1} of {samples}"
        found = over(run, source, change, batch, title, look, *tools, jax.random.key(turn))
        passes.append(generation.collect(found, titles))
    if jax.process_index():
        return {}, []
    (rows, moments, shown), turns = passes[0], [rows for rows, *_ in passes]
    scores, table = task.summarize({name: rows[name] for name in ("loss", "weight", "correct") if name in rows})
    metrics = {"pictures": len(rows["index"]), "held out": scores}
    parts = [Section("Held-out codes", (), {"What held-out codes cost": table})]

    named, text, far, title = {}, [], {}, features and features.title
    if judge:
        named[generation.REAL] = real[f"class/{generation.REAL}"], real["label"]
        named[generation.OWN] = rows[f"class/{generation.OWN}"], rows["label"]  # the same in every turn
        for name in titles[1:]:
            named[name] = tuple(np.concatenate([r[key] for r in turns]) for key in (f"class/{name}", "label"))
        text.append(JUDGED.format(n=len(known), tenth=len(known) // 10, samples=samples * len(rows["index"])))
    if moments and len(rows["index"]) >= 4:
        sets = {name: frechet.merge(*parts) for name, parts in moments.items()}
        sets["originals"] = halves[generation.REAL]
        far, metrics["frechet"], line = sections.distances(sets, title, features.width, features.sha256)
        far[sections.HALVES] = metrics["frechet"]["floor"]
        text.append(line)
    metrics["samples"], part = generation.quality(named, far, title, text)
    parts.append(part._replace(pictures=generation.grid(shown, names if named else (), run.out)))
    if f"codes/{task.titles()[0]}" in rows and hasattr(train, "manifest"):
        codes = np.stack([train[i]["codes"] for i in streaming.Spread(train, KNOWN).numbers])
        drawn = {name: rows[f"codes/{t}"] for name, t in zip(titles, task.titles(), strict=True)}
        metrics["copies"], part = generation.copies(drawn, codes)
        parts.append(part)
    return metrics | {"notes": notes}, parts


def pictures_of(source, data):
    """(The pictures that a source of codes was made of, or the source itself; a section with their transforms)."""
    manifest = getattr(source, "manifest", None)
    return (build.build(manifest["source"]), ConfigDict(manifest)) if manifest else (source, data)


def probe_codes(task, run, held_out, change, batch, notes):
    """({token count: what `probe` finds}, [its section]), or nothing and a note."""
    train = build.build(run.data.train.source)
    classes = len(getattr(train, "class_names", ()))
    if classes < 2:
        notes.append("No probe: the training pictures have no classes.")
        return {}, []
    encode = lambda variables, batch: task.model.apply(
        variables, batch["image"], **task.context(batch), method="encode"
    )
    function = functools.partial(latents, encode, task.token_counts)

    def read(source, title):
        parts = []
        for z, label, mask in over(run, source, change, batch, title, function):
            known = mask & (label >= 0)  # a test set may hide its labels
            parts.append(jax.tree.map(lambda x, known=known: x[known], (z, label)))
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    x, y = read(streaming.Spread(train, PROBED), "Codes to train a probe")
    test_x, test_y = read(streaming.Spread(held_out, PROBED), "Codes to test it")
    if len(np.unique(y)) < 2 or not len(test_y):
        notes.append("No probe: the pictures are all of one class, or their labels are hidden.")
        return {}, []
    of = lambda i, k: probe((prefix(x, i, k), y), (prefix(test_x, i, k), test_y), classes)
    found = {k: of(i, k) for i, k in enumerate(task.token_counts)}
    return found, [sections.probe(found, len(y), len(test_y))]


def over(run, source, change, batch, title, function, *args):
    """Yields function(variables, *args, batch) for the batches of a source, on the host; a bar shows how far it is.

    The function is compiled; what it returns is put together on every device, so it must be small.
    """
    program = jax.jit(function, out_shardings=NamedSharding(run.mesh, PartitionSpec()))
    processes = dict(process_index=jax.process_index(), process_count=jax.process_count())
    options = dict(batch_size=batch, max_bad=run.data.get("max_bad", 0.01), **processes)
    shown = dict(total=-(-len(source) // batch), desc=title, dynamic_ncols=True)
    with pipeline.eval_batches(source, change, **options) as data:
        for local in tqdm(data, disable=jax.process_index() > 0 or None, **shown):
            yield jax.device_get(program(run.variables, *args, sharding.put_batch(numbered(local), run.mesh)))


# ---- pieces ----


def publish(out, title, about, notes, parts, metrics):
    """Prints the tables, and writes report.html and then metrics.json."""
    for part in parts:
        for caption, rows in part.tables.items():
            print(f"\n{format_table(caption, rows)}")
    report.write(out / "report.html", report.page(title, [about, *notes], parts))
    report.write(out / "metrics.json", report.to_json(metrics))
    print("", *notes, f"Report: {out / 'report.html'}", sep="\n")


def distance_of(net, shape, notes):
    """LPIPS as a function of two batches of pictures, or None and a note."""
    if min(shape[:2]) < perceptual.SMALLEST[net]:
        notes.append(f"No LPIPS: with {net} it takes pictures of at least {perceptual.SMALLEST[net]} pixels a side.")
        return None
    params = or_note("LPIPS", lambda: perceptual.lpips_params(net), notes)
    apply = lambda params, a, b: perceptual.LPIPS(net).apply({"params": params}, a, b)
    return params and jax.tree_util.Partial(apply, params)


def features_of(net, inception, notes):
    """The extractor of features for the Fréchet distance, or None and a note."""
    if inception:  # asked for by name, so it must be there
        return extractor("inception", inception)
    return or_note("Fréchet distance", lambda: extractor(net), notes)


def or_note(what, make, notes):
    """make(), or None and a note that says how to get what is missing."""
    try:
        return make()
    except FileNotFoundError as error:
        notes.append(f"No {what}: {error}")
        return None


@command.one_line("python -m jaxtok.evaluate")
def main(argv):
    if bool(FLAGS.checkpoint) == FLAGS.compare or (len(argv) > 1 and not FLAGS.compare):
        raise app.UsageError("Give --checkpoint=RUN, or --compare RUN RUN ...; options are --NAME=VALUE (--help).")
    if FLAGS.compare and not FLAGS.out:
        raise app.UsageError("--compare needs --out=FOLDER for its report.")
    logging.set_verbosity(logging.WARNING)  # Orbax narrates
    options = {
        "net": FLAGS.extractor,
        "tokens": tuple(map(int, FLAGS.tokens)),
        "sampler": dict(map(command.pair, FLAGS.sampler)),
    }
    options |= {
        name: getattr(FLAGS, name) for name in "limit batch all_samplers inception lpips samples perturbed".split()
    }
    options = {name: value for name, value in options.items() if value not in (None, False, (), {})}  # as given
    with command.together():
        if FLAGS.compare:
            compare(argv[1:], FLAGS.out, FLAGS.config, **options)
        else:
            evaluate(FLAGS.checkpoint, FLAGS.out, FLAGS.config, **options)


if __name__ == "__main__":
    command.use_huge_pages()
    FLAGS = flags.FLAGS
    flags.DEFINE_string("checkpoint", None, "Workdir of a run, or of converted weights.")
    flags.DEFINE_bool("compare", False, "Compare the tokenizers whose workdirs follow, on the pictures of the first.")
    flags.DEFINE_string("out", None, "Where to write; default: evaluation/ in the workdir.")
    command.define_config("A config whose data section replaces that of the run.")
    flags.DEFINE_integer("limit", None, "So many held-out pictures, spread over the set; default: all.", lower_bound=1)
    flags.DEFINE_integer("batch", None, "Pictures at a time, over all devices; default: the config's.", lower_bound=1)
    flags.DEFINE_list("tokens", [], "Token counts, as 1,4,16; default: the run's.")
    flags.register_validator("tokens", lambda words: all(map(str.isdigit, words)), "write numbers, as 1,4,16")
    flags.DEFINE_list("sampler", [], "Of the decoder, as steps=20,guidance=7.5; default: the run's first.")
    flags.DEFINE_bool("all_samplers", False, "All samplers of the run, not the first alone.")
    flags.DEFINE_bool("perturbed", False, "Also rebuild pictures from perturbed codes (pFID).")
    flags.DEFINE_enum("extractor", None, ["alexnet", "efflite0"], "Of the features; default: alexnet.")
    flags.DEFINE_integer("samples", None, "Of a generator, for each held-out example; default: 2.", lower_bound=1)
    flags.DEFINE_string("inception", None, "File of Inception weights that makes the Fréchet distance FID.")
    flags.DEFINE_enum("lpips", None, sorted(perceptual.SMALLEST), "The net of LPIPS; default: alex.")
    command.define_processes()
    app.run(main)
