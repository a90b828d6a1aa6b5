"""Attention is the same, whatever computes it, and what computes it is chosen by what the program is compiled for."""

import importlib.util
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok import plan, sharding
from jaxtok.nn import attention, flops, masks

PREFIX = masks.prefix_causal(128, 256)[128:]  # [128 256]: FlexTok's registers


def qkv(dtype=jnp.float32, queries=128, keys=256, batch=2, heads=2):
    shapes = (batch, queries, heads, 64), *[(batch, keys, heads, 64)] * 2
    return [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


def by_hand(q, k, v, mask=None, counts=None, scale=0.125):
    """In numpy, float64; a key that counts for n is n equal keys."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    weights = np.exp(scale * np.einsum("bqhd,bkhd->bhqk", q, k))
    weights *= 1.0 if counts is None else counts
    weights *= 1.0 if mask is None else np.broadcast_to(mask, (*mask.shape[:-2], *weights.shape[2:]))[..., None, :, :]
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


def on(platform):
    """A mesh of one device of that kind, as traced programs see it."""
    device = jax.sharding.AbstractDevice(device_kind=f"a {platform}", num_cores=1, platform=platform)
    mesh = sharding.make_mesh(devices=jax.devices()[:1]).abstract_mesh
    return jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device))


def splash(*args, **options):
    """It refuses the precision that tests/conftest.py sets."""
    with jax.default_matmul_precision("default"):
        return attention.splash(*args, **options)


MASKS = {
    "none": {},
    "prefix": dict(mask=PREFIX),
    "of each": dict(mask=np.arange(256) < np.array([[100], [200]])[:, None]),  # [B 1 K]
    "counts": dict(counts=np.r_[np.ones(255), 40.0]),
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_the_form_of_a_cpu_is_what_the_formula_says(options):
    got = attention.attention(*qkv(), scale=0.125, **options)
    np.testing.assert_allclose(got, by_hand(*qkv(), **options), atol=1e-5)
    if options:  # the control
        assert np.abs(got - by_hand(*qkv())).max() > 1e-3


@pytest.mark.parametrize(
    "mask, shape",
    [(None, {}), (PREFIX, {}), (None, dict(queries=240, keys=250)), (PREFIX[:120], dict(queries=120))],
    ids=["none", "prefix", "none, padded", "prefix, padded"],
)
def test_the_kernel_of_a_tpu_gives_the_same_values_and_gradients(mask, shape):
    args = qkv(**shape)

    def loss(form, *args):
        y = form(*args, mask, None, 0.1)
        return (y**2).sum(), y

    kernel = partial(splash, interpret=True)
    (_, want), wanted = jax.value_and_grad(partial(loss, attention.dense), (0, 1, 2), has_aux=True)(*args)
    (_, got), gradients = jax.value_and_grad(partial(loss, kernel), (0, 1, 2), has_aux=True)(*args)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for gradient, same in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, same, atol=1e-5)


def test_the_kernel_of_a_tpu_on_a_mesh():
    """Four devices, each with its own examples and heads."""
    mesh = sharding.make_mesh(2, 1, 2, devices=jax.devices()[:4])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor"))
    run = jax.jit(sharding.on_mesh(mesh, lambda *x: splash(*x, PREFIX, None, 0.125, interpret=True)))
    got = run(*(jax.device_put(x, split) for x in qkv()))
    np.testing.assert_allclose(got, attention.dense(*qkv(), PREFIX, None, 0.125), atol=1e-5)
    count = partial(flops.count, lambda *x: splash(*x, None, None, None))
    assert sharding.on_mesh(mesh, count)(*qkv()) == count(*qkv()) == 2 * 2 * 2 * 2 * 128 * 256 * 64


# ---- which is chosen ----


@pytest.fixture
def calls(monkeypatch):
    """(implementation, bias, mask) of every call of jax.nn's attention, which then runs as XLA's."""
    seen, real = [], jax.nn.dot_product_attention

    def spy(q, k, v, bias, mask, *, scale, implementation):
        seen.append((implementation, bias, mask))
        return real(q, k, v, bias, mask, scale=scale)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    return seen


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_a_gpu_has_cudnn_which_gets_masks_of_full_size(options, calls):
    with on("gpu"):
        got = attention.attention(*qkv(jnp.bfloat16), scale=0.125, **options)
    [(implementation, bias, mask)] = calls
    assert implementation == "cudnn"
    assert bias is None or bias.shape == (1, 1, 128, 256)
    assert mask is None or mask.shape in ((1, 1, 128, 256), (2, 1, 128, 256))
    np.testing.assert_allclose(np.float32(got), by_hand(*qkv(jnp.bfloat16), **options), atol=0.03)


def test_float32_and_programs_for_no_known_platform_are_xlas(calls):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention.attention(*qkv(jnp.bfloat16))
        for platform in ("gpu", "tpu"):
            with on(platform):
                attention.attention(*qkv())
        with on("cpu"):
            attention.attention(*qkv(jnp.bfloat16))
    assert [implementation for implementation, _, _ in calls] == ["xla"] * 4


@pytest.mark.parametrize(
    "platform, shape, options, reason",
    [
        ("gpu", {}, {}, "cuDNN"),  # which is not here
        ("tpu", {}, MASKS["counts"], "it takes no counts"),
        ("tpu", {}, MASKS["of each"], "it takes no counts, and no masks but constant ones"),
        ("tpu", {}, dict(mask=jnp.asarray(PREFIX)), "constant ones"),
        ("tpu", dict(queries=130), {}, "padding for more than an eighth"),
        ("tpu", {}, {}, "jax_default_matmul_precision"),
    ],
)
def test_what_a_kernel_does_not_take_is_xlas_and_a_warning_says_so_once(platform, shape, options, reason):
    args = qkv(jnp.bfloat16, **shape)
    precision = "highest" if "precision" in reason else "default"
    with on(platform), jax.default_matmul_precision(precision), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            got = attention.attention(*args, **options)
    [warning] = said
    assert "is left to XLA" in str(warning.message) and f"a {platform}: " in str(warning.message)
    assert reason in str(warning.message)
    np.testing.assert_allclose(np.float32(got), by_hand(*args, **options), atol=0.03)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='TPUs are compiled for by libtpu: pip install "jaxtok[plan]"'
)
def test_a_tpus_kernel_needs_less_memory(monkeypatch):
    """Forward and backward pass of FlexTok's attention at a batch of eight a chip."""
    mesh = sharding.make_mesh(devices=plan.topology_devices("v5e:2x4"))
    args = [
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.eval_shape(partial(qkv, jnp.bfloat16, 512, 512, 64, 12))
    ]

    def compiled():
        loss = lambda *args: (attention.attention(*args).astype(jnp.float32) ** 2).sum()
        step = jax.jit(sharding.on_mesh(mesh, jax.grad(loss, (0, 1, 2))), in_shardings=sharding.batch_sharding(mesh))
        with jax.default_matmul_precision("default"):
            done = step.lower(*args).compile()
        return done.memory_analysis().temp_size_in_bytes, "tpu_custom_call" in done.as_text()

    with_it, kernel = compiled()
    monkeypatch.setattr(attention, "KERNELS", {})
    without, none = compiled()
    assert kernel and not none and with_it < without / 2
