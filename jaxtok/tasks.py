"""What a training run optimises. A task is `init`, `loss` and `evaluate`: pure functions of trees that train.py holds.

init(key, batch) -> {"params", "mutable", "frozen"}
loss(params, mutable, frozen, batch, key, step) -> (scalar, (mutable, logs))
evaluate(params, mutable, frozen, batch, key) -> {"rows": {name: [B]}, "pictures": {title: uint8 [B H W 3]}}
titles() -> of those pictures. summarize(rows) -> (metrics, table): of all rows of a pass, on the host
check(source): ValueError where a data source is not for this task
sources() -> where frozen weights come from that the task itself names, as `init_from` takes them
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxtok import checkpoint
from jaxtok.bound import paint, picture_shape, square
from jaxtok.build import build, check_keys
from jaxtok.eval.reconstruction import psnr, ssim
from jaxtok.eval.usage import bits_of, usage
from jaxtok.losses.adaptive import by_parameter, by_picture
from jaxtok.nn import codebook, masks
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


@dataclasses.dataclass(frozen=True)
class GeneratorTask:
    """Trains a model over the codes of a tokenizer.

    A batch brings "codes" or "latents", as python -m jaxtok.tokenize wrote them, or pictures, which are then encoded on
    the fly; and "label" and "text" where the model reads them.

    Attributes:
      model: the generator; jaxtok/generate has the contract.
      tokenizer: workdir of the tokenizer, a run or what jaxtok.pretrained.convert wrote. It is frozen.
      samplers: ({"title", and options of the model's `sample`}, ...): each draws for the condition of every held-out
        example.
      decoder: options of the tokenizer's decoder, with which samples become pictures.
      text_tower: None, or a module: "text" int [B T] -> (features [B T D], mask [B T]).
      frozen: ("text_tower",) if that does not train; its weights must come from `init_from`.
      grid: (h, w) of the tokens of a tokenizer that takes pictures of any size, as convolutional ones do; else None.
    """

    model: nn.Module
    tokenizer: str
    samplers: tuple[Mapping[str, Any], ...] = ()
    decoder: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text_tower: nn.Module | None = None
    frozen: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None
    shows = "samples"

    @functools.cached_property
    def codec(self) -> Tokenizer:
        """The tokenizer's model."""
        path = epath.Path(self.tokenizer).expanduser() / "config.json"
        if not path.exists():
            raise FileNotFoundError(
                f"task.tokenizer: there is no {path}; it is the workdir of a tokenizer, which python -m jaxtok.train "
                "(configs/flextok.py) or python -m jaxtok.pretrained.convert writes."
            )
        model = build(json.loads(path.read_text())["task"]["model"])
        if model.text_tower is not None:
            raise ValueError(f"task.tokenizer: {self.tokenizer} reads texts, and a generator hands it none.")
        return model

    @functools.cached_property
    def tokens(self) -> int:
        """N, of the tokenizer; of one for pictures of any size those of `grid`, or as many as the model draws."""
        if (shape := picture_shape(self.codec)) is None:
            return math.prod(self.grid) if self.grid else self.model.length
        return jax.eval_shape(self._encode, self._stored, jax.ShapeDtypeStruct((1, *shape), jnp.uint8)).keep.shape[1]

    def check(self, source):
        """ValueError for codes of another tokenizer, too few of them, or another number of classes."""
        classes = getattr(self.model, "classes", 0)
        if classes and classes != len(source.class_names):
            raise ValueError(f"task.model.classes is {classes}; the data has {len(source.class_names)} classes.")
        vocabulary, there = getattr(self.model, "vocabulary", None), self.codec.quantizer.vocabulary
        if vocabulary != there:
            raise ValueError(f"task.model.vocabulary is {vocabulary}, and that of {self.tokenizer} {there}.")
        manifest = getattr(source, "manifest", None)
        if manifest and manifest["tokenizer"]["fingerprint"] != (ours := checkpoint.fingerprint(self.tokenizer)):
            raise ValueError(
                f"These codes were made by another tokenizer, {manifest['tokenizer']}, than {self.tokenizer} ({ours}) "
                "is now: run python -m jaxtok.tokenize again, or set task.tokenizer."
            )
        if manifest and self.grid is not None and manifest["grid"] != list(self.grid):
            raise ValueError(f"task.grid is {self.grid}, and that of these codes {manifest['grid']}.")
        if vocabulary is not None and self.model.length > (k := manifest["tokens"] if manifest else self.tokens):
            raise ValueError(f"task.model.length is {self.model.length}; a picture has {k} codes here.")

    def sources(self):
        """The tokenizer's weights, under "tokenizer"."""
        shapes = {which: tree for _, which, tree in checkpoint.stored_weights(self.tokenizer)}
        rules = [(rf"({name}/.*)", r"tokenizer/\1") for name in shapes.get("mutable", ())]
        if any("objective" in tree for tree in shapes.values()):
            rules.append((r"objective/.*", None))
        return (dict(path=self.tokenizer, rules=(*rules, (r".*", r"tokenizer/params/\g<0>"))),)

    def init(self, key, batch):
        """Trees for a batch of the training data's shapes."""
        keys = dict(zip(("params", "train"), jax.random.split(key), strict=True))
        frozen = {"tokenizer": jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self._stored)}
        params = {}
        if self.text_tower is not None:
            where = frozen if "text_tower" in self.frozen else params
            where["text_tower"] = self.text_tower.init(keys["params"], batch["text"])["params"]
        args = self.codes(frozen, batch), self.condition(merge(params, frozen), batch)
        params["generator"] = self.model.init(keys, *args, train=True, method="loss")["params"]
        return {"params": params, "mutable": {}, "frozen": frozen}

    def codes(self, frozen, batch):
        """What the model is trained on: codes int32 [B N] or [B N G], or latents float32 [B h w C]."""
        if "latents" in batch:
            return batch["latents"]
        codes = batch.get("codes")
        if codes is None:
            encoded = self._encode(frozen["tokenizer"], batch["image"])
            if self.grid is not None and encoded.grid != self.grid:
                raise ValueError(f"task.grid is {self.grid}, and these pictures have {encoded.grid} tokens.")
            if encoded.indices is None:
                return encoded.z.reshape(len(encoded.z), *(encoded.grid or encoded.z.shape[1:2]), -1)
            codes = encoded.indices
        return codes[:, : self.model.length]

    def condition(self, params, batch):
        """What the model may read of a batch, as jaxtok/generate has it: None, or a dict."""
        condition = {}
        if getattr(self.model, "classes", 0):
            condition["label"] = batch["label"]
        if self.text_tower is not None:
            features, mask = self.text_tower.apply({"params": params["text_tower"]}, batch["text"])
            condition |= {"text": features, "text_mask": mask}
        return condition or None

    def loss(self, params, mutable, frozen, batch, key, step):
        """The mean of the model's Scores, and how often its likeliest code was the right one."""
        args = self.codes(frozen, batch), self.condition(merge(params, frozen), batch)
        scores = self._scores(params, *args, key, train=True, step=step)
        loss = scores.mean()
        if scores.correct is None:
            return loss, (mutable, {"loss/generator": loss})
        accuracy = scores._replace(loss=scores.correct).mean()
        return loss, (mutable, {"loss/generator": loss, "codes/accuracy": accuracy})

    def evaluate(self, params, mutable, frozen, batch, key):
        """Scores of held-out codes; these codes and those of samples for the same conditions, and both as pictures.

        A batch has `index`, by which the key becomes its own: of one key no two batches have the same samples.
        """
        key = jax.random.fold_in(key, batch["index"].max())  # the least is -1 in every batch with a blank
        codes, condition = self.codes(frozen, batch), self.condition(merge(params, frozen), batch)
        scores = self._scores(params, codes, condition, key)
        rows = {name: value for name, value in scores._asdict().items() if value is not None}
        found = [codes]
        for i, sampler in enumerate(self.samplers):
            options = {k: v for k, v in sampler.items() if k != "title"}
            found.append(self.sample(params, jax.random.fold_in(key, i), condition, batch=len(codes), **options))
        if jnp.issubdtype(found[0].dtype, jnp.integer):
            rows |= {f"codes/{title}": codes for title, codes in zip(self.titles(), found, strict=True)}
        return {"rows": rows, "pictures": [self.decode(frozen["tokenizer"], codes, key) for codes in found]}

    def sample(self, params, key, condition, **options):
        """Codes or latents for a condition, or for none; options as of the model's `sample`."""
        return self.model.apply({"params": params["generator"]}, key, condition, **options, method="sample")

    def decode(self, variables, codes, key):
        """Codes int [B k] or [B k G], or latents [B h w C] -> pictures uint8 [B H W 3]."""
        codes = self.lookup(variables, codes)
        return paint(self.codec, variables, codes, codes.keep.shape[1], key, tuple(self.decoder.items()))

    def lookup(self, variables, codes):
        """The same arrays -> Codes of the tokenizer, whose tokens have their places."""
        apply = functools.partial(self.codec.apply, variables, method="lookup")
        if jnp.issubdtype(codes.dtype, jnp.integer):
            return apply(codes, self.tokens, self.grid or (None if picture_shape(self.codec) else square(self.tokens)))
        return apply(codes, math.prod(codes.shape[1:-1]))

    def titles(self):
        """Of the pictures that `evaluate` gives."""
        return ["held out", *(sampler["title"] for sampler in self.samplers)]

    def summarize(self, rows):
        """Means over held-out examples; of codes also a table, a row for 1, 2, 4 ... tokens: what they cost and hit."""

        def mean(values, places=slice(None)):
            weight = rows["weight"][:, places]
            return float((values[:, places] * weight).sum(dtype=np.float64) / max(weight.sum(dtype=np.float64), 1e-8))

        rows = {name: values.reshape(len(values), -1) for name, values in rows.items()}  # Scores may be of samples
        metrics = {"loss": mean(rows["loss"])}
        if "correct" not in rows:
            return metrics, [{"held-out loss": metrics["loss"]}]
        metrics |= {"bits a token": metrics["loss"] / np.log(2), "accuracy": mean(rows["correct"])}

        def line(label, bits, hits=""):
            return {"tokens": label, "bits a token": f"{bits:.2f}", "likeliest is right": hits}

        percent = lambda share: f"{100 * share:.1f} %"

        n, start, table = rows["loss"].shape[1], 0, []
        while start < n:  # the k-th row ends where twice as many tokens do
            stop = min(max(2 * start, 1), n)
            label, places = f"{start + 1}" if stop == start + 1 else f"{start + 1} to {stop}", slice(start, stop)
            table.append(line(label, mean(rows["loss"], places) / np.log(2), percent(mean(rows["correct"], places))))
            start = stop
        table.append(line("all", metrics["bits a token"], percent(metrics["accuracy"])))
        table.append(line("uniform guess", bits_of(self.model.vocabulary)))
        return metrics, table

    # ---- pieces ----

    @functools.cached_property
    def _stored(self):
        """The tokenizer's variables, as shapes."""
        params, others = {}, {}
        for _, which, tree in checkpoint.stored_weights(self.tokenizer):
            tree = {name: part for name, part in tree.items() if name != "objective"}
            params, others = (params, tree) if which == "mutable" else (merge(params, tree), others)
        return {"params": params, **others}

    def _encode(self, variables, images):
        return self.codec.apply(variables, images, method="encode")

    def _scores(self, params, codes, condition, key, **options):
        args = {"params": params["generator"]}, codes, condition
        return self.model.apply(*args, **options, rngs={"train": key}, method="loss")


def another(mask):
    """Another row for each of a batch, int [B]: the one before it of those that `mask`, bool [B], counts.

    Where it counts one alone, a blank; in a batch of one that row itself.
    """
    order, count = jnp.argsort(~mask, stable=True), mask.sum()  # rows that count come first
    before = order[(jnp.arange(len(mask)) - 1) % jnp.where(count > 1, count, len(mask))]
    return order.at[order].set(before)


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
