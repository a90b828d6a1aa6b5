"""Models together with their weights: pictures to codes and codes to pictures, and conditions to codes."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok import sharding
from jaxtok.build import check_keys, parameters
from jaxtok.nn.nested_dropout import powers_of_two
from jaxtok.tokenizer import Tokenizer


class BoundTokenizer:
    """What `jaxtok.load` returns. Its functions are compiled once for each shape (and each `tokens` or options).

    Attributes:
      model: the Tokenizer.
      variables: its parameters and other collections, as `model.apply` takes them.
      tokens: N, how many a picture has; None where that is not known beforehand.
      vocabulary: indices are 0 ... vocabulary - 1; a tuple of G for tokens of G indices, None for continuous ones.
      picture: (H, W, 3) of the pictures that it was made for; None: of any size, and tokens have places.
    """

    def __init__(self, model: Tokenizer, variables: dict[str, Any], mesh: jax.sharding.Mesh | None = None):
        """`mesh`: batches that it divides are split over it; the variables lie on it already."""
        if model.text_tower is not None:
            raise ValueError(
                "This tokenizer reads the texts of its pictures, and what jaxtok.load gives hands it none: "
                "python -m jaxtok.evaluate measures it, and `jaxtok.hub.restore(workdir, None)` gives model and "
                "variables, whose `encode` and `decode` take the texts as `context`."
            )
        self.model, self.variables, self._mesh = model, variables, mesh
        self.vocabulary = model.quantizer.vocabulary
        self.picture, self.tokens = picture_shape(model), None
        if self.picture is not None:
            encode = functools.partial(model.apply, method="encode")
            codes = jax.eval_shape(encode, variables, jax.ShapeDtypeStruct((1, *self.picture), jnp.uint8))
            self.tokens = codes.keep.shape[1]
        self._encoder = jax.jit(functools.partial(encode_arrays, model), static_argnames="tokens")
        self._decoder = jax.jit(functools.partial(decode_arrays, model), static_argnames=("grid", "options"))

    def encode(self, images, tokens: int | None = None) -> jax.Array:
        """Pictures -> int32 [B N], or [B k] for the first k = `tokens` of them, which costs less.

        Tokens of G indices are [B N G]; continuous ones are float32 [B N D], or [B h w D] where they have places.

        Args:
          images: [B H W 3], numpy or jax: uint8, or floats in the codec's range ([-1, 1] unless it says otherwise).

        The same picture has the same codes always: a VAE's latents are the mean of its posterior. ValueError for other
        shapes, types and ranges.
        """
        images = self.check_images(images)
        if tokens is not None and not 1 <= tokens <= (self.tokens or tokens):
            raise ValueError(f"tokens={tokens}: a picture has 1 to {self.tokens} tokens.")
        return self._encoder(self.variables, put(images, self._mesh), tokens=None if tokens == self.tokens else tokens)

    def decode(self, codes, *, seed: int = 0, grid: tuple[int, int] | None = None, **options) -> jax.Array:
        """Codes -> pictures, uint8 [B H W 3].

        Args:
          codes: integers [B k]: the first k tokens of each picture, k from 1 to N. [B k G], or floats [B k D] and
            [B h w D], as `encode` gives them.
          seed: of the noise that a generative decoder starts from; the same seed gives the same pictures.
          grid: (h, w), where indices have places; default: as many rows as columns.
          options: of the decoder's `sample`: a flow's `steps`, `guidance` and `guide`, for instance.

        Programs are compiled for k a power of two or N; other k use the next one, with the same result. ValueError for
        other shapes and for indices that are no codes of this tokenizer, TypeError for options that are not there.
        """
        codes = check_codes(codes, self.vocabulary)
        k = codes.shape[1] if codes.ndim < 4 else codes.shape[1] * codes.shape[2]
        if k > (self.tokens or k):
            raise ValueError(f"A picture has 1 to {self.tokens} tokens here, got {k}.")
        if self.picture is None and codes.ndim < 4:
            grid = square(k) if grid is None else tuple(grid)
            if grid[0] * grid[1] != k:
                raise ValueError(f"grid={grid} has not {k} places.")
        elif grid is not None:
            raise ValueError("grid is for indices of tokens with places, which these have not.")
        check_sampler(self.model.decoder, options)
        bucket = next(n for n in powers_of_two(self.tokens) if n >= k) if self.tokens else k
        if bucket > k:
            codes = np.pad(codes, ((0, 0), (0, bucket - k), *[(0, 0)] * (codes.ndim - 2)))
        options, key = tuple(sorted(options.items())), jax.random.key(seed)
        return self._decoder(self.variables, put(codes, self._mesh), k, key, grid=grid, options=options)

    def check_images(self, images):
        """Images as `encode` takes them, floats as float32. ValueError for other shapes, types and ranges."""
        images = images if isinstance(images, jax.Array) else np.asarray(images)
        shape = ("B", *(self.picture or ("H", "W", 3)))
        wanted = f"images are [{' '.join(map(str, shape))}]"
        if images.ndim != 4 or images.shape[3] != 3 or not images.size:
            raise ValueError(f"{wanted}, channels last, and these are {list(images.shape)}.")
        any_size = self.picture is None or getattr(self.model.encoder, "grid", None) is not None
        if not any_size and images.shape[1:] != self.picture:
            raise ValueError(f"{wanted} for this tokenizer: resize them, {list(images.shape)}, first.")
        if images.dtype == np.uint8:
            return images
        low, high = getattr(self.model.codec, "low", -1.0), getattr(self.model.codec, "high", 1.0)
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"Images are uint8, or floats in [{low:g}, {high:g}], and these are {images.dtype}.")
        least, most = float(images.min()), float(images.max())
        if not (low <= least and most <= high):  # NaN is in no range
            raise ValueError(f"Images of floats lie in [{low:g}, {high:g}], and these in [{least:g}, {most:g}].")
        return images.astype(np.float32)


class BoundGenerator:
    """What `jaxtok.load` returns for a generator. Its functions are compiled once for each shape and set of options.

    Attributes:
      task: the GeneratorTask; task.model is the generator.
      variables: {"generator", "tokenizer", and "text_tower" if there is one}.
    """

    def __init__(self, task, variables: dict[str, Any], mesh: jax.sharding.Mesh | None = None):
        """`mesh`: batches that it divides are split over it; the variables lie on it already."""
        self.task, self.variables, self._mesh = task, variables, mesh
        self._sampler = jax.jit(functools.partial(sample_codes, task), static_argnames=("batch", "options"))
        self._decoder = jax.jit(functools.partial(decode_codes, task), static_argnames="options")

    def sample(self, labels=None, *, text=None, batch: int = 1, seed: int = 0, **options) -> jax.Array:
        """Draws codes int32 [B k], or latents float32 [B h w C].

        Args:
          labels: int [B], classes, for a model that has any.
          text: int [B T], as the run's transforms make it of captions, for a model that reads it.
          batch: how many, where there is neither: unconditional samples.
          seed: the same seed and batch give the same codes.
          options: of the generator's `sample`: `tokens`, `guidance`, `temperature`, `top_k`, `top_p` of an
            autoregressive one, for instance.

        ValueError for labels that are no classes, TypeError for options that are not there.
        """
        model, given = self.task.model, {}
        if labels is not None:
            labels, classes = np.atleast_1d(np.asarray(labels)), getattr(model, "classes", 0)
            if labels.dtype.kind not in "iu" or labels.ndim != 1 or not labels.size:
                raise ValueError(f"Labels are integers [B], not {labels.dtype} {list(labels.shape)}.")
            if labels.min() < 0 or labels.max() >= classes:
                raise ValueError(f"Labels lie in 0 ... {classes - 1} here, got {labels.min()} ... {labels.max()}.")
            given["label"] = labels.astype(np.int32)
        if text is not None:
            if self.task.text_tower is None:
                raise ValueError("This generator reads no text.")
            given["text"] = np.asarray(text, np.int32)
        wanted = [k for k, has in (("label", getattr(model, "classes", 0)), ("text", self.task.text_tower)) if has]
        if given and set(given) != set(wanted):
            raise ValueError(f"This generator is conditioned on {' and '.join(wanted)}; only {sorted(given)} is given.")
        if len({len(value) for value in given.values()}) > 1:
            raise ValueError("There are not as many labels as texts.")
        batch = len(next(iter(given.values()))) if given else batch
        check_draws(model, options)
        options = tuple(sorted(options.items()))
        return self._sampler(self.variables, put(given, self._mesh), jax.random.key(seed), batch=batch, options=options)

    def decode(self, codes, *, seed: int = 0, **options) -> jax.Array:
        """Codes int [B k] or latents [B h w C] -> pictures uint8 [B H W 3].

        options: of the tokenizer's decoder, before those of the run's config (`task.decoder`).

        ValueError for other shapes and for indices that are no codes of the tokenizer.
        """
        codes = check_codes(codes, self.task.codec.quantizer.vocabulary)
        check_sampler(self.task.codec.decoder, options)
        options = tuple(sorted((dict(self.task.decoder) | options).items()))
        return self._decoder(self.variables, put(codes, self._mesh), jax.random.key(seed), options=options)


def sample_codes(task, variables, given, key, batch, options):
    """Codes for a batch that brings the conditions in `given`, maybe none."""
    condition = task.condition(variables, given) if given else None
    return task.sample(variables, key, condition, batch=batch, **dict(options))


def decode_codes(task, variables, codes, key, options):
    """Pictures uint8 of codes or latents."""
    return dataclasses.replace(task, decoder=dict(options)).decode(variables["tokenizer"], codes, key)


def check_codes(codes, vocabulary):
    """Codes as `decode` takes them, numpy int32 or float32. ValueError for other shapes, types and ranges."""
    codes = np.asarray(codes)
    if vocabulary is None:
        if codes.dtype.kind != "f" or codes.ndim not in (3, 4) or not np.isfinite(codes).all() or not codes.size:
            raise ValueError(f"Tokens are finite floats [B k D] here, not {codes.dtype} {list(codes.shape)}.")
        return codes.astype(np.float32)
    sizes = np.asarray(vocabulary)
    wanted = "[B k]" if sizes.ndim == 0 else f"[B k {len(sizes)}]"
    if codes.dtype.kind not in "iu" or codes.shape[2:] != sizes.shape or codes.ndim < 2 or not codes.size:
        raise ValueError(f"Codes are integers {wanted}, not {codes.dtype} {list(codes.shape)}.")
    if codes.min() < 0 or (codes >= sizes).any():
        raise ValueError(
            f"Codes must lie in 0 ... {sizes - 1}, got {codes.min()} ... {codes.max()}: "
            "were they made by another tokenizer?"
        )
    return codes.astype(np.int32)


def check_sampler(decoder, options):
    """TypeError for an option that the decoder's `sample` does not have."""
    known = [name for name in parameters(decoder.sample) if name not in ("codes", "rng", "noise")]
    check_keys(options, known, f"{type(decoder).__name__}.sample")


