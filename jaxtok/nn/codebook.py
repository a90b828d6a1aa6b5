"""Codebooks: the nearest of many codes in little memory, gradients past a rounding, entropies, use, k-means.

Latents here are rows x [M D], codes [K D], everything float32. Whatever pairs rows with codes walks over the codes in
chunks, forwards and backwards, so that no [M K] array exists. A chunk takes every n-th code: where the codes are
split over devices, each device works on its own part of every chunk.
"""

import jax
import jax.numpy as jnp
import numpy as np

PAIRS = 2**25  # of rows and codes at a time: 128 MiB of scores, over all devices
LOWEST = -1e30  # the score of a code that does not exist; finite, for 0 * inf is NaN


# ---- gradients past a rounding ----


def straight_through(z, q):
    """q, with the gradient of z."""
    return jax.lax.stop_gradient(q) + (z - jax.lax.stop_gradient(z))


def rotate(z, q):
    """q [... D], with the gradient of the rotation and scaling that take z to q, both held constant.

    The rotation trick (arXiv 2410.06424, section 4): R = I - 2 w w' + 2 v u' with u, v the directions of z and q, and
    w that of u + v.
    """
    u, v = (jax.lax.stop_gradient(l2_normalize(x)) for x in (z, q))
    w = l2_normalize(u + v)
    scale = jax.lax.stop_gradient(_norm(q) / jnp.maximum(_norm(z), 1e-12))
    dot = lambda a, b: (a * b).sum(-1, keepdims=True)
    return straight_through(scale * (z - 2 * w * dot(w, z) + 2 * v * dot(u, z)), q)


def l2_normalize(x):
    """x [... D] / |x|; zero stays zero."""
    return x / jnp.maximum(_norm(x), 1e-12)


def _norm(x):
    square = jnp.square(x).sum(-1, keepdims=True)
    return jnp.sqrt(jnp.where(square > 0, square, 1)) * (square > 0)  # a gradient of 0, not NaN, at 0


# ---- rows and codes ----


def nearest(x, codes, chunk=None):
    """[M D], [K D] -> int32 [M], the code at the smallest Euclidean distance; of several, the first. No gradient."""
    return best(x, codes, half_square(codes), chunk)


def best(x, codes, bias=None, chunk=None):
    """[M D], [K D] -> int32 [M], the code of the largest <x, code> + bias [K]; of several, the first. No gradient."""
    x, codes, bias = jax.lax.stop_gradient((x, codes, bias))
    chunks = _chunks(codes, bias, chunk, x.shape[0])

    def step(found, part):
        scores, numbers = _scores(x, part), part[2]  # [M C], [C]
        value = scores.max(-1)
        index = jnp.where(scores == value[:, None], numbers, codes.shape[0]).min(-1)
        better = (value > found[0]) | ((value == found[0]) & (index < found[1]))
        return (jnp.where(better, value, found[0]), jnp.where(better, index, found[1])), None

    start = jnp.full(x.shape[0], -jnp.inf), jnp.zeros(x.shape[0], jnp.int32)
    return jax.lax.scan(step, start, chunks)[0][1]


def neighbours(x, codes, count, chunk=None):
    """[M D], [K D] -> int32 [M count]: the nearest codes, the nearest first. No gradient."""
    x, codes = jax.lax.stop_gradient((x, codes))
    chunks = _chunks(codes, half_square(codes), chunk, len(x))

    def step(found, part):
        values = jnp.concatenate([found[0], _scores(x, part)], -1)
        indices = jnp.concatenate([found[1], jnp.broadcast_to(part[2], (len(x), len(part[2])))], -1)
        values, places = jax.lax.top_k(values, count)
        return (values, jnp.take_along_axis(indices, places, -1)), None

    start = jnp.full((len(x), count), -jnp.inf), jnp.zeros((len(x), count), jnp.int32)
    return jax.lax.scan(step, start, chunks)[0][1]


def entropies(x, codes, bias=None, temperature=1.0, chunk=None):
    """Of p = softmax((<x, codes> + bias) / temperature), rows [M K] that are never whole -> two scalars, in nats.

    The mean over rows of the entropy of p (how undecided a row is), and the entropy of the mean over rows (how evenly
    the codes are used): MaskGIT's pair, E[H(p)] and H(E[p]). For Euclidean distances x is 2 z and bias -|code|^2.
    """
    x, bias = x / temperature, None if bias is None else bias / temperature
    chunks = _chunks(codes, bias, chunk, x.shape[0])
    normalizer = _normalizer(x, chunks)  # [M 1]

    @jax.checkpoint
    def step(own, part):
        log_p = _scores(x, part) - normalizer  # [M C]
        p = jnp.exp(log_p)
        mean = p.mean(0)
        return own - (p * log_p).sum(-1).mean(), -(mean * jnp.log(mean + 1e-5)).sum()

    own, shared = jax.lax.scan(step, jnp.zeros(()), chunks)
    return own, shared.sum()


def expected(x, codes, bias=None, chunk=None):
    """softmax(<x, codes> + bias) @ codes, [M D]; in that product, the codes are constant."""
    chunks = _chunks(codes, bias, chunk, x.shape[0])
    normalizer = _normalizer(x, chunks)

    @jax.checkpoint
    def share(part):
        return _product(jnp.exp(_scores(x, part) - normalizer), jax.lax.stop_gradient(part[0]))

    return jax.lax.scan(lambda y, part: (y + share(part), None), jnp.zeros_like(x), chunks)[0]


