"""The docs as a site: docs/ as it is, with the README as the first page. mkdocs.yml calls these as MkDocs' hooks.

The site fetches nothing: the theme's two optional downloads and the README's badge are left out.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: What a page loads by itself, or a script by a CDN's address.
_FETCHED = re.compile(
    r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=[\"']?https?://[^\s>]*|url\([\"']?https?://[^)]*"
    r"|https?://[\w.]*(?:unpkg|jsdelivr|cdnjs|googleapis|gstatic)[\w./@-]*"
)
PICTURES = "pictures"  #: in the site: pictures that lie outside of docs/


def on_files(files: Any, config: Any) -> Any:
    """Add the README as index.md, and the pictures outside of docs/ that a page shows."""
    from mkdocs.structure.files import File

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=first_page(readme)))
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    for target in {picture for page in pages for picture in re.findall(r"\]\(\.\./(\S+\.png)\)", page)}:
        files.append(File.generated(config, f"{PICTURES}/{Path(target).name}", abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page without the sources of its figures, its links out of docs/ leading to the repository."""
    return inside(re.sub(r"<!--.*?-->", "", markdown, flags=re.DOTALL))


def on_post_build(config: Any) -> None:
    """Take out of the theme's scripts what they would fetch for browsers and diagrams that no page needs.

    Raises ValueError where the site would still fetch something from elsewhere.
    """
    site = Path(config["site_dir"])
    for path in (site / "assets").rglob("*"):
        if path.suffix == ".map":
            path.unlink()
        elif path.suffix in (".js", ".css"):
            text = re.sub(r"/[/*]# sourceMappingURL=\S+( \*/)?", "", path.read_text(encoding="utf-8"))
            path.write_text(re.sub(r"https://unpkg\.com/[^\"']*", "", text), encoding="utf-8")
    for path in site.rglob("*"):
        if path.suffix in (".html", ".js", ".css") and (found := _FETCHED.search(path.read_text(encoding="utf-8"))):
            raise ValueError(f"{path.relative_to(site)} would fetch something from elsewhere: {found[0]}")


def first_page(readme: str) -> str:
    """Return the README as a page of docs/: links without docs/, and the badge as plain words."""
    page = re.sub(r"\[!\[([^\]]+)\]\(https?://[^)]+\)\]", r"[\1]", readme)
    page = re.sub(r"\]\((?!https?://|#|docs/)", "](../", page)
    return re.sub(r"\]\(docs/", "](", page)


def inside(markdown: str) -> str:
    """Return a page of docs/ whose links to other parts of the project lead to its repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    markdown = re.sub(r"\]\(\.\./(?:[^)\s]*/)?([^)\s/]+\.png)\)", rf"]({PICTURES}/\1)", markdown)
    return re.sub(r"\]\(\.\./", f"]({project['urls']['Repository']}/blob/main/", markdown)