def check_draws(generator, options):
    """TypeError for an option that the generator's `sample` does not have."""
    known = parameters(getattr(generator, "rollout", generator.sample))  # where `sample` hands its options on
    known = [name for name in known if name not in ("rng", "condition", "batch")]
    check_keys(options, known, f"{type(generator).__name__}.sample")


def put(batch, mesh):
    """A tree of arrays [B ...], split over the mesh where that divides them."""
    rows = [len(x) for x in jax.tree.leaves(batch)]
    if mesh is None or any(n % (mesh.shape["data"] * mesh.shape["fsdp"]) for n in rows):
        return batch
    return jax.tree.map(lambda x: sharding.put_batch({"rows": x}, mesh)["rows"], batch)


def encode_arrays(model, variables, images, tokens=None):
    """Images [B H W 3] -> their first `tokens`: int32 [B k] or [B k G]; float32 [B k D], or [B h w D] of all."""
    fewer = tokens is not None and "tokens" in parameters(type(model.encoder).__call__)  # which costs less
    codes = model.apply(variables, images, **({"tokens": tokens} if fewer else {}), method="encode")
    if codes.indices is not None:
        return codes.indices[:, :tokens]
    if codes.grid is not None and tokens in (None, codes.z.shape[1]):
        return codes.z.reshape(codes.z.shape[0], *codes.grid, -1)
    return codes.z[:, :tokens]


