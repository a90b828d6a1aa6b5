"""Models for programs without jaxtok: python -m jaxtok.export --checkpoint=runs/flextok --format=savedmodel --out=DIR

    savedmodel   for TensorFlow, which needs no jax: a signature for each function
    stablehlo    for jax.export.deserialize: a file for each function, and weights.npz
    onnx         for onnxruntime and others: a file for each function, with its weights; tokenizers alone

A tokenizer becomes `encode`, `decode` and `reconstruct`, a generator `sample`, `decode` and `sample_decode`. The batch
is symbolic, number of tokens and seed are inputs, all other options are fixed here (docs/export.md). The only file that
uses what others do not promise to keep: `jax.extend.mlir` and TensorFlow's `call_module`.
"""

import argparse
import contextlib
import functools
import io
import json
import logging
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export as jax_export
from jax.extend import core, mlir

import jaxtok
from jaxtok import command
from jaxtok.bound import BoundTokenizer, check_draws, check_sampler, encode_arrays, sample_codes
from jaxtok.build import parameters
from jaxtok.metrics import format_table

PLATFORMS = ("cpu", "cuda", "tpu")
STABLEHLO = "1.13.0"  # what TensorFlow below reads; jax itself writes newer ones
TENSORFLOW = "2.21"  # with which exports are tested
OUTSIDE = "k is clipped to 1 ... N, codes to the vocabulary; a label that is no class draws a sample without one"

B = jax_export.symbolic_shape("B")[0]
NUMBER = jax.ShapeDtypeStruct((), jnp.int32)


class Function(NamedTuple):
    """What is exported under one name: run(variables, *inputs) -> an array that is called `output`."""

    run: Callable
    inputs: Mapping[str, jax.ShapeDtypeStruct]
    output: str


def export(checkpoint, out, format="savedmodel", *, size=None, batch=None, sample=(), decode=()):
    """Exports the model that `jaxtok.load(checkpoint)` gives into the folder `out`.

    Args:
      checkpoint: as `jaxtok.load` takes it.
      out: a folder that is new, or empty.
      format: a key of WRITERS.
      size: (H, W) of the pictures, for a tokenizer that is made for any.
      batch: one number for B; None: any.
      sample: {option: value} of the generator's `sample`, as `jaxtok.load(checkpoint).sample` takes them.
      decode: the same, of `decode`.

    Returns the manifest that it wrote, out/export.json. ValueError, TypeError or FileExistsError for what is asked and
    cannot be, ImportError where a format's package is missing.
    """
    out, sample, decode = Path(out), dict(sample), dict(decode)
    if format not in WRITERS:
        raise ValueError(f'There is no format "{format}": it is one of {", ".join(WRITERS)}.')
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already, and not empty: export into a new folder.")
    bound = jaxtok.load(checkpoint)
    if isinstance(bound, BoundTokenizer):
        if sample:
            raise ValueError(f"{checkpoint} is a tokenizer: options of `sample` are for generators.")
        functions = of_tokenizer(bound, size, decode, noise=format == "onnx")
    else:
        functions = of_generator(bound, size, sample, decode)
    variables = traverse_util.flatten_dict(bound.variables, sep="/")
    programs = {name: program(function, variables, batch) for name, function in functions.items()}
    out.mkdir(parents=True, exist_ok=True)
    about = dict(format=format, checkpoint=str(checkpoint), options=dict(sample=sample, decode=decode), outside=OUTSIDE)
    about |= dict(jaxtok=jaxtok.__version__, jax=jax.__version__)
    try:
        about |= WRITERS[format](programs, out)
    except BaseException:
        shutil.rmtree(out)  # half of it is of no use, and in the way of the next try
        raise
    about["functions"] = {name: described(one) for name, one in programs.items()}
    (out / "export.json").write_text(json.dumps(about, indent=1))
    rows = []
    for name, one in about["functions"].items():
        takes, gives = (", ".join(map(" ".join, one[which].items())) for which in ("takes", "gives"))
        count = sum(x.size for x in programs[name].weights.values())
        sizes = {"weights, M": f"{count / 1e6:.2f}", "program, kB": f"{about['bytes'][name] / 1e3:.0f}"}
        rows.append(dict(function=name, takes=takes, gives=gives) | sizes)
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{format_table(f'{checkpoint} as {format}', rows)}\n{total / 1e6:.1f} MB in {out}.")
    return about


# ---- what is exported ----