def half_square(codes):
    """-|code|^2 / 2 [K]: with it as bias, the largest score is the smallest distance."""
    return -jnp.square(codes).sum(-1) / 2


def _product(a, b):
    return jnp.matmul(a, b, precision="highest")


def _scores(x, part):
    codes, bias, _ = part
    return _product(x, codes.T) + bias


def _normalizer(x, chunks):
    """log sum exp of the scores over all codes, [M 1]."""
    step = jax.checkpoint(lambda total, part: jnp.logaddexp(total, jax.nn.logsumexp(_scores(x, part), -1)))
    start = jnp.full(x.shape[0], LOWEST)
    return jax.lax.scan(lambda total, part: (step(total, part), None), start, chunks)[0][:, None]


def _chunks(codes, bias, chunk, rows):
    """[K D], [K] -> [n C D], [n C] and their numbers, int32 [n C]; chunk j has the codes j, n + j, 2 n + j ..."""
    size, width = codes.shape
    rows = rows if isinstance(rows, int) else PAIRS // 1024  # exported for any number
    n = -(-size // (chunk or min(max(PAIRS // rows, 256), 8192)))
    columns = -(-size // n)
    pad = n * columns - size
    bias = jnp.zeros(size) if bias is None else bias
    codes = jnp.pad(codes, ((0, pad), (0, 0))).reshape(columns, n, width)
    bias = jnp.pad(bias, (0, pad), constant_values=LOWEST).reshape(columns, n)
    numbers = jnp.arange(n * columns, dtype=jnp.int32).reshape(columns, n)
    return codes.swapaxes(0, 1), bias.T, numbers.T


# ---- statistics ----


def counts_and_sums(x, indices, size):
    """How many rows [M D] each of `size` codes got, float32 [size], and their sum [size D]."""
    return jax.ops.segment_sum(jnp.ones(len(x)), indices, size), jax.ops.segment_sum(x, indices, size)


def draw_rows(key, x, count):
    """`count` rows of x [M D] in random order; none comes twice before all came once."""
    return x[jax.random.permutation(key, len(x))[jnp.arange(count) % len(x)]]


def kmeans(key, x, size, iterations):
    """Lloyd's algorithm on rows [M D] -> codes [size D], and how many rows are nearest to each.

    It starts from rows drawn at random; with fewer rows than codes, they come again with a little noise. A code that
    gets no row stays.
    """
    row_key, noise_key = jax.random.split(key)
    codes = draw_rows(row_key, x, size)
    noise = 0.01 * x.std(0) * jax.random.normal(noise_key, codes.shape)
    codes = codes + jnp.where(jnp.arange(size)[:, None] < len(x), 0, noise)

    def step(_, codes):
        counts, sums = counts_and_sums(x, nearest(x, codes), size)
        return jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1)[:, None], codes)

    codes = jax.lax.fori_loop(0, iterations, step, codes)
    return codes, counts_and_sums(x, nearest(x, codes), size)[0]


def usage(indices):
    """int [...] -> (perplexity, distinct), float32 scalars: exp of the entropy of the codes seen, and how many differ.

    By sorting, so the memory is that of the codes and not of the vocabulary. Both are bounded by the number of codes.
    """
    codes = jnp.sort(indices.reshape(-1))
    count = jnp.searchsorted(codes, codes, side="right") - jnp.searchsorted(codes, codes, side="left")
    return jnp.exp(-jnp.log(count / codes.size).mean()), (1.0 / count).sum()


# ---- indices from outside ----


def in_range(indices, vocabulary, who):
    """bool like indices [... ] or [... G]: which lie in 0 ... vocabulary - 1, an int or one for each of G.

    Raises ValueError if one does not; inside a jitted function, where values cannot be read, the caller gives NaN.
    """
    valid = (indices >= 0) & (indices < np.asarray(vocabulary))
    if not isinstance(valid, jax.core.Tracer) and not valid.all():
        raise ValueError(
            f"{who}: indices must lie in 0 ... {np.asarray(vocabulary) - 1}, got {int(indices.min())} ... "
            f"{int(indices.max())}: were they made by another tokenizer?"
        )
    return valid


def take(codes, indices, who):
    """Rows of codes [K D] at indices int [...] -> [... D]; for an index outside see in_range."""
    valid = in_range(indices, len(codes), who)
    return jnp.where(valid[..., None], codes[indices], jnp.nan)


# ---- several indices a token ----


def join(parts):
    """Indices [B N] or [B N G] each -> [B N sum G]."""
    return jnp.concatenate([part if part.ndim == 3 else part[..., None] for part in parts], -1)


def split(indices, vocabularies):
    """The inverse of join: a list, [B N] for each vocabulary that is a number, [B N G] for a tuple of G."""
    parts, at = [], 0
    for vocabulary in vocabularies:
        if isinstance(vocabulary, int):
            parts.append(indices[..., at])
            at += 1
        else:
            parts.append(indices[..., at : at + len(vocabulary)])
            at += len(vocabulary)
    return parts


def flat(vocabularies):
    """The flat tuple of several vocabularies, numbers or tuples."""
    return tuple(n for v in vocabularies for n in ((v,) if isinstance(v, int) else v))
