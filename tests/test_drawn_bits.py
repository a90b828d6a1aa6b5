"""Bits that are drawn in training: what ELM and Instella-T2I claim for them, and generators over such tokens.

Emoji of 8 px, an MLP to 4 tokens of so many bits and one back, 800 steps of 128 (`python -m tests.test_drawn_bits`).
PSNR in dB of held-out pictures from their bits, from the bits' probabilities, and with 5 % of the bits flipped; how
many different tokens there are among their 1,280; least and largest mean of a bit:

                           bits    probabilities   flipped   tokens   means
    3 bits, seed 0         15.58   15.56           15.14        8     0.52 to 0.59
            seed 1         15.52   15.54           15.02        8     0.42 to 0.62
            seed 2         15.61   15.60           15.15        8     0.45 to 0.66
    12 bits, seed 0        16.36   16.54           16.18      353     0.35 to 0.70
             seed 1        16.23   16.47           16.11      333     0.33 to 0.80
             seed 2        16.39   16.61           16.15      331     0.43 to 0.76
    thresholded, seed 0    17.05   14.14           16.02      404     0.23 to 0.80
                 seed 1    16.89   14.05           15.82      351     0.41 to 0.84
                 seed 2    17.20   14.18           16.21      433     0.34 to 0.71
    4,096 codes, seed 0    12.77                                6
                 seed 1    13.32                                6
                 seed 2    13.45                                8

In so short a run drawing costs what thresholding keeps, 0.7 to 0.8 dB: the bits are still noisy.

The tests train seed 0.
"""

import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtok.build import build
from jaxtok.generate.ar import AR
from jaxtok.quantizers import binary
from jaxtok.quantizers.binary import Bernoulli
from jaxtok.quantizers.vq import VQ

TOKENS = 4
ARMS = {
    "3 bits": Bernoulli((3,), width=16),
    "12 bits": Bernoulli((6, 6), width=16),
    "12 bits, thresholded": Bernoulli((6, 6), width=16, draws=False),
    "4,096 codes": VQ(4096),
}


class Tiny(nn.Module):
    """Pictures [B 192] -> (their reconstructions, Codes, latents)."""

    quantizer: nn.Module

    @nn.compact
    def __call__(self, x, train=False):
        width = 8 if isinstance(self.quantizer, VQ) else sum(self.quantizer.bits)
        z = nn.Dense(TOKENS * width, name="out")(nn.gelu(nn.Dense(128, name="in")(x))).reshape(-1, TOKENS, width)
        codes = self.quantizer(z, train=train)
        return self.picture(codes.z), codes, z

    @nn.compact
    def picture(self, z):
        return nn.Dense(192, name="pixels")(nn.gelu(nn.Dense(128, name="up")(z.reshape(len(z), -1))))


@functools.cache
def pictures(split):
    source = build(dict(name="data.sources.Emoji", size=16, split=split))
    images = np.stack([source[i]["image"] for i in range(len(source))]) / 255
    return jnp.asarray(images.reshape(-1, 8, 2, 8, 2, 3).mean((2, 4)).reshape(-1, 192), jnp.float32)


def psnr(x, y):
    return float(-10 * jnp.log10(jnp.square(x - jnp.clip(y, 0, 1)).mean(-1)).mean())


