"""Generators over the codes of tokenizers that are not FlexTok: each learns, and its samples are pictures."""

import importlib

import numpy as np
import pytest

import jaxtok
from tests import runs

GENERATORS = [
    ("instella_t2i", "diffusion_tiny"),
    ("titok", "masked_tiny"),
    pytest.param("instella_t2i", "ar_tiny", marks=pytest.mark.slow),
    pytest.param("elm", "ar_tiny", marks=pytest.mark.slow),
    pytest.param("fqgan", "ar_tiny", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, variant", GENERATORS)
def test_it_learns_and_its_samples_are_pictures(tmp_path, name, variant):
    module = importlib.import_module(f"configs.{name}")
    runs.untrained(module.get_config("tiny"), tmp_path / "tokenizer")
    config = module.get_config(variant)
    config.task.tokenizer, config.log_every = str(tmp_path / "tokenizer"), 1
    metrics = runs.alone(config, tmp_path / "run")
    losses = runs.logged(tmp_path / "run")
    assert losses[6] < losses[1] and np.isfinite(metrics["loss"])
    generator, vocabulary = jaxtok.load(tmp_path / "run"), config.task.model.vocabulary
    codes = generator.sample([0, 1, 2], guidance=1.5)
    assert codes.shape[1:] == (config.task.model.length, *np.shape(vocabulary))
    assert codes.min() >= 0 and codes.max() < np.max(vocabulary) and len(np.unique(codes)) > 1
    assert generator.decode(codes).shape == (3, 16, 16, 3)
