"""The page: one HTML file, with its script, its style and its data inside, that asks no network for anything.

Data never becomes markup. What Python writes is escaped; what the script writes goes through textContent; and the
Content-Security-Policy allows this page's own script and style by their digests, and nothing else.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

STATIC = Path(__file__).parent / "static"
SCRIPTS = (
    "uPlot.iife.min.js", "util.js", "map.js", "rowview.js", "curves.js", "answers.js", "ask.js", "explore.js",
    "watch.js", "main.js",
)  # fmt: skip
#: Scripts that go only into a page with these facts.
ONLY_WITH = {"ask.js": "live", "explore.js": "explore", "watch.js": "watch"}
SELF = "'self'"  #: in a policy: the server that the page came from
COLOURS = 6  #: a stage or a run has one of --g0 to --g5 of report.css
STYLES = ("uPlot.min.css", "report.css")


def is_page(content: bytes) -> bool:
    """Return whether a file's content is a page that `page` wrote."""
    return content.startswith(b"<!doctype html>\n<!-- This file holds ")


def page(
    title: str,
    about: str,
    sections: Iterable[tuple[str, str, str]],
    facts: Mapping[str, Any],
    blocks: Mapping[str, bytes],
    warning: str = "",
) -> str:
    """Return the whole file.

    about: what the page holds, as text. sections: (id, heading, markup); the markup is ours, with all data escaped.
    facts: JSON for the script; with "live", the page may ask the server that it came from. blocks: gzip'd bytes for
    the script, by name. warning: why the page is not to be shared, shown at its top.
    """
    sections = list(sections)
    scripts = [name for name in SCRIPTS if ONLY_WITH.get(name, name) in (name, *facts)]
    script = "\n".join((STATIC / name).read_text(encoding="utf-8") for name in scripts)
    style = "\n".join((STATIC / name).read_text(encoding="utf-8") for name in STYLES)
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data:; "
        f"base-uri 'none'; form-action 'none'{'; connect-src ' + SELF if 'live' in facts else ''}"
    )
    packed = gzip.compress(json.dumps(finite(facts), ensure_ascii=False).encode(), 6, mtime=0)
    data = "\n".join(
        f'<script type="application/octet-stream" id="block-{name}">{base64.b64encode(block).decode()}</script>'
        for name, block in {"facts": packed, **blocks}.items()
    )
    slots = {
        "title": html.escape(title),
        "policy": policy,
        "about": html.escape(about),
        "warning": f'<p class="notice"><strong>Not to be shared.</strong> {html.escape(warning)}</p>'
        if warning
        else "",
        "nav": "".join(f'<li><a href="#{id_}">{html.escape(heading)}</a></li>' for id_, heading, _ in sections),
        "sections": "\n".join(
            f'<section id="{id_}" aria-labelledby="{id_}-title"><h2 id="{id_}-title">{html.escape(heading)}</h2>\n'
            f"{markup}\n</section>"
            for id_, heading, markup in sections
        ),
        "style": style,
        "data": data,
        "script": script,
    }
    template = (STATIC / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: slots[match[1]], template)  # one pass: data is not searched for slots


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[Any]],
    caption: str | None = None,
    numbers: bool = False,
    runs: bool = False,
) -> str:
    """Return a table, the first column its row headings; every cell is escaped.

    numbers: other columns align right. runs: other columns are runs, each with its colour.
    """
    cells = [[html.escape(str(cell)) for cell in row] for row in rows]
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in cells
    )
    top = "".join(
        f'<th scope="col"{_coloured(place - 1) if runs and place else ""}>{html.escape(name)}</th>'
        for place, name in enumerate(head)
    )
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    kind = ' class="numbers"' if numbers else ""
    inner = f"<table{kind}>{title}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{inner}</div>'


def _coloured(number: int) -> str:
    return f' class="run g{number % COLOURS}"'


def details(summary: str, markup: str) -> str:
    """Return a part that opens on demand; `summary` is escaped, `markup` is ours."""
    return f"<details><summary>{html.escape(summary)}</summary>{markup}</details>"


def bullets(texts: Iterable[str]) -> str:
    """Return an escaped list."""
    return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>"


def paragraph(text: str, kind: str = "") -> str:
    """Return an escaped paragraph."""
    return f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>"


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def finite(value: Any) -> Any:
    """Return JSON's values with null for what it does not know: a loss that was NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
