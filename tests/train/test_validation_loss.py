"""The validation loss where memory is short: fewer rows a pass, the same figure, and training goes on in any case."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fast_ft.common.minutes import Measurements, TrainPace
from fast_ft.train.session import TrainSession
from tests.train.test_train import MakeSession, make_rows, make_session, same

assert make_session is not None  # a fixture

ROWS = make_rows(8, seed=3)
Lines = list[dict[str, Any]]


def losses(lines: Lines) -> list[float]:
    return [line["validation_loss"] for line in lines if "validation_loss" in line]


def measuring(session: TrainSession, is_short: Callable[[int], bool]) -> list[int]:
    """Let memory run out in passes that measure, by their tokens; return the tokens of those passes, as they come."""
    seen: list[int] = []

    def full(module: Any, given: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            return
        seen.append(given[0].shape[1])
        if is_short(seen[-1]):
            raise torch.OutOfMemoryError("as a small card would")

    session.loaded.model.get_input_embeddings().register_forward_pre_hook(full)
    return seen


def test_where_memory_runs_out_passes_take_half_as_many_rows_and_say_the_same(
    make_session: MakeSession, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, wanted = make_session(validation=ROWS, eval_steps=2, dropout=0.1)
    plain.run()
    session, lines = make_session(validation=ROWS, eval_steps=2, dropout=0.1)
    seen = measuring(session, lambda tokens: tokens > 32)
    session.run()
    assert losses(lines) == pytest.approx(losses(wanted), rel=1e-6) and len(losses(lines)) == 4
    assert same(plain, session), "nothing was drawn, and no gradient was added"
    assert session.steps.plan == plain.steps.plan and session.steps.out_of_memory == 0 and not session.notes
    short = [tokens for tokens in seen if tokens > 32]
    assert len(short) == 1 and session.validation.loss.most_rows == 2, (
        "four rows were too many once, and then never again"
    )
    assert capsys.readouterr().err.count("is measured again with at most 2 rows in a pass") == 1


def test_one_row_that_does_not_fit_beside_graphs_has_their_memory(
    make_session: MakeSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are no graphs on a CPU: something else takes their place."""
    plain, wanted = make_session(validation=ROWS)
    plain.run()
    session, lines = make_session(validation=ROWS)
    passes = session.steps.passes
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    passes._graphs[128] = object()  # type: ignore[assignment]
    measuring(session, lambda _: bool(passes._graphs))
    session.run()
    assert losses(lines) == pytest.approx(losses(wanted), rel=1e-6) and same(plain, session)
    said = capsys.readouterr().err
    assert [said.count(f"at most {most} in a pass") for most in ("2 rows", "1 row")] == [1, 1]
    assert said.count("measured again without the graphs") == 1


@pytest.mark.parametrize("fits", [0, 1])
def test_a_row_that_does_not_fit_ends_the_measurements_and_not_the_training(
    make_session: MakeSession, fits: int, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, wanted = make_session()
    plain.run()
    due = Measurements.over([len(row.input_ids) for row in ROWS], [4, 3], 2)
    session, lines = make_session(
        validation=ROWS, eval_steps=2, save_steps=1,
        pace=lambda _: TrainPace(60, [1] * 7, time.monotonic, measurements=due),
    )  # fmt: skip
    seen = measuring(session, lambda _: session.state.global_step > 2 * fits)
    session.run()
    assert session.finished and same(plain, session)
    assert [line["loss"] for line in lines] == [line["loss"] for line in wanted]
    assert ["validation_loss" in line for line in lines] == [False, bool(fits)] + [False] * 5
    assert ["validation_seconds" in line for line in lines].count(True) == 1 + fits, "it is not tried again"
    assert session.stopping.pace is not None and not session.stopping.pace.measurements.after
    longest = max(len(row.input_ids) for row in ROWS)
    assert len([tokens for tokens in seen if tokens >= longest]) <= 2 * fits + 3
    (text,) = session.notes
    assert text.startswith(f"the validation loss is not measured from step {2 + 2 * fits} on: out of memory over one")
    assert f"the longest has {longest} tokens. Lower model.max_length" in text and text in capsys.readouterr().err


def test_other_errors_of_a_measurement_are_not_taken_for_short_memory(make_session: MakeSession) -> None:
    session, _ = make_session(validation=ROWS)

    def broken(module: Any, given: Any) -> None:
        if not torch.is_grad_enabled():
            raise RuntimeError("device-side assert triggered")

    session.loaded.model.get_input_embeddings().register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        session.run()
