"""Steps that are launched before it is known what came of the last one: the same lines, weights and endings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor

from bench.step_log import StepLog
from fast_ft.common.errors import InputError
from fast_ft.common.minutes import RESERVE, TrainPace
from fast_ft.data.batches import StageJob
from fast_ft.recipe import schema
from fast_ft.train import state
from fast_ft.train.adamw_8bit import AdamW8bit
from fast_ft.train.launched_step import LaunchedStep
from fast_ft.train.optimizer import make_optimizer
from fast_ft.train.session import TrainSession
from tests.train.test_train import MakeSession, learning_rates, make_jobs, make_rows, make_session, same

assert make_session is not None  # a fixture

EIGHT = {"optim": "adamw_8bit", "r": 64}  # bitsandbytes keeps fewer than 4,096 weights in 32 bits
Lines = list[dict[str, Any]]


def told(lines: Lines) -> Lines:
    """What lines say besides the time."""
    return [{key: value for key, value in line.items() if key not in ("seconds", "gib")} for line in lines]


@pytest.fixture
def both(make_session: MakeSession) -> Callable[..., list[tuple[TrainSession, Lines]]]:
    """Two sessions of the same task, the second of which runs ahead; `arrange` changes each before it runs."""

    def make(arrange: Callable[[TrainSession, Lines], None] = lambda *_: None, **values: Any) -> Any:
        made = []
        for ahead in (False, True):
            session, lines = make_session(**values)
            session.ahead = ahead
            arrange(session, lines)
            session.run()
            made.append((session, lines))
        return made

    return make


@pytest.mark.parametrize(
    "values",
    [
        {},
        {**EIGHT, "dropout": 0.1, "neftune_noise_alpha": 5, "save_steps": 2},
        {"carry": schema.Carry(optimizer=False, schedule=False), "max_grad_norm": 0.0},
        {**EIGHT, "stop_after": 5, "max_grad_norm": 0.05},
    ],
)
def test_running_ahead_changes_no_line_and_no_weight(both: Any, values: dict[str, Any]) -> None:
    (plain, wanted), (session, lines) = both(**values)
    assert len(lines) == values.get("stop_after", 7) and told(lines) == told(wanted) and same(plain, session)


@dataclass
class CardsClock:
    """An event that a card reached at a second of its own clock."""

    at: float

    def synchronize(self) -> None:
        """Wait for nothing."""

    def elapsed_time(self, other: CardsClock) -> float:
        return 1e3 * (other.at - self.at)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_steps_seconds_are_the_cards_however_late_the_host_learns_of_its_end(
    make_session: MakeSession, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that runs ahead read the last two steps at one time, and the last one's rate was a million tokens/s."""
    ends, of = iter([10.0, 12.5, 13.0, 16.0]), LaunchedStep.of
    monkeypatch.setattr(LaunchedStep, "of", lambda *given: replace(of(*given), done=CardsClock(next(ends))))
    session, lines = make_session(stop_after=4)
    session.ahead = ahead
    session.run()
    assert [line["seconds"] for line in lines[1:]] == [2.5, 0.5, 3.0]


def test_a_line_is_written_while_the_next_step_runs_but_never_behind_a_checkpoint(make_session: MakeSession) -> None:
    """Seven steps of two stages, 4 and 3: saved after step 2 and at both ends, where all lines are written first."""
    events: list[str] = []
    saving = {
        "on_step": lambda entry: events.append(f"line {entry['step']}"),
        "on_checkpoint": lambda step, write: events.append(f"save {step}"),
    }
    session, _ = make_session(callbacks=saving, save_steps=2)
    session.ahead = True
    run_step = session.steps.train_step

    def launched(*given: Any) -> Any:
        events.append(f"step {session.state.global_step + session._in_flight + 1}")
        return run_step(*given)

    session.steps.train_step = launched  # type: ignore[method-assign]
    session.run()
    assert events == [
        "step 1", "step 2", "line 1", "line 2", "save 2", "step 3", "step 4", "line 3", "line 4", "save 4",
        "step 5", "step 6", "line 5", "line 6", "save 6", "step 7", "line 7", "save 7",
    ]  # fmt: skip


