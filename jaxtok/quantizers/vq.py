"""Vector quantization (VQ-VAE; van den Oord et al., arXiv 1711.00937): a latent becomes the nearest of K codes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.nn import codebook
from jaxtok.structs import Codes

USE_DECAY = 0.99  # of the running counts of a codebook that is trained by gradient


def quantize(z, codes, *, rotation=False, temperature=None, moving=False):
    """Latents float32 [B N D], codes [K D] -> Codes: for each latent the nearest code.

    aux has `commitment`, the mean of (z - sg q)^2 over all elements, and unless `moving` (the codes get no gradient)
    `codebook`, that of (sg z - q)^2. With a temperature it also has `sample_entropy` and `batch_entropy`, the pair of
    nn.codebook.entropies for minus squared distances.
    """
    rows = z.reshape(-1, z.shape[-1])
    indices = codebook.nearest(rows, codes).reshape(z.shape[:-1])  # [B N]
    q = codes[indices]
    aux = {"commitment": jnp.square(z - jax.lax.stop_gradient(q)).mean()}
    if not moving:
        aux["codebook"] = jnp.square(jax.lax.stop_gradient(z) - q).mean()
    if temperature is not None:
        pair = codebook.entropies(2 * rows, codes, 2 * codebook.half_square(codes), temperature)
        aux["sample_entropy"], aux["batch_entropy"] = pair
    through = codebook.rotate if rotation else codebook.straight_through
    return Codes(z=through(z, q), indices=indices, keep=jnp.ones(indices.shape, bool), aux=aux)


# ---- what no gradient does: state is {"codes" [K D], "count" [K], "sum" [K D]}, the last two where they are kept ----


def count_use(state, indices, decay):
    """Running counts of the latents a batch that fall to each code."""
    counts = jnp.bincount(indices.reshape(-1), length=len(state["count"]))
    return state | {"count": decay * state["count"] + (1 - decay) * counts}


def moving_average(state, rows, indices, decay, epsilon=1e-7):
    """Codes become running means of their latents (arXiv 1711.00937, appendix A.1).

    Counts are smoothed by epsilon (Laplace), so that a code which is never used does not divide by zero.
    """
    state = count_use(state, indices, decay)
    sums = jax.ops.segment_sum(rows, indices.reshape(-1), len(state["codes"]))
    sums = decay * state["sum"] + (1 - decay) * sums
    count, total = state["count"], state["count"].sum()
    smooth = (count + epsilon) / (total + len(count) * epsilon) * total
    return state | {"sum": sums, "codes": sums / smooth[:, None]}


def cluster(state, nearest, rows, decay=USE_DECAY):
    """Codes move towards latents, rows[nearest] [K D], the further the less they are used (CVQ, arXiv 2307.15139)."""
    share = state["count"] / len(rows)
    step = jnp.exp(-share * len(share) * 10 / (1 - decay) - 1e-3)[:, None]
    return state | {"codes": state["codes"] * (1 - step) + rows[nearest] * step}


def revive(state, key, rows, threshold):
    """A code whose count is below the threshold becomes a latent of the batch, with twice the threshold as count."""
    dead = state["count"] < threshold
    fresh = codebook.draw_rows(key, rows, len(dead))
    new = {"codes": fresh, "count": jnp.full_like(state["count"], 2 * threshold), "sum": 2 * threshold * fresh}
    pick = lambda new, old: jnp.where(dead.reshape(-1, *[1] * (old.ndim - 1)), new, old)
    return {name: pick(new[name], old) for name, old in state.items()}


def start(state, key, rows, iterations):
    """Codes by k-means on a batch."""
    codes, count = codebook.kmeans(key, rows, len(state["codes"]), iterations)
    count = jnp.maximum(count, 1)  # a code without latents stays where it is
    new = {"codes": codes, "count": count, "sum": codes * count[:, None]}
    return {name: new[name] for name in state}


class VQ(nn.Module):
    """Latents [B N D] -> Codes, one index a token; float32 inside.

    The codebook is a parameter, which the losses `commitment` and `codebook` train (losses.quantizer.aux), or with
    `ema` the running mean of the latents that fell to each code, and then only `commitment` is there. What no
    gradient writes lives in the collection "codebook": with `ema` the codes themselves, else an offset that is added
    to the parameter and takes what k-means, revival and clustering write. It changes when `train` is set and the
    collection is mutable, by sums over the whole batch, on however many devices that lies.

    Attributes:
      size: K, the vocabulary.
      normalize: what is scaled to length 1 before anything else: "none", "both" latents and codes, or only "latents".
      rotation: the gradient passes by the rotation trick (arXiv 2410.06424), not straight through.
      temperature: of the aux entropies `sample_entropy` and `batch_entropy` in training; None: they are not computed.
      ema: decay of a moving-average codebook; None: it is trained by gradient.
      kmeans: iterations of k-means that make the codes from the first training batch; 0: they start at random.
      revive: a code whose running count of latents a batch is below this becomes a random latent of the batch.
      clustering: codes move towards the nearest latent of every batch, the further the less they are used.

    k-means and revival draw from the rng stream "train". Weight decay should not fall on the codebook.
    """

    size: int
    normalize: str = "none"
    rotation: bool = False
    temperature: float | None = None
    ema: float | None = None
    kmeans: int = 0
    revive: float = 0.0
    clustering: bool = False

    @property
    def vocabulary(self):
        """The number of codes."""
        return self.size

    @nn.compact
    def __call__(self, latents, *, train=False):
        self._declare(latents.shape[-1])
        latents = latents.astype(jnp.float32)
        z = latents if self.normalize == "none" else codebook.l2_normalize(latents)
        learns = train and self.is_mutable_collection("codebook") and not self.is_initializing()
        rows = jax.lax.stop_gradient(z.reshape(-1, z.shape[-1]))
        if learns and self.kmeans:
            begin = lambda state, key: start(state, key, rows, self.kmeans)
            stay = lambda state, key: state
            started = self.get_variable("codebook", "started")
            self._write(jax.lax.cond(started, stay, begin, self._kept(), self.make_rng("train")))
            self.put_variable("codebook", "started", jnp.ones((), bool))
        codes, temperature = self.codes(), self.temperature if train else None
        out = quantize(z, codes, rotation=self.rotation, temperature=temperature, moving=self.ema is not None)
        if learns and self.has_variable("codebook", "count"):
            state = self._kept()
            if self.ema is not None:
                state = moving_average(state, rows, out.indices, self.ema)
            else:
                state = count_use(state, out.indices, USE_DECAY)
            if self.clustering:
                state = cluster(state, codebook.nearest(codes, rows), latents.reshape(rows.shape))
            if self.revive:
                state = revive(state, self.make_rng("train"), rows, self.revive)
            self._write(state)
        return out

    def lookup(self, indices):
        """int [B N] -> z float32 [B N D]. An index outside raises ValueError; inside a jitted function it gives NaN."""
        return codebook.take(self.codes(), indices, "VQ")

    def codes(self):
        """float32 [K D], what the indices stand for."""
        return codebook.l2_normalize(self._codes()) if self.normalize == "both" else self._codes()

    def _codes(self):
        if self.ema is not None:
            return self.get_variable("codebook", "codes")
        return self.get_variable("params", "codebook") + self.get_variable("codebook", "offset", 0.0)

    def _declare(self, width):
        """Makes the codes and what is kept about them."""
        if self.normalize not in ("none", "both", "latents"):
            raise ValueError(f'VQ.normalize is "none", "both" or "latents", not "{self.normalize}".')
        if self.clustering and (self.ema is not None or self.revive):
            raise ValueError(
                "VQ.clustering moves unused codes of a codebook trained by gradient: leave ema and revive out."
            )
        bound, shape = 1 / self.size, (self.size, width)
        init = lambda key: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        begin = 0.0 if self.clustering else max(1.0, 2 * self.revive)
        if self.ema is not None:
            codes = self.variable("codebook", "codes", lambda: init(self.make_rng("params"))).value
            self.variable("codebook", "sum", lambda: begin * codes)
        else:
            self.param("codebook", init)
            if self.kmeans or self.revive or self.clustering:
                self.variable("codebook", "offset", jnp.zeros, shape)
        if self.ema is not None or self.revive or self.clustering:
            self.variable("codebook", "count", jnp.full, self.size, begin)
        if self.kmeans:
            self.variable("codebook", "started", jnp.zeros, (), bool)

    def _kept(self):
        kept = {name: self.get_variable("codebook", name) for name in ("count", "sum")}
        state = {"codes": self._codes()} | {name: value for name, value in kept.items() if value is not None}
        return jax.lax.stop_gradient(state)

    def _write(self, state):
        """Puts the state back; a parameter stays as it is, its offset takes the change."""
        if self.ema is None:
            offset = self.get_variable("codebook", "offset")
            state = state | {"offset": offset + (state["codes"] - self._codes())}
            del state["codes"]
        for name, value in state.items():
            self.put_variable("codebook", name, jax.lax.stop_gradient(value))
