"""How a run's work is cut: tokens in a pass, layers computed again, answers decoded side by side, and what that takes.

Pure arithmetic on the model's shape and the rows' token counts; no torch. What is settled here is written to
plan.json and obeyed when the run is resumed. The effective batch, the order of rows and the loss stay the recipe's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

from fast_ft.common.errors import InputError
from fast_ft.common.text_safety import escaped
from fast_ft.hub.families import ModelShape
from fast_ft.plan import cost_model
from fast_ft.plan.cost_model import Rates, Training
from fast_ft.plan.decode_pool import settle_pool, slots_without_card
from fast_ft.plan.micro_batches import cut, share, width

_SLACK = 0.96  #: of the memory may be planned for
_LOOKED_AT = 48  #: steps that a choice is judged by, evenly over the run


@dataclass(frozen=True)
class Plan:
    """What was settled. GiB are predicted peaks, CUDA context included; 0 on a CPU, where nothing is predicted.

    A micro-batch has at most `micro_batch` rows and `most_tokens` tokens (None: no limit). The first
    `recompute_layers` layers' activations are computed again. `capture`: passes are replayed from CUDA graphs.
    `generation_batch` answers are decoded side by side, over a KV cache of `cache_tokens` (None: enough for all);
    `dequantise`: from weights turned to 16 bits, since there is memory for them. `step_seconds` is a mean.
    `world_size` processes share each effective batch; limits and GiB are those of one. `backend`: whose costs they are.
    """

    micro_batch: int
    most_tokens: int | None = None
    recompute_layers: int = 0
    capture: bool = False
    generation_batch: int = 1
    memory_gib: float = 0.0
    train_gib: float = 0.0
    generate_gib: float = 0.0
    cache_tokens: int | None = None
    dequantise: bool = False
    step_seconds: float = 0.0
    world_size: int = 1
    backend: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any], path: Path) -> Plan:
        """Return the plan that a file holds; another version's keys, and values of another type, are refused."""
        hints = get_type_hints(cls)
        if unknown := sorted(content.keys() - hints.keys()):
            raise InputError(f"{path}: the plan has {escaped(unknown[0])!r}, which this fast_ft does not know")
        for name, value in content.items():
            whole = int if isinstance(value, int) and not isinstance(value, bool) else type(value)
            if not isinstance(value, hints[name]) and not (hints[name] is float and whole is int):
                raise InputError(f"{path}: the plan's {name} is of type {type(value).__name__}")
            if isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value < 1e9:
                raise InputError(f"{path}: the plan's {name} is {value}")
        try:
            return cls(**content)
        except TypeError as error:
            raise InputError(f"{path}: the plan is not whole ({error})") from None


@dataclass(frozen=True)
class Wanted:
    """What the recipe fixes; None: to be settled."""

    micro_batch: int | None = None
    generation_batch: int | None = None
    recompute: bool | None = None  #: all layers, or none
    capture: bool = True  #: allowed


@dataclass(frozen=True)
class Answers:
    """The prompts' token counts, and what each is answered with at most."""

    prompt_tokens: Sequence[int]
    max_new_tokens: int
    candidates: int = 1