def of_tokenizer(bound, size, options, noise=False):
    """{name: Function} of a tokenizer. noise: a decoder that draws some is given it, instead of a seed."""
    images, codes, start, encode, decode = coder(bound, size, options, noise)
    both = lambda variables, images, k, start: decode(variables, encode(variables, images), k, start)
    return {
        "encode": Function(encode, {"images": images}, "codes"),
        "decode": Function(decode, {"codes": codes, "k": NUMBER} | start, "pixels"),
        "reconstruct": Function(both, {"images": images, "k": NUMBER} | start, "pixels"),
    }


def of_generator(bound, size, sample, decode):
    """{name: Function} of a generator: its codes are those that its tokenizer decodes."""
    task, model = bound.task, bound.task.model
    if task.text_tower is not None:
        raise ValueError("Generators that read text are not exported: what is exported takes labels.")
    check_draws(model, sample)
    classes = getattr(model, "classes", 0)

    def draw(variables, labels, seed):
        given = {"label": jnp.where((labels >= 0) & (labels < classes), labels, classes)} if classes else None
        return sample_codes(task, variables, given, jax.random.key(seed), labels.shape[0], tuple(sample.items()))

    labels = jax.ShapeDtypeStruct((B,), jnp.int32)
    drawn = jax.eval_shape(draw, bound.variables, labels, NUMBER)
    tokenizer = BoundTokenizer(task.codec, bound.variables["tokenizer"])
    *_, start, _, paint = coder(tokenizer, size, dict(task.decoder) | decode)
    paint_ours = lambda variables, *inputs: paint(variables["tokenizer"], *inputs)
    every = np.iinfo(np.int32).max  # tokens: all there are
    both = lambda variables, labels, seed: paint_ours(variables, draw(variables, labels, seed), every, seed)
    return {
        "sample": Function(draw, {"labels": labels, "seed": NUMBER}, "codes"),
        "decode": Function(paint_ours, {"codes": drawn, "k": NUMBER} | start, "pixels"),
        "sample_decode": Function(both, {"labels": labels, "seed": NUMBER}, "pixels"),
    }


def coder(bound, size, options, noise=False):
    """(shapes of images and codes, what a picture starts from, encode(variables, images), decode(variables, codes, k,
    start)) of a tokenizer; start: {"seed": its shape}, or {"noise": ...} of a decoder that draws some.

    No format can raise for a value, so what lies outside is clipped: k to 1 ... N, indices to the vocabulary.
    """
    model, shape = bound.model, bound.picture or (size and (*size, 3))
    if not shape:
        raise ValueError("This tokenizer takes pictures of any size: say which, --size=256 or --size=256,384.")
    if size and tuple(size) != shape[:2]:
        raise ValueError(f"This tokenizer is made for pictures {list(shape)}: leave --size out.")
    check_sampler(model.decoder, options)
    encode, images = functools.partial(encode_arrays, model), jax.ShapeDtypeStruct((B, *shape), jnp.uint8)
    like = jax.eval_shape(functools.partial(model.apply, method="encode"), bound.variables, images)
    length = like.keep.shape[1]
    start = {"seed": NUMBER}
    if noise and "noise" in parameters(model.decoder.sample) and getattr(model.decoder, "shape", None):
        start = {"noise": jax.ShapeDtypeStruct((B, *model.decoder.shape), jnp.float32)}

    def decode(variables, codes, k, start):
        if like.indices is not None:
            codes = jnp.clip(codes, 0, np.asarray(model.quantizer.vocabulary, np.int32) - 1)
        codes = model.apply(variables, codes, length, like.grid, method="lookup")
        codes = codes.replace(keep=codes.keep & (jnp.arange(length) < jnp.maximum(k, 1)))
        key, given = (None, {"noise": start}) if jnp.ndim(start) else (jax.random.key(start), {})
        return model.apply(variables, codes, key, **options, **given, method="decode")

    return images, jax.eval_shape(encode, bound.variables, images), start, encode, decode


class Program(NamedTuple):
    """A Function of the weights that it reads, and of the inputs that it reads: run({name: weight}, *inputs)."""

    run: Callable
    weights: Mapping[str, jax.Array]
    inputs: Mapping[str, jax.ShapeDtypeStruct]
    outputs: Mapping[str, jax.ShapeDtypeStruct]  # one


