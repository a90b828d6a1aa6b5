"""docs/quantizers.md: every form in it can be built, and every quantizer is in it."""

import importlib
import pkgutil
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok import quantizers
from jaxtok.build import build

PAGE = (Path(__file__).parents[2] / "docs/quantizers.md").read_text()
FORMS = re.findall(r"^\| [^|]+ \| `(dict\(name=.*?\))`", PAGE, re.M)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_the_page_is_a_quantizer(form):
    """Of its own width, or of 16 channels; nothing is computed, only the shapes."""
    module = build(eval(form))
    width = 16
    if "binary" in form:
        width = sum(np.atleast_1d(module.bits))
    latents = jax.ShapeDtypeStruct((2, 16, width), jnp.float32)
    if "books=dict" in form:
        latents = dict.fromkeys(("visual", "semantic"), latents)
    keys = {"params": jax.random.key(0), "train": jax.random.key(1)}
    codes, _ = jax.eval_shape(lambda x: module.init_with_output(keys, x, train=True), latents)
    assert codes.z.shape[:2] == (2, 16) and codes.indices.dtype == jnp.int32


def test_there_are_forms():
    assert len(FORMS) > 15


def test_every_quantizer_is_in_the_table():
    for info in pkgutil.iter_modules(quantizers.__path__):
        module = importlib.import_module(f"jaxtok.quantizers.{info.name}")
        for name, thing in vars(module).items():
            ours = getattr(thing, "__module__", "") == module.__name__ and not name.startswith("_")
            if ours and isinstance(thing, type) and issubclass(thing, nn.Module):
                assert f"`quantizers.{info.name}.{name}`" in PAGE
