"""Text as vectors for a generator to read: a small tower that is trained with the run, and no pretrained text model."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtok.nn.decoder_block import Side, stack
from jaxtok.nn.norm import Norm


class TextTransformer(nn.Module):
    """A bidirectional transformer over the bytes of a text: what `data.transforms.caption_bytes` gives.

    It knows what the run's own captions teach it and nothing else: for training from nothing on small data, where no
    pretrained text model is at hand (`pretrained.minilm`, `t5` and `clip_text` read words they were never shown here).

    Attributes:
      width, depth: of the transformer.
      length: T, the most bytes that there can be.
      vocabulary: how many ids there are; 0 is padding.
      head_dim: heads are width / head_dim.
      dtype: of the computation.
    """

    width: int
    depth: int
    length: int
    vocabulary: int = 257
    head_dim: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, text):
        """Ids int32 [B T], 0 where there is no more text -> (features float32 [B T width], mask bool [B T]).

        Nothing reads padding, and the features there mean nothing; the mask says where they do. The first place counts
        always, so that there is something to attend to where the text is empty.
        """
        n = text.shape[1]
        if n > self.length:
            raise ValueError(f"TextTransformer has places for {self.length} bytes, got {n}.")
        normal = nn.initializers.normal(0.02)
        mask = (text > 0) | (jnp.arange(n) == 0)  # [B T]
        x = nn.Embed(self.vocabulary, self.width, embedding_init=normal, name="embed")(text)
        x = x + self.param("pos_embed", normal, (self.length, self.width))[:n]  # [B T D]
        side = Side(jnp.broadcast_to(mask[:, None], (len(text), n, n)))
        blocks = stack(self.depth, head_dim=self.head_dim, dtype=self.dtype, name="blocks")
        x, _ = blocks(x.astype(self.dtype), side, False)
        return Norm(name="norm")(x.astype(jnp.float32)), mask
