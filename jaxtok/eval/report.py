"""One HTML file that says all: no scripts, no links, pictures inside; it opens anywhere, without a network."""

import base64
import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 0 auto;
  padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #555; padding: .2rem 0; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th { border-bottom: 2px solid #999; vertical-align: bottom; font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: nowrap; }
figure { margin: .8rem 0; overflow-x: auto; } img { max-width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: .9rem; }
"""


class Section(NamedTuple):
    """A part of a report.

    Attributes:
      title: its heading.
      text: paragraphs.
      tables: caption -> rows, dicts of one set of keys.
      pictures: path of a PNG -> what stands below it.
    """

    title: str
    text: Sequence[str] = ()
    tables: Mapping[str, Sequence[Mapping]] = {}
    pictures: Mapping[Path, str] = {}


def page(title: str, text: Sequence[str], sections: Sequence[Section]) -> str:
    """The report as HTML: a title, what stands below it, and the sections. Texts are plain; this escapes them."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{html.escape(title)}</h1>
{_paragraphs(text)}
{"".join(map(_section, sections))}</body></html>
"""


def to_json(metrics: Mapping) -> str:
    """Nested metrics as JSON, which has no infinities: they become null."""

    def plain(tree):
        if isinstance(tree, Mapping):
            return {str(name): plain(value) for name, value in tree.items()}
        if isinstance(tree, list | tuple):
            return [plain(value) for value in tree]
        return None if isinstance(tree, float) and not math.isfinite(tree) else tree

    return json.dumps(plain(metrics), indent=2, allow_nan=False) + "\n"


def percent(share: float) -> str:
    """0.1234 -> "12.3 %"."""
    return f"{100 * share:.1f} %"


def write(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    half = path.with_name(path.name + ".tmp")
    half.write_text(text, encoding="utf-8")
    os.replace(half, path)


def _section(section):
    tables = "".join(_table(caption, rows) for caption, rows in section.tables.items())
    figures = "".join(_figure(Path(path), caption) for path, caption in section.pictures.items())
    return f"<h2>{html.escape(section.title)}</h2>\n{_paragraphs(section.text)}{tables}{figures}"


def _paragraphs(texts):
    return "".join(f"<p>{html.escape(text)}</p>\n" for text in texts)


def _table(caption, rows):
    line = lambda tag, cells: "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>\n"
    head, body = line("th", rows[0]), "".join(line("td", row.values()) for row in rows)
    return f'<div class="wide"><table><caption>{html.escape(caption)}</caption>\n{head}{body}</table></div>\n'


def _figure(path, caption):
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>\n'
