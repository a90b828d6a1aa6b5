"""FlexTok's speed: python -m benchmarks.flextok [--size=d12_d12] [--steps=25] [--json=FILE]

Encoding, guided decoding from k tokens, and a training step, each with and without the exact shortcuts, on random
weights (speed does not depend on them) and on latents: the VAE is not in it. "of peak" is the work that the program
does (2 x multiply-adds of its products) over its time, as a share of what a product of two 2048 x 2048 matrices
reaches in the same run; "speed-up" is against the plain form, which computes all registers in two full passes.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from benchmarks import measure
from configs import flextok
from jaxtok.build import build
from jaxtok.command import use_huge_pages
from jaxtok.losses.flow import flow_matching
from jaxtok.metrics import format_table
from jaxtok.nn.masks import keep_prefix
from jaxtok.structs import Codes


def programs(size, steps, batches=(1, 8)):
    """{label: (function, arguments, label of its plain form)}, as measure.measure wants them."""
    model = build(flextok.get_config(size).task.model)
    plainly = dict(dtype=jnp.float32, remat="none")
    encoder, decoder = model.encoder.clone(batch_norm=False, **plainly), model.decoder.clone(**plainly)
    x = jax.random.normal(jax.random.key(0), (max(2, *batches), *decoder.shape))
    codes = Codes(jnp.zeros((2, decoder.registers, encoder.channels)), None, jnp.ones((2, decoder.registers), bool))
    few, some, every = (-(-decoder.registers // share) for share in (16, 4, 1))  # 16, 64, 256 as published
    keys = {"params": jax.random.key(1), "train": jax.random.key(2)}
    encoder_params = jax.jit(encoder.init)(keys, x[:1])
    decoder_params = jax.jit(lambda keys: decoder.init(keys, codes, target=x[:2], train=True))(keys)
    rows = {}

    def encode(encoder):
        return lambda params, x: encoder.apply(params, x)

    for b in batches:
        plain = f"encode {b}, plain"
        rows[plain] = encode(encoder.clone(shortcuts=())), (encoder_params, x[:b]), None
        rows[f"encode {b}"] = encode(encoder), (encoder_params, x[:b]), plain
    rows[f"encode 1, {some} tokens"] = (
        lambda params, x: encoder.apply(params, x, tokens=some),
        (encoder_params, x[:1]),
        "encode 1, plain",
    )

    def decode(decoder, k, whole):
        """From k tokens, handed over as k, or as all of which k are kept."""
        n = decoder.registers if whole else k
        codes = Codes(jnp.zeros((1, n, encoder.channels)), None, keep_prefix(jnp.array([k]), n))
        options = dict(steps=steps, guidance=7.5, noise=x[:1], method="sample")
        return lambda params, codes: decoder.apply(params, codes, **options), (decoder_params, codes)

    for k in (few, some, every):
        plain = f"decode {k}, plain"
        rows[plain] = *decode(decoder.clone(shortcuts=()), k, True), None
        rows[f"decode {k}"] = *decode(decoder, k, False), plain
    for shortcut in decoder.shortcuts:
        others = tuple(s for s in decoder.shortcuts if s != shortcut)
        short = *decode(decoder.clone(shortcuts=others), some, False), f"decode {some}, plain"
        rows[f'decode {some} without "{shortcut}"'] = short

    def step(encoder, decoder):
        tx = optax.adamw(1e-4)

        def step(params, opt_state, x, key):
            def loss(params):
                codes = model.quantizer.apply({}, encoder.apply(params[0], x, train=True))
                outputs = decoder.apply(params[1], codes, target=x, train=True, rngs={"train": key})
                return flow_matching({"decoded": outputs}, None)

            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        params = encoder_params, decoder_params
        return step, (params, tx.init(params), x[:2], jax.random.key(3))

    rows["train step 2, plain"] = *step(encoder.clone(shortcuts=()), decoder.clone(shortcuts=())), None
    rows["train step 2"] = *step(encoder, decoder), "train step 2, plain"
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="d12_d12", help="a variant of configs/flextok.py")
    parser.add_argument("--steps", type=int, default=25, help="Euler steps of a decoding")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each program; the fastest counts")
    parser.add_argument("--json", type=Path, help="where the figures go too")
    parser.add_argument("--only", default="", help="measure programs whose label contains this (and their plain form)")
    options = parser.parse_args()
    rows = programs(options.size, options.steps)
    wanted = [label for label in rows if options.only in label]
    wanted += [rows[label][2] for label in wanted]
    rows = {label: row for label, row in rows.items() if label in wanted}
    if not rows:
        parser.error(f'no program has "{options.only}" in its label')
    results = measure.measure(rows, options.repeats)
    title = f"FlexTok {options.size}, float32, {options.steps} steps, {jax.devices()[0].device_kind}"
    print(format_table(title, [{key: shown(value) for key, value in row.items()} for row in results]))
    print(f"most memory held: {measure.resident_mb():.0f} MB")
    if options.json:
        about = {"size": options.size, "steps": options.steps, "device": jax.devices()[0].device_kind}
        about |= {"jax": jax.__version__, "devices": jax.device_count(), "resident MB": measure.resident_mb()}
        options.json.write_text(json.dumps(about | {"programs": results}, indent=2) + "\n")


def shown(value):
    """A cell of the table: three digits, and whole numbers above them."""
    if not isinstance(value, float):
        return value or ""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


if __name__ == "__main__":
    use_huge_pages()
    main()
