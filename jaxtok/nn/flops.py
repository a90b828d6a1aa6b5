"""FLOPs of any jax function, counted from its program."""

import math

import jax


def count(fn, *args):
    """The FLOPs of `fn(*args)`: 2 x multiply-adds of its matrix products and convolutions, loops times their length.

    Args are arrays or ShapeDtypeStructs; nothing runs. What the program computes twice (rematerialisation) counts
    twice. Raises ValueError for a `while` of unknown length that holds a product.
    """
    return count_program(jax.make_jaxpr(fn)(*args))


def count_program(program):
    """The same of what `jax.make_jaxpr`, or the `trace` of a jitted function, made."""
    return _count(program.jaxpr)


def _count(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
        primitive, params = eqn.primitive.name, eqn.params
        if primitive == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            total += 2 * depth * eqn.outvars[0].aval.size
        elif primitive == "conv_general_dilated":
            kernel, spec = eqn.invars[1].aval, params["dimension_numbers"].rhs_spec
            total += 2 * eqn.outvars[0].aval.size * kernel.size // kernel.shape[spec[0]]
        elif primitive == "cond":
            total += max(_count(branch.jaxpr) for branch in params["branches"])
        elif primitive == "while":
            if _count(params["body_jaxpr"].jaxpr):
                raise ValueError("flops.count: a while loop of unknown length holds matrix products; use lax.scan.")
        else:
            inner = sum(_count(j) for p in params.values() for j in _jaxprs(p))
            total += inner * _times(primitive, params)
    return total


def _times(primitive, params):
    """How often a primitive runs what it holds: a loop's length, a kernel's grid, the devices that have a part each."""
    if primitive == "scan":
        return params["length"]
    if primitive == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return params["mesh"].size if primitive == "shard_map" else 1


def _jaxprs(param):
    if isinstance(param, jax.extend.core.ClosedJaxpr):
        return [param.jaxpr]
    return [param] if isinstance(param, jax.extend.core.Jaxpr) else []
