"""How a run's work is cut: tokens in a pass, layers computed again, answers decoded side by side, and what that takes.

Pure arithmetic on the model's shape and the rows' token counts; no torch. What is settled here is kept (run_plan.py).
The effective batch, the order of rows and the loss stay the recipe's.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fast_ft.hub.families import ModelShape
from fast_ft.plan import cost_model, memory_model
from fast_ft.plan.decode_pool import Answers, settle_decoding
from fast_ft.plan.micro_batches import cut, share, width
from fast_ft.plan.run_plan import RunPlan, TrainPlan
from fast_ft.plan.training_work import Rates, Training

_PLANNED_FOR = 0.98  #: of the memory: no measured peak of training was over its plan by more than 1.1 %
_FINER = 8  #: tokens by which a pass is made smaller until it fits
_BUSY = 2.0  #: how much longer a host launches that others use; a graph does not care
_LOOKED_AT = 48  #: steps that a choice is judged by, evenly over the run


@dataclass(frozen=True)
class Wanted:
    """What the recipe fixes; None: to be settled."""

    micro_batch: int | None = None
    generation_batch: int | None = None
    recompute: bool | None = None  #: all layers, or none
    capture: bool = True  #: allowed


@dataclass(frozen=True)
class Machine:
    """What a plan is made for: memory in GiB that a process may take, its CUDA context included, and a card's rates.

    None for both is a CPU, on which what a process may hold in all, `host_gib`, limits answers; None: nothing does.
    `world_size` processes train together, each on such a card. `tiles`: as PoolMemory's.
    """

    memory_gib: float | None = None
    rates: Rates | None = None
    world_size: int = 1
    tiles: bool = True
    host_gib: float | None = None


def settle(
    shape: ModelShape,
    training: Training,
    steps: Sequence[Sequence[int]],
    answers: Answers,
    wanted: Wanted,
    machine: Machine,
) -> RunPlan:
    """Return the plan for these steps, each given by its rows' token counts, and for these answers where there are any.

    Of all counts of recomputed layers, with the largest pass that each leaves room for, the one that takes least time
    is chosen.
    """
    decode = None
    if answers.prompt_tokens:
        decode = settle_decoding(
            shape, answers, wanted.generation_batch, memory_gib=machine.memory_gib, load_in_4bit=training.load_in_4bit,
            tiles=machine.tiles, host_gib=machine.host_gib,
        )  # fmt: skip
    micro_batch = wanted.micro_batch or training.rows
    plan = TrainPlan(micro_batch, world_size=machine.world_size, backend=training.backend)
    if machine.memory_gib is None or machine.rates is None:
        recomputed = shape.num_hidden_layers if wanted.recompute else 0
        return RunPlan(replace(plan, recompute_layers=recomputed), decode)
    budget = machine.memory_gib * _PLANNED_FOR
    plan = replace(plan, memory_gib=machine.memory_gib)
    tuples = [tuple(step) for step in steps]
    shares = {step: shares_of(plan, step) for step in dict.fromkeys(tuples)}
    costs = _Costs(shape, training, tuples, shares, machine.rates, budget)
    choices = [
        costs.choice(plan, recomputed, capture=capture)
        for recomputed in _counts(shape, wanted.recompute)
        for capture in ((True, False) if wanted.capture and not (training.draws and recomputed) else (False,))
    ]
    fitting = [each for each in choices if each[1].train_gib <= budget]
    # where nothing fits, the thriftiest is tried: the run itself will say so
    _, chosen = min(fitting, key=lambda c: c[0]) if fitting else min(choices, key=lambda c: c[1].train_gib)
    return RunPlan(chosen, decode)


def _counts(shape: ModelShape, recompute: bool | None) -> range:
    if recompute is None:
        return range(shape.num_hidden_layers + 1)
    return range(shape.num_hidden_layers, shape.num_hidden_layers + 1) if recompute else range(1)


@dataclass(frozen=True)
class _Costs:
    """What choices of a training plan are judged by."""

    shape: ModelShape
    training: Training
    steps: Sequence[tuple[int, ...]]
    shares: Mapping[tuple[int, ...], list[list[int]]]  #: the token counts of each process's rows, of each step
    rates: Rates
    budget: float  #: GiB

    def choice(self, plan: TrainPlan, recomputed: int, *, capture: bool) -> tuple[float, TrainPlan]:
        """Return `plan` with this many layers recomputed, and as many tokens in a pass as the budget has room for.

        Before it stand the seconds a step by which it is chosen: on a host that others use, too, and with what
        capturing takes, once for each width, spread over the run.
        """
        fixed = memory_model.fixed_gib(self.shape, self.training)

        def gib(wide: int) -> float:
            return fixed + memory_model.pass_gib(self.shape, self.training, wide, recomputed, capture=capture)

        largest = max((sum(own) for shares in self.shares.values() for own in shares), default=1)
        counts = range(largest, self.training.longest, -_FINER)  # fewer tokens never take more memory
        fits = bisect.bisect_left(counts, True, key=lambda n: gib(width(n, capture=capture)) <= self.budget)
        room = counts[fits] if fits < len(counts) else self.training.longest
        made = replace(plan, most_tokens=room, recompute_layers=recomputed, capture=capture)
        widths = {step: [widths_of(made, own) for own in shares] for step, shares in self.shares.items()}
        looked = Counter(self.steps[:: max(1, len(self.steps) // _LOOKED_AT)])
        seconds, at_worst = (
            sum(n * step_seconds(self.shape, self.training, made, s, rates, widths[s]) for s, n in looked.items())
            / max(1, looked.total())
            for rates in (self.rates, replace(self.rates, launch=_BUSY * self.rates.launch))
        )
        distinct = {wide for processes in widths.values() for own in processes for wide in own}
        captures = len(distinct) * cost_model.CAPTURE_SECONDS / max(1, len(self.steps)) if capture else 0.0
        peak = gib(max(distinct, default=1))
        return at_worst + captures, replace(made, train_gib=round(peak, 2), step_seconds=round(seconds, 4))


def shares_of(plan: TrainPlan, lengths: Sequence[int]) -> list[list[int]]:
    """Return the token counts of each process's rows in one step over rows of these."""
    return [[lengths[i] for i in part] for part in share(lengths, plan.world_size)]


