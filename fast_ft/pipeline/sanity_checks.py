"""Warnings about a finished run whose result is useless, each with a likely cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fast_ft.common.wording import counted
from fast_ft.models.adapter_effect import AdapterEffect
from fast_ft.recipe import schema
from fast_ft.recipe.steps import warmup_steps

_RISE = 1.5  #: times the loss before training, over rows that it saw; see `rose`
_LEAST = 0.1  #: nats by which the loss rises at least: of a text that is known by heart it may double, and be nothing
_FALL = 0.001  #: of that loss; see `stands_still`
_HALF = 0.5


def equals_start(lines: Sequence[Mapping[str, Any]], weights: Mapping[str, Any]) -> str | None:
    """Return a warning where a finished training's adapter does nothing, or None.

    lines: the training's log. weights: the adapter's tensors by PEFT's names.
    """
    outer = [tensor for name, tensor in weights.items() if "lora_B" in name]
    if not outer or any(bool(tensor.any()) for tensor in outer):  # LoRA's B is zero before the first step
        return None
    skipped = sum(line["skipped"] for line in lines)
    cause = (
        f"{counted(skipped, 'step')} of {len(lines)} skipped" if skipped else "was the learning rate above zero at all?"
    )
    return f"the adapter equals its start: the model answers as the base model does. Likely cause: {cause}"


def rose(effect: AdapterEffect, section: schema.Train) -> str | None:
    """Return a warning where training made the rows that it saw far less likely, or None.

    The threshold stands on trainings of recipes/quickstart.yaml, with several seeds each, and on 8 of their 100 rows.
    38 good ones, of 3, 4 or 12 steps of 1 or 8 rows at 2e-4 or 1e-3, ended at 0.57 to 0.99 of the loss before them. 16
    of 4 or 12 steps at 0.03 to 2 ended at 2.2 to 4.5 times it. The log does not tell the two apart: in 8 of the 38 good
    ones, the last third of the steps had over 1.5 times the loss of the first step.
    """
    if effect.after <= max(_RISE * effect.before, effect.before + _LEAST):  # NaN is not
        return None
    return (
        f"the loss rose: {_compared(effect)}; the adapter is useless. Likely cause: train.learning_rate "
        f"{section.learning_rate:g} is too high; common are 1e-5 to 1e-3"
    )


def stands_still(effect: AdapterEffect, section: schema.Train, steps: int, early: str | None = None) -> str | None:
    """Return a warning where training made the rows that it saw no likelier, or None.

    steps: those of the training. early: what ended it before its last step, in a sentence. Of the trainings that `rose`
    speaks of, 12 steps at 1e-6 lowered the loss by 0.0005 of it, at 1e-5 by 0.005, and the good ones by 0.014 or more.
    """
    if effect.after < effect.before * (1 - _FALL):
        return None
    cause = f"train.learning_rate {section.learning_rate:g} is too low or too high for these rows"
    if (rising := warmup_steps(section, steps)) >= steps / 2:
        cause = f"the warm-up of {counted(rising, 'step')} takes most of the {counted(steps, 'step')}"
    return f"the loss stood still: {_compared(effect)}. Likely cause: {early or cause}"


def _compared(effect: AdapterEffect) -> str:
    return (
        f"{effect.before:.4f} before training, {effect.after:.4f} after it (means per token, over "
        f"{counted(effect.rows, 'row')} that it saw)"
    )


def answer_warnings(answers: Sequence[Any], max_new_tokens: int) -> list[str]:
    """Return what is suspicious in answers (generate.Answer): empty, all the same, or all at max_new_tokens.

    Answers that a budget of minutes cut tell nothing: they are left out.
    """
    whole = [answer for answer in answers if answer.within is None]
    found, count = [], len(whole)
    these = "answers" if count == len(answers) else "answers that budget.generate_minutes did not cut"
    empty = sum(not answer.text.strip() for answer in whole)
    if empty and empty >= _HALF * count:
        found.append(
            f"{empty} of {count} {these} are empty. Likely cause: EOS comes first, as after rows whose responses are "
            "empty, or with another model.template than the base model's"
        )
    elif count > 1 and len({answer.text for answer in whole}) == 1:
        found.append(
            f"all {count} {these} are the same. Likely cause: training went too far (train.learning_rate, epochs), or "
            "its rows all have one response"
        )
    if count > 1 and not any(answer.ended for answer in whole):
        found.append(
            f"all {count} {these} were cut off at generate.max_new_tokens {max_new_tokens}. Likely cause: that is too "
            "few, or EOS was never learned: too few steps, or responses without an end"
        )
    return found


def came_to_nothing(section: schema.Train, log: Path, *, stranded: bool = False) -> str:
    """Return the error of a training that has no good state.

    stranded: it had none to go back to. Else it went back to its beginning once, with half the learning rate.
    """
    tried = "and no earlier state of this run is left; the same command begins again"
    if not stranded:
        tried = "with half the learning rate too"
    return (
        f"training came to nothing: loss or gradients are not finite, {tried}. "
        f"Lower train.learning_rate ({section.learning_rate:g}), or set train.max_grad_norm: 1.0; {log} has the steps."
    )


def no_number(section: schema.Train, steps: int, log: Path) -> str:
    """Return the error of a training that ended before bad numbers were too many, and had no other."""
    return (
        f"training came to nothing: no finite loss in {counted(steps, 'step')}. Lower train.learning_rate "
        f"({section.learning_rate:g}), or set train.max_grad_norm: 1.0; {log} has the steps."
    )


def gave_up(section: schema.Train, step: int, adapter: Path, log: Path) -> str:
    """Return the error of a training that ends with its last good state."""
    return (
        f"training stopped: twice there was no finite loss or gradient, with half the learning rate too. {adapter} is "
        f"the adapter after step {step}, the last good one; the same command goes on with it. For a whole run lower "
        f"train.learning_rate ({section.learning_rate:g}), or set train.max_grad_norm: 1.0; {log} has the steps."
    )
