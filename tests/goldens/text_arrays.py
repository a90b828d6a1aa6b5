"""Features of texts: our towers on the arrays of tests/goldens/text. See tests/goldens/__main__.py for the form."""

import json

import jax
import numpy as np

from jaxtok.build import build
from jaxtok.pretrained import clip_text, t5

TABLES = {"t5": t5, "clip_text": clip_text, "clip_text_gelu": clip_text}


def loaded(name, golden):
    """(spec of the tower, its params, report) of a file."""
    weights = {key.removeprefix("param/"): value for key, value in golden.items() if key.startswith("param/")}
    return TABLES[name].load(weights, json.loads(str(golden["config"])))


def features(name, golden):
    spec, params, _ = loaded(name, golden)
    ours, mask = map(np.array, jax.jit(build(spec["text_tower"]).apply)({"params": params}, golden["ids"]))
    if name == "t5":
        ours[~mask] = golden["features"][~mask]
    fed = [key for key in golden if key != "features"]
    return {"features": ours}, fed, {"features": (0.0, 1e-5)}


FILES = {name: lambda golden, name=name: features(name, golden) for name in TABLES}
