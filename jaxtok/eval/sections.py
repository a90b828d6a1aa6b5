"""The sections of a tokenizer's report: each a function from what was measured to (metrics, Section)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxtok.eval import frechet, pictures, plots, rate_distortion
from jaxtok.eval.reconstruction import psnr, ssim
from jaxtok.eval.report import Section, percent
from jaxtok.eval.usage import bits_of, usage

FORMATS = {"psnr": "{:.2f}", "ssim": "{:.3f}", "lpips": "{:.3f}", "frechet": "{:#.4g}", "bytes": "{:.1f}"}
CODED = 64  # pictures that JPEG and WebP store, at every quality and scale
HALVES = "two halves of the originals"
GALLERY = {  # the file and what stands below it
    "shown": ("reconstructions.png", "Spread over the held-out set"),
    "worst": ("worst.png", "Least PSNR"),
    "best": ("best.png", "Highest PSNR"),
}


def tokenizer(task, passed, judge, extractor, lpips, scales, read, number, out, notes) -> tuple[dict, list[Section]]:
    """All but the probe.

    Args:
      task: a TokenizerTask; its token counts and samplers.
      passed: of `streaming.collect`.
      judge: LPIPS of two batches of pictures in [0, 1], or None; lpips: its net.
      extractor: that of the moments, or None.
      scales: labels that set a scale -> their bytes, or None.
      read: index -> picture; number: index -> what the source calls it.
      out: the folder for PNGs.
      notes: gets a line for all that could not be done.
    """
    rows, kept, moments = passed
    n, vocabulary = len(rows["index"]), task.model.quantizer.vocabulary
    bits = bits_of(vocabulary)
    heads = ({"bytes": "bytes"} if bits else {}) | {"psnr": "PSNR", "ssim": "SSIM"}
    heads |= {"lpips": f"LPIPS {lpips}"} if judge else {}
    text, far, metrics = ["PSNR (dB) and SSIM: higher is better. LPIPS and Fréchet distance: lower is better."], {}, {}
    if moments and n >= 4:
        far, metrics["frechet"], line = distances(moments, extractor.title, extractor.width, extractor.sha256)
        heads["frechet"] = extractor.title
        scales, far[HALVES] = scales | {HALVES: None}, metrics["frechet"]["floor"]
        text.append(line)
    elif moments:
        notes.append("No Fréchet distance: it takes at least 4 pictures.")
    titles = [sampler["title"] for sampler in task.samplers]
    metrics["reconstruction"], tables = reconstruction(rows, titles, task.token_counts, scales, bits, heads, far)
    drawn = gallery(kept, task.titles(), number, out)
    parts = [Section("Reconstruction", text, tables, drawn)]
    if not bits:
        notes.append("Tokens are continuous: there is no codebook to count, and no bytes to compare with JPEG's.")
        return metrics, parts
    metrics["codebook"], part = codebook(rows["indices"], vocabulary, out, notes)
    chosen = np.linspace(0, n - 1, min(n, CODED)).round().astype(int)
    points = [
        {"tokens": k, "bytes": k * bits / 8, **means(rows, f"{titles[0]}@{k}", chosen)} for k in task.token_counts
    ]
    scores = {"psnr": jax.jit(psnr), "ssim": jax.jit(ssim)}
    if judge:
        scores["lpips"] = jax.jit(lambda a, b: judge(a / np.float32(255), b / np.float32(255)))
    axes = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": f"LPIPS {lpips} (lower is better)"}
    axes = {name: axes[name] for name in scores}
    images = np.stack([read(int(i)) for i in rows["index"][chosen]])
    metrics["rate_distortion"], rates = rate(points, images, scores, axes, out, notes)
    return metrics, [*parts, part, rates]


def means(rows: Mapping[str, np.ndarray], label: str, chosen=slice(None)) -> dict[str, float]:
    """The means over the chosen pictures of a label's scores, those of psnr, ssim and lpips that are there."""
    names = [name for name in ("psnr", "ssim", "lpips") if f"{name}/{label}" in rows]
    return {name: float(np.mean(rows[f"{name}/{label}"][chosen], dtype=np.float64)) for name in names}


def reconstruction(
    rows: Mapping[str, np.ndarray],
    samplers: Sequence[str],
    counts: Sequence[int],
    scales: Mapping[str, float | None],
    bits: float | None,
    heads: Mapping[str, str],
    distances: Mapping[str, float],
) -> tuple[dict, dict]:
    """(sampler or scale -> token count -> scores, caption -> table).

    Args:
      rows: "score/label" -> [n]; labels are "sampler@k", and the scales.
      samplers, counts: titles, and token counts k.
      scales: labels that stand beside the first sampler and set a scale -> their bytes.
      bits: of a token.
      heads: score -> head of its column.
      distances: label -> Fréchet distance, if they were measured.
    """
    metrics, tables = {}, {}
    for title in samplers:
        labels = {str(k): f"{title}@{k}" for k in counts}
        sizes = {str(k): k * bits / 8 if bits else None for k in counts}
        if title == samplers[0]:
            labels |= {label: label for label in scales}
            sizes |= scales
        found = {name: means(rows, label) for name, label in labels.items()}
        for name, label in labels.items():
            found[name] |= {"bytes": sizes[name]} if sizes[name] is not None else {}
            found[name] |= {"frechet": distances[label]} if label in distances else {}
        tables[f"Held-out pictures rebuilt from their first tokens, {title}"] = [
            {"tokens": name} | {head: FORMATS[key].format(r[key]) if key in r else "" for key, head in heads.items()}
            for name, r in found.items()
        ]
        metrics[title] = {name: found[name] for name in map(str, counts)}
        metrics |= {label: found[label] for label in scales if title == samplers[0]}
    return metrics, tables


