"""A tokenizer learns to rebuild pictures."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.build import check_keys
from jaxtok.eval.reconstruction import psnr, ssim
from jaxtok.eval.usage import bits_of, usage
from jaxtok.losses.adaptive import by_parameter, by_picture
from jaxtok.nn import codebook, masks
from jaxtok.tasks.trees import apart, merge
from jaxtok.tokenizer import Tokenizer

# The rows of a table that set a scale: what three bytes give, and what a decoder gives that does not read its codes.
MEAN_COLOUR, SWAPPED = "mean colour", "another picture's codes"
NO_TEXT, OTHER_TEXT = "no text", "another picture's text"


@dataclasses.dataclass(frozen=True)
class TokenizerTask:
    """Trains a Tokenizer to reconstruct pictures.

    Where the model has a text_tower, a batch brings "text" beside "image", and evaluation also says what pictures are
    without their texts, and with another's at the decoder.

    Attributes:
      model: the Tokenizer.
      losses: {name: {"fn": f(outputs, batch) -> scalar, "weight": 1.0, "start": 0}}: the run's loss is the weighted
        sum, each term from its start step on. A term that is a Flax module trains with the model, its parameters under
        "objective/<name>"; what it or a part of it calls `tower` is frozen. Its other variables are mutable, under
        "<collection>/objective/<name>", and what it sows in "logs" is logged as "<name>/<what>". One term may be
        `adaptive`: losses.adaptive says how it is weighed.
      token_counts: the k at which held-out pictures are rebuilt from their first k tokens; the last is all of them.
      samplers: ({"title", and options of the decoder's `sample`}, ...): each rebuilds every picture; the first counts.
      frozen: names of the model's parts that do not train ("codec"); their weights must come from `init_from`.
    """

    model: Tokenizer
    losses: Mapping[str, Mapping[str, Any]]
    token_counts: tuple[int, ...]
    samplers: tuple[Mapping[str, Any], ...]
    frozen: tuple[str, ...] = ()
    shows = "reconstructions"

    def __post_init__(self):
        for name, term in self.losses.items():
            check_keys(term, ("fn", "weight", "start"), f"task.losses.{name}")

    def check(self, source):
        """ValueError for a source of codes: a tokenizer trains on pictures."""
        if hasattr(source, "manifest"):
            raise ValueError(
                f"{type(source).__name__} gives codes, and a tokenizer trains on pictures: set data.*.source."
            )

    def sources(self):
        """None: a config's `init_from` brings them."""
        return ()

    def context(self, batch):
        """What of a batch the model's functions take beside pictures or codes. ValueError where the texts lack."""
        if self.model.text_tower is None:
            return {}
        if "text" not in batch:
            raise ValueError(
                'This tokenizer reads texts, and the data bring none: add dict(name="data.transforms.caption_bytes", '
                "length=...), or caption_words, to the transforms of data.train and data.eval."
            )
        return {"context": batch["text"]}

    @property
    def scales(self):
        """The rows of an evaluation that set a scale, and their bytes where that is known."""
        texts = dict.fromkeys((NO_TEXT, OTHER_TEXT) if self.model.text_tower is not None else ())
        return {MEAN_COLOUR: 3.0, SWAPPED: None, **texts}

    def init(self, key, batch):
        """Trees for a batch of the training data's shapes."""
        model_key, train_key, objective_key = jax.random.split(key, 3)
        keys = {"params": model_key, "train": train_key}
        outputs, variables = self.model.init_with_output(keys, batch["image"], **self.context(batch), train=True)
        params = variables.pop("params")
        variables.pop("intermediates", None)
        if unknown := [name for name in self.frozen if name not in params]:
            raise ValueError(f"task.frozen: the model has no parameters in {unknown}, only in {sorted(params)}.")
        frozen = {name: params.pop(name) for name in self.frozen}
        for i, (name, term) in enumerate(self.losses.items()):
            if isinstance(term["fn"], nn.Module):
                own = term["fn"].init(jax.random.fold_in(objective_key, i), outputs, batch)
                objective = own.pop("params", {})
                own.pop("logs", None)
                for collection, tree in own.items():
                    variables = merge(variables, {collection: {"objective": {name: tree}}})
                for where, tree in zip((params, frozen), apart(objective, "tower"), strict=True):
                    if tree:
                        where.setdefault("objective", {})[name] = tree
        return {"params": params, "mutable": dict(variables), "frozen": frozen}

    def loss(self, params, mutable, frozen, batch, key, step):
        """The one scalar, and what a log wants: every term, and how much of the vocabulary the batch used."""
        params = merge(params, frozen)

        def forward(params):
            outputs, after = self.model.apply(
                {"params": params, **mutable},
                batch["image"],
                **self.context(batch),
                train=True,
                rngs={"train": key},
                mutable=list(mutable),
            )
            return outputs["decoded"].prediction, (outputs, after)

        terms = functools.partial(self._terms, params=params, batch=batch, key=key, step=step)
        adaptive = [name for name, term in self.losses.items() if getattr(term["fn"], "adaptive", "")]
        others = [name for name in self.losses if name not in adaptive]
        if adaptive:
            outputs, total, (mutable, logs) = self._balanced(forward, params, terms, adaptive, others)
        else:
            _, (outputs, mutable) = forward(params)
            total, (mutable, logs) = terms(others, outputs, mutable)
        codes = outputs["codes"]
        logs |= {f"codes/{name}": value for name, value in codes.aux.items()}
        if codes.indices is not None:
            vocabulary = np.atleast_1d(self.model.quantizer.vocabulary)  # [G], a token has so many indices
            perplexity, distinct = jax.vmap(codebook.usage, 1)(codes.indices.reshape(-1, len(vocabulary)))
            logs |= {"codes/perplexity": perplexity.mean(), "codes/used": (distinct / vocabulary).mean()}
        return total, (mutable, logs)

    def _balanced(self, forward, params, terms, adaptive, others):
        """(outputs, total, (mutable, logs)) where one term weighs itself by the gradients of the others."""
        if len(adaptive) > 1:
            raise ValueError(f"task.losses: one term may be adaptive, and these are: {adaptive}.")
        path = self.losses[adaptive[0]]["fn"].adaptive
        prediction, (outputs, mutable), norm = by_parameter(forward, params, path)
        of = lambda x: outputs | {"decoded": outputs["decoded"].replace(prediction=x)}
        total, (mutable, logs), slope = by_picture(lambda x: terms(others, of(x), mutable), prediction)
        norms = lambda own: (norm(slope), norm(own))
        value, (mutable, more) = terms(adaptive, of(prediction), mutable, norms=norms)
        return of(prediction), total + value, (mutable, logs | more)

    def _terms(self, names, outputs, mutable, *, params, batch, key, step, **given):
        """(The weighted sum of some of the losses, (mutable, every one of them and what it logs)). given: to each."""
        total, logs = jnp.zeros(()), {}
        for name in names:
            term = self.losses[name]
            value, mutable, says = self._term(name, params, mutable, outputs, batch, key, **given)
            logs |= {f"loss/{name}": value} | {f"{name}/{what}": number for what, number in says.items()}
            total += jnp.where(step >= term.get("start", 0), term.get("weight", 1.0), 0.0) * value
        return total, (mutable, logs)

    def _term(self, name, params, mutable, outputs, batch, key, **given):
        """One of the losses: (scalar, mutable, what it logs)."""
        fn = self.losses[name]["fn"]
        if not isinstance(fn, nn.Module):
            return fn(outputs, batch), mutable, {}
        own = {c: tree["objective"][name] for c, tree in mutable.items() if name in tree.get("objective", {})}
        variables = {"params": params.get("objective", {}).get(name, {}), **own}
        rngs = {"train": jax.random.fold_in(key, list(self.losses).index(name))}
        value, own = fn.apply(variables, outputs, batch, **given, rngs=rngs, mutable=[*own, "logs"])
        logs = own.pop("logs", {})
        for collection, tree in own.items():
            objective = mutable[collection]["objective"] | {name: tree}
            mutable = mutable | {collection: mutable[collection] | {"objective": objective}}
        return value, mutable, logs

    def evaluate(self, params, mutable, frozen, batch, key):
        """Reconstructions of a batch at every token count, by every sampler, and how near they are."""
        variables = {"params": merge(params, frozen), **mutable}
        apply = functools.partial(self.model.apply, variables)
        images, context = batch["image"].astype(jnp.float32) / 255, self.context(batch)
        codes = apply(batch["image"], **context, method="encode")
        n = codes.keep.shape[1]
        if not all(1 <= k <= n for k in self.token_counts):
            raise ValueError(f"task.token_counts {self.token_counts} must lie in 1 ... {n}, the model's tokens.")
        rows = {} if codes.indices is None else {"indices": codes.indices}
        pictures = [batch["image"]]

        def compare(decoded):
            return {"psnr": psnr(images, decoded), "ssim": ssim(images, decoded)}

        def rebuild(sampler, codes, context=context):
            options = {k: v for k, v in sampler.items() if k != "title"}
            decoded = apply(codes, key, **context, **options, method="decode")
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
        other = another(batch.get("mask", jnp.ones(len(images), bool)))
        lent = lambda metrics: {k: jnp.where(other == jnp.arange(len(x)), jnp.nan, x) for k, x in metrics.items()}
        record(SWAPPED, lent(rebuild(self.samplers[0], codes.replace(z=codes.z[other]))[0]))
        if context:
            none, others = ({"context": text} for text in (0 * batch["text"], batch["text"][other]))
            without = apply(batch["image"], **none, method="encode")
            record(NO_TEXT, rebuild(self.samplers[0], without, none)[0])
            record(OTHER_TEXT, lent(rebuild(self.samplers[0], codes, others)[0]))
        return {"rows": rows, "pictures": pictures}

    def titles(self):
        """Of the pictures that `evaluate` gives."""
        kinds = [(k, sampler["title"]) for sampler in self.samplers for k in self.token_counts]
        return ["original", *(f"{k} token{'s'[: k > 1]}\n{title}" for k, title in kinds)]

    def summarize(self, rows):
        """Means over held-out pictures (numpy [N ...]) and a table: a row a token count, PSNR and SSIM a sampler."""
        metrics = {name: float(np.mean(values, dtype=np.float64)) for name, values in rows.items() if name != "indices"}
        if "indices" in rows:
            found = usage(rows["indices"], self.model.quantizer.vocabulary)
            names = {"perplexity": "perplexity", "used": "used", "distinct first tokens": "distinct_first"}
            metrics |= {f"codes/{name}": found[key] for name, key in names.items()}
        return metrics, self._table(metrics)

    def _table(self, metrics):
        """A row a token count, a column a metric and sampler."""
        titles, bits = [sampler["title"] for sampler in self.samplers], bits_of(self.model.quantizer.vocabulary)
        rows = [(MEAN_COLOUR, 3, [MEAN_COLOUR] * len(titles))]
        for k in self.token_counts:
            size = f"{k * bits / 8:.1f}" if bits else ""
            rows.append((k, size, [f"{title}@{k}" for title in titles]))
        for name in [name for name in self.scales if name != MEAN_COLOUR]:
            rows.append((name, "", [name] + [None] * (len(titles) - 1)))
        table = []
        for label, size, names in rows:
            line = {"tokens": str(label), "bytes": str(size)}
            for title, name in zip(titles, names, strict=True):
                line[f"PSNR, {title}"] = f"{metrics[f'psnr/{name}']:.2f}" if name else ""
                line[f"SSIM, {title}"] = f"{metrics[f'ssim/{name}']:.3f}" if name else ""
            table.append(line)
        return table


def another(mask):
    """Another row for each of a batch, int [B]: the one before it of those that `mask`, bool [B], counts.

    Where it counts one alone, a blank; in a batch of one that row itself.
    """
    order, count = jnp.argsort(~mask, stable=True), mask.sum()  # rows that count come first
    before = order[(jnp.arange(len(mask)) - 1) % jnp.where(count > 1, count, len(mask))]
    return order.at[order].set(before)
