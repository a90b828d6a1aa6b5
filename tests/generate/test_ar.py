"""The autoregressive model: one token at a time on a cache is the whole sequence at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from configs import ar_flextok
from jaxtok import sharding
from jaxtok.build import build
from jaxtok.generate import ar, sampling
from jaxtok.nn import flops
from tests.generate import models
from tests.generate.models import ARS, CLASSES, K, N, run

RNG = jax.random.key(7)
RISING = partial(sampling.linear, scale=4.0)


def guided_logits(module, params, codes, condition, scale):
    """Of the whole sequence at once, in two passes."""
    full = run(module, "__call__", params, codes, condition)
    none = run(module, "__call__", params, codes, condition, null=jnp.ones(len(codes), bool))
    return sampling.guide(full, none, scale)


@pytest.mark.parametrize("kind", sorted(ARS.keys() - {"text", "digits"}))
def test_sampling_on_a_cache_is_sampling_from_the_whole_prefix(kind):
    """Logits to 1e-5 a step, codes token for token."""
    module = models.ar(kind)
    params, (_, condition) = models.parameters(module), models.batch(module)
    options = dict(temperature=0.8, top_k=7, top_p=0.95)
    scale = 1.0 if condition is None else RISING(jnp.arange(N), N)[:, None]
    if condition is not None:
        options["guidance"] = RISING
    codes, logits = run(module, "rollout", params, RNG, condition, batch=4, **options)
    assert codes.shape == (4, N) and codes.dtype == jnp.int32 and len(np.unique(codes)) > 3
    full = guided_logits(module, params, codes, condition, scale)
    np.testing.assert_allclose(logits, full, atol=1e-5)
    law = dict(temperature=0.8, top_k=7, top_p=0.95)
    for i in range(N):
        np.testing.assert_array_equal(codes[:, i], sampling.draw(jax.random.fold_in(RNG, i), full[:, i], **law))


@pytest.mark.parametrize("kind", ["learned", "llamagen"])
def test_at_temperature_0_a_code_is_the_likeliest_of_the_full_pass(kind):
    module = models.ar(kind)
    params, (_, condition) = models.parameters(module), models.batch(module)
    codes = run(module, "sample", params, RNG, condition, temperature=0, guidance=3.0)
    np.testing.assert_array_equal(codes, guided_logits(module, params, codes, condition, 3.0).argmax(-1))


@pytest.mark.parametrize("kind", ["learned", "llamagen", "text"])
def test_a_short_sample_is_the_beginning_of_a_long_one(kind):
    module = models.ar(kind)
    params, (_, condition) = models.parameters(module), models.batch(module)
    sample = lambda k: run(module, "sample", params, RNG, condition, tokens=k, guidance=RISING)
    whole = sample(None)
    for k in (1, 4):
        np.testing.assert_array_equal(sample(k), whole[:, :k])


@pytest.mark.parametrize("kind", ["learned", "llamagen", "text", "text and classes"])
def test_null_is_no_condition(kind):
    module = models.ar(kind)
    params, (codes, condition) = models.parameters(module), models.batch(module)
    none = run(module, "__call__", params, codes)
    dropped = run(module, "__call__", params, codes, condition, null=jnp.ones(4, bool))
    np.testing.assert_allclose(dropped, none, atol=1e-5)  # texts of other lengths are summed in another order
    assert np.abs(none - run(module, "__call__", params, codes, condition)).max() > 0.1
    if kind in ("learned", "llamagen"):
        null_class = run(module, "__call__", params, codes, {"label": jnp.full(4, CLASSES)})
        np.testing.assert_array_equal(null_class, none)
    sample = run(module, "sample", params, RNG, batch=4)
    np.testing.assert_array_equal(sample, run(module, "sample", params, RNG, dict(condition), guidance=zero))


def zero(step, steps):
    return 0.0


def test_guidance_1_saves_the_second_pass_and_changes_nothing():
    module = models.ar()
    params, (_, condition) = models.parameters(module), models.batch(module)
    cost = lambda guidance: flops.count(
        partial(module.apply, method="sample", guidance=guidance), params, RNG, condition
    )
    assert cost(2.0) == cost(partial(sampling.constant, scale=1.0)) == 2 * cost(1.0)
    plain, logits = run(module, "rollout", params, RNG, condition)
    codes, guided = run(module, "rollout", params, RNG, condition, guidance=partial(sampling.constant, scale=1.0))
    np.testing.assert_allclose(guided, logits, atol=1e-5)
    np.testing.assert_array_equal(codes, plain)


def test_no_token_is_computed_twice():
    """FLOPs of k tokens by hand: 2 per weight and token, and attention to all k places."""
    module = models.ar(block=dict(head_dim=8, hidden=24))
    params, (_, condition) = models.parameters(module), models.batch(module)
    for k in (3, N):
        counted = flops.count(partial(module.apply, method="sample", tokens=k), params, RNG, condition)
        weights = 2 * (4 * 16**2 + 3 * 16 * 24) + 16 * K
        assert counted == 2 * 4 * k * (weights + 2 * 2 * 16 * k)  # batch 4; layers x (q k and a v) x width x places


def test_a_token_reads_those_before_it_and_no_other():
    """By gradients: of the logits of token i with respect to the vectors of the codes, here all different."""
    module = models.ar("rotary, gelu, biases, q and k normalised")
    params, codes = models.parameters(module), jnp.arange(N)[None]
    condition = {"label": jnp.array([1])}

    def logit(params, i):
        return (module.apply(params, codes, condition)[0, i] * jnp.arange(1, K + 1)).sum()

    of_rows = jax.jit(jax.vmap(lambda i: jax.grad(logit)(params, i)["params"]["token_embed"]["embedding"]))
    reads = np.abs(of_rows(jnp.arange(N))).max(-1) > 0  # [token, code]
    np.testing.assert_array_equal(reads[:, :N], np.tri(N, k=-1, dtype=bool))
    assert not reads[:, N:].any()


def test_conditions_are_dropped_at_the_given_rate():
    """Equal codes and labels: a sample's loss is that of the class or that of none."""
    module = models.ar(null_rate=0.3)
    params, n = models.parameters(module), 2000
    codes, condition = jnp.tile(jnp.arange(N), (n, 1)), {"label": jnp.ones(n, int)}
    losses = run(module, "loss", params, codes, condition, train=True, rngs={"train": RNG}).loss.mean(1)
    one, labels = jnp.tile(jnp.arange(N), (2, 1)), jnp.array([1, CLASSES])
    kept, none = run(module, "loss", params, one, {"label": labels}).loss.mean(1)
    is_kept, is_none = np.isclose(losses, kept, atol=1e-5), np.isclose(losses, none, atol=1e-5)
    assert (is_kept ^ is_none).all()
    assert abs(is_none.mean() - 0.3) < 5 * (0.3 * 0.7 / n) ** 0.5


