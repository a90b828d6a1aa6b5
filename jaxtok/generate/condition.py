"""What all generators ask of a condition."""

import jax
import jax.numpy as jnp

from jaxtok.generate import sampling


def labels(condition, classes, batch, null=None):
    """int [B]: the labels of a condition; the null class, `classes`, where null bool [B] and for all of no condition.

    Raises ValueError where a model has classes and the condition no "label".
    """
    if condition is None or not classes:
        return jnp.full(batch, classes)
    if "label" not in condition:
        raise ValueError(f'This model has {classes} classes; the condition lacks "label", it has {sorted(condition)}.')
    return condition["label"] if null is None else jnp.where(null, classes, condition["label"])


def check_given(condition, classes):
    """Raises ValueError where a model that has classes is to be trained without a condition."""
    if condition is None and classes:
        raise ValueError('This model has classes: its loss needs a condition with the "label" of each sample.')


def check_steps(module, steps, tokens=None):
    """ValueError without a step, or where not all of a masked model's tokens are asked for (None: they are)."""
    if steps < 1:
        raise ValueError(f"{type(module).__name__}.sample needs at least 1 step, got {steps}.")
    if tokens is not None and tokens != module.length:
        raise ValueError(f"A masked model samples all of its {module.length} tokens, not {tokens}.")


def batch_size(condition, batch):
    """Of a condition, or `batch` without one."""
    return batch if condition is None else next(iter(condition.values())).shape[0]


def is_guided(guidance, condition):
    """Whether the unconditional pass is needed: not at scale 1. ValueError where there is nothing to guide towards."""
    guided = callable(guidance) or guidance != 1.0
    if guided and condition is None:
        raise ValueError("Guidance needs a condition to guide towards: give one, or guidance 1.0.")
    return guided


def passes(module, condition, batch, guidance):
    """How a sampler calls a bound module over all its places: (predict, how many samples).

    predict(scale, x, *times) is module(x, *times, condition) of x [B ...] at times [], guided by `scale` if `guidance`
    is not 1: both passes are then one call.
    """
    guided = is_guided(guidance, condition)
    batch, null = batch_size(condition, batch), None
    if guided:
        condition = jax.tree.map(lambda x: sampling.pair(x, x), condition)
        null = jnp.arange(2 * batch) % 2 == 1  # each sample's second pass has no class
    module, variables = module.unbind()  # a bound module must not be called inside a scan

    def predict(scale, x, *times):
        x = sampling.pair(x, x) if guided else x
        y = module.apply(variables, x, *(jnp.full(len(x), t) for t in times), condition, null=null)
        return sampling.guide(*sampling.unpair(y), scale) if guided else y

    return predict, batch
