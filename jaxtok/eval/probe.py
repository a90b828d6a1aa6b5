"""A linear probe: how much of a picture's class its codes say to a linear classifier."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

L2 = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # on the squared weights of standardised features, over 2
STEPS = 60  # of L-BFGS: on 3,689 x 96 emoji codes accuracy moves by less than a picture after 40
SPLIT = 5  # every fifth training picture chooses the L2
WIDE = 4096  # latents of more numbers a picture are averaged over tokens


def latents(encode, counts: Sequence[int], variables, batch):
    """(latents, label, mask) of a batch with `image`, `label` and `mask`, on the devices; `prefix` reads the latents.

    encode: (variables, batch) -> Codes.
    """
    z = encode(variables, batch).z  # [B N D]
    wide = z[0].size > WIDE
    z = {"means": jnp.stack([z[:, :k].mean(1) for k in counts], 1)} if wide else {"tokens": z}
    return z, batch["label"], batch["mask"]


def prefix(z: dict, i: int, k: int) -> np.ndarray:
    """Latents as features [n F] of the first k tokens, the i-th of the counts.

    All N tokens, those after the k-th as zeros, so that one program probes every k; or, of more than 4,096 numbers, the
    mean over the first k.
    """
    if "means" in z:
        return z["means"][:, i]
    tokens = z["tokens"]
    return (tokens * (np.arange(tokens.shape[1]) < k)[:, None]).reshape(len(tokens), -1)


def probe(train: tuple, held_out: tuple, classes: int, seed: int = 0) -> dict:
    """Multinomial logistic regression on frozen features; its accuracy on held-out pictures.

    Features are standardised by the training pictures; those that never change count for nothing. The L2 penalty is
    the one of `L2` whose fit to four fifths of the training pictures has the least cross-entropy on the last fifth; the
    classifier is then fitted to all of them. All of it is convex: `seed` draws the split and nothing else.

    Args:
      train, held_out: (features float32 [n D], labels int [n] in 0 ... classes - 1) each.
      classes: how many there are.

    Returns dict with `accuracy`; `balanced`, the mean over classes of the share found, of those classes that are held
    out; `majority`, the accuracy of always naming the commonest training class; `chance` = 1 / classes; `l2`.

    Raises ValueError for features and labels that do not fit each other.
    """
    for name, (x, y) in {"train": train, "held_out": held_out}.items():
        if x.ndim != 2 or y.shape != x.shape[:1] or not len(y) or not (0 <= y.min() and y.max() < classes):
            raise ValueError(f"probe: {name} is features {x.shape} and labels {y.shape} in 0 ... {classes - 1}.")
    (x, y), (test_x, test_y) = train, held_out
    mean, std = x.mean(0), x.std(0)
    scale = np.where(std > 1e-6, 1 / np.maximum(std, 1e-6), 0).astype(np.float32)
    x, test_x = (x - mean) * scale, (test_x - mean) * scale
    chooses = np.random.default_rng(seed).permutation(len(y)) % SPLIT == 0
    losses = [cross_entropy(fit(x, y, ~chooses, l2, classes), x[chooses], y[chooses]) for l2 in L2]
    l2 = L2[int(np.argmin(losses))]
    predicted = np.asarray(logits(fit(x, y, np.ones(len(y), bool), l2, classes), test_x)).argmax(1)
    majority = np.bincount(y, minlength=classes).argmax()
    return {
        **accuracies(predicted, test_y),
        "majority": float(np.mean(test_y == majority)),
        "chance": 1 / classes,
        "l2": l2,
    }


def accuracies(predicted: np.ndarray, labels: np.ndarray) -> dict:
    """`accuracy`, and `balanced`: its mean over the classes that occur among the labels, each counting the same."""
    right = np.asarray(predicted) == np.asarray(labels)
    return {
        "accuracy": float(right.mean()),
        "balanced": float(np.mean([right[labels == c].mean() for c in np.unique(labels)])),
    }


def logits(params, x):
    return jnp.matmul(x, params["w"], precision="highest") + params["b"]


def cross_entropy(params, x, y, weight=None):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)
    return losses.mean() if weight is None else (losses * weight).sum() / weight.sum()


@jax.jit(static_argnames="classes")
def fit(x, y, counts, l2, classes):
    """The weights {"w" [D classes], "b"} that minimise cross-entropy + l2 / 2 * |w|^2 over the rows that count."""
    weight = counts.astype(jnp.float32)
    loss = lambda params: cross_entropy(params, x, y, weight) + l2 / 2 * jnp.sum(params["w"] ** 2)
    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(_, carry):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state

    params = {"w": jnp.zeros((x.shape[1], classes)), "b": jnp.zeros(classes)}
    return jax.lax.fori_loop(0, STEPS, step, (params, optimizer.init(params)))[0]
