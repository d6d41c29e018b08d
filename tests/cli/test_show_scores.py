"""What is printed of scores.json: a table of 80 columns, and the result in the last lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fast_ft.cli.show_scores import print_scores
from fast_ft.common.atomic_files import write_json
from fast_ft.run.folder import RunDir

LONG = "Explaining of ordinary things to children, in one sentence"
TOTALS = {
    "count": 150, "missing": 3, "mean": 4.314, "low": 4.1, "high": 4.52, "exact_match": 1.0, "rouge_l": 0.5,
    "chrf": 0.5, "length_ratio": 1.0,
}  # fmt: skip


@pytest.fixture(params=["openai", "reference"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    """A run judged by this kind, beside the base model."""
    run = RunDir(tmp_path)
    groups: dict[str, Any] = {"by_skill": {LONG: TOTALS}, "by_difficulty": {"10": TOTALS}}
    scores = TOTALS | groups | {
        "kind": request.param, "model": "gpt-4o-mini", "labelled": "pairwise", "answered_by": [], "notes": ["A note."],
        "reference_mean": None, "swapped": None, "base": TOTALS | groups | {"missing": 2, "prompts": {}}, "prompts": {},
        "gain": {"sentence": "This run scores 1.00 more than the base model."},
    }  # fmt: skip
    write_json(run.scores, scores)
    entry = {"input": [{"role": "user", "content": "Which crop?"}], "output": ["Melons."]}
    for path in (run.pred, run.base_pred):
        write_json(path, {"1": entry})
    return run


def test_the_table_fits_80_columns_and_the_result_comes_last(
    folder: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_scores(folder)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in out
    names = "".join(line.split("│")[1].replace(" ", "") for line in lines if "│" in line)
    assert LONG.replace(" ", "") in names and "all(3missing)(base2missing)" in names
    assert lines[-1] == "This run scores 1.00 more than the base model."
    assert out.index("Which crop?") < out.index("prompts") < out.index("A note.") < out.index(lines[-1])
