"""What our VAE computes for the arrays of vae_tiny.npz; its weights stand in the same file, under "w/"."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.codecs.vae import VAE
from jaxtok.nn import gaussian
from jaxtok.pretrained import vae
from jaxtok.pretrained.convert import convert
from tests.goldens.flextok_arrays import first, last


def arrays(config, golden) -> tuple[dict, dict]:
    """(ours, golden without the weights); config: the dict of vae_tiny_config.json, in diffusers' format.

    Raises ValueError for a config that is not ours or weights that do not fit it.
    """
    codec, x = VAE(**vae.config(config)), last(golden["x"])
    weights = {name.removeprefix("w/"): a for name, a in golden.items() if name.startswith("w/")}
    golden = {name: a for name, a in golden.items() if not name.startswith("w/")}
    like = jax.eval_shape(codec.init, jax.random.key(0), jnp.zeros_like(x))["params"]
    variables = {"params": convert(weights, vae.rules(), like)[0]}
    apply = lambda *args, **kw: np.asarray(jax.jit(lambda v: codec.apply(v, *args, **kw))(variables))

    mean, logvar = jax.jit(lambda v: codec.apply(v, x, method="moments"))(variables)
    latents = apply(x, method="encode")
    ours = {
        "mean": mean,
        "logvar": logvar,
        "std": np.exp(0.5 * np.asarray(logvar)),
        "latents_mode_scaled": latents,
        "latents_sampled_scaled": apply(x, noise=last(golden["eps"]), method="encode"),
        "reconst": apply(latents, method="reconstruct"),
    }
    return {name: first(a) for name, a in ours.items()} | {"kl": gaussian.kl(mean, logvar)}, golden