def program(function, variables, batch=None):
    """The Program of a Function, without the weights and the numbers (k, seed) on which nothing depends."""
    shaped = lambda x: jax.ShapeDtypeStruct(tuple(batch if batch and d == B else d for d in x.shape), x.dtype)
    specs = {name: shaped(x) for name, x in sorted(variables.items())}
    given = {name: shaped(x) for name, x in function.inputs.items()}

    def whole(weights, inputs):
        ordered = (inputs[name] for name in given)  # jax sorts the keys of dicts
        return function.run(traverse_util.unflatten_dict(weights, sep="/"), *ordered)

    read = reads(whole, specs, given)
    inputs = {name: x for name, x in given.items() if name in read or x.shape}

    def run(weights, *values):
        zeros = lambda tree: {name: jnp.zeros(x.shape, x.dtype) for name, x in tree.items() if name not in read}
        return whole(zeros(specs) | weights, zeros(given) | dict(zip(inputs, values, strict=True)))

    weights = {name: variables[name] for name in specs if name in read}
    return Program(run, weights, inputs, {function.output: jax.eval_shape(run, weights, *inputs.values())})


def reads(function, *trees):
    """Names, in the dicts of arrays `trees`, of those on which the result depends: jax.export itself asks for all."""
    names = [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(trees)]
    jaxpr = jax.make_jaxpr(function)(*trees).jaxpr
    variables = lambda atoms: {atom for atom in atoms if not isinstance(atom, core.Literal)}
    needed = variables(jaxpr.outvars)
    for equation in reversed(jaxpr.eqns):
        if needed & set(equation.outvars):
            needed |= variables(equation.invars)
    return {name for name, variable in zip(names, jaxpr.invars, strict=True) if variable in needed}


# ---- onto the disk: each takes {name: Program} and a folder, and gives what the manifest says of it ----


def lowered(one):
    """A Program through jax.export: an Exported of ({name: weight}, *inputs)."""
    return jax_export.export(jax.jit(one.run), platforms=PLATFORMS)(one.weights, *one.inputs.values())


def every_weight(programs):
    """{name: numpy array} of all programs."""
    return {name: np.asarray(array) for one in programs.values() for name, array in one.weights.items()}


def write_savedmodel(programs, out):
    """A SavedModel with a signature for each function; their weights are variables that they share."""
    try:
        import tensorflow as tf
        from tensorflow.compiler.tf2xla.python.xla import call_module
    except ImportError as error:
        raise ImportError(f'--format=savedmodel needs TensorFlow: pip install "jaxtok[export]" ({error}).') from error
    if not tf.__version__.startswith(f"{TENSORFLOW}."):
        print(f"TensorFlow {tf.__version__} writes this; exports are tested with {TENSORFLOW}.", file=sys.stderr)
    module, size = tf.Module(), {}
    variables = {name: tf.Variable(x, trainable=False, name=name) for name, x in every_weight(programs).items()}
    module.weights = list(variables.values())  # what a SavedModel saves hangs on the module
    dims = lambda x: [d if isinstance(d, int) else None for d in x.shape]

    def signature(name, one):
        exported = lowered(one)
        artifact = mlir.serialize_portable_artifact(exported.mlir_module(), STABLEHLO)
        size[name] = len(artifact)
        attributes = dict(
            version=exported.calling_convention_version,
            platforms=[name.upper() for name in exported.platforms],
            Sout=[dims(x) for x in exported.out_avals],
            Tout=[tf.as_dtype(x.dtype) for x in exported.out_avals],
        )

        def call(**given):
            args = [*(variables[name] for name in one.weights), *(given[name] for name in one.inputs)]
            args = [args[i] for i in exported.module_kept_var_idx]
            return dict(zip(one.outputs, call_module(args, module=artifact, **attributes), strict=True))

        specs = {name: tf.TensorSpec(dims(x), x.dtype, name) for name, x in one.inputs.items()}
        return tf.function(call, autograph=False).get_concrete_function(**specs)

    tf.saved_model.save(module, str(out), {name: signature(name, one) for name, one in programs.items()})
    return dict(platforms=PLATFORMS, stablehlo=STABLEHLO, tensorflow=tf.__version__, bytes=size)


def write_stablehlo(programs, out):
    """NAME.jax_exported for each function, and the weights."""
    size = {}
    for name, one in programs.items():
        size[name] = (out / f"{name}.jax_exported").write_bytes(lowered(one).serialize())
    np.savez(out / "weights.npz", **every_weight(programs))
    return dict(platforms=PLATFORMS, bytes=size)


