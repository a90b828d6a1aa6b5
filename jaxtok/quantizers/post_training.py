"""Quantization of continuous latents after training (TokenBridge, arXiv 2503.16430): fixed levels, no training."""

import statistics

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxtok.nn import codebook
from jaxtok.structs import Codes


def gaussian_levels(bits, reach=3.0):
    """float64 [2^bits], rising: the mean of a standard normal, cut off at +-reach, in each of 2^bits equally likely
    cells.

    Cells end at the normal quantiles of k / 2^bits, the outer ones at -reach and reach.
    """
    normal = statistics.NormalDist()
    inner = [normal.inv_cdf(k / 2**bits) for k in range(1, 2**bits)]
    ends = np.clip([-reach, *inner, reach], -reach, reach)
    pdf, cdf = (np.array([f(end) for end in ends]) for f in (normal.pdf, normal.cdf))
    return (pdf[:-1] - pdf[1:]) / (cdf[1:] - cdf[:-1])


def channel_order(latents):
    """Latents of M pictures, [M h w C] -> int [C], the channels by the mean frequency of their spectrum, lowest
    first.

    The order in which a generator writes the channels of a token: what is smooth over the picture comes first.
    """
    latents = np.asarray(latents, np.float64)
    power = np.abs(np.fft.fft2(latents - latents.mean((1, 2), keepdims=True), axes=(1, 2))) ** 2
    frequency = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) for n in latents.shape[1:3]), indexing="ij"))
    power = power.mean(0)  # [h w C]
    return np.argsort((power * frequency[..., None]).sum((0, 1)) / np.maximum(power.sum((0, 1)), 1e-30))


class GaussianLevels(nn.Module):
    """Latents [B N C] -> Codes with an index a channel, [B N C]: the nearest of 2^bits levels of a Gaussian shape.

    Or [B N 2C], of an encoder that quantizers.gaussian.Gaussian was trained with: of its means and log variances, only
    the means are read. So a tokenizer's config becomes that of its quantized form by this one part.

    Levels are those of gaussian_levels, stretched so that -reach ... reach covers low ... high; what lies outside
    goes to the outermost. They are equally likely for normal latents whose standard deviation is (high - low) / (2
    reach). There are no parameters; the gradient passes straight through.

    Attributes:
      channels: C.
      bits: of an index.
      low, high: the range of the latents; +-5 with the autoencoder of MAR, whose latents are multiplied by 0.2325.
      reach: where the normal distribution is cut off.
    """

    channels: int = 16
    bits: int = 6
    low: float = -5.0
    high: float = 5.0
    reach: float = 3.0

    @property
    def vocabulary(self):
        """The number of levels, once for each channel."""
        return (2**self.bits,) * self.channels

    def levels(self):
        """float32 [2^bits], rising, in the range of the latents."""
        unit = (gaussian_levels(self.bits, self.reach) + self.reach) / (2 * self.reach)
        return (self.low + unit * (self.high - self.low)).astype(np.float32)

    def __call__(self, latents, *, train=False):
        if latents.shape[-1] not in (self.channels, 2 * self.channels):
            raise ValueError(
                f"GaussianLevels.channels is {self.channels}, but the encoder gives {latents.shape[-1]}: it takes as "
                "many, or twice as many, means and log variances."
            )
        z, levels = latents[..., : self.channels].astype(jnp.float32), self.levels()
        indices = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, z).astype(jnp.int32)  # halfway, the lower one
        z = codebook.straight_through(z, jnp.asarray(levels)[indices])
        return Codes(z=z, indices=indices, keep=jnp.ones(z.shape[:2], bool))

    def lookup(self, indices):
        """int [B N C] -> z [B N C]. An index outside raises ValueError; inside a jitted function it gives NaN."""
        valid = codebook.in_range(indices, self.vocabulary, "GaussianLevels")
        return jnp.where(valid, jnp.asarray(self.levels())[indices], jnp.nan)
