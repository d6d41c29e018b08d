"""A sweep's page: units, what it leaves out, and drawings that fit and whose lines cross no label."""

from __future__ import annotations

import html
import json
import random
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fast_ft.common import atomic_files
from fast_ft.sweep import plots, report
from fast_ft.sweep.score_unit import Unit
from tests.helpers.report_pages import Browser, chromium

KEYS = ["select.where", "select.method", "train.num_train_epochs", "train.learning_rate", "generate.temperature"]
WHERE = json.dumps({"score": ">= 4.5", "ends_cleanly": True})


def made_sweep(root: Path, count: int, own: int | None = 0, **recipe: Any) -> str:
    """Write sweep.json of a finished sweep, with its best run's scores, and return the page.

    own: the trial that is the recipe itself.
    """
    chance, trials = random.Random(4), []
    for number in range(count):
        point = {
            "select.where": chance.choice(["{}", WHERE]), "select.method": chance.choice(["top", "stratified"]),
            "train.num_train_epochs": chance.randint(1, 12), "train.learning_rate": 10 ** chance.uniform(-4, -2),
            "generate.temperature": chance.choice(["1.5", "0.7", "0.2"]),
        }  # fmt: skip
        scores = {f"p{i}": float(chance.random() < 0.05 + 0.06 * point["train.num_train_epochs"]) for i in range(50)}
        trials.append({
            "number": number, "state": "finished", "value": sum(scores.values()) / 50, "scores": scores, "point": point,
            "minutes": 0.5 + 0.6 * number, "seconds": {"all": 30.0}, "priced": 40.0, "folder": str(root / "no"),
            "proof": {"rows": [], "in_validation": [], "in_test": []},
        })  # fmt: skip
    best = max(trials, key=lambda trial: trial["value"])
    content = {
        "seed": 1,
        "judge": {"kind": "reference"},
        "search": {"objective": "judge", "space": dict.fromkeys(KEYS)},
    }
    sweep = {
        "recipe": content | recipe, "recipe_file": "small.yaml", "hours": None, "seconds": 60.0, "ended": "all done",
        "validation": {"prompts": ["a"] * 50}, "trials": trials, "own": own, "importances": dict.fromkeys(KEYS, 0.2),
        "best": {"number": best["number"], "value": best["value"], "run": "best", "sentence": "Best of all."},
    }  # fmt: skip
    atomic_files.write_json(root / "sweep.json", sweep)
    (root / "best").mkdir(exist_ok=True)
    scores = {"kind": "reference", "mean": 0.84, "low": 0.77, "high": 0.91, "count": 100}
    atomic_files.write_json(root / "best" / "scores.json", scores)
    return report.write(root).read_text(encoding="utf-8")


def test_the_page_names_the_unit_and_the_best_recipes_test_score(tmp_path: Path) -> None:
    page = made_sweep(tmp_path, 6)
    assert "<dt>best, test prompts</dt><dd>84\u00a0%</dd>" in page and "95 % interval 77\u00a0% to 91\u00a0%" in page
    assert page.count("exact matches, share of the validation prompts") == 2
    assert "percentage" in page or ", points (95 % interval)" in page
    (tmp_path / "best" / "scores.json").unlink()
    without = report.write(tmp_path).read_text(encoding="utf-8")
    assert "best, test prompts" not in without and "answers to the test set have no score" in without
    judged = made_sweep(tmp_path, 6, judge={"kind": "openai", "model": "some-judge"})
    assert "some-judge" in judged and "1 to 10" in judged


@pytest.mark.parametrize(("count", "shown"), [(report.ENOUGH - 1, False), (report.ENOUGH, True)])
def test_what_mattered_is_shown_only_of_enough_trials(tmp_path: Path, count: int, shown: bool) -> None:
    page = made_sweep(tmp_path, count)
    assert ("What mattered" in page) == shown
    assert ("too few to tell" in page) == (not shown)


