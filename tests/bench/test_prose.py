"""Measured numbers in README.md and docs/ are rendered from figures.json or a raw result, or say that they are not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import figures, prose, quickstart, table
from fast_ft.common.errors import InputError

#: Numbers that look measured and are not, by what they are. Each phrase stands in some document.
ALLOWED = {
    "a limit of memory or time that a command is given": [
        "14.7 GiB", "a cap of 10 GiB", "at most 6 trials and 5 minutes", "held to a T4's memory (14.7 GiB)",
        "2.5 GiB of disk",
    ],
    "a version": ["Python 3.11 or 3.12", "on Python 3.11 (`pip check` clean) and 3.12", "torch 2.11"],
    "the size of a file or a data set": [
        "a sketch of one gradient (2,048 numbers)",
        "about 400 MB", "Alpaca's 1,000 longest rows", "13 GB are not read", "rows of 2,048 tokens",
        "100 of 2,000 rows", "stand-in of 52,002", "11,229 of Alpaca's",
    ],
    "what the homework or its course says": ["| 2.4 |", "| 4.15 |", "| 4.4 |", "4.15 and 4.4", "score >= 4.5"],
    "a recipe's setting": ["all 13 times", "With 0.5 an epoch"],
    "a limit that the program keeps, in its code and a test": [
        "public scores less than 0.35", "less than 1.5 times apart", "saw 1.5 times as high",
        "over 2 %", "95 % interval", "cosine at least 0.99", "same within 5 %",
        "no beat came for 60 s", "a dead machine after 60 s", "ends within 10 s of a signal",
        "more than 0.01 nats per token", "pieces of 16 MiB down to 4 KiB",
        "20,000 values", "10 s, 1 GiB, 200,000 characters", "8 MiB, tokenizers 128 MiB", "64 MiB, 2,000 members",
        "costs 2 s", "within 10 seconds", "64 MiB in 64 KiB of gzip: under 16 MiB", "2,000 requests, 1 dollar",
            ],
    "what a test goes through, and holds": [
        "stopped 3 times in 12 steps", "file system of 32 MiB", "a model of 285 MB", "under 1.8 times its size",
            ],
    "a computation from what stands beside it": ["about 0.17", "at most 0.07 dollars"],
    "a goal": ["The aim was 98 %", "while the aim was 0.6", "while the aim was 1.45"],
    "the number of a paper": ["arXiv 2402.04833", "arXiv 2305.11206"],
}  # fmt: skip
PHRASES = sorted((phrase for phrases in ALLOWED.values() for phrase in phrases), key=len, reverse=True)
DOCUMENTS = [pytest.param(path, id=path.name) for path in prose.documents()]
#: From the schema and from the commands' help, to the letter: tests/project/test_docs_site.py and test_commands.py.
GENERATED = ("recipe-reference.md", "commands.md")
CITATIONS = sorted({match[0] for path in prose.documents() for match in prose.CITED.finditer(path.read_text("utf-8"))})


@pytest.mark.parametrize("path", DOCUMENTS)
def test_what_a_document_cites_is_what_the_samples_say(path: Path) -> None:
    assert prose.rendered(path) == path.read_text(encoding="utf-8"), "run python -m bench --readme"


@pytest.mark.parametrize("path", [each for each in DOCUMENTS if each.id not in GENERATED])
def test_a_number_that_looks_measured_names_its_source(path: Path) -> None:
    found = prose.unsourced(path.read_text(encoding="utf-8"), PHRASES)
    assert found == [], "write <!-- source --> behind it (bench/prose.py), or say what it is in ALLOWED"


def test_what_is_allowed_stands_in_a_document() -> None:
    texts = re.sub(r"\s+", " ", "\n".join(path.read_text(encoding="utf-8") for path in prose.documents()))
    assert [phrase for phrase in PHRASES if phrase not in texts] == []


def test_there_is_no_citation_that_could_be_changed_unnoticed() -> None:
    assert len(CITATIONS) > 100
    for cited in CITATIONS:
        match = prose.CITED.fullmatch(cited)
        assert match is not None
        for place, digit in enumerate(match["number"]):
            if digit.isdigit():
                other = cited[:place] + str((int(digit) + 1) % 10) + cited[place + 1 :]
                try:
                    assert prose.render(other) != other, other
                except InputError as error:
                    assert "does not stand in" in str(error)


@pytest.mark.parametrize(
    ("written", "rendered"),
    [
        ("1<!-- a.json/runs/0/seconds --> s", "2<!-- a.json/runs/0/seconds --> s"),
        ("1.00<!-- a.json/runs/1/seconds --> s", "3.25<!-- a.json/runs/1/seconds --> s"),
        ("9,000<!-- a.json/tokens -->", "1,234<!-- a.json/tokens -->"),
        ("9000<!-- a.json/tokens -->", "1234<!-- a.json/tokens -->"),
        ("1 %<!-- a.json/share -->", "12 %<!-- a.json/share -->"),
        ("1.0%<!-- a.json/share -->", "12.5%<!-- a.json/share -->"),
        ("1 points<!-- a.json/share -->", "12 points<!-- a.json/share -->"),
        ("0.0<!-- a.json/runs/*/seconds/mean -->", "2.6<!-- a.json/runs/*/seconds/mean -->"),
        ("0<!-- a.json/lengths/max minus 2 -->", "7<!-- a.json/lengths/max minus 2 -->"),
        ("0<!-- a.json/tokens over a.json/runs/0/seconds -->", "617<!-- a.json/tokens over a.json/runs/0/seconds -->"),
        ("0<!-- a.json/runs/0/seconds times 1000 -->", "2,000<!-- a.json/runs/0/seconds times 1000 -->"),
        ("4,407<!-- a.json/line --> and **1.0<!-- b.c -->**", "4,407<!-- a.json/line --> and **7.5<!-- b.c -->**"),
        ("3 <!-- figures --> 4", "3 <!-- figures --> 4"),
    ],
)  # fmt: skip
def test_numbers_are_written_from_their_sources(
    written: str, rendered: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = {
        "runs": [{"seconds": 2.0}, {"seconds": 3.25}], "tokens": 1234, "share": 0.125, "lengths": [3, 9],
        "line": "whole again {'tokens_per_s': 4407}",
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(raw))
    (tmp_path / "figures.json").write_text(json.dumps({"b.c": {"value": 7.5}}))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setattr(figures, "FIGURES", tmp_path / "figures.json")
    prose.raw.cache_clear()
    assert prose.render(written) == rendered
    for wrong in ("1<!-- a.json/nothing -->", "1<!-- no.such.figure -->", "1<!-- b.json/runs -->"):
        with pytest.raises(InputError, match="no such figure, and nothing in a raw result"):
            prose.render(wrong)
    with pytest.raises(InputError, match=r"5 does not stand in a.json/line: whole again"):
        prose.render("5<!-- a.json/line -->")
    prose.raw.cache_clear()


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("It takes 12 s.", ["12"]),
        ("It takes 36 to 42 s, at 4,563 tokens/s.", ["36", "42", "4,563"]),
        ("Step time within 13 %; memory 0.3.", ["13", "0.3"]),
        ("Measured on 2026-11-22 with 100 rows.", ["2026-11-22"]),
        ("| a | b |\n|---|---|\n| 10 rows | 4 |\n| x | 3<!-- a.b --> |", ["4"]),
        ("| a | b |\n|---|---|\n| 10 rows | 4 |", []),
        ("* one of 5 ms\n* and 6 GiB", ["5", "6"]),
        ("    run it    # takes 15 minutes\n    sleep 15 s", ["15"]),
        ("It takes `12 s` by [this](12.5), not 1.2.3, in a 7B, at 5 steps.", []),
        ("It takes 26 ms, by count. It takes 27 ms.", ["27"]),
        ("| a | 26 ms, no samples kept |\n|---|---|\n| b | 27 ms |", ["27"]),
        ("## First (no samples kept)\n\nIt takes 1.5 s.\n\n## Second\n\nIt takes 2.5 s.", ["2.5"]),
        ("<!-- figures -->\n| 1.5 s |\n<!-- /figures -->\n\n2.5", ["2.5"]),
        ("It takes 12<!-- a.b --> s at the limit of 3 GiB.", []),
    ],
)
def test_what_looks_measured(text: str, numbers: list[str]) -> None:
    assert [each.split(" in: ")[0] for each in prose.unsourced(text, ["limit of 3 GiB"])] == numbers


def test_the_quickstarts_excerpt_is_of_its_output() -> None:
    result = json.loads((figures.RESULTS / "quickstart.json").read_text(encoding="utf-8"))
    excerpt = quickstart.excerpt(result["output"])
    assert set(excerpt) <= set(result["output"]) and 20 < len(excerpt) < len(result["output"])
    assert [line.split("  ")[0] for line in excerpt if re.search(r" \d+/\d+ ", line)] == [
        "training", "answers", "answers of the base model", "judging",
    ]  # fmt: skip
    for share in ("tuned", "base"):
        score = result["scores"] if share == "tuned" else result["scores"]["base"]
        assert any(line.startswith("│ all") and f"{score['exact_match']:.0%} │" in line for line in excerpt), share
    folder = Path("/tmp/somewhere/run")
    (line,) = quickstart.output_lines(f"done: {folder}\n", folder)
    assert re.fullmatch(r"done: runs/quickstart-[0-9a-f]{8}", line), "no folder of the machine is shown"
    shown = quickstart.markdown(result | {"cores": 2, "load_before": 0.4, "date": "2026-01-31T1", "wall_seconds": 41.6})
    assert shown.startswith(
        "`make quickstart`, some lines left out (2 CPU cores, 2026-01-31; 42 s after installation):"
    )
    assert "beside other work that kept them busy" in quickstart.markdown(result | {"cores": 2, "load_before": 2.1})


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in figures.RESULTS.glob("*-train.json")])
def test_the_tables_of_a_result_are_rendered_from_it(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == table.markdown(result)
