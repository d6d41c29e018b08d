"""The docs as a site: its menu, its first page, what it fetches, and the reference of a recipe's keys."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fast_ft.recipe.messages import allowed
from fast_ft.recipe.reference import reference_page
from fast_ft.recipe.schema import Recipe
from tests.helpers.parts import ROOT
from tools import docs_site

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def in_menu(entry: Any) -> Iterator[str]:
    """The pages of a part of the menu, however deep."""
    for value in entry.values() if isinstance(entry, dict) else entry:
        if isinstance(value, str):
            yield value
        else:
            yield from in_menu(value)


def test_the_menu_names_every_page_once() -> None:
    assert sorted(in_menu(SETTINGS["nav"])) == sorted(["index.md", *(path.name for path in DOCS.glob("*.md"))])


def test_the_first_page_is_the_readme_with_links_from_inside_docs() -> None:
    page = docs_site.first_page((ROOT / "README.md").read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", page)
    assert "data.md" in targets and "report.png" in targets and "../notebooks/colab.ipynb" in targets
    for target in targets:
        if not target.startswith(("https://", "#")):
            assert (DOCS / target.partition("#")[0]).exists(), target
    assert "colab-badge" not in page and "[Open in Colab](https://" in page


def test_links_out_of_the_docs_lead_to_the_repository_and_pictures_come_along() -> None:
    page = docs_site.inside(
        "[a](../recipes/strong.yaml#L3) ![b](../bench/results/one.png) [c](data.md) [d](report.png)"
    )
    assert re.fullmatch(
        r"\[a\]\(https://github\.com/\w+/fast_ft/blob/main/recipes/strong\.yaml#L3\) !\[b\]\(pictures/one\.png\) "
        r"\[c\]\(data\.md\) \[d\]\(report\.png\)",
        page,
    )


def test_the_sources_of_figures_stay_out_of_the_site() -> None:
    assert docs_site.on_page_markdown("It took 99<!-- a.json/b --> s.") == "It took 99 s."


def test_the_theme_fetches_nothing(tmp_path: Path) -> None:
    scripts = tmp_path / "assets" / "javascripts"
    scripts.mkdir(parents=True)
    (scripts / "bundle.js").write_text(
        'a("https://unpkg.com/mermaid@11/dist/mermaid.min.js")\n//# sourceMappingURL=x.map'
    )
    (scripts / "bundle.js.map").write_text("https://unpkg.com/")
    docs_site.on_post_build({"site_dir": str(tmp_path)})
    assert [path.name for path in scripts.iterdir()] == ["bundle.js"]
    assert (scripts / "bundle.js").read_text() == 'a("")\n'
    for name, text in (
        ("a.html", '<img alt="x" src="https://example.org/a.png">'),
        ("b.css", "a { background: url(https://example.org/a.png) }"),
        ("c.js", 'load("https://cdn.jsdelivr.net/npm/x")'),
    ):
        (there := tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name} would fetch"):
            docs_site.on_post_build({"site_dir": str(tmp_path)})
        there.write_text('<a href="https://example.org/">a link is followed by hand</a>')
    docs_site.on_post_build({"site_dir": str(tmp_path)})
    assert SETTINGS["theme"]["font"] is False and SETTINGS["extra"]["generator"] is False


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in PAGES])
def test_a_page_reads_alike_on_github_and_on_the_site(path: Path) -> None:
    """MkDocs takes code in a list for text under 8 spaces of indentation, and wants an empty line before a list."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for before, line in itertools.pairwise(lines):
        assert before or not re.match(r" {5,7}\S", line), f"code in a list: indent it by 8 spaces: {line}"
        starts, goes_on = re.match(r"([*-]|\d+\.) ", line), re.match(r"([*-]|\d+\.| ) *\S", before)
        assert not starts or not before or goes_on, f"a list without an empty line before it: {line}"


def test_the_reference_is_made_from_the_schema() -> None:
    page = (DOCS / "recipe-reference.md").read_text(encoding="utf-8")
    assert page == reference_page() + "\n", (
        "write it again: python -m fast_ft schema --markdown > docs/recipe-reference.md"
    )


def keys(schema: dict[str, Any], root: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each key of the schema, found through its definitions: those of `$ref`, wherever one stands below a key."""
    for name, part in schema["properties"].items():
        yield prefix + name, part
        for inner in re.findall(r"#/\$defs/(\w+)", str(part)):
            yield from keys(root["$defs"][inner], root, f"{prefix}{name}.")


def test_every_key_is_described_with_what_it_takes_and_its_default() -> None:
    root = Recipe.model_json_schema()
    page = (DOCS / "recipe-reference.md").read_text(encoding="utf-8")
    entries = {match[1]: match[2] for match in re.finditer(r"^#+ `([\w.]+)`\n\n(.*?)(?=^#|\Z)", page, re.M | re.S)}
    assert set(entries) == {key for key, _ in keys(root, root)}
    for key, part in keys(root, root):
        description = (
            part.get("description") or root["$defs"][re.findall(r"#/\$defs/(\w+)", str(part))[0]]["description"]
        )
        assert len(description.split()) >= 3 and description in entries[key], key
        assert key in root["properties"] or f"It takes {allowed(part, root)}. " in entries[key], key
    assert "above 0 and at most 1" in entries["generate.top_p"] and "Default: `0.9`." in entries["generate.top_p"]
    assert "Default: `{}`." in entries["select.where"] and "It must be given." in entries["data.train"]
    assert "text of 1 to 60 characters" in entries["run_name"]
