"""Nested dicts of arrays, put together and taken apart."""


def merge(a, b):
    """Two nested dicts without a common leaf as one."""
    return {**a, **b, **{name: merge(a[name], b[name]) for name in a.keys() & b.keys()}}


def apart(tree, name):
    """Nested dicts as two: without, and with, what lies under `name` at any depth."""
    without, within = {}, {}
    for key, branch in tree.items():
        if key == name:
            within[key] = branch
        elif not isinstance(branch, dict):
            without[key] = branch
        else:
            for part, rest in zip((without, within), apart(branch, name), strict=True):
                if rest:
                    part[key] = rest
    return without, within
