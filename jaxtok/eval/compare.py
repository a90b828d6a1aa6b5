"""Several tokenizers on the same held-out pictures: one table, and what each makes of equally many bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtok.eval import plots, rate_distortion
from jaxtok.eval.report import Section
from jaxtok.eval.sections import FORMATS

HEADS = {"bytes": "bytes", "psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "frechet": "Fréchet"}


def first_sampler(metrics: Mapping) -> Mapping[str, Mapping]:
    """Token count -> scores, of the sampler that counts."""
    return next(iter(metrics["reconstruction"].values()))


def everything(found: Mapping[str, Mapping]) -> Section:
    """A row a run and token count.

    Args:
      found: run -> metrics of its evaluation, all on the same pictures.
    """
    rows = []
    for name, metrics in found.items():
        for k, scores in first_sampler(metrics).items():
            cells = {head: FORMATS[key].format(scores[key]) if key in scores else "" for key, head in HEADS.items()}
            rows.append({"run": name, "tokens": k} | cells)
    pictures = {metrics["pictures"] for metrics in found.values()}
    if len(pictures) > 1:  # bad files are the same for all, so this is another set
        raise ValueError(f"These runs were evaluated on {sorted(pictures)} pictures: evaluate them on the same ones.")
    text = [
        f"All {pictures.pop()} held-out pictures, rebuilt from the first tokens of each run with its first sampler. "
        "PSNR (dB) and SSIM: higher is better. LPIPS and Fréchet distance: lower is better. A token of a codebook "
        "costs log2 of its size; continuous tokens have no size in bytes."
    ]
    return Section("Runs", text, {"Held-out pictures": rows})


def at_equal_bytes(found: Mapping[str, Mapping], out: Path, notes: list) -> tuple[dict, Section] | None:
    """({score: {name: curve}}, a section): the best of each run, and of JPEG and WebP, within so many bytes.

    Args:
      found: run -> metrics of its evaluation.
      out: the folder for the plot.
      notes: gets a line for what could not be done.

    None, and a note, if all runs have continuous tokens.
    """
    rates = {name: metrics["rate_distortion"] for name, metrics in found.items() if "rate_distortion" in metrics}
    notes += [f"{name}: its tokens are continuous and have no bytes to compare." for name in found if name not in rates]
    if not rates:
        return None
    codecs = next(iter(rates.values()))  # the same pictures, so the same files
    scores = [score for score in ("psnr", "ssim", "lpips") if score in codecs["tokens"][0]]
    fronts, tables = {}, {}
    for score in scores:
        rows = {name: rate["tokens"] for name, rate in rates.items()} | {c: codecs[c] for c in ("JPEG", "WebP")}
        fronts[score] = {name: rate_distortion.front(points, score) for name, points in rows.items()}
        sizes = sorted({round(rate["tokens"][-1]["bytes"], 3) for rate in rates.values()})
        caption = f"{HEADS[score]} of the best within so many bytes a picture"
        tables[caption] = [{"bytes": f"{size:g}"} | best(fronts[score], size, score) for size in sizes]
    text = [
        f"Means over {codecs['pictures']} of the pictures. Each row is the size of all tokens of a run. Of a run "
        "counts the number of first tokens that is best within it; JPEG and WebP files count with their headers, at "
        "their best over qualities and scales."
    ]
    drawn = {}
    try:
        tokenizers = {name: rate["tokens"] for name, rate in rates.items()}
        curves = {score: {codec: fronts[score][codec] for codec in ("JPEG", "WebP")} for score in scores}
        labels = {score: plots.AXES[score] for score in scores}
        plots.rate_distortion(tokenizers, curves, labels, out / "compare.png")
        drawn = {out / "compare.png": "Quality against bytes a picture; beside each point, how many tokens."}
    except ImportError as error:
        notes.append(str(error))
    return fronts, Section("At equal bytes", text, tables, drawn)


def best(fronts: Mapping[str, Sequence[Mapping]], size: float, score: str) -> dict[str, str]:
    """Name -> the best score of its curve within `size` bytes."""
    cells = {}
    for name, curve in fronts.items():
        row = rate_distortion.best_within(curve, size * (1 + 1e-6))
        cells[name] = FORMATS[score].format(row[score]) if row else f"from {curve[0]['bytes']:.0f} on"
    return cells
