"""The ledger: public scores, noise, minutes over all attempts, and JudgeBoi's day."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest

from fast_ft.cli.main import main
from fast_ft.common import atomic_files
from fast_ft.common.errors import InputError
from fast_ft.homework import ledger, public_scores
from fast_ft.run.folder import RunDir


def make_run(
    root: Path, name: str, *, minutes: float = 1.0, rules: str | None = "ntu-ml-2025-hw5", **more: Any
) -> RunDir:
    """A run folder as far as the ledger looks into it."""
    folder = RunDir(root / name)
    folder.root.mkdir(parents=True)
    recipe = {"rules": rules, "lora": {"r": len(name)}, "budget": {"train_minutes": None}}
    atomic_files.write_json(folder.pred, {name: {"input": [], "output": ["x"]}})
    manifest = {
        "recipe": recipe,
        "started": f"2025-04-0{len(list(root.iterdir()))}",
        "phases": {"train": {"seconds": 1}},
    }
    atomic_files.write_json(
        folder.manifest_path, manifest | {"digests": {"pred": atomic_files.sha256_file(folder.pred)}} | more
    )
    step = {"stage": "all", "step": 1, "loss": 1.0, "seconds": minutes * 30}
    folder.log.write_text(f"{json.dumps(step)}\n" * 2)
    return folder


def at(hour: int, minute: int = 0, day: int = 5) -> str:
    return f"2025-04-{day:02d} {hour:02d}:{minute:02d}"


def test_a_public_score_is_recorded_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path, "a")
    make_run(tmp_path, "bb")
    assert main(["submit", str(folder.root), "--public-score", "4.31", "--at", at(21, 30)]) == 0
    (entry,) = json.loads((folder.root / "submissions.json").read_text())["submissions"]
    assert entry == {"score": 4.31, "at": "2025-04-05T13:30:00+00:00", "pred": atomic_files.sha256_file(folder.pred)}
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "public 4.31" in out and "r=1" in out and "r=2" in out
    assert "training over all 2 attempts: 2.0 of 240 minutes" in out


def test_differences_under_035_are_called_noise(tmp_path: Path) -> None:
    for name, score in (("a", 4.31), ("bb", 4.0), ("ccc", 3.96), ("dddd", 3.95)):
        ledger.record(make_run(tmp_path, name), score, at(12))
    leads, noise, below, *_ = ledger.read(tmp_path).sentences()
    assert leads == "public scores: a leads with 4.31"
    assert noise.endswith("(less than 0.35 below): bb 4") and below.endswith("more than noise: ccc 3.96, dddd 3.95")


def test_the_fifth_of_a_day_warns_over_all_runs(tmp_path: Path) -> None:
    one, two = make_run(tmp_path, "a"), make_run(tmp_path, "bb")
    # In Taipei; 23:59 on the 4th is the next day's already.
    for folder, when in ((one, at(23, 59, 4)), (two, at(1)), (one, at(9)), (two, at(23, 58))):
        ledger.record(folder, 4.0, when)
    now = dt.datetime(2025, 4, 5, 23, 58, 30, tzinfo=public_scores.TAIPEI)
    assert ledger.read(tmp_path).today(now) == [
        "warning: 4 submissions today; the next is the last of 5 until 23:59 (UTC+8)"
    ]
    ledger.record(one, 4.1, at(20))
    (warning,) = ledger.read(tmp_path).today(now)
    assert warning.startswith("warning: 5 of 5 submissions today") and "after 23:59 (UTC+8)" in warning
    assert ledger.read(tmp_path).today(now + dt.timedelta(minutes=1)) == []
    ledger.record(one, 4.2, at(23, 58, 4))
    assert [e["score"] for e in ledger.read(tmp_path).attempts[0].submissions] == [4.2, 4.0, 4.0, 4.1], "by time"


def test_recording_the_fifth_warns_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Noon(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Noon:
            return cls(2025, 4, 5, 12, tzinfo=public_scores.TAIPEI).astimezone(tz)

    monkeypatch.setattr(dt, "datetime", Noon)  # all five on one day, whenever this runs
    folder = make_run(tmp_path, "a")
    warnings = [ledger.record(folder, 4.0) for _ in range(5)]
    assert warnings[:3] == [[], [], []] and "the last of 5" in warnings[3][0] and "5 of 5" in warnings[4][0]


def test_minutes_count_the_homeworks_attempts_and_stopped_ones_too(tmp_path: Path) -> None:
    make_run(tmp_path, "a", minutes=200)
    make_run(tmp_path, "bb", minutes=50, phases={})
    make_run(tmp_path, "trial", minutes=500, rules=None)
    make_run(tmp_path, "again", minutes=500, reproduction_of="x.zip")
    content = ledger.read(tmp_path)
    assert [a.name for a in content.attempts] == ["a", "bb", "trial"]
    assert "warning: training over all 2 attempts: 250.0 of 240 minutes" in content.sentences()


def test_own_scores_are_compared_within_one_judge(tmp_path: Path) -> None:
    for name, low, mean, high, model in (
        ("a", 4.0, 4.3, 4.6, "m"), ("bb", 3.7, 4.0, 4.2, "m"), ("ccc", 2.0, 2.2, 2.4, "m"), ("dddd", 1, 9, 9, "other"),
    ):  # fmt: skip
        scores = {"kind": "openai", "model": model, "rubric": "pairwise", "mean": mean, "low": low, "high": high}
        atomic_files.write_json(make_run(tmp_path, name).scores, scores)
    (sentence,) = [text for text in ledger.read(tmp_path).sentences() if text.startswith("scores by")]
    assert sentence.startswith("scores by openai m: a leads with 4.30; its 95 % interval overlaps with that of bb, so")


def test_answers_made_anew_keep_the_score_apart(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a")
    ledger.record(folder, 4.0)
    folder.update(digests={"pred": "other"})
    assert "which is the former answers' score" in ledger.read(tmp_path).sentences()[0]


def test_a_damaged_file_hides_no_run_and_is_never_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "a")
    folder = make_run(tmp_path, "bb")
    good = {"score": 4.0, "at": "2025-04-05T13:30:00+00:00", "pred": "0"}
    damaged = [
        "", "{", "[]", "[" * 100_000, '{"submissions": {}}', '{"submissions": [7]}', "\udcff",
        *(json.dumps({"submissions": [good | wrong]}) for wrong in (
            {"score": "4"}, {"score": None}, {"score": 10**400}, {"score": float("nan")}, {"at": "yesterday"},
            {"at": 7}, {"at": "0001-01-01T00:00:00+23:59"}, {"at": "9999-12-31T23:59:59"}, {"at": "\ud800"},
            {"pred": []}, {"note": "\ud800"})),
    ]  # fmt: skip
    for text in damaged:
        path = folder.root / "submissions.json"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        assert main(["runs", str(tmp_path)]) == 0
        captured = capsys.readouterr()
        assert "  a  " in captured.out and "  bb  " in captured.out and f"warning: {path}: " in captured.err
        assert main(["submit", str(folder.root), "--public-score", "4"]) == 2
        assert "mend it, or delete it" in capsys.readouterr().err
        assert path.read_bytes() == text.encode("utf-8", "surrogateescape")


def test_a_time_without_an_offset_is_taipeis(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a")
    times = ["2025-04-05 21:30", "2025-04-05T13:31:00+00:00", "2025-04-05T21:29:00+08:00"]
    content = {"submissions": [{"score": 4.0 + n / 10, "at": text, "note": "mine"} for n, text in enumerate(times)]}
    atomic_files.write_json(folder.root / "submissions.json", content)
    ledger.record(folder, 5.0, at(21, 45))
    noted = json.loads((folder.root / "submissions.json").read_text())["submissions"]
    assert [each["score"] for each in noted] == [4.2, 4.0, 4.1, 5.0] and noted[0]["note"] == "mine"
    assert "4 submissions today" in ledger.read(tmp_path).today(public_scores.moment(at(22)))[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.jsonl", '{"seconds": ' + "[" * 100_000), ("log.jsonl", f'{{"seconds": {10**400}}}'),
        ("scores.json", '{"kind": "openai", "low": "x", "high": []}'), ("scores.json", "["),
        ("scores.json", '{"kind": "openai", "low": 1, "high": 2, "mean": 1.5, "rubric": [[]]}'),
    ],
)  # fmt: skip
def test_other_damaged_files_hide_no_run(name: str, content: str, tmp_path: Path) -> None:
    for run in ("a", "bb"):
        (make_run(tmp_path, run).root / name).write_text(content)
    assert [attempt.name for attempt in ledger.read(tmp_path).attempts] == ["a", "bb"]
    ledger.read(tmp_path).sentences()


def test_wrong_scores_and_times_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path, "a")
    for score in (float("nan"), -1.0, 43.1):
        with pytest.raises(InputError, match="from 0 to 10"):
            ledger.record(folder, score)
    for when, message in (
        ("yesterday", "write it as"), ("2050-01-01 00:00", "has not come yet"), ("2999-01-01 00:00", "is no time"),
        ("0001-01-01 00:00", "is no time"), ("2025-04-05T23:59+99:00", "is no time"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            ledger.record(folder, 4.0, when)
    assert main(["submit", str(folder.root), "--at", at(1)]) == 2
    assert "give --public-score too" in capsys.readouterr().err
    (folder.root / "submissions.json").write_text("{")
    with pytest.raises(InputError, match="mend it, or delete it"):
        ledger.record(folder, 4.0)
    folder.pred.unlink()
    with pytest.raises(InputError, match=r"no pred\.json"):
        ledger.record(folder, 4.0)
    assert not list(folder.root.glob(".*"))
