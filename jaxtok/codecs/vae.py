"""A frozen KL autoencoder between pixels and what the encoder sees (latent diffusion, arXiv 2112.10752)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtok.nn import gaussian
from jaxtok.nn.conv import ConvDecoder, ConvEncoder


class VAE(nn.Module):
    """Pixels [B H W 3] <-> latents [B H/f W/f C], f = 2^(levels - 1): the architecture of Stable Diffusion and SDXL.

    The defaults are FlexTok's sizes (arXiv 2502.13967), 83.8 M parameters; `pretrained.vae.config` reads those of a
    published checkpoint.

    Attributes:
      latent_channels: C.
      channels, blocks, groups: of both trunks, see nn.conv.ConvEncoder.
      scaling_factor, shift_factor: latents = (z - shift) * scaling: what gives them about mean 0 and variance 1.
      quant_convs: whether a 1x1 convolution follows the encoder and precedes the decoder (not in SD3 and FLUX).
      dtype: of the computation; latents and pixels are float32 in any case.
    """

    latent_channels: int = 16
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    quant_convs: bool = True
    dtype: Any = jnp.float32

    def setup(self):
        trunk = dict(channels=self.channels, blocks=self.blocks, groups=self.groups, dtype=self.dtype)
        self.encoder = ConvEncoder(2 * self.latent_channels, **trunk)
        self.decoder = ConvDecoder(3, **trunk)
        if self.quant_convs:
            self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1))
            self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1))

    def __call__(self, pixels):
        """There and back, deterministic: for `init`, which must see both halves."""
        return self.decode(self.encode(pixels))

    def moments(self, pixels):
        """Pixels as `encode` takes them -> (mean, logvar in [-30, 20]) of the unscaled posterior, float32 [B h w C]."""
        if pixels.dtype == jnp.uint8:
            pixels = pixels.astype(jnp.float32) / 127.5 - 1
        x = self.encoder(pixels)
        return gaussian.moments(self.quant_conv(x) if self.quant_convs else x)

    def encode(self, pixels, rng=None, noise=None):
        """Scaled latents, float32 [B h w C].

        Args:
          pixels: [B H W 3], uint8 or floats in [-1, 1]; ValueError unless f divides H and W.
          rng: None for the mean of the posterior; a key for a sample of it.
          noise: [B h w C], standard normal, instead of a key.
        """
        mean, logvar = self.moments(pixels)
        if rng is not None:
            noise = jax.random.normal(rng, mean.shape)
        z = mean if noise is None else gaussian.sample(mean, logvar, noise)
        return (z - self.shift_factor) * self.scaling_factor

    def reconstruct(self, latents):
        """Scaled latents [B h w C] -> what the decoder gives, float32 [B H W 3] near [-1, 1], unclipped."""
        z = latents.astype(jnp.float32) / self.scaling_factor + self.shift_factor
        return self.decoder(self.post_quant_conv(z) if self.quant_convs else z)

    def decode(self, latents):
        """Scaled latents [B h w C] -> pixels float32 [B H W 3] in [0, 1]."""
        return jnp.clip(self.reconstruct(latents) / 2 + 0.5, 0, 1)
