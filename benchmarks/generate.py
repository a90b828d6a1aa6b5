"""Generators' speed: python -m benchmarks.generate [--size=49M] [--tokens=256] [--json=FILE]

Sampling codes on a cache, with and without guidance (both passes in one batch), against the same model without a cache;
and one randomised and one masked generator. float32, random weights: speed does not depend on them.

"plain" computes the whole prefix again for every token, padded to the next eighth of the sample, for programs have one
shape. "read MB" is what a step must read whatever the program: every weight once, but for the tables of which it reads
a row a sample (codes, classes, places); and of keys and values, in float32, those of the places so far, half of all on
average. What is computed in between counts as nothing. "of copy" is the time that this takes at the rate at which a
large array is scaled in place, bytes read and bytes written together, over the program's time; "of read" the same at
the rate at which it is summed, where bytes are read only (benchmarks/measure.py). "of peak" and "speed-up" are those of
benchmarks/flextok.py.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import measure
from benchmarks.flextok import shown
from configs import ar_flextok
from jaxtok.command import use_huge_pages
from jaxtok.generate import ar
from jaxtok.generate.masked import Masked
from jaxtok.generate.rar import RAR
from jaxtok.metrics import format_table

LLAMAGEN = dict(classes=1000, class_token=True, position="rotary_2d")
MODELS = {
    "tiny": ar.AR(48, 16, 32, 2, dict(head_dim=16), classes=3),
    **{name: ar.AR(64_000, 256, width, depth, classes=1000) for name, (depth, width) in ar_flextok.SIZES.items()},
    "llamagen-b": ar.AR(16_384, 256, 768, 12, dict(norm="rms", hidden=2048), **LLAMAGEN),
    "llamagen-l": ar.AR(16_384, 256, 1024, 24, dict(norm="rms", hidden=2816), **LLAMAGEN),
}
TINY = RAR(48, 16, 32, 2, 3, dict(head_dim=16)), Masked(48, 16, 32, 2, 3, dict(head_dim=16))
OTHERS = (
    RAR(1024, 256, 768, 24, 1000, dict(head_dim=48)),
    Masked(4096, 32, 768, 24, 1000, dict(head_dim=48, post_norm=True, eps=1e-12)),
)  # RAR-B, and the generator over 32 tokens of TiTok-L


def programs(size, tokens, batches=(1, 16)):
    """({label: (function, arguments, label of its plain form)}, {label: (tokens, bytes that must be read)})."""
    rows, sizes = {}, {}

    def add(label, module, params, batch, plain=None, **options):
        """Sampling, guided if `options` say so."""
        copies = 2 if "guidance" in options else 1
        condition = {"label": jnp.zeros(batch, int)}
        rows[label] = partial(module.apply, method="sample", **options), (params, jax.random.key(0), condition), plain
        k = options.get("tokens", module.length)
        steps = options.get("steps", k)  # of a masked model, which has no cache
        places = 0 if "steps" in options else (k + 1) / 2
        sizes[label] = batch * k, steps * (weights(params) + copies * batch * cache(module, places))

    model, (rar, masked) = MODELS[size], TINY if size == "tiny" else OTHERS
    params = initial(model)
    plain = f"{size}, batch {batches[0]}, plain"  # of one batch only: it is slow
    condition = {"label": jnp.zeros(batches[0], int)}
    rows[plain] = partial(recompute, model, tokens), (params, jax.random.key(0), condition), None
    for b in batches:
        add(f"{size}, batch {b}", model, params, b, plain if b == batches[0] else None, tokens=tokens)
        add(f"{size}, batch {b}, guided", model, params, b, tokens=tokens, guidance=1.5)
    sizes[plain] = sizes[f"{size}, batch {batches[0]}"]
    b = batches[0]
    add(f"rar, batch {b}, guided", rar, initial(rar), b, tokens=min(tokens, rar.length), guidance=4.0)
    add(f"masked, batch {b}, guided, 8 steps", masked, initial(masked), b, steps=8, guidance=4.5)
    return rows, sizes


def initial(module):
    """Parameters of a module."""
    keys = {"params": jax.random.key(0), "train": jax.random.key(1)}
    init = jax.jit(partial(module.init, keys, method="loss"))
    return init(jnp.zeros((1, module.length), int), {"label": jnp.zeros(1, int)})


def recompute(model, tokens, params, rng, condition):
    """The model's sample of `tokens` codes without a cache."""
    eighth = -(-tokens // 8)

    def turn(codes, i, n):
        logits = jax.lax.dynamic_index_in_dim(model.apply(params, codes[:, :n], condition), i, 1, keepdims=False)
        drawn = jax.random.categorical(jax.random.fold_in(rng, i), logits)
        return codes.at[:, i].set(drawn), None

    codes = jnp.zeros((len(condition["label"]), tokens), int)
    for start in range(0, tokens, eighth):
        stop = min(start + eighth, tokens)
        codes, _ = jax.lax.scan(partial(turn, n=stop), codes, jnp.arange(start, stop))
    return codes


def weights(params):
    """Bytes of the parameters that a step reads whole."""
    tables = ("embed", "token_embed", "class_embed", "pos_embed", "target_embed", "number_embed")
    return sum(p.nbytes for name, part in params["params"].items() if name not in tables for p in jax.tree.leaves(part))


def cache(module, places):
    """Bytes of the keys and values of a sequence's `places`, float32."""
    return 2 * 4 * module.depth * module.width * places


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="49M", choices=MODELS, help="the autoregressive model")
    parser.add_argument("--tokens", type=int, default=256, help="how many are sampled")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each program; the fastest counts")
    parser.add_argument("--json", type=Path, help="where the figures go too")
    parser.add_argument("--only", default="", help="measure programs whose label contains this (and their plain form)")
    options = parser.parse_args()
    rows, sizes = programs(options.size, options.tokens)
    wanted = [label for label in rows if options.only in label]
    wanted += [rows[label][2] for label in wanted]
    rows = {label: row for label, row in rows.items() if label in wanted}
    if not rows:
        parser.error(f'no program has "{options.only}" in its label')
    results = []
    for row in measure.measure(rows, options.repeats):
        tokens, read = sizes[row["program"]]
        rates = {"tokens/s": tokens / row["seconds"], "read MB": read / 1e6}
        rates |= {f"of {way}": read / row["seconds"] / (row[f"{way} GB/s"] * 1e9) for way in ("copy", "read")}
        results.append({"program": row.pop("program")} | rates | row)
    columns = ("program", "tokens/s", "seconds", "read MB", "of copy", "of read", "of peak", "speed-up", "compile s")
    title = f"Generators, float32, {options.tokens} tokens, {jax.devices()[0].device_kind}"
    print(format_table(title, [{key: shown(row[key]) for key in columns} for row in results]))
    for key in ("copy GB/s", "read GB/s", "peak gflop/s"):
        print(f"{key}: {min(row[key] for row in results):.1f} to {max(row[key] for row in results):.1f}")
    print(f"most memory held: {measure.resident_mb():.0f} MB")
    if options.json:
        about = {"size": options.size, "tokens": options.tokens, "device": jax.devices()[0].device_kind}
        about |= {"jax": jax.__version__, "devices": jax.device_count(), "resident MB": measure.resident_mb()}
        options.json.write_text(json.dumps(about | {"programs": results}, indent=2) + "\n")


if __name__ == "__main__":
    use_huge_pages()
    main()