def widths_of(plan: TrainPlan, lengths: Sequence[int]) -> list[int]:
    """Return the widths of the passes of one process over its rows, which have these token counts."""
    pieces = cut(lengths, most_rows=plan.micro_batch, most_tokens=plan.most_tokens)
    return [width(sum(lengths[i] for i in piece), capture=plan.capture) for piece in pieces]


def step_seconds(
    shape: ModelShape, training: Training, plan: TrainPlan, lengths: Sequence[int], rates: Rates,
    widths: Sequence[list[int]] | None = None,
) -> float:  # fmt: skip
    """Return the predicted seconds of one optimizer step over rows of these token counts.

    The slowest process's passes count; adding up gradients does not: 160 MB for a 7B with r = 16. Through our own
    blocks a process that trains alone launches a step while the one before is computed. `widths`: of each process's
    passes, where they are known.
    """
    ours = training.backend == "fused"

    def seconds(own: Sequence[int], wide: Sequence[int]) -> float:
        row = sum(n * n for n in own) / max(1, sum(own))
        parts = [
            cost_model.pass_seconds(shape, training, rates, each, plan.recompute_layers, row=row, capture=plan.capture)
            for each in wide
        ]
        if not ours or plan.world_size > 1:
            return sum(max(each.card, each.host) for each in parts)
        parts.append(cost_model.step_overhead(shape, training, rates))
        return max(sum(each.card for each in parts), sum(each.host for each in parts))

    beside = 0.0 if ours and plan.world_size == 1 else cost_model.STEP_SECONDS
    shares = shares_of(plan, lengths)
    return beside + max(map(seconds, shares, widths or [widths_of(plan, own) for own in shares]))