def test_dropout_acts_in_training_only_and_differs_between_layers():
    module = models.ar(dropout=0.5, null_rate=0.0)
    params, (codes, condition) = models.parameters(module), models.batch(module)
    loss = lambda train, seed, module=module: run(
        module, "loss", params, codes, condition, train=train, rngs={"train": jax.random.key(seed)}
    ).mean()
    assert loss(True, 0) == loss(True, 0) != loss(True, 1)
    assert loss(False, 0) == loss(False, 1) == loss(True, 0, models.ar(null_rate=0.0))


@pytest.mark.parametrize("options", [dict(remat="full"), dict(remat="dots"), dict(unroll=2)])
def test_remat_and_unroll_change_no_gradient(options):
    for ours, plain in zip(*(jax.tree.leaves(gradients(models.ar(**o))) for o in (options, {})), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-6)


def gradients(module):
    params, (codes, condition) = models.parameters(models.ar()), models.batch(module)
    loss = lambda p: module.apply(p, codes, condition, train=True, method="loss", rngs={"train": RNG}).mean()
    return jax.jit(jax.value_and_grad(loss))(params)


def test_bfloat16_samples_and_keeps_float32_logits():
    module = models.ar("llamagen", dtype=jnp.bfloat16)
    params, (_, condition) = models.parameters(module), models.batch(module)
    codes, logits = run(module, "rollout", params, RNG, condition, temperature=0)
    full = run(module, "__call__", params, codes, condition)
    assert logits.dtype == full.dtype == jnp.float32
    np.testing.assert_allclose(logits, full, atol=0.1)  # of logits around 3