def test_a_timed_run_ends_its_warm_up_before_it_runs_ahead(make_session: MakeSession) -> None:
    """Its seconds are then those from the warm-up's end to the last step's, and of as many steps."""
    log, events = StepLog(2), list[str]()

    def line(entry: dict[str, Any]) -> None:
        events.append(f"line {entry['step']}")
        log(entry)

    session, _ = make_session(callbacks={"on_step": line}, stop_after=4)
    session.ahead, run_step = True, session.steps.train_step
    log.follow(session)

    def launched(*given: Any) -> Any:
        events.append(f"step {session.state.global_step + session._in_flight + 1}")
        return run_step(*given)

    session.steps.train_step = launched  # type: ignore[method-assign]
    session.run()
    assert events == ["step 1", "line 1", "step 2", "line 2", "step 3", "step 4", "line 3", "line 4"]
    assert log.seconds == [each["seconds"] for each in log.lines[2:]] and len(log.lines) == 4


def test_a_step_reads_no_number_from_the_device(make_session: MakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads one waits for the card. Only the line of a step does, and it is written a step later."""
    reads: list[str] = []
    reading = [False]
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        plain = getattr(Tensor, name)

        def read(self: Tensor, *given: Any, name: str = name, plain: Any = plain) -> Any:
            if not reading[0] and self.is_floating_point():
                import traceback

                reads.append(f"{name}: {traceback.extract_stack()[-2]}")
            return plain(self, *given)

        monkeypatch.setattr(Tensor, name, read)
    plain_read = LaunchedStep.read

    def waits(self: LaunchedStep) -> tuple[float, float, float]:
        reading[0] = True
        try:
            return plain_read(self)
        finally:
            reading[0] = False

    monkeypatch.setattr(LaunchedStep, "read", waits)
    session, lines = make_session([StageJob(0, "one", make_rows(4), [[0, 1, 2, 3]] * 4, 0.01)], **EIGHT)
    session.ahead = True
    train_step, first = session.steps.train_step, [True]

    def launched(*given: Any) -> Any:
        if first[0]:
            reads.clear()  # what making the trainer reads
            first[0] = False
        if len(lines) == 2:
            assert not reads, reads
        return train_step(*given)

    session.steps.train_step = launched  # type: ignore[method-assign]
    session.run()
    assert len(lines) == 4 and not first[0]


# Skips that the device decides


def made(kind: type, count: int = 5000) -> tuple[torch.nn.Parameter, Any]:
    weight = torch.nn.Parameter(torch.randn(count, generator=torch.Generator().manual_seed(0)))
    return weight, kind([weight], lr=2e-3, weight_decay=0.01)


@pytest.mark.parametrize("count", [5000, 300])
def test_a_step_of_eight_bits_is_bitsandbytes_own_and_a_skipped_one_changes_and_counts_nothing(count: int) -> None:
    """Under a GradScaler, whose first scale overflows twice and whose growth overflows once more."""
    ours, theirs = made(AdamW8bit, count), made(bitsandbytes.optim.AdamW8bit, count)
    found: list[list[float]] = []
    for weight, optimizer in (ours, theirs):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=4)
        scales = []
        for step in range(14):
            draw = torch.Generator().manual_seed(step)
            gradient = torch.randn(count, generator=draw)
            scale = scaler.scale(torch.ones(()))
            weight.grad = torch.where(scale > 2.0**6, float("inf"), gradient * scale)
            before = weight.detach().clone()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            assert weight.detach().equal(before) == (step and scales[-1] < scales[-2]) or step == 0
        found.append(scales)
    assert found[0] == found[1] and min(found[0]) < max(found[0])
    left, right = ours[1].state[ours[0]], theirs[1].state[theirs[0]]
    assert float(left["step"]) == right["step"] < 14
    assert torch.allclose(ours[0], theirs[0], atol=1e-6)
    for name in ("state1", "state2"):
        if left[name].dtype == torch.uint8:
            assert float((left[name] != right[name]).float().mean()) < 1e-3
        else:
            assert torch.allclose(left[name], right[name], rtol=1e-5, atol=1e-9)


def test_the_host_is_not_asked_whether_a_step_of_eight_bits_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, optimizer = made(AdamW8bit)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    weight.grad = torch.full_like(weight, float("nan"))
    before = weight.detach().clone()
    with monkeypatch.context() as within:
        for name in ("item", "__bool__", "__float__"):
            within.setattr(Tensor, name, lambda *_: pytest.fail("a number was read"))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert weight.detach().equal(before) and scaler.get_scale() == 2.0**15


def test_a_checkpoint_of_bitsandbytes_own_optimizer_goes_on(make_session: MakeSession, tmp_path: Path) -> None:
    """An earlier version saved the number of steps as a number."""
    session, _ = make_session(**EIGHT)
    session.optimizer = bitsandbytes.optim.AdamW8bit([session.flat.parameter], lr=0.01)
    session.flat.zero_gradients()
    session.flat.gradient.fill_(0.1)
    for _ in range(3):
        session.optimizer.step()
    session.save_state(tmp_path)
    assert '"step": 3' in (tmp_path / "state.json").read_text()
    second, _ = make_session(**EIGHT)
    state.load(tmp_path, second.loaded.model, second.optimizer)
    assert type(second.optimizer) is AdamW8bit
    for each in (session, second):
        each.flat.zero_gradients()
        each.flat.gradient.fill_(-0.2)
        each.optimizer.param_groups[0] |= {"lr": 0.01, "weight_decay": 0.01}
        each.optimizer.step()
    assert torch.allclose(session.flat.parameter, second.flat.parameter, atol=1e-7)
    assert float(second.optimizer.state[second.flat.parameter]["step"]) == 4


def spoiling(*calls: int) -> Callable[[TrainSession, Lines], None]:
    """Make the loss of these steps NaN, counted from 1 as they are launched."""

    def arrange(session: TrainSession, lines: Lines) -> None:
        count = [0]

        def hook(module: Any, given: Any, output: Tensor) -> Tensor:
            count[0] += 1
            return output * float("nan") if count[0] in calls else output

        session.loaded.model.get_input_embeddings().register_forward_hook(hook)

    return arrange


@pytest.mark.parametrize("optim", [EIGHT, {}])
@pytest.mark.parametrize("calls", [(1,), (2, 3), (4, 6), (2, 3, 4), (2, 3, 4, 6, 7, 8), (7,)])
def test_bad_numbers_are_skipped_counted_and_gone_back_from_at_the_same_steps(
    both: Any, calls: tuple[int, ...], optim: dict[str, Any]
) -> None:
    jobs = [StageJob(0, "one", make_rows(4), [[0, 1, 2, 3]] * 7, 0.01)]
    (plain, wanted), (session, lines) = both(spoiling(*calls), jobs=jobs, max_bad_steps=3, **optim)
    assert repr(told(lines)) == repr(told(wanted)) and same(plain, session)  # repr: NaN is not NaN
    assert any(line["skipped"] for line in lines) and session.gave_up == plain.gave_up
    assert session.state == plain.state


# Endings


def test_a_budget_ends_training_at_the_same_step_with_the_same_rates(both: Any) -> None:
    """17 of 20 steps fit, each of 6 s: the rate goes down over the last three."""
    rows = make_rows(4)
    jobs = [StageJob(i, name, rows, [[0, 1, 2, 3]] * count, 0.01) for i, name, count in ((0, "a", 16), (1, "b", 4))]

    def pace(lines: Lines) -> TrainPace:
        minutes = 103 / 60 / (1 - RESERVE)  # a step is counted before its line is there
        return TrainPace(minutes, [1] * 20, lambda: 6.0 * (len(lines) + 1), since=0.0)

    (plain, wanted), (session, lines) = both(jobs=jobs, pace=pace, warmup_steps=0, lr_scheduler_type="constant")
    assert session.out_of_time and len(lines) == 17
    assert learning_rates(lines) == pytest.approx([0.01] * 15 + [0.02 / 3, 0.01 / 3])
    assert told(lines) == told(wanted) and same(plain, session) and session.state == plain.state


def test_with_ample_time_training_runs_ahead_and_a_stall_ends_it_with_all_that_was_launched(
    make_session: MakeSession,
) -> None:
    """The clock jumps beyond the budget during step 8: the step behind it was launched, and is the last."""
    jobs = [StageJob(0, "one", make_rows(4), [[0, 1, 2, 3]] * 12, 0.01)]
    now = [0.0]
    session, lines = make_session(jobs, pace=lambda _: TrainPace(10, [1] * 12, lambda: now[0]))
    session.ahead, most = True, [0]
    train_step = session.steps.train_step

    def launched(*given: Any) -> Any:
        most[0] = max(most[0], session._in_flight)
        now[0] += 700.0 if session.state.global_step + session._in_flight == 7 else 1.0
        return train_step(*given)

    session.steps.train_step = launched  # type: ignore[method-assign]
    session.run()
    assert most[0] == 1 and session.out_of_time
    assert [line["step"] for line in lines] == list(range(1, session.state.global_step + 1))
    plain, _ = make_session(jobs, stop_after=len(lines))
    plain.run()
    assert 8 <= len(lines) <= 9 and same(plain, session), "the weights are those of the last line"


def test_a_request_to_stop_ends_after_the_steps_that_were_launched_and_they_are_saved(
    make_session: MakeSession, tmp_path: Path
) -> None:
    session, lines = make_session(callbacks={"on_checkpoint": lambda step, write: write(tmp_path)}, **EIGHT)
    session.ahead, train_step = True, session.steps.train_step

    def launched(*given: Any) -> Any:
        if session.state.global_step + session._in_flight == 2:
            session.stopping.ask()  # during the third step, while the second is not yet read
        return train_step(*given)

    session.steps.train_step = launched  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        session.run()
    assert [line["step"] for line in lines] == [1, 2, 3] and state.read(tmp_path).global_step == 3
    second, later = make_session(**EIGHT)
    second.resume(tmp_path)
    second.run()
    whole, wanted = make_session(**EIGHT)
    whole.run()
    assert told(lines + later) == told(wanted) and same(whole, second)


def test_memory_that_runs_out_while_a_step_is_not_yet_read_costs_no_line(both: Any) -> None:
    def arrange(session: TrainSession, lines: Lines) -> None:
        count = [0]

        def full(module: Any, given: Any) -> None:
            count[0] += 1
            if count[0] == 3:
                assert session._in_flight == int(session.ahead)
                raise torch.OutOfMemoryError("in the third step")

        session.loaded.model.get_input_embeddings().register_forward_pre_hook(full)

    (plain, wanted), (session, lines) = both(arrange)
    assert told(lines) == told(wanted) and same(plain, session) and session.steps.out_of_memory == 1


def test_where_no_plan_is_left_the_lines_before_are_written(make_session: MakeSession) -> None:
    session, lines = make_session(micro_batch=1, recompute_layers=2)
    session.ahead = True

    def full(module: Any, given: Any) -> None:
        if session.state.global_step + session._in_flight == 3:
            raise torch.OutOfMemoryError("from the fourth step on")

    session.loaded.model.get_input_embeddings().register_forward_pre_hook(full)
    with pytest.raises(InputError, match="out of memory with one row at a time, at step 4"):
        session.run()
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_several_processes_do_not_run_ahead(make_session: MakeSession) -> None:
    session, _ = make_session()
    assert not session.ahead, "on a CPU there is nothing to wait for"
    session.ahead = True
    assert session.runs_ahead
    session._in_flight = len(make_jobs(make_rows(12))[0].batches)
    assert session.runs_ahead, "nothing is saved in between at the stage's end: its trainer reads all steps"
    assert type(make_optimizer(session.flat, schema.Train(optim="adamw_8bit"))) is AdamW8bit
