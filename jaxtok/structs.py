"""What the rooms hand to each other."""

from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class Codes:
    """A picture as tokens: what a quantizer returns and a decoder reads.

    Attributes:
      z: float32 [B N D], the quantized latents that the decoder sees.
      indices: int32 [B N] (or [B N G] for G groups), or None when the latents are continuous.
      keep: bool [B N], True where a token carries information; what a dropped token becomes is the decoder's choice.
      grid: (h, w) or (t, h, w) when the tokens have places, None for register tokens. Static.
      aux: dict of scalars a loss or a log may want (commitment, entropy ...).
    """

    z: jax.Array
    indices: jax.Array | None
    keep: jax.Array
    grid: tuple[int, ...] | None = flax.struct.field(pytree_node=False, default=None)
    aux: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class Decoded:
    """A decoder's training output; `prediction` and `target` live in the space it trains in (pixels, velocity ...).

    Attributes:
      prediction, target: arrays (or equal trees of arrays) [B h w C].
      features: what alignment losses may tap, by name.
    """

    prediction: Any
    target: Any
    features: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