def test_a_split_batch_samples_the_same():
    """Batch over `data`, weights over `fsdp`: eight devices against one, guided."""
    module = models.ar("text and classes")
    params, (_, condition) = models.parameters(module), models.batch(module, size=8)
    mesh = sharding.make_mesh(data=4, fsdp=2)
    split = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, P(*spec)))
    spread = jax.device_put(params, sharding.shardings(params, mesh, [(".*", "fsdp")], min_size=16))
    conditions = jax.tree.map(lambda x: split(x, ("data", "fsdp")), condition)
    options = dict(guidance=RISING, top_p=0.9)
    ours = run(module, "sample", spread, split(RNG), conditions, **options)
    np.testing.assert_array_equal(ours, run(module, "sample", params, RNG, condition, **options))


@pytest.mark.parametrize("text", [False, True])
def test_flextok_sizes(text):
    """The published counts are those of the blocks' matrices."""
    for name, (depth, width) in (ar_flextok.TEXT_SIZES if text else ar_flextok.SIZES).items():
        module = ar.AR(64_000, 256, width, depth, classes=0 if text else 1000, text=text)
        condition = {"text": jnp.zeros((1, 3, 8))} if text else {"label": jnp.zeros(1, int)}
        init = partial(module.init, jax.random.key(0), method="loss")
        blocks = jax.eval_shape(init, jnp.zeros((1, 256), int), condition)["params"]["blocks"]
        count = sum(p.size for p in jax.tree.leaves(blocks) if p.ndim > 2)
        said = float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]
        digits = 1e6 if name[-1] == "M" else 1e7
        assert round(count / digits) == round(said / digits), name


def test_a_config_builds_the_model_and_its_schedule():
    spec = dict(name="generate.ar.AR", vocabulary=K, length=N, width=64, depth=2, classes=3, block=dict(norm="rms"))
    module = build(ConfigDict(spec))
    assert module.block["norm"] == "rms"
    params = jax.eval_shape(partial(module.init, RNG, method="loss"), *models.batch(module))["params"]
    assert params["blocks"]["norm1"].keys() == {"scale"}
    schedule = build(dict(name="generate.sampling.power_cosine", scale=5.0, power=1.0))
    assert float(schedule(2, 4)) == 3


def test_errors_say_what_is_wrong():
    codes, condition = models.batch(models.ar())
    init = lambda module, *args: module.init(RNG, *args, method="loss")
    with pytest.raises(ValueError, match='one of .* not "rotary_3d"'):
        init(models.ar(position="rotary_3d"), codes, condition)
    with pytest.raises(ValueError, match="class_token needs classes"):
        init(models.ar("no classes", class_token=True), codes)
    with pytest.raises(ValueError, match="square number of tokens, not 8"):
        init(models.ar("llamagen", length=8), codes[:, :8], condition)
    with pytest.raises(ValueError, match="its loss needs the labels"):
        init(models.ar(), codes)
    with pytest.raises(ValueError, match=r"the condition lacks \"text\", it has \['label'\]"):
        init(models.ar("text and classes"), codes, condition)
    with pytest.raises(ValueError, match=r"has 3 classes; the condition lacks \"label\", it has \['text'\]"):
        init(models.ar(), codes, {"text": jnp.zeros((4, 5, 6))})
    with pytest.raises(ValueError, match="not divisible by head_dim 5"):
        init(models.ar(block=dict(head_dim=5)), codes, condition)
    with pytest.raises(ValueError, match='not "moe"'):
        init(models.ar(block=dict(mlp="moe")), codes, condition)
    with pytest.raises(ValueError, match="remat is one of"):
        init(models.ar(remat="some"), codes, condition)
    with pytest.raises(ValueError, match=r"not \['q'\]"):
        init(models.ar(block=dict(bias=("q",))), codes, condition)
    params = models.parameters(models.ar())
    sample = partial(models.ar().apply, params, RNG, method="sample")
    for k in (0, N + 1):
        with pytest.raises(ValueError, match=f"1 to {N} tokens, not {k}"):
            sample(condition, tokens=k)
    with pytest.raises(ValueError, match="Guidance needs a condition"):
        sample(guidance=2.0)
    with pytest.raises(ValueError, match=f"places for {N} tokens, got {N + 1}"):
        models.ar().apply(params, jnp.zeros((1, N + 1), int), condition)
