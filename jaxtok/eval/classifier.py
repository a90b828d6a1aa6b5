"""A small classifier of real pictures, to judge whether class-conditional samples look like their class."""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtok.eval.probe import accuracies
from jaxtok.nn.conv import GroupNorm, ResBlock, conv
from jaxtok.nn.linear import Linear


class Classifier(nn.Module):
    """Pictures uint8 [B H W 3] -> logits float32 [B classes]: stages of one residual block at half the resolution each.

    Attributes:
      classes: how many.
      widths: channels of the stages.
      groups: of the group norms; must divide the widths.
    """

    classes: int
    widths: tuple[int, ...] = (32, 64, 128)
    groups: int = 8

    @nn.compact
    def __call__(self, images):
        x = images.astype(jnp.float32) / 127.5 - 1
        for i, width in enumerate(self.widths):
            x = conv(width, 3 if i else 4, dtype=jnp.float32, name=f"down_{i}", stride=2)(x)
            x = ResBlock(width, self.groups, name=f"block_{i}")(x)
        x = jax.nn.silu(GroupNorm(self.groups, name="norm")(x)).mean((1, 2))
        return Linear(self.classes, name="head")(x)


def train_classifier(
    source,
    transforms: Sequence[Callable],
    classes: int,
    seed: int = 0,
    steps: int = 1000,
    held_out=None,
    batch_size: int = 64,
):
    """Trains `Classifier` on real pictures.

    Args:
      source: examples by number, dicts with `image` uint8 [H W 3] and `label`.
      transforms: functions (example, rng) -> example, applied to training pictures: flips, shifts.
      classes: how many there are.
      seed: of the parameters, the order and the augmentations.
      steps: of AdamW, the rate rising for a tenth of them and falling to 0 by a cosine.
      held_out: a source to measure on. Default: a random tenth of `source`, which then does not train.

    Returns (apply, params, scores): `apply(params, images uint8 [B H W 3]) -> logits [B classes]`, the parameters, and
    `accuracy` of the held-out pictures, with `balanced` beside it.

    The source is read into memory. Classes are drawn by the root of their size: a rare one is seen more often than it
    is there.

    On the emoji of 32 px (3,689 to train on; 320 held out, of which the largest of 10 groups has 58 %), flipped and
    shifted by up to 3 pixels, with the defaults: accuracy 0.716 and 0.706 for seeds 0 and 1, balanced 0.556 and 0.557;
    about two minutes of one CPU core. Samples of a perfect generator would score this, not 1.
    """
    rng = np.random.default_rng(seed)
    examples = [source[i] for i in range(len(source))]
    if held_out is None:
        order = rng.permutation(len(examples))
        held_out = [examples[i] for i in order[: len(order) // 10]]
        examples = [examples[i] for i in order[len(order) // 10 :]]
    labels = np.array([e["label"] for e in examples])
    share = 1 / np.sqrt(np.bincount(labels, minlength=classes)[labels])
    share /= share.sum()
    model = Classifier(classes)
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, max(1, steps // 10), steps)
    tx = optax.adamw(rate, weight_decay=0.05)
    params = jax.jit(model.init)(jax.random.key(seed), source[0]["image"][None])

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, images, labels):
        def loss(params):
            targets = optax.smooth_labels(jax.nn.one_hot(labels, classes), 0.1)
            return optax.softmax_cross_entropy(model.apply(params, images), targets).mean()

        params, opt_state = state
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = params, tx.init(params)
    for _ in range(steps):
        chosen = rng.choice(len(examples), batch_size, p=share)
        drawn = [functools.reduce(lambda e, f: f(e, rng), transforms, examples[i]) for i in chosen]
        state = step(state, np.stack([e["image"] for e in drawn]), labels[chosen])
    examples = [held_out[i] for i in range(len(held_out))]
    images, labels = np.stack([e["image"] for e in examples]), np.array([e["label"] for e in examples])
    apply = jax.jit(model.apply)
    return apply, state[0], accuracy(apply, state[0], images, labels)


def accuracy(apply, params, images: np.ndarray, labels: np.ndarray, batch_size: int = 64) -> dict:
    """How often the classifier names the label: {"accuracy", "balanced"}, the second a mean over classes that occur.

    Args:
      apply, params: of `train_classifier`.
      images, labels: uint8 [N H W 3] of the size it was trained at, and int [N].
    """
    predicted = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        rows = np.pad(batch, ((0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)))  # one program for all
        predicted.append(np.asarray(apply(params, rows)).argmax(1)[: len(batch)])
    return accuracies(np.concatenate(predicted), np.asarray(labels))
