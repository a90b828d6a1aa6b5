"""A model learns the codes of a tokenizer."""

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
from jaxtok.build import build
from jaxtok.eval.usage import bits_of
from jaxtok.tasks.trees import merge
from jaxtok.tokenizer import Tokenizer


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
