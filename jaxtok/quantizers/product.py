"""Product quantization: parts of a latent, or streams of latents, each with a codebook of its own."""

import itertools

import flax.linen as nn
import jax.numpy as jnp

from jaxtok.nn import codebook
from jaxtok.structs import Codes


class Product(nn.Module):
    """Latents [B N D] or {stream: [B N d]} -> Codes with the indices of all books side by side, [B N G].

    z is the z of all books joined along D, in the order of `books`. Factorized codebooks (FQGAN, arXiv 2411.16681),
    multi-codebook quantization (UniTok, arXiv 2502.20321), FSQ in groups. Losses in aux are summed over the books
    that have them; where all are equally wide there is also `overlap`, the mean over tokens and pairs of books of the
    squared cosine between their z, which FQGAN keeps small so that books do not say the same.

    Attributes:
      books: quantizers. A tuple: they take the channels in order. A dict by stream: each takes its own latents.
      widths: the channels of each book of a tuple; None: equal parts.
    """

    books: tuple[nn.Module, ...] | dict[str, nn.Module]
    widths: tuple[int, ...] | None = None

    @property
    def vocabulary(self):
        """The numbers of codes, one for each of the G indices."""
        return codebook.flat(book.vocabulary for book in self._books())

    def __call__(self, latents, *, train=False):
        codes = [book(part, train=train) for book, part in zip(self._books(), self._parts(latents), strict=True)]
        names = {name: None for one in codes for name in one.aux}
        aux = {name: sum(one.aux[name] for one in codes if name in one.aux) for name in names}
        pairs = list(itertools.combinations([codebook.l2_normalize(one.z) for one in codes], 2))
        if pairs and len({one.z.shape[-1] for one in codes}) == 1:
            aux["overlap"] = sum(jnp.square((a * b).sum(-1)).mean() for a, b in pairs) / len(pairs)
        return Codes(
            z=jnp.concatenate([one.z for one in codes], -1),
            indices=codebook.join([one.indices for one in codes]),
            keep=jnp.ones(codes[0].keep.shape, bool),
            grid=codes[0].grid,
            aux=aux,
        )

    def lookup(self, indices):
        """int [B N G] -> z [B N D]. An index outside raises ValueError; inside a jitted function it gives NaN."""
        books = self._books()
        if indices.shape[-1] != len(self.vocabulary):
            raise ValueError(f"Product.lookup takes {len(self.vocabulary)} indices a token, got {indices.shape[-1]}.")
        parts = codebook.split(indices, [book.vocabulary for book in books])
        return jnp.concatenate([book.lookup(part) for book, part in zip(books, parts, strict=True)], -1)

    def _books(self):
        return tuple(self.books.values()) if hasattr(self.books, "values") else tuple(self.books)

    def _parts(self, latents):
        if hasattr(self.books, "values"):
            if not hasattr(latents, "keys") or set(latents) != set(self.books):
                given = sorted(latents) if hasattr(latents, "keys") else "a single array"
                raise ValueError(f"Product.books are named {sorted(self.books)}, but the encoder gives {given}.")
            return [latents[name] for name in self.books]
        width, count = latents.shape[-1], len(self.books)
        widths = self.widths or (width // count,) * count
        if len(widths) != count or sum(widths) != width:
            raise ValueError(
                f"Product has {count} books of widths {tuple(widths)}, but the encoder gives {width} channels: "
                "set `widths`, or the encoder's `channels`."
            )
        return jnp.split(latents, list(itertools.accumulate(widths))[:-1], -1)
