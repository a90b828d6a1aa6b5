"""AdamW as the field uses it: warm-up and decay of the rate, clipping, decay masks, rates per parameter, EMA."""

import difflib
import re

import jax
import jax.numpy as jnp
import optax

from jaxtok.sharding import path_name


def schedule(total_steps, *, peak_lr, warmup=0, end=0.01, decay="cosine"):
    """Linear warm-up from 0 to peak_lr, then "cosine" down to end * peak_lr, or "constant". Step -> rate."""
    if decay not in ("cosine", "constant"):
        raise ValueError(f'schedule.decay is "cosine" or "constant", not "{decay}".')
    if warmup > total_steps:
        raise ValueError(f"schedule.warmup is {warmup} steps but the run has {total_steps}: shorten the warm-up.")
    ramp = optax.linear_schedule(0.0, peak_lr, warmup)
    if decay == "constant":
        rest = optax.constant_schedule(peak_lr)
    else:
        rest = optax.cosine_decay_schedule(peak_lr, max(total_steps - warmup, 1), end)
    return optax.join_schedules([ramp, rest], [warmup])


def adamw(
    rate, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip=None, decay=("/kernel$",), lr_factors=(), apart=()
):
    """AdamW (arXiv 1711.05101).

    Args:
      rate: schedule, step -> learning rate.
      b1, b2, eps: of Adam.
      weight_decay: decoupled, times the rate; on the parameters whose path matches a regex of `decay` (matrices; not
        biases, tokens or positions).
      clip: global norm of the gradients, or None.
      apart: regexes of networks that are clipped each by its own norm, and not by that of all others together: a
        critic's ("^objective/gan/"), whose gradient says nothing of the tokenizer's.
      lr_factors: ((regex, factor), ...): the rate of matching parameters is multiplied; the first match wins.

    A regex that matches no parameter raises ValueError at init.
    """
    return optax.chain(
        _clip(clip, apart) if clip else optax.identity(),
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(
            weight_decay, lambda params: per_parameter(params, [(r, True) for r in decay], False)
        ),
        _scale(lr_factors),
        optax.scale_by_learning_rate(rate),
    )


def _clip(norm, apart):
    networks = [(regex, i + 1) for i, regex in enumerate(apart)]
    mask = lambda i: lambda params: jax.tree.map(lambda which: which == i, per_parameter(params, networks, 0))
    clip = optax.clip_by_global_norm(norm)
    return optax.chain(*(optax.masked(clip, mask(i)) for i in range(len(apart) + 1))) if apart else clip


def _scale(lr_factors):
    def init(params):
        per_parameter(params, lr_factors, 1.0)
        return optax.EmptyState()

    def update(updates, state, params=None):
        factors = per_parameter(updates, lr_factors, 1.0)
        return jax.tree.map(lambda u, f: u * f, updates, factors), state

    return optax.GradientTransformation(init, update)


def per_parameter(params, rules, default):
    """A tree like params of the value whose regex matches the path first, else default.

    ValueError for a regex that matches no path, or none that those before it leave.
    """
    rule_of = lambda path: next((i for i, (regex, _) in enumerate(rules) if re.search(regex, path)), None)
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    chosen = [rule_of(path) for path in paths]
    for i in sorted(set(range(len(rules))) - set(chosen)):
        regex = rules[i][0]
        if any(re.search(regex, path) for path in paths):
            raise ValueError(f"optimizer: rules before {regex!r} match all its parameters: move it up, or take it out.")
        near = difflib.get_close_matches(regex.strip("^$"), paths, 3, 0)
        raise ValueError(f"optimizer: no parameter matches {regex!r}; the nearest paths are {', '.join(near)}.")
    values = [default if i is None else rules[i][1] for i in chosen]
    return jax.tree.unflatten(jax.tree.structure(params), values)


def ema_update(ema, params, step, decay):
    """ema + (1 - d)(params - ema) with d = min(decay, (1 + step) / (10 + step)): early steps are forgotten soon."""
    d = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + (1 - d) * (p - e), ema, params)