def test_only_the_homework_warns_and_no_word_names_a_themes_colour(tmp_path: Path) -> None:
    page = made_sweep(tmp_path, 6).split("<style>")
    head, body = page[0] + page[1].split("</style>")[0][:0], page[1].split("</style>")[1]
    assert "Not to be shared" not in head + body
    assert not re.search(r"\b(black|white|orange|blue)\b", body.split("<script")[0], re.IGNORECASE)
    assert "Not to be shared" in made_sweep(tmp_path, 6, rules="ntu-ml-2025-hw5")


@pytest.mark.parametrize("own", [0, 3, None])
def test_the_recipe_itself_is_marked_whatever_its_number(tmp_path: Path, own: int | None) -> None:
    page = made_sweep(tmp_path, 6, own)
    best = json.loads((tmp_path / "sweep.json").read_text())["best"]["number"]
    assert best not in (0, 3), "else it is marked as the best"
    assert re.findall(r">(\d) \(the recipe\)<", page) == ([] if own is None else [str(own)])
    assert page.count("<dt>the recipe itself</dt>") == page.count(" stroke-dasharray=") / 2 == (own is not None)
    rings = re.findall(r'stroke-width="2.5"><title>trial (\d)', page)
    assert rings == ([] if own is None else [str(own)] * 2)
    differences = re.findall(r"<td>[^<(]+\([^)]*\u00a0to\u00a0[^)]*\)", page)
    assert len(differences) == (5 if own is not None else 0)


@pytest.mark.parametrize("width", [plots.WIDE, plots.NARROW])
@pytest.mark.parametrize("count", [3, 14, 40])
def test_no_line_crosses_a_label(tmp_path: Path, width: int, count: int) -> None:
    made_sweep(tmp_path, count)
    trials = json.loads((tmp_path / "sweep.json").read_text())["trials"]
    drawn = plots._parallel(trials, KEYS, (0, None), Unit("share", percent=True), width)
    texts = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="middle" font-size="11"[^>]*>([^<]*)', drawn)
    half = [plots.LETTER * len(html.unescape(text)) / 2 for _, _, text in texts]
    labels = [
        (float(x) - room, float(x) + room, float(y) - 9, float(y) + 1)
        for (x, y, _), room in zip(texts, half, strict=True)
    ]
    assert len(labels) >= 10
    segments = [
        (float(x0), float(y0), float(x1), float(y1))
        for path in re.findall(r' d="([^"]*)"', drawn)
        for part in path.split("M")[1:]
        for (x0, y0), (x1, y1) in pairwise(point.split(",") for point in part.split("L"))
    ]
    assert len(segments) >= count * len(KEYS)
    for x0, y0, x1, y1 in segments:
        for left, right, top, foot in labels:
            for step in range(21):
                x, y = x0 + (x1 - x0) * step / 20, y0 + (y1 - y0) * step / 20
                assert not (left < x < right and top < y < foot)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if chromium() is None:
        pytest.skip("no Chromium with chromedriver here (apt-get install chromium chromium-driver)")
    found = Browser()
    yield found
    found.driver.quit()


@pytest.mark.parametrize("dark", [False, True])
def test_charts_fill_the_page_or_fit_a_phone(browser: Browser, tmp_path: Path, dark: bool) -> None:
    made_sweep(tmp_path, 24)
    for width in (1440, 390):
        browser.open((tmp_path / "report.html").as_uri(), width, 844, dark)
        assert browser.js("return document.documentElement.scrollWidth") <= width
        charts = browser.js("""const seen = [...document.querySelectorAll(".chart")].filter((n) => n.checkVisibility());
            return seen.map((n) => {
            const style = getComputedStyle(n.querySelector("text"));
            return [n.clientWidth, n.firstElementChild.getBoundingClientRect().width, n.scrollWidth, style.fill];
        })""")  # fmt: skip
        assert len(charts) == 3
        for place, (holder, drawn, scrolls, fill) in enumerate(charts):
            assert drawn >= holder - 1  # full width
            assert scrolls <= holder or (place == 0 and width == 390)  # many keys scroll, with a shadow that says so
            assert fill == ("rgb(232, 235, 239)" if dark else "rgb(27, 31, 36)")
    assert "gradient" in browser.js("return getComputedStyle(document.querySelector('.chart.narrow')).backgroundImage")
