"""SimVQ: one linear map moves all codes, the table stays."""

import jax
import numpy as np

from jaxtok.quantizers.simvq import SimVQ

LATENTS = jax.random.normal(jax.random.key(0), (4, 9, 6))


def test_codes_are_a_linear_map_of_a_table_that_never_changes():
    module = SimVQ(500)
    variables = module.init({"params": jax.random.key(1)}, LATENTS)
    table, weights = variables["codebook"]["table"], variables["params"]["map"]
    np.testing.assert_allclose(table.std(), 6**-0.5, rtol=0.05)
    codes = module.apply(variables, method="codes")
    np.testing.assert_allclose(codes, table @ weights["kernel"] + weights["bias"], atol=1e-6)
    found, after = module.apply(variables, LATENTS, train=True, mutable=["codebook"])
    np.testing.assert_array_equal(after["codebook"]["table"], table)
    distances = np.square(np.asarray(LATENTS)[:, :, None] - codes).sum(-1)
    np.testing.assert_array_equal(found.indices, distances.argmin(-1))


def test_a_step_of_one_code_moves_all_of_them():
    module = SimVQ(12)
    variables = module.init({"params": jax.random.key(1)}, LATENTS)
    one = LATENTS[:1, :1]
    loss = lambda params: module.apply({**variables, "params": params}, one).aux["codebook"]
    gradient = jax.grad(loss)(variables["params"])
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradient)
    before, after = (module.apply({**variables, "params": p}, method="codes") for p in (variables["params"], stepped))
    assert np.abs(after - before).max(-1).min() > 1e-4
    assert loss(stepped) < loss(variables["params"])
