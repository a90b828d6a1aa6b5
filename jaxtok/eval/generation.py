"""Samples of a generator beside real pictures: their class, their distance, and whether they are copies."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.eval import frechet, pictures
from jaxtok.eval.probe import accuracies
from jaxtok.eval.report import Section, percent

SHOWN = 8  # samples of a class in the grid
CLASSES = 12  # columns of the grid
NAMED = {"accuracy": "class named rightly", "balanced": "mean over classes"}
REAL, OWN = "held-out pictures", "their own codes, decoded"


def look(task, variables, judge, features, key, batch) -> dict:
    """What is to be known of a batch's samples, one for each sampler and example. To be compiled.

    Args:
      task: a GeneratorTask.
      variables: its trees.
      judge: None, or pictures uint8 [B H W 3] -> class int [B].
      features: None, or f(pictures in [0, 1]) -> [B D].
      key: of the samples, which are others for every batch.
      batch: of the run's data, with `mask`.

    Returns rows, name -> [B ...], those of `task.evaluate` and "class/<title>"; features [1 + S B D] or None; and
    pictures uint8 [B H W 3], of the last sampler.
    """
    params = {name: tree for name, tree in variables.items() if name != "tokenizer"}
    out = task.evaluate(params, {}, {"tokenizer": variables["tokenizer"]}, batch, key)
    found = seen(judge, features, jnp.stack(out["pictures"]))
    rows = out["rows"] | {"mask": batch["mask"], "index": batch["index"]}
    if "label" in batch:
        rows["label"] = batch["label"]
    if judge:
        rows |= {f"class/{title}": found[0][i] for i, title in enumerate([OWN, *task.titles()[1:]])}
    return {"rows": rows, "features": found[1], "pictures": out["pictures"][-1]}


def real(judge, features, batch) -> dict:
    """The same of real pictures: rows and features [1 B D]."""
    found = seen(judge, features, batch["image"][None])
    rows = {"mask": batch["mask"], "label": batch["label"], "index": batch["index"]}
    return {"rows": rows | ({f"class/{REAL}": found[0][0]} if judge else {}), "features": found[1]}


def collect(batches: Iterable[Mapping], titles: Sequence[str]) -> tuple[dict, dict, dict]:
    """What a pass leaves behind, on the host.

    Args:
      batches: of `look` or `real`, as numpy.
      titles: of the columns of their features.

    Returns rows, name -> [n ...]; moments, title -> those of two random halves, {} without features; and label -> the
    first few pictures.
    """
    rows, moments, shown = [], {}, {}
    for batch in batches:
        mask, features = batch["rows"]["mask"], batch["features"]
        rows.append({name: values[mask] for name, values in batch["rows"].items()})
        for title, x in zip(titles, () if features is None else features, strict=features is not None):
            first = frechet.first_half(batch["rows"]["index"])
            halves = moments.get(title, (frechet.empty(x.shape[-1]),) * 2)
            moments[title] = tuple(
                frechet.update(m, x, mask & half) for m, half in zip(halves, (first, ~first), strict=True)
            )
        if "pictures" in batch:
            labels = batch["rows"].get("label", np.zeros_like(batch["rows"]["index"]))
            for label, image in zip(labels[mask].tolist(), batch["pictures"][mask], strict=True):
                some = shown.setdefault(label, [])
                some += [image.copy()] * (len(some) < SHOWN)
    return {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}, moments, shown


def seen(judge, features, columns):
    """(classes [K B] or None, features [K B D] or None) of pictures uint8 [K B H W 3], one program for all columns."""
    both = lambda x: (judge and judge(x), features and features(x.astype(jnp.float32) / 255))
    return jax.lax.map(both, columns)


def nearest(codes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """How many codes each of [n k] has in common, place for place, with the nearest of [m N]: int [n].

    Of several indices a token, [n k G] and [m N G], a code in common is one of which all are.
    """
    best = np.zeros(len(codes), int)
    for i, row in enumerate(codes):
        same = known[:, : len(row)] == row
        best[i] = same.reshape(*same.shape[:2], -1).all(-1).sum(1).max()
    return best


def quality(named: Mapping, distances: Mapping[str, float], title: str, text: Sequence[str]) -> tuple[dict, Section]:
    """(metrics, Section): a row for the real pictures, for their own codes, and for each sampler.

    Args:
      named: name -> (what a classifier said int [n], labels int [n]), or nothing.
      distances: name -> Fréchet distance from the real pictures, or nothing; title: its name.
      text: paragraphs.
    """
    metrics, table = {}, []
    for name in dict.fromkeys([*named, *distances]):
        metrics[name] = found = accuracies(*named[name]) if name in named else {}
        line = {"pictures": name.replace("\n", " ")}
        if named:
            line |= {head: percent(found[key]) if key in found else "" for key, head in NAMED.items()}
        if distances:
            found |= {"frechet": distances[name]} if name in distances else {}
            line[title] = f"{distances[name]:#.4g}" if name in distances else ""
        table.append(line)
    if named:
        labels = named[REAL][1]
        metrics["commonest class"] = found = accuracies(np.full_like(labels, np.bincount(labels).argmax()), labels)
        line = {"pictures": "always the commonest class"} | {head: percent(found[key]) for key, head in NAMED.items()}
        table.append(dict.fromkeys(table[0], "") | line)
    tables = {"Samples for the conditions of held-out pictures": table} if table else {}
    return metrics, Section("Samples", text, tables)


def copies(codes: Mapping[str, np.ndarray], known: np.ndarray) -> tuple[dict, Section]:
    """How near to training examples, int [m N] or [m N G], the codes of samples are: name -> int [n k] or [n k G]."""
    metrics, table = {}, []
    for name, values in codes.items():
        shared, k = nearest(values, known), values.shape[1]
        metrics[name] = {"tokens": k, "shared": float(shared.mean()), "copies": float((shared == k).mean())}
        line = {
            "pictures": name.replace("\n", " "),
            "tokens": str(k),
            "shared with the nearest": f"{shared.mean():.2f}",
        }
        table.append(line | {"copies": percent(metrics[name]["copies"])})
    text = [
        f"How many codes a sample shares, place for place, with the nearest of {len(known)} training examples; a copy "
        "shares all. What is usual, held-out pictures say, which training never saw."
    ]
    return metrics, Section("Copies of training examples", text, {"Codes in common": table})


def grid(images: Mapping[int, Sequence[np.ndarray]], names: Sequence[str], out: Path) -> dict[Path, str]:
    """Draws samples, a column a class: label -> pictures uint8 [H W 3]."""
    full = sorted(label for label, some in images.items() if len(some) == SHOWN)
    if not full:
        return {}
    spread = np.linspace(0, len(full) - 1, min(CLASSES, len(full))).round().astype(int)
    columns = {names[full[i]] if names else "samples": np.stack(images[full[i]]) for i in np.unique(spread)}
    pictures.grid(columns, out / "samples.png")
    return {out / "samples.png": "The first samples of each class, none chosen."}
