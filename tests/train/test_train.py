"""Batches, schedules, what stages hand on, and runs that end alike whether they were stopped or not."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fast_ft.common.errors import InputError
from fast_ft.common.minutes import RESERVE, TrainPace
from fast_ft.common.process_group import ALONE, Ranks
from fast_ft.data.batches import StageJob, batches
from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow
from fast_ft.models import lora_files, packed_attention
from fast_ft.models.loaders import choose
from fast_ft.models.packed_attention import PackedRows, attend
from fast_ft.plan.micro_batches import cut
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.recipe import schema
from fast_ft.train import state
from fast_ft.train.loss import response_loss
from fast_ft.train.micro_batch import blank, lay_out
from fast_ft.train.optimizer import make_optimizer, make_scheduler
from fast_ft.train.session import TrainSession
from fast_ft.train.task import TrainCallbacks, TrainTask

# Order of rows, micro-batches, padding: pure functions


def test_response_loss_equals_cross_entropy_in_chunks_of_any_size() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2500, 16, requires_grad=True), torch.randn(50, 16)
    target = torch.randint(0, 50, (2500,))
    target[::3] = IGNORE_INDEX
    ours = response_loss(hidden, weight, target)
    (ours * 0.25).backward()
    gradient, hidden.grad = hidden.grad, None
    theirs = torch.nn.functional.cross_entropy(hidden @ weight.t(), target, reduction="sum", ignore_index=IGNORE_INDEX)
    (theirs * 0.25).backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert torch.allclose(gradient, hidden.grad, atol=1e-6)
    assert response_loss(hidden, weight, torch.full((2500,), IGNORE_INDEX)).item() == 0


def test_batches_hold_each_row_once_an_epoch() -> None:
    steps = batches(10, 3, 4, shuffled=True, seed=1, stage=0)
    assert [len(step) for step in steps] == [4, 4, 2] * 3
    epochs = [[i for step in steps[start : start + 3] for i in step] for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert steps == batches(10, 3, 4, shuffled=True, seed=1, stage=0)
    assert steps != batches(10, 3, 4, shuffled=True, seed=2, stage=0)
    assert steps != batches(10, 3, 4, shuffled=True, seed=1, stage=1)
    assert batches(5, 2, 2, shuffled=False, seed=1, stage=0) == [[0, 1], [2, 3], [4]] * 2
    assert batches(3, 1, 8, shuffled=False, seed=1, stage=0) == [[0, 1, 2]]
    assert batches(10, 1.5, 4, shuffled=True, seed=1, stage=0) == steps[:5], "half of three steps, rounded up"
    assert batches(10, 0.3, 4, shuffled=True, seed=1, stage=0) == steps[:1]


def test_batches_leave_pythons_own_random_state_alone() -> None:
    random.seed(5)
    before = random.getstate()
    batches(10, 2, 4, shuffled=True, seed=1, stage=0)
    assert random.getstate() == before


def test_cut_deals_rows_into_few_micro_batches_of_like_size() -> None:
    assert cut([5, 90, 7, 80, 6], most_rows=5, most_tokens=100) == [[0, 1], [2, 3, 4]], "95 and 93 tokens"
    assert cut([3, 3, 3], most_rows=8, most_tokens=None) == [[0, 1, 2]]
    assert cut([3, 3, 3], most_rows=1, most_tokens=None) == [[0], [1], [2]]
    assert cut([300, 200, 9], most_rows=8, most_tokens=100) == [[0], [1, 2]], "a row over the limit sets it"
    draw = random.Random(0)
    for _ in range(200):
        lengths = [draw.randrange(1, 600) for _ in range(draw.randrange(1, 12))]
        rows, tokens = draw.randrange(1, 9), draw.choice([None, draw.randrange(1, 2000)])
        pieces = cut(lengths, most_rows=rows, most_tokens=tokens)
        assert sorted(i for piece in pieces for i in piece) == list(range(len(lengths)))
        for piece in pieces:
            total = sum(lengths[i] for i in piece)
            assert len(piece) <= rows and (tokens is None or total <= max(tokens, *lengths)), "none over its limit"


def test_rows_lie_one_behind_the_other_each_with_its_own_positions_and_targets() -> None:
    rows = [
        EncodedRow("a", [1, 5, 2], [IGNORE_INDEX, 5, 2]),
        EncodedRow("b", [1, 8, 9, 2], [IGNORE_INDEX, IGNORE_INDEX, 9, 2]),
    ]
    made = lay_out(rows, tokens=8, places=3, pad_id=0)
    ids, targets, positions, own = made.tokens_4T.tolist()
    assert ids == [1, 5, 2, 1, 8, 9, 2, 0]
    assert targets == [5, 2, IGNORE_INDEX, IGNORE_INDEX, 9, 2, IGNORE_INDEX, IGNORE_INDEX], "none from another row"
    assert positions == [0, 1, 2, 0, 1, 2, 3, 0] and own == [3] * 3 + [4] * 4 + [1]
    assert made.starts_S.tolist() == [0, 3, 7, 8, 8], "two rows, the padding, and a place that none takes"


def test_a_blank_pass_trains_nothing_and_holds_no_row_that_is_too_long() -> None:
    for tokens in (128, 1024, 1408):
        made = blank(tokens, places=4, longest=400, pad_id=0)
        assert made.tokens_4T.shape == (4, tokens) and set(made.tokens_4T[1].tolist()) == {IGNORE_INDEX}
        lengths = made.starts_S.diff()
        assert made.starts_S[-1] == tokens and len(lengths) == 5 and lengths.max() <= 400


def test_attention_keeps_to_each_row() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    rows = PackedRows(torch.tensor([0, 4, 6, 9, 9], dtype=torch.int32), 4)
    made = attend(q, k, v, rows)
    assert made.shape == (1, 9, 4, 8)
    heads = [part.repeat_interleave(2, dim=1) for part in (k, v)]
    mask = torch.zeros(9, 9, dtype=torch.bool)
    for a, b in ((0, 4), (4, 6), (6, 9)):
        mask[a:b, a:b] = torch.ones(b - a, b - a).tril().bool()
    expected = torch.nn.functional.scaled_dot_product_attention(q, *heads, attn_mask=mask).transpose(1, 2)
    assert torch.allclose(made, expected, atol=1e-6)


def test_rows_within_rows_give_the_outer_ones_back() -> None:
    config = SimpleNamespace(_attn_implementation="sdpa")
    outer, inner = (PackedRows(torch.tensor([0, n], dtype=torch.int32), n) for n in (9, 4))
    with packed_attention.packed_pass(config, outer):
        with packed_attention.packed_pass(config, inner):
            assert packed_attention.current_rows() is inner
        assert packed_attention.current_rows() is outer and config._attn_implementation == packed_attention.NAME
        with pytest.raises(ZeroDivisionError), packed_attention.packed_pass(config, inner):
            _ = 1 // 0
        assert packed_attention.current_rows() is outer
    assert packed_attention.current_rows() is None and config._attn_implementation == "sdpa"


# Schedules


def rates(kind: str, total: int, start: int = 0, steps: int | None = None, rate: float = 1.0, warmup: int = 2) -> list:
    """The learning rates of the steps `start`..."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=99.0)
    section = schema.Train(lr_scheduler_type=kind, warmup_steps=warmup)
    scheduler = make_scheduler(optimizer, section, rate, total, start)
    found = []
    for _ in range(total - start if steps is None else steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_linear_warms_up_and_ends_near_zero() -> None:
    assert rates("linear", 6) == pytest.approx([0.0, 0.5, 1.0, 0.75, 0.5, 0.25])
    assert rates("constant", 3) == [1.0, 1.0, 1.0]
    assert rates("constant_with_warmup", 4) == [0.0, 0.5, 1.0, 1.0]
    cosine = [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert rates("cosine", 6)[2:] == pytest.approx(cosine)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_one_schedule_over_two_stages_is_one_stages(kind: str) -> None:
    assert rates(kind, 10, 0, 4) + rates(kind, 10, 4) == rates(kind, 10)


def test_a_stages_own_rate_scales_the_schedule_and_a_new_one_starts_again() -> None:
    assert rates("linear", 10, 4, rate=0.5) == [0.5 * r for r in rates("linear", 10)[4:]]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    section = schema.Train(warmup_steps=0)
    for rate in (3.0, 2.0):  # the second must not keep the first's peak
        make_scheduler(optimizer, section, rate, 5, 0)
        assert optimizer.param_groups[0]["lr"] == rate


# Sessions: real training of a tiny model


def make_rows(count: int, seed: int = 0) -> list[EncodedRow]:
    """Rows of random ids, prompts of 3 to 6 and responses of 2 to 12 tokens."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        prompt = [1] + [rng.randrange(300, 2000) for _ in range(rng.randrange(3, 7))]
        answer = [rng.randrange(300, 2000) for _ in range(rng.randrange(1, 12))] + [2]
        rows.append(EncodedRow(f"r{i}", prompt + answer, [IGNORE_INDEX] * len(prompt) + answer))
    return rows


def make_jobs(
    rows: list[EncodedRow], size: int = 4, rate: float = 0.01, second_rate: float | None = None
) -> list[StageJob]:
    """Two stages: the first half of the rows, then all of them."""
    half = rows[: len(rows) // 2]
    return [
        StageJob(0, "easy", half, batches(len(half), 2, size, shuffled=True, seed=7, stage=0), rate),
        StageJob(1, "all", rows, batches(len(rows), 1, size, shuffled=True, seed=7, stage=1), second_rate or rate),
    ]


MakeSession = Callable[..., tuple[TrainSession, list[dict[str, Any]]]]


@pytest.fixture
def make_session(tiny: Path, tmp_path: Path) -> MakeSession:
    def make(
        jobs: list[StageJob] | None = None,
        carry: schema.Carry | None = None,
        micro_batch: int = 4,
        dropout: float = 0.0,
        r: int = 4,
        recompute_layers: int = 0,
        stop_after: int | None = None,
        ranks: Ranks = ALONE,
        pace: Callable[[list[dict[str, Any]]], TrainPace] | None = None,
        callbacks: dict[str, Any] | None = None,
        validation: Sequence[EncodedRow] = (),
        **values: Any,
    ) -> tuple[TrainSession, list[dict[str, Any]]]:
        model = schema.Model(name_or_path=str(tiny), max_length=64, load_in_4bit=False)
        lora = schema.Lora(r=r, lora_alpha=2 * r, lora_dropout=dropout)
        maker = choose.make_loader(model, lora, seed=7, name="peft")
        arguments = {"effective_batch_size": 4, "warmup_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01}
        section = schema.Train(**{**arguments, "gradient_checkpointing": False, **values})
        lines: list[dict[str, Any]] = []
        session = TrainSession(
            maker.for_training(),
            TrainTask(jobs or make_jobs(make_rows(12)), section, carry or schema.Carry(), 7, 0, stop_after, validation),
            TrainPlan(micro_batch, recompute_layers=recompute_layers, world_size=ranks.size),
            tmp_path / "work",
            TrainCallbacks(**{"on_step": lines.append} | (callbacks or {})),
            pace(lines) if pace is not None else None,
            ranks,
        )
        return session, lines

    return make


def same(a: TrainSession, b: TrainSession) -> bool:
    """Are two adapters equal to the last bit?"""
    left, right = lora_files.weights(a.loaded.model), lora_files.weights(b.loaded.model)
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, by path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{path}/{key}")
    else:
        yield path, value


def moments(session: TrainSession) -> float:
    """The size of Adam's second moments."""
    return sum(float(entry["exp_avg_sq"].sum()) for entry in session.optimizer.state.values())


def learning_rates(lines: list[dict[str, Any]]) -> list[float]:
    return [line["learning_rate"] for line in lines]


def test_the_log_has_one_whole_line_a_step(make_session: MakeSession) -> None:
    rows = make_rows(12)
    jobs = make_jobs(rows)
    session, lines = make_session(jobs)
    session.run()
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert [(line["stage"], line["stage_step"]) for line in lines] == [
        *(("easy", n) for n in range(1, 5)), *(("all", n) for n in range(1, 4))
    ]  # fmt: skip
    steps = [[job.rows[i] for i in batch] for job in jobs for batch in job.batches]
    for line, taken in zip(lines, steps, strict=True):
        assert line["tokens"] == sum(len(row.input_ids) for row in taken)
        assert line["supervised_tokens"] == sum(row.supervised for row in taken)
        assert line["grad_norm"] > 0 and not line["skipped"] and line["seconds"] >= 0
    assert session.finished and session.peak_gib == 0.0, "there is no card"
    json.dumps(lines)


def test_a_steps_seconds_are_its_own(make_session: MakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of the measurement and the checkpoint before it."""
    from fast_ft.train import sft_trainer, validation

    now, jobs = [0.0], [StageJob(0, "one", make_rows(4), [[0, 1, 2, 3]] * 6, 0.01)]

    def moving(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def moved(*given: Any) -> Any:
            now[0] += seconds
            return function(*given)

        return moved

    callbacks = {"on_checkpoint": moving(100.0, lambda *_: None)}
    session, lines = make_session(jobs, save_steps=2, eval_steps=3, callbacks=callbacks, validation=make_rows(2))
    for module in (sft_trainer, validation):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(session.steps, "train_step", moving(1.0, session.steps.train_step))
    monkeypatch.setattr(session.validation.loss, "measure", moving(10.0, session.validation.loss.measure))
    session.run()
    assert [line["seconds"] for line in lines] == [1.0] * 6
    assert [line.get("validation_seconds") for line in lines] == [None, None, 10.0] * 2
    assert now[0] == 6 * 1.0 + 2 * 10.0 + 3 * 100.0


def test_training_lowers_the_loss(make_session: MakeSession) -> None:
    rows = make_rows(4)
    session, lines = make_session([StageJob(0, "one", rows, [[0, 1, 2, 3]] * 15, 0.02)])
    session.run()
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


def test_one_schedule_spans_both_stages_by_default(make_session: MakeSession) -> None:
    session, lines = make_session()
    session.run()
    assert learning_rates(lines) == pytest.approx([0.01 * r for r in rates("linear", 7)])


def test_a_schedule_that_is_not_carried_starts_again_at_the_stages_own_rate(make_session: MakeSession) -> None:
    jobs = make_jobs(make_rows(12), second_rate=0.004)
    session, lines = make_session(jobs, schema.Carry(schedule=False))
    session.run()
    wanted = [0.01 * r for r in rates("linear", 4)] + [0.004 * r for r in rates("linear", 3)]
    assert learning_rates(lines) == pytest.approx(wanted)


def skip_first(monkeypatch: pytest.MonkeyPatch, count: int, lines: list[dict[str, Any]]) -> None:
    """Let the loss scale skip the first steps, as it does in float16: those that end while `lines` holds fewer."""
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda _: len(lines) < count))


@pytest.mark.parametrize("carried", [True, False])
def test_steps_that_the_loss_scale_skipped_count_in_the_schedule(
    make_session: MakeSession, monkeypatch: pytest.MonkeyPatch, carried: bool
) -> None:
    plain, wanted = make_session(carry=schema.Carry(schedule=carried))
    plain.run()
    session, lines = make_session(carry=schema.Carry(schedule=carried))
    skip_first(monkeypatch, 3, lines)
    session.run()
    assert [line["skipped"] for line in lines] == [True] * 3 + [False] * 4
    assert learning_rates(lines) == learning_rates(wanted)


@pytest.mark.parametrize("skipped", [0, 2, 4])
def test_the_rate_is_down_where_a_budget_ends_the_training_whatever_was_skipped_or_stopped(
    make_session: MakeSession, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, skipped: int
) -> None:
    """Stages of 16 and 4 steps; 17 fit. The rate goes down over the last three, which lie in both stages."""
    rows = make_rows(4)
    jobs = [StageJob(i, name, rows, [[0, 1, 2, 3]] * count, 0.01) for i, name, count in ((0, "a", 16), (1, "b", 4))]
    values = {"warmup_steps": 0, "lr_scheduler_type": "constant"}

    def paced(lines: list[dict[str, Any]], spent: float = 0.0) -> TrainPace:
        minutes = 103 / 60 / (1 - RESERVE)  # a step is counted before its line is there
        return TrainPace(minutes, [1] * 20, lambda: 6.0 * (len(lines) + 1), spent=spent, since=0.0)

    whole, lines = make_session(jobs, pace=paced, **values)
    skip_first(monkeypatch, skipped, lines)
    whole.run()
    assert whole.out_of_time and [line["skipped"] for line in lines] == [True] * skipped + [False] * (17 - skipped)
    assert learning_rates(lines) == pytest.approx([0.01] * 15 + [0.02 / 3, 0.01 / 3])

    saving = {"on_checkpoint": lambda step, write: write(tmp_path)}
    first, earlier = make_session(jobs, pace=paced, stop_after=15, callbacks=saving, **values)
    skip_first(monkeypatch, skipped, earlier)
    first.run()
    spent = state.read(tmp_path).seconds
    second, later = make_session(jobs, pace=lambda lines: paced(lines, spent), **values)
    skip_first(monkeypatch, 0, later)
    second.resume(tmp_path)
    second.run()
    assert learning_rates(earlier + later) == learning_rates(lines) and same(whole, second)


def test_moments_are_carried_or_start_again(make_session: MakeSession) -> None:
    after: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for carried in after:
        made: list[TrainSession] = []

        def look(
            step: int,
            write: Callable[[Path], None],
            made: list[TrainSession] = made,
            found: list[tuple[float, float]] = after[carried],
        ) -> None:
            steps = {float(entry["step"]) for entry in made[0].optimizer.state.values()}
            found.append((*steps, moments(made[0])))

        session, _ = make_session(carry=schema.Carry(optimizer=carried), callbacks={"on_checkpoint": look})
        made.append(session)
        session.run()
    assert [steps for steps, _ in after[True]] == [4.0, 7.0]
    assert [steps for steps, _ in after[False]] == [4.0, 3.0]
    assert after[True][0] == after[False][0], "the first stage knows nothing of it"
    assert after[True][1][1] != after[False][1][1]


def test_the_same_run_twice_gives_the_same_bits(make_session: MakeSession) -> None:
    runs = [make_session(dropout=0.1, neftune_noise_alpha=5) for _ in range(2)]
    for session, _ in runs:
        session.run()
    assert same(runs[0][0], runs[1][0])
    losses = [[line["loss"] for line in lines] for _, lines in runs]
    assert losses[0] == losses[1]


class OneOfTwo(Ranks):
    """One of two processes that run one after the other; the second one gets what the first one shared."""

    def __init__(self, rank: int, shared: list[bytes]) -> None:
        super().__init__(rank, 2)
        self.shared = shared

    def share_bytes(self, data: bytes, source: int = 0) -> bytes:
        if self.first:
            self.shared.append(data)
        return data if self.first else self.shared.pop(0)

    def most(self, values: Sequence[int]) -> list[int]:
        return [int(value) for value in values]

    def sum(self, tensor: Any) -> None:
        pass


@pytest.mark.parametrize("values", [{"dropout": 0.3}, {"neftune_noise_alpha": 5}, {}])
def test_no_two_passes_draw_the_same(make_session: MakeSession, values: dict[str, Any]) -> None:
    """One row, four times a step, two steps a stage, two stages, two processes; the weights stand still."""
    (row,) = make_rows(1)
    jobs = [StageJob(i, name, [row] * 4, [[0, 1, 2, 3]] * 2, 1e-45) for i, name in ((0, "a"), (1, "b"))]
    hidden: list[torch.Tensor] = []
    shared: list[bytes] = []
    for rank in range(2):
        session, _ = make_session(jobs, micro_batch=1, weight_decay=0.0, ranks=OneOfTwo(rank, shared), **values)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():  # at first LoRA's B is zero, and dropout has nothing to drop
            session.flat.parameter.copy_(torch.randn(session.flat.parameter.shape, generator=draw) * 0.1)
        norm = session.loaded.model.get_base_model().model.norm
        norm.register_forward_hook(lambda _, given, output: hidden.append(output.detach().clone()))
        session.run()
    assert len(hidden) == 2 * 2 * 4, "each process takes two of the four"
    alike = [(i, j) for i, a in enumerate(hidden) for j, b in enumerate(hidden[:i]) if a.equal(b)]
    assert alike == ([] if values else [(i, j) for i in range(16) for j in range(i)]), "without draws all are equal"


@pytest.mark.parametrize("most", [0.01, 1e9])
def test_gradients_are_clipped_to_the_norm_that_the_recipe_allows(make_session: MakeSession, most: float) -> None:
    rows = make_rows(4)
    session, lines = make_session([StageJob(0, "one", rows, [[0, 1, 2, 3]], 0.01)], max_grad_norm=most)
    session.run()
    (state_,) = session.optimizer.state.values()
    norm = lines[0]["grad_norm"]
    assert norm > 0.1, "the log has the norm before"
    # after one step Adam's first moment is a tenth of the gradient that it was given
    assert float(state_["exp_avg"].norm()) == pytest.approx(0.1 * min(norm, most), rel=1e-3)


class Stopped(Exception):
    pass


@pytest.mark.parametrize(
    ("optim", "stop_at"), [("adamw_torch", 2), ("adamw_torch", 3), ("adamw_torch", 4), ("adamw_8bit", 6)]
)
def test_a_stopped_run_ends_as_one_that_was_not(
    make_session: MakeSession, tmp_path: Path, stop_at: int, optim: str
) -> None:
    """Stops between checkpoints (3), at one within a stage (2, 6), and at a stage's end (4)."""
    values: dict[str, Any] = {"dropout": 0.1, "neftune_noise_alpha": 5, "save_steps": 2, "optim": optim, "r": 64}
    whole, whole_lines = make_session(**values)
    whole.run()

    def save(step: int, write: Callable[[Path], None]) -> None:
        folder = tmp_path / "state"
        folder.mkdir(exist_ok=True)
        write(folder)

    lines: list[dict[str, Any]] = []

    def stop(entry: dict[str, Any]) -> None:
        if entry["step"] == stop_at + 1:
            raise Stopped
        lines.append(entry)

    first, _ = make_session(callbacks={"on_step": stop, "on_checkpoint": save}, **values)
    with pytest.raises(Stopped):
        first.run()
    done = state.read(tmp_path / "state").global_step
    assert done == stop_at - stop_at % 2

    second, later = make_session(**values)
    second.resume(tmp_path / "state")
    second.run()
    assert [line["step"] for line in later] == list(range(done + 1, 8))
    wanted = [(line["step"], line["loss"], line["learning_rate"]) for line in whole_lines]
    assert [(line["step"], line["loss"], line["learning_rate"]) for line in lines[:done] + later] == wanted
    assert same(whole, second)


def test_a_run_that_had_ended_resumes_to_nothing(make_session: MakeSession, tmp_path: Path) -> None:
    first, _ = make_session()
    first.run()
    first.state.stage -= 1  # as it stood when the last stage's end was saved
    first.state.step = 3
    (tmp_path / "state").mkdir()
    first.save_state(tmp_path / "state")
    second, lines = make_session()
    second.resume(tmp_path / "state")
    second.run()
    assert second.finished and lines == [] and same(first, second)


@pytest.mark.parametrize("r", [4, 64])  # bitsandbytes keeps fewer than 4,096 weights in 32 bits
@pytest.mark.parametrize("optims", [("adamw_torch", "adamw_8bit"), ("adamw_8bit", "adamw_torch")])
def test_moments_of_another_optimizer_are_not_taken(
    make_session: MakeSession, tmp_path: Path, optims: tuple[str, str], r: int
) -> None:
    first, _ = make_session(optim=optims[0], r=r)
    first.run()
    first.save_state(tmp_path)
    second, _ = make_session(optim=optims[1], r=r)
    assert not state.load(tmp_path, second.loaded.model, second.optimizer)
    assert same(first, second) and not second.optimizer.state_dict()["state"]
    second.save_state(tmp_path)
    third, _ = make_session(optim=optims[0], r=r)
    assert state.load(tmp_path, third.loaded.model, third.optimizer), "there are none to leave"


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_state_comes_back_as_it_was_saved(make_session: MakeSession, tmp_path: Path, optim: str) -> None:
    first, _ = make_session(optim=optim, r=64)  # bitsandbytes keeps fewer than 4,096 weights in 32 bits
    first.run()
    first.state.scaler = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3}
    first.save_state(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter.safetensors", "optimizer.safetensors", "state.json"}
    assert not list(tmp_path.glob("*.p*t*")), "no pickles"
    second, _ = make_session(optim=optim, r=64)
    assert not same(first, second)
    state.load(tmp_path, second.loaded.model, second.optimizer)
    assert same(first, second) and state.read(tmp_path) == first.state
    left, right = (dict(flat(session.optimizer.state_dict()["state"])) for session in (first, second))
    assert left.keys() == right.keys() and left
    for name, value in left.items():
        other = right[name]
        assert type(value) is type(other)
        assert (value.equal(other) and value.dtype == other.dtype) if torch.is_tensor(value) else value == other, name
    eight_bits = {name for name, value in left.items() if torch.is_tensor(value) and value.dtype == torch.uint8}
    assert bool(eight_bits) == (optim == "adamw_8bit")


def test_a_garbled_state_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"progress": ')
    with pytest.raises(InputError, match=r"this checkpoint cannot be read .* Delete the folder"):
        state.read(tmp_path)


def test_an_adapter_of_other_modules_is_refused(make_session: MakeSession, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    session, _ = make_session()
    tensors = lora_files.weights(session.loaded.model)
    save_file({name.replace("layers.1", "layers.7"): t for name, t in tensors.items()}, str(tmp_path / "a.safetensors"))
    with pytest.raises(InputError, match="has no place for"):
        lora_files.load(session.loaded.model, tmp_path / "a.safetensors")


def test_a_loss_that_is_no_number_is_logged_as_one(make_session: MakeSession) -> None:
    session, lines = make_session()
    with torch.no_grad():
        weights = dict(session.loaded.model.named_parameters())
        next(p for name, p in weights.items() if "down_proj.lora_B" in name).fill_(float("nan"))
    session.run()
    assert [line["step"] for line in lines] == [*range(1, 8)] * 2, "once more with half the learning rate"
    assert session.gave_up and all(math.isnan(line["loss"]) for line in lines)
    assert all(math.isnan(line["grad_norm"]) for line in lines)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("as a small card would"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")],
)
def test_out_of_memory_makes_passes_smaller_and_keeps_the_loss(
    make_session: MakeSession, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    plain, wanted = make_session()
    plain.run()
    settled: list[TrainPlan] = []
    session, lines = make_session(callbacks={"on_plan": settled.append})

    def full(module: Any, given: tuple[torch.Tensor, ...]) -> None:
        if given[0].shape[1] > 32:
            raise error

    session.loaded.model.get_input_embeddings().register_forward_pre_hook(full)
    session.run()
    limits = [each.most_tokens or 0 for each in settled]
    assert (
        limits == sorted(limits, reverse=True) and 16 < limits[-1] <= 32 and session.steps.out_of_memory == len(limits)
    )
    assert session.steps.plan == settled[-1] and settled[-1].recompute_layers == 0
    assert f"at most {limits[-1]} tokens in a pass" in capsys.readouterr().err
    for a, b in zip(wanted, lines, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert (b["tokens"], b["supervised_tokens"]) == (a["tokens"], a["supervised_tokens"])


def test_memory_that_runs_out_in_the_second_piece_leaves_no_gradient_behind(make_session: MakeSession) -> None:
    rows = make_rows(4)
    one = [StageJob(0, "one", rows, [[0, 1, 2, 3]], 0.01)]
    plain, wanted = make_session(one)
    plain.run()
    session, lines = make_session(one, micro_batch=2)
    calls: list[int] = []

    def full(module: Any, given: tuple[torch.Tensor, ...]) -> None:
        calls.append(given[0].shape[1])
        if len(calls) == 2:
            raise torch.OutOfMemoryError("in the second piece")

    session.loaded.model.get_input_embeddings().register_forward_pre_hook(full)
    session.run()
    assert len(calls) >= 2 + 3 and sum(calls[2:]) >= lines[0]["tokens"], "the whole step again, in more pieces"
    assert lines[0]["grad_norm"] == pytest.approx(wanted[0]["grad_norm"], rel=1e-4)


def test_out_of_memory_with_one_row_and_all_recomputed_is_a_clear_error(make_session: MakeSession) -> None:
    session, _ = make_session(micro_batch=1)

    def full(module: Any, given: Any) -> None:
        raise torch.OutOfMemoryError("always")

    session.loaded.model.get_input_embeddings().register_forward_pre_hook(full)
    with pytest.raises(InputError, match=r"out of memory with one row .*max_length"):
        session.run()
    assert session.steps.plan.recompute_layers > 0, "that was tried first"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_that_are_computed_again_change_no_gradient(make_session: MakeSession, dropout: float) -> None:
    plain, wanted = make_session(dropout=dropout)
    plain.run()
    for count in (1, 2):
        session, lines = make_session(dropout=dropout, recompute_layers=count)
        calls: list[int] = []
        layers = session.loaded.model.get_base_model().model.layers
        for index, layer in enumerate(layers):
            layer.input_layernorm.register_forward_hook(lambda *_, index=index, calls=calls: calls.append(index))
        session.run()
        assert same(plain, session) and [line["loss"] for line in lines] == [line["loss"] for line in wanted]
        assert calls.count(0) == 2 * len(lines), "forward, and again"
        assert calls.count(1) == (2 if count == 2 else 1) * len(lines)
        assert not any("forward" in layer.__dict__ and hasattr(layer.forward, "func") for layer in layers)


def test_a_session_leaves_the_model_as_it_was_however_it_ends(make_session: MakeSession) -> None:
    def changes(model: torch.nn.Module) -> list[str]:
        """What is on the model besides its weights: hooks and forwards of its modules."""
        return [
            f"{name}: {what}"
            for name, module in model.named_modules()
            for what in ("_forward_hooks", "_forward_pre_hooks", "forward")
            if name and module.__dict__.get(what)
        ]

    def fail(entry: dict[str, Any]) -> None:
        assert len(changes(session.loaded.model)) > len(before), "noise and a layer that is computed again"
        raise Stopped

    session, _ = make_session(neftune_noise_alpha=5, recompute_layers=1, callbacks={"on_step": fail})
    before: list[str] = []
    assert changes(session.loaded.model) == before, "a session that never ran"
    with pytest.raises(Stopped):
        session.run()
    assert changes(session.loaded.model) == before
    session, _ = make_session(neftune_noise_alpha=5, recompute_layers=1)
    session.run()
    assert changes(session.loaded.model) == before


def test_weights_stay_float32(make_session: MakeSession) -> None:
    """TRL casts a quantised model's adapter to bf16; ours stays."""
    session, _ = make_session()
    session.run()
    weights = [p for p in session.loaded.model.parameters() if p.requires_grad]
    assert weights and {p.dtype for p in weights} == {torch.float32}


def test_the_optimizer_is_adamw_with_our_numbers(make_session: MakeSession) -> None:
    session, _ = make_session()
    for optim in ("adamw_torch", "adamw_8bit"):
        section = schema.Train(optim=optim, learning_rate=3e-4, weight_decay=0.02)
        (group,) = make_optimizer(session.flat, section).param_groups
        assert (group["lr"], group["weight_decay"], tuple(group["betas"]), group["eps"]) == (
            3e-4, 0.02, (0.9, 0.999), 1e-8,
        )  # fmt: skip
        assert group["params"] == [session.flat.parameter]


def test_weights_and_gradients_are_views_of_two_flat_tensors(make_session: MakeSession) -> None:
    session, _ = make_session()
    before = {name: weight.clone() for name, weight in lora_files.weights(session.loaded.model).items()}
    session.run()
    weights = [p for p in session.loaded.model.parameters() if p.requires_grad]
    assert len(weights) == 2 * 7 * 2
    assert torch.cat([p.flatten() for p in weights]).equal(session.flat.parameter)
    assert not any(weight.equal(before[name]) for name, weight in lora_files.weights(session.loaded.model).items())
    session.flat.zero_gradients()
    weights[3].grad += 1
    assert session.flat.gradient.count_nonzero() == weights[3].numel()


def test_a_pass_that_cannot_be_captured_runs_kernel_by_kernel(
    make_session: MakeSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, wanted = make_session()
    plain.run()
    session, lines = make_session()
    passes = session.steps.passes
    passes.plan = replace(passes.plan, capture=True)  # as on a card, where Graph stands for a model that synchronises

    def refuse(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr("fast_ft.train.forward_backward.Graph", refuse)
    session.run()
    assert "cannot be captured (operation not permitted when stream is capturing)" in capsys.readouterr().err
    assert not session.steps.plan.capture
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in wanted], rel=1e-6)