def learn(quantizer, seed=0, steps=800):
    """(the module, its variables)."""
    module, images = Tiny(quantizer), pictures("train")
    tx, key = optax.adam(optax.cosine_decay_schedule(3e-3, steps)), jax.random.key(seed)

    def loss(params, key):
        keys = jax.random.split(key)
        x = images[jax.random.randint(keys[0], (128,), 0, len(images))]
        y, codes, _ = module.apply({"params": params}, x, True, rngs={"train": keys[1]})
        aux = codes.aux.get("codebook", 0.0) + 0.25 * codes.aux.get("commitment", 0.0)
        aux = aux + 0.01 * codes.aux.get("uncertainty", 0.0)
        return jnp.square(y - x).mean() + 0.1 * aux

    def step(state, i):
        params, opt_state = state
        updates, opt_state = tx.update(jax.grad(loss)(params, jax.random.fold_in(key, i)), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    @jax.jit
    def run():
        params = module.init({"params": key, "train": key}, images[:2], True)["params"]
        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[0][0]

    return module, {"params": run()}


def measure(module, variables):
    """What the table above has."""
    images = pictures("test")
    rebuilt, codes, z = jax.jit(lambda v: module.apply(v, images))(variables)
    distinct = len(np.unique(np.asarray(codes.indices).reshape(len(images) * TOKENS, -1), axis=0))
    if isinstance(module.quantizer, VQ):
        return psnr(images, rebuilt), None, None, distinct, None, None
    sizes, decode = module.quantizer.bits, lambda z: module.apply(variables, z, method="picture")
    soft = decode(jax.nn.sigmoid(z) @ variables["params"]["quantizer"]["vectors"])
    bits = binary.unpack(codes.indices, sizes)
    wrong = binary.pack(bits ^ jax.random.bernoulli(jax.random.key(0), 0.05, bits.shape), sizes)
    of = {"params": variables["params"]["quantizer"]}
    flipped = decode(module.quantizer.apply(of, wrong, method="lookup"))
    means = bits.mean((0, 1))
    return *(psnr(images, y) for y in (rebuilt, soft, flipped)), distinct, float(means.min()), float(means.max())


@pytest.fixture(scope="module")
def trained():
    return {arm: learn(quantizer) for arm, quantizer in ARMS.items()}


@pytest.fixture(scope="module")
def found(trained):
    return {arm: measure(*trained[arm]) for arm in ARMS}


def test_more_bits_show_more(found):
    assert found["12 bits"][0] > found["3 bits"][0] + 0.5


def test_drawn_bits_end_up_sure_and_even(found):
    hard, soft, _, _, least, most = found["12 bits"]
    assert abs(hard - soft) < 0.5 and 0.1 < least and most < 0.9
    assert found["12 bits, thresholded"][0] - found["12 bits, thresholded"][1] > 2  # the control's are not


def test_they_use_more_codes_than_a_codebook(found):
    assert found["12 bits"][3] > 2 * found["4,096 codes"][3]


def test_a_wrong_bit_costs_less_where_bits_were_drawn(found):
    costs = [found[arm][0] - found[arm][2] for arm in ("12 bits", "12 bits, thresholded")]
    assert 0 < costs[0] < costs[1] - 0.5


def heads(module, variables, seed=0, steps=200, batch=64):
    """Of one head of 4,096 codes and of two of 64: (parameters, bits a token of held-out pictures)."""
    encode = jax.jit(lambda x: module.apply(variables, x)[1].indices)
    known, new = encode(pictures("train")), encode(pictures("test"))

    def nll(module, pack):
        key, tx = jax.random.key(seed), optax.adam(optax.cosine_decay_schedule(3e-3, steps))
        train, test = pack(known), pack(new)

        def step(state, i):
            params, opt_state = state
            keys = jax.random.split(jax.random.fold_in(key, i))
            rows = train[jax.random.randint(keys[0], (batch,), 0, len(train))]
            loss = lambda p: module.apply(p, rows, train=True, method="loss", rngs={"train": keys[1]}).mean()
            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        @jax.jit
        def run():
            params = module.init(key, train[:2], method="loss")
            params = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[0][0]
            return params, module.apply(params, test, method="loss").mean() / np.log(2)

        params, loss = run()
        return sum(x.size for x in jax.tree.leaves(params)), float(loss)

    sizes = module.quantizer.bits
    gpt = partial(AR, length=TOKENS, width=48, depth=1, block=dict(head_dim=16))
    whole = lambda codes: binary.pack(binary.unpack(codes, sizes), (sum(sizes),))[..., 0]
    in_groups = gpt(tuple(2**n for n in sizes), parallel=True)
    return nll(gpt(2 ** sum(sizes)), whole), nll(in_groups, lambda codes: codes)


def test_two_small_heads_do_for_a_large_one(trained):
    """Bits a token, of one and of two: 6.41 and 5.62, 5.61 and 5.17, 6.01 and 5.40; 421,392 and 40,592 parameters."""
    (many, one), (few, two) = heads(*trained["12 bits"])
    assert few < many / 3
    assert two < one < 11


if __name__ == "__main__":
    for number in range(3):
        for name, part in ARMS.items():
            run = learn(part, number)
            says = ", ".join("-" if x is None else f"{x:.2f}" for x in measure(*run))
            print(f"seed {number} {name}: {says}", *(heads(*run, number) if name == "12 bits" else ()), flush=True)
