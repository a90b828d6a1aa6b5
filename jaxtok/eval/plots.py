"""Plots of an evaluation. They need matplotlib, which the extra `eval` brings."""

import os
from collections.abc import Mapping, Sequence

COLOURS = {"tokens": "#1f5fbf", "JPEG": "#c2571a", "WebP": "#2e8540"}  # told apart by marker and line, too
STYLES = {"JPEG": "s--", "WebP": "^:"}
MARKERS = "oDvPX*<>hd"  # of tokenizers, in turn
AXES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS (lower is better)"}


def figure(columns: int = 1):
    """A matplotlib figure with a row of axes: (figure, [axes ...]). ImportError says what to install."""
    try:
        from matplotlib.figure import Figure  # without pyplot there is no window and no global state
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "jaxtok[eval]"') from error
    drawn = Figure(figsize=(1 + 4.2 * columns, 4), dpi=110, layout="constrained")
    axes = [drawn.add_subplot(1, columns, i + 1) for i in range(columns)]
    for ax in axes:
        ax.grid(color="0.9")
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def rate_distortion(
    tokenizers: Mapping[str, Sequence[Mapping]],
    curves: Mapping[str, Mapping[str, Sequence[Mapping]]],
    labels: Mapping[str, str],
    path: str | os.PathLike,
) -> None:
    """A PNG of quality against bytes a picture, a panel a score.

    Args:
      tokenizers: name -> points: `tokens`, written beside each, `bytes` and the scores.
      curves: score -> codec -> rows with `bytes` and the score.
      labels: score -> what its axis says.
      path: the PNG to write.
    """
    drawn, axes = figure(len(labels))
    colours = [COLOURS["tokens"], *(f"C{i}" for i in range(4, 4 + len(tokenizers)))]
    for ax, (score, label) in zip(axes, labels.items(), strict=True):
        for (name, points), colour, marker in zip(tokenizers.items(), colours, MARKERS, strict=False):
            x, y = [point["bytes"] for point in points], [point[score] for point in points]
            ax.plot(x, y, f"{marker}-", color=colour, markersize=4, label=name)
            for point in points:
                place = dict(xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8, color=colour)
                ax.annotate(str(point["tokens"]), (point["bytes"], point[score]), **place)
        for name, rows in curves[score].items():
            x, y = [row["bytes"] for row in rows], [row[score] for row in rows]
            ax.plot(x, y, STYLES[name], color=COLOURS[name], markersize=4, label=name)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.set_xlabel("bytes a picture")
        ax.set_ylabel(label)
        ax.margins(y=0.1)
    handles, names = axes[0].get_legend_handles_labels()
    drawn.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    drawn.savefig(path)


def positions(bits: Sequence[float], of_bits: float, shown: float, path: str | os.PathLike) -> None:
    """A PNG of the entropy at each position.

    Args:
      bits: of each position.
      of_bits: log2 of the vocabulary.
      shown: the most that so many pictures can show.
      path: the PNG to write.
    """
    drawn, [ax] = figure()
    ax.bar(range(1, len(bits) + 1), bits, width=0.8, color=COLOURS["tokens"], label="entropy")
    ax.axhline(of_bits, color="0.2", label=f"log2 of the vocabulary: {of_bits:.1f}")
    if shown < of_bits:
        ax.axhline(
            shown, color=COLOURS["JPEG"], linestyle="--", label=f"most that these pictures can show: {shown:.1f}"
        )
    ax.set_ylim(0, 1.05 * of_bits)
    ax.set_xlim(0.4, len(bits) + 0.6)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("position of the token")
    ax.set_ylabel("bits")
    drawn.legend(loc="outside upper center", frameon=False)
    drawn.savefig(path)