def write_onnx(programs, out):
    """NAME.onnx for each function, its weights inside, which onnxruntime has run: ValueError where it disagrees."""
    try:
        import jax2onnx
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            f'--format=onnx needs jax2onnx, on Python 3.11, where jax is 0.10: pip install "jaxtok[onnx]" ({error}).'
        ) from error
    onnxruntime.set_default_logger_severity(3)  # errors
    for chatty in ("jax2onnx", "onnx_ir"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    size, differences, plain = {}, {}, dict(vars(jnp))
    for name, one in programs.items():
        if "seed" in one.inputs:
            raise ValueError(f"{name} draws, and a seed fixes no random numbers in ONNX: export it as savedmodel.")
        if sum(x.nbytes for x in one.weights.values()) > 2e9:
            raise ValueError(f"{name} has more than 2 GB of weights, all that an ONNX file holds: use savedmodel.")
        run = lambda *inputs, one=one: one.run(one.weights, *inputs)
        # Traced here: jax2onnx patches Flax and jax.numpy while it traces, and some of our calls it does not know.
        traced = core.jaxpr_as_fun(jax.make_jaxpr(run)(*one.inputs.values()))
        names = dict(input_names=list(one.inputs), output_names=list(one.outputs), model_name=name)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # of version 0.12.5, which prints
                model = jax2onnx.to_onnx(lambda *x, f=traced: f(*x)[0], list(one.inputs.values()), **names)
        except Exception as error:  # of many kinds
            symbolic = any(B in x.shape for x in one.inputs.values())
            mend = "give it a fixed batch, --batch=1" if symbolic else "choose another format"
            why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise ValueError(f"jax2onnx cannot convert {name}: {mend} ({why}).") from error
        finally:
            vars(jnp).update(plain)  # jax2onnx leaves a cumsum of its own there, which takes fewer arguments
        size[name] = (out / f"{name}.onnx").write_bytes(model.SerializeToString())
        session = onnxruntime.InferenceSession(out / f"{name}.onnx", providers=["CPUExecutionProvider"])
        differences[name] = difference(name, one, lambda inputs, s=session: s.run(None, inputs)[0])
    return dict(opset=model.opset_import[0].version, bytes=size, onnxruntime=differences)


def difference(name, one, run):
    """How far run({input: array}) is from the Program on made-up inputs, in words; ValueError if that is too far."""
    rng, inputs = np.random.default_rng(0), {}
    for key, x in one.inputs.items():
        shape = [2 if d == B else d for d in x.shape]
        real = jnp.issubdtype(x.dtype, jnp.floating)
        inputs[key] = np.asarray(rng.normal(size=shape) if real else rng.integers(1, 100, shape), x.dtype)
    found, wanted = run(inputs), np.asarray(jax.jit(one.run)(one.weights, *inputs.values()))
    if jnp.issubdtype(wanted.dtype, jnp.integer):
        wrong, of = int((found != wanted).sum()), wanted.size
        far, said = wrong / of > 0.01, f"{of - wrong} of {of} codes equal"
    else:
        most = float(np.abs(found - wanted).max())
        far, said = not most < 1e-3 * max(1, np.abs(wanted).max()), f"at most {most:.1e} apart"  # NaN is far
    if far:
        raise ValueError(f"{name} gives other values in onnxruntime, {said}: choose another format.")
    return said


WRITERS = {"savedmodel": write_savedmodel, "stablehlo": write_stablehlo, "onnx": write_onnx}


def described(one):
    """A Program for the manifest."""
    text = lambda x: f"{x.dtype} [{' '.join(map(str, x.shape))}]"
    takes, gives = ({name: text(x) for name, x in some.items()} for some in (one.inputs, one.outputs))
    return dict(takes=takes, gives=gives, weights=list(one.weights))


def sides(text):
    """256,384 -> [256, 384]."""
    return [int(side) for side in text.split(",")]


@command.one_line("python -m jaxtok.export")
def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m jaxtok.export",
        description="Writes a tokenizer or a generator as files that run where jaxtok is not installed.",
        epilog="example: python -m jaxtok.export --checkpoint=runs/flextok --format=stablehlo --out=exported "
        "--decode steps=10 guidance=1.5",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run's workdir, or what else jaxtok.load takes")
    add("--format", required=True, choices=sorted(WRITERS))
    add("--out", required=True, help="a new folder")
    add("--size", type=sides, help="of the pictures, as 256 or 256,384, for a tokenizer of any size")
    pairs = dict(nargs="*", default=(), metavar="KEY=VALUE")
    add("--batch", type=int, help="one number of pictures at a time; default: any")
    add("--sample", help="options of the generator's `sample`, as tokens=16 guidance=1.5", **pairs)
    add("--decode", help="options of the decoder, as steps=20 guidance=7.5", **pairs)
    given = parser.parse_args(argv)
    options = {name: dict(map(command.pair, getattr(given, name))) for name in ("sample", "decode")}
    export(
        given.checkpoint,
        given.out,
        given.format,
        size=given.size and (given.size * 2)[:2],
        batch=given.batch,
        **options,
    )


if __name__ == "__main__":
    main()
