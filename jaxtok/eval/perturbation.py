"""How far pictures fall when their codes are not quite the right ones, as a generator's are not (arXiv 2503.08354)."""

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.eval import frechet
from jaxtok.eval.reconstruction import psnr
from jaxtok.eval.report import Section

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)  # how often a code is replaced
SHARES = (0.05, 0.07, 0.09)  # by one of so many, as a share of the vocabulary


def grid(vocabulary: int) -> list[tuple[float, int]]:
    """(alpha, delta) of every cell. ValueError for tokens without an index, or with several."""
    if not isinstance(vocabulary, int):
        raise ValueError(f"Only tokens of one index are perturbed; these have the vocabulary {vocabulary}.")
    return [(alpha, max(2, round(share * vocabulary))) for share in SHARES for alpha in ALPHAS]


def look(task, perturb, cells, variables, features, key, batch) -> dict:
    """What is to be known of a batch, its codes perturbed as every cell says. To be compiled.

    Args:
      task: a TokenizerTask; pictures are rebuilt by its first sampler.
      perturb: (key, bound quantizer, indices, alpha, delta) -> indices.
      cells: (alpha, delta), ...
      variables, features: see eval.streaming.look.
      key: of the draws, which are others for every batch and cell.
      batch: `image`, `mask`, and `index` int32 [B].

    Returns psnr [cells B], features [cells B D] or None, and mask.
    """
    apply = functools.partial(task.model.apply, variables)
    images, key = batch["image"].astype(jnp.float32) / 255, jax.random.fold_in(key, batch["index"].max())
    codes = apply(batch["image"], method="encode")
    options = {name: value for name, value in task.samplers[0].items() if name != "title"}

    def replace(model, key, alpha, delta):
        indices = perturb(key, model.quantizer, codes.indices, alpha, delta)
        return codes.replace(z=model.quantizer.lookup(indices), indices=indices)

    def one(delta, cell):
        alpha, key = cell
        wrong = apply(key, alpha, delta, method=replace)
        picture = jnp.round(apply(wrong, key, **options, method="decode") * 255) / 255
        return psnr(images, picture), features and features(picture)

    found, places = [], []
    for delta in dict.fromkeys(delta for _, delta in cells):
        own = [i for i, (_, d) in enumerate(cells) if d == delta]
        alphas, keys = jnp.array([cells[i][0] for i in own]), jax.random.split(jax.random.fold_in(key, delta), len(own))
        found.append(jax.lax.map(functools.partial(one, delta), (alphas, keys)))  # one program for all alphas
        places += own
    scores, seen = jax.tree.map(lambda *x: jnp.concatenate(x)[np.argsort(places)], *found)
    return {"psnr": scores, "features": seen, "mask": batch["mask"]}


def section(batches: Iterable[Mapping], cells, originals, title) -> tuple[dict, Section]:
    """(metrics, the section of a report): a row a cell, and their mean.

    Args:
      batches: of `look`, as numpy; cells: as there.
      originals: Moments of the features of the pictures themselves, or None.
      title: of the distance.
    """
    scores, moments = [], [originals and frechet.empty(len(originals.mean)) for _ in cells]
    for batch in batches:
        mask = batch["mask"]
        scores.append(batch["psnr"][:, mask])
        if originals:
            moments = [frechet.update(*pair, mask) for pair in zip(moments, batch["features"], strict=True)]
    rows = []
    for i, (alpha, delta) in enumerate(cells):
        row = {"alpha": alpha, "delta": delta, "psnr": float(np.concatenate(scores, 1)[i].mean(dtype=np.float64))}
        rows.append(row | ({"frechet": frechet.distance(originals, moments[i])} if originals else {}))
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name in ("psnr", "frechet")}
    say = lambda row: {"PSNR": f"{row['psnr']:.2f}"} | ({title: f"{row['frechet']:#.4g}"} if originals else {})
    table = [{"alpha": f"{row['alpha']:g}", "delta": str(row["delta"])} | say(row) for row in rows]
    table.append({"alpha": "mean", "delta": ""} | say(mean))
    text = [
        "Every token is replaced, with probability alpha, by one of the delta codes nearest to its own, itself among "
        "them. The mean distance is what pFID is with Inception's features; its name is that of the features here."
    ]
    return {"cells": rows, "mean": mean}, Section("Perturbed codes", text, {"Rebuilt from perturbed codes": table})
