"""What a training run optimises. A task is `init`, `loss` and `evaluate`: pure functions of trees that train.py holds.

init(key, batch) -> {"params", "mutable", "frozen"}
loss(params, mutable, frozen, batch, key, step) -> (scalar, (mutable, logs))
evaluate(params, mutable, frozen, batch, key) -> {"rows": {name: [B]}, "pictures": {title: uint8 [B H W 3]}}
summarize(rows) -> (metrics, table): of all rows of a pass, on the host
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.eval.reconstruction import psnr, ssim
from jaxtok.nn import codebook, masks
from jaxtok.tokenizer import Tokenizer

# The rows of a table that set a scale: what three bytes give, and what a decoder gives that does not read its codes.
MEAN_COLOUR, SWAPPED = "mean colour", "another picture's codes"


@dataclasses.dataclass(frozen=True)
class TokenizerTask:
    """Trains a Tokenizer to reconstruct pictures.

    Attributes:
      model: the Tokenizer.
      losses: {name: {"fn": f(outputs, batch) -> scalar, "weight": 1.0, "start": 0}}: the run's loss is the weighted
        sum, each term from its start step on. A term that is a Flax module trains with the model, its parameters under
        "objective/<name>"; what it calls `tower` is a teacher and frozen.
      token_counts: the k at which held-out pictures are rebuilt from their first k tokens; the last is all of them.
      samplers: ({"title", and options of the decoder's `sample`}, ...): each rebuilds every picture; the first counts.
      frozen: names of the model's parts that do not train ("codec"); their weights must come from `init_from`.
    """

    model: Tokenizer
    losses: Mapping[str, Mapping[str, Any]]
    token_counts: tuple[int, ...]
    samplers: tuple[Mapping[str, Any], ...]
    frozen: tuple[str, ...] = ()

    def init(self, key, batch):
        """Trees for a batch of the training data's shapes."""
        model_key, train_key, objective_key = jax.random.split(key, 3)
        keys = {"params": model_key, "train": train_key}
        outputs, variables = self.model.init_with_output(keys, batch["image"], train=True)
        params = variables.pop("params")
        variables.pop("intermediates", None)
        if unknown := [name for name in self.frozen if name not in params]:
            raise ValueError(f"task.frozen: the model has no parameters in {unknown}, only in {sorted(params)}.")
        frozen = {name: params.pop(name) for name in self.frozen}
        for i, (name, term) in enumerate(self.losses.items()):
            if isinstance(term["fn"], nn.Module):
                objective = term["fn"].init(jax.random.fold_in(objective_key, i), outputs, batch)["params"]
                if "tower" in objective:
                    frozen.setdefault("objective", {})[name] = {"tower": objective.pop("tower")}
                params.setdefault("objective", {})[name] = objective
        return {"params": params, "mutable": dict(variables), "frozen": frozen}

    def loss(self, params, mutable, frozen, batch, key, step):
        """The one scalar, and what a log wants: every term, and how much of the vocabulary the batch used."""
        params = merge(params, frozen)
        outputs, mutable = self.model.apply(
            {"params": params, **mutable},
            batch["image"],
            train=True,
            rngs={"train": key},
            mutable=list(mutable),
        )
        total, logs = 0.0, {}
        for name, term in self.losses.items():
            fn = term["fn"]
            if isinstance(fn, nn.Module):
                fn = functools.partial(fn.apply, {"params": params["objective"][name]})
            value = fn(outputs, batch)
            logs[f"loss/{name}"] = value
            total += jnp.where(step >= term.get("start", 0), term.get("weight", 1.0), 0.0) * value
        codes = outputs["codes"]
        logs |= {f"codes/{name}": value for name, value in codes.aux.items()}
        if codes.indices is not None:
            vocabulary = np.atleast_1d(self.model.quantizer.vocabulary)  # [G], a token has so many indices
            perplexity, distinct = jax.vmap(codebook.usage, 1)(codes.indices.reshape(-1, len(vocabulary)))
            logs |= {"codes/perplexity": perplexity.mean(), "codes/used": (distinct / vocabulary).mean()}
        return total, (mutable, logs)

    def evaluate(self, params, mutable, frozen, batch, key):
        """Reconstructions of a batch at every token count, by every sampler, and how near they are."""
        variables = {"params": merge(params, frozen), **mutable}
        apply = functools.partial(self.model.apply, variables)
        images = batch["image"].astype(jnp.float32) / 255
        codes = apply(batch["image"], method="encode")
        n = codes.keep.shape[1]
        if not all(1 <= k <= n for k in self.token_counts):
            raise ValueError(f"task.token_counts {self.token_counts} must lie in 1 ... {n}, the model's tokens.")
        rows = {} if codes.indices is None else {"indices": codes.indices}
        pictures = [batch["image"]]

        def compare(decoded):
            return {"psnr": psnr(images, decoded), "ssim": ssim(images, decoded)}

        def rebuild(sampler, codes):
            options = {k: v for k, v in sampler.items() if k != "title"}
            decoded = apply(codes, key, **options, method="decode")
            return compare(decoded), jnp.round(decoded * 255).astype(jnp.uint8)

        def prefix(k):
            return codes.replace(keep=masks.keep_prefix(jnp.full(len(images), k), n))

        def record(label, metrics):
            rows.update({f"{metric}/{label}": values for metric, values in metrics.items()})

        record(MEAN_COLOUR, compare(jnp.broadcast_to(images.mean((1, 2), keepdims=True), images.shape)))
        for sampler in self.samplers:  # one program for every k
            rebuilt = jax.lax.map(lambda k, sampler=sampler: rebuild(sampler, prefix(k)), jnp.array(self.token_counts))
            for i, k in enumerate(self.token_counts):
                metrics, shown = jax.tree.map(lambda x, i=i: x[i], rebuilt)
                record(f"{sampler['title']}@{k}", metrics)
                pictures.append(shown)
        record(SWAPPED, rebuild(self.samplers[0], codes.replace(z=jnp.roll(codes.z, 1, 0)))[0])
        return {"rows": rows, "pictures": pictures}

    def titles(self):
        """Of the pictures that `evaluate` gives."""
        kinds = [(k, sampler["title"]) for sampler in self.samplers for k in self.token_counts]
        return ["original", *(f"{k} token{'s'[: k > 1]}\n{title}" for k, title in kinds)]

    def summarize(self, rows):
        """Means over held-out pictures (numpy [N ...]) and a table: a row a token count, PSNR and SSIM a sampler."""
        metrics = {name: float(np.mean(values, dtype=np.float64)) for name, values in rows.items() if name != "indices"}
        vocabulary = None
        if "indices" in rows:
            vocabulary = np.atleast_1d(self.model.quantizer.vocabulary)  # [G], a token has so many indices
            indices = rows["indices"].reshape(len(rows["indices"]), -1, len(vocabulary))
            shares = [np.unique(one, return_counts=True)[1] / one.size for one in np.moveaxis(indices, 2, 0)]
            metrics["codes/perplexity"] = float(np.mean([np.exp(-(share * np.log(share)).sum()) for share in shares]))
            metrics["codes/used"] = float(np.mean([len(share) for share in shares] / vocabulary))
            metrics["codes/distinct first tokens"] = len(np.unique(indices[:, 0], axis=0)) / len(indices)
        return metrics, self._table(metrics, vocabulary)

    def _table(self, metrics, vocabulary):
        """A row a token count, a column a metric and sampler."""
        titles = [sampler["title"] for sampler in self.samplers]
        rows = [(MEAN_COLOUR, 3, [MEAN_COLOUR] * len(titles))]
        for k in self.token_counts:
            size = f"{k * np.log2(vocabulary).sum() / 8:.1f}" if vocabulary is not None else ""
            rows.append((k, size, [f"{title}@{k}" for title in titles]))
        rows.append((SWAPPED, "", [SWAPPED] + [None] * (len(titles) - 1)))
        table = []
        for label, size, names in rows:
            line = {"tokens": str(label), "bytes": str(size)}
            for title, name in zip(titles, names, strict=True):
                line[f"PSNR, {title}"] = f"{metrics[f'psnr/{name}']:.2f}" if name else ""
                line[f"SSIM, {title}"] = f"{metrics[f'ssim/{name}']:.3f}" if name else ""
            table.append(line)
        return table


def merge(a, b):
    """Two nested dicts without a common leaf as one."""
    return {**a, **b, **{name: merge(a[name], b[name]) for name in a.keys() & b.keys()}}