def decode_arrays(model, variables, arrays, k, key, grid=None, options=()):
    """What `encode_arrays` gives, of which the first k tokens count -> uint8 [B H W 3].

    grid: (h, w) of indices with places. options: pairs, of the decoder's `sample`.
    """
    n = arrays.shape[1] if arrays.ndim < 4 else arrays.shape[1] * arrays.shape[2]
    return paint(model, variables, model.apply(variables, arrays, n, grid, method="lookup"), k, key, options)


def paint(model, variables, codes, k, key, options=()):
    """Codes, of which the first k tokens count -> uint8 [B H W 3]. options: pairs, of the decoder's `sample`."""
    keep = codes.keep & (jnp.arange(codes.keep.shape[1]) < k)  # k is a number, not a shape
    pixels = model.apply(variables, codes.replace(keep=keep), key, **dict(options), method="decode")
    return jnp.round(pixels * 255).astype(jnp.uint8)


def square(n):
    """(h, w) of n places, as many rows as columns. ValueError if n is no square."""
    side = math.isqrt(n)
    if side * side != n:
        raise ValueError(f"{n} tokens with places are no square: give grid=(rows, columns).")
    return side, side


def picture_shape(model):
    """(H, W, 3) of what the decoder gives, where it is made for one size; else None."""
    if getattr(model.decoder, "shape", None) is None:
        return None
    decode = lambda model: model.codec.decode(jnp.zeros((1, *model.decoder.shape)))
    pixels, _ = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), method=decode))
    return pixels.shape[1:]