def distances(moments: dict, title: str, width: int, sha256: str) -> tuple[dict, dict, str]:
    """(label -> distance from the originals, metrics, a paragraph).

    Args:
      moments: label -> Moments, and "originals" -> those of two random halves of them.
      title, width, sha256: of the extractor.
    """
    halves = moments["originals"]
    whole, floor = frechet.merge(*halves), frechet.distance(*halves)
    found = {label: frechet.distance(whole, m) for label, m in moments.items() if label != "originals"}
    text = (
        f"{title}: the Fréchet distance from {whole.count} originals to as many others (sha256 of the extractor "
        f"{sha256}). Two random halves of the originals, {whole.count // 2} each, are {floor:#.4g} apart."
    )
    if whole.count < 2 * width:
        text += f" So few pictures for {width} features bias it upwards: compare at equal numbers only."
    metrics = {"extractor": title, "sha256": sha256, "pictures": whole.count, "floor": floor}
    return found, metrics, text


def gallery(kept: Mapping[str, Sequence], titles: Sequence[str], number, out: Path) -> dict[Path, str]:
    """Draws what was kept: path -> caption.

    Args:
      kept: "shown", "worst" and "best" -> (key, index, uint8 [columns H W 3]) each.
      titles: of the columns.
      number: index -> what the source calls the picture.
      out: the folder.
    """
    drawn = {}
    for name, (file, caption) in GALLERY.items():
        columns = np.stack([columns for *_, columns in kept[name]], 1)  # [columns n H W 3]
        pictures.grid(dict(zip(titles, columns, strict=True)), out / file)
        drawn[out / file] = f"{caption}: pictures {', '.join(str(number(i)) for _, i, _ in kept[name])} of the source."
    return drawn


def codebook(indices: np.ndarray, vocabulary, out: Path, notes: list) -> tuple[dict, Section]:
    """What the codes [n N] or [n N G] of the held-out pictures use of the vocabulary."""
    found = usage(indices, vocabulary)
    places = found["positions"]
    row = {
        "vocabulary": " x ".join(map(str, np.atleast_1d(vocabulary))),
        "used": percent(found["used"]),
        "perplexity": f"{found['perplexity']:.0f}",
        "bits a token": f"{found['bits']:.2f} of {found['of_bits']:.2f}",
        "different first tokens": percent(found["distinct_first"]),
    }
    text = [
        f"Counted over {len(indices)} pictures of {len(places)} tokens. So many can show at most {found['shown']:.2f} "
        f"bits a token, and {found['shown_position']:.2f} at one position, whatever the tokenizer."
    ]
    drawn = {}
    try:
        path = out / "codebook.png"
        plots.positions([place["bits"] for place in places], found["of_bits"], found["shown_position"], path)
        drawn = {path: "Entropy of the tokens at each position."}
    except ImportError as error:
        notes.append(str(error))
    return found, Section("Codebook", text, {"Use of the codebook": [row]}, drawn)


def rate(points: Sequence[Mapping], images: np.ndarray, scores, heads, out: Path, notes: list) -> tuple[dict, Section]:
    """The tokenizer beside JPEG and WebP.

    Args:
      points: `tokens`, `bytes` and scores of the tokenizer on these very pictures.
      images: uint8 [n H W 3].
      scores: of `reconstruction.jpeg_webp`.
      heads: score -> label of its axis.
    """
    codecs = rate_distortion.codec_rows(images, scores)
    curves = {score: {codec: rate_distortion.front(rows, score) for codec, rows in codecs.items()} for score in scores}
    text = [
        f"Means over {len(images)} held-out pictures, spread over the set. A token costs log2 of the vocabulary, and "
        "the tokenizer's weights cost nothing here. JPEG and WebP files count whole, with the headers that are "
        f"much of a small file. Each is shown at its best over qualities {rate_distortion.QUALITIES[0]} to "
        f"{rate_distortion.QUALITIES[-1]} and pictures stored at full height and width, down to 1/8 of them."
    ]
    drawn = {}
    drawable = [point for point in points if np.isfinite(point["psnr"])]
    try:
        named = {"first k tokens (k beside each)": drawable}
        plots.rate_distortion(named, curves, heads, out / "rate_distortion.png")
        drawn = {out / "rate_distortion.png": "Quality against bytes a picture."}
    except ImportError as error:
        if str(error) not in notes:
            notes.append(str(error))
    tables = {"PSNR at equal bytes, and bytes at equal PSNR": rate_distortion.table(points, curves["psnr"])}
    return {"pictures": len(images), "tokens": list(points), **codecs}, Section(
        "Rate and distortion", text, tables, drawn
    )


def probe(found: Mapping[int, Mapping], trained: int, held_out: int) -> Section:
    """A row a token count, of `eval.probe.probe`."""
    table = [
        {"tokens": str(k), "accuracy": percent(r["accuracy"]), "balanced": percent(r["balanced"]), "L2": f"{r['l2']:g}"}
        for k, r in found.items()
    ]
    any_row = next(iter(found.values()))
    text = [
        f"Logistic regression from the latents of {trained} training pictures to their class, measured on {held_out} "
        f"held-out ones. Always naming the commonest class is right in {percent(any_row['majority'])} of them, chance "
        f"in {percent(any_row['chance'])}. Balanced: the mean over classes; naming one alone scores 1 / classes."
    ]
    return Section("What the codes say of the class", text, {"Linear probe": table})