def settle(
    shape: ModelShape,
    training: Training,
    steps: Sequence[Sequence[int]],
    answers: Answers,
    wanted: Wanted,
    *,
    memory_gib: float | None,
    rates: Rates | None,
    world_size: int = 1,
) -> Plan:
    """Return the plan for these steps, each given by its rows' token counts.

    `memory_gib` is what this process may take, its CUDA context included; None is a CPU. Of all counts of recomputed
    layers, with the largest pass that each leaves room for, the one that takes least time is chosen.
    """
    if memory_gib is None or rates is None:
        again = shape.num_hidden_layers if wanted.recompute else 0
        slots = wanted.generation_batch or slots_without_card(answers.prompt_tokens, answers.candidates)
        micro_batch = wanted.micro_batch or training.rows
        return Plan(micro_batch, None, again, generation_batch=slots, world_size=world_size, backend=training.backend)
    budget = memory_gib * _SLACK
    slots, cache_tokens, dequantise, generate_gib = settle_pool(
        shape,
        answers.prompt_tokens,
        candidates=answers.candidates,
        max_new_tokens=answers.max_new_tokens,
        wanted_slots=wanted.generation_batch,
        load_in_4bit=training.load_in_4bit,
        fixed_gib=shape.weights_gib(load_in_4bit=training.load_in_4bit) + cost_model.CONTEXT_GIB,
        budget_gib=budget,
    )
    pool = Plan(
        wanted.micro_batch or training.rows, generation_batch=slots, memory_gib=memory_gib,
        generate_gib=round(generate_gib, 2), cache_tokens=cache_tokens, dequantise=dequantise, world_size=world_size,
        backend=training.backend,
    )  # fmt: skip
    choices = [
        _choice(shape, training, steps, pool, rates, budget, again, capture)
        for again in _counts(shape, wanted.recompute)
        for capture in ((True, False) if wanted.capture and not (training.draws and again) else (False,))
    ]
    fitting = [each for each in choices if each[1].train_gib <= budget]
    # where nothing fits, the thriftiest is tried: the run itself will say so
    _, chosen = min(fitting, key=lambda c: c[0]) if fitting else min(choices, key=lambda c: c[1].train_gib)
    return chosen


def _counts(shape: ModelShape, recompute: bool | None) -> range:
    if recompute is None:
        return range(shape.num_hidden_layers + 1)
    return range(shape.num_hidden_layers, shape.num_hidden_layers + 1) if recompute else range(1)


def _choice(
    shape: ModelShape, training: Training, steps: Sequence[Sequence[int]], plan: Plan, rates: Rates, budget: float,
    again: int, capture: bool,
) -> tuple[float, Plan]:  # fmt: skip
    """Return `plan` with this many layers recomputed and as many tokens in a pass as the budget then has room for.

    Before it stand the seconds a step by which it is chosen: capturing, once for each width, is spread over the run.
    """
    fixed = cost_model.fixed_gib(shape, training)

    def gib(tokens: int) -> float:
        return fixed + cost_model.pass_gib(shape, training, width(tokens, capture=capture), again, capture=capture)

    shares = [each for step in steps for each in shares_of(plan, step)]
    largest = max((sum(each) for each in shares), default=1)
    room = next((n for n in range(largest, training.longest, -32) if gib(n) <= budget), training.longest)
    looked = steps[:: max(1, len(steps) // _LOOKED_AT)]
    made = Plan(**asdict(plan) | {"most_tokens": room, "recompute_layers": again, "capture": capture})
    seconds = sum(step_seconds(shape, training, made, step, rates) for step in looked) / max(1, len(looked))
    widths = {wide for each in shares for wide in widths_of(made, each)}
    captures = len(widths) * cost_model.CAPTURE_SECONDS / max(1, len(steps)) if capture else 0.0
    peak = fixed + cost_model.pass_gib(shape, training, max(widths, default=1), again, capture=capture)
    settled = Plan(**asdict(made) | {"train_gib": round(peak, 2), "step_seconds": round(seconds, 4)})
    return seconds + captures, settled


def shares_of(plan: Plan, lengths: Sequence[int]) -> list[list[int]]:
    """Return the token counts of each process's rows in one step over rows of these."""
    return [[lengths[i] for i in part] for part in share(lengths, plan.world_size)]


def widths_of(plan: Plan, lengths: Sequence[int]) -> list[int]:
    """Return the widths of the passes of one process over its rows, which have these token counts."""
    pieces = cut(lengths, most_rows=plan.micro_batch, most_tokens=plan.most_tokens)
    return [width(sum(lengths[i] for i in piece), capture=plan.capture) for piece in pieces]


def step_seconds(shape: ModelShape, training: Training, plan: Plan, lengths: Sequence[int], rates: Rates) -> float:
    """Return the predicted seconds of one optimizer step over rows of these token counts.

    The slowest process's passes count; adding up gradients does not: 160 MB for a 7B with r = 16.
    """

    def seconds(own: Sequence[int]) -> float:
        return sum(
            cost_model.pass_seconds(shape, training, rates, each, plan.recompute_layers, capture=plan.capture)
            for each in widths_of(plan, own)
        )

    return cost_model.STEP_SECONDS + max(seconds(own) for own in shares_of(plan, lengths))
