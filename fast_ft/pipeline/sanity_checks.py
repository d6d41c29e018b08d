"""Warnings about a finished run whose result is useless, each with a likely cause."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fast_ft.common.wording import counted
from fast_ft.recipe import schema
from fast_ft.recipe.steps import warmup_steps

_STEPS = 12  #: of one stage, before a loss can be said to stand still
_FALL = 0.01  #: relative, from a stage's first third to its last
_RISE = 1.5  #: times the first step's loss, which is the base model's: what ends above it has unlearned
_HALF = 0.5


def training_warnings(
    lines: Sequence[Mapping[str, Any]], weights: Mapping[str, Any], section: schema.Train, early: str | None = None
) -> list[str]:
    """Return what is suspicious in a finished training: its log's lines, its adapter's tensors by PEFT's names.

    early: what ended it before its last step, in a sentence.
    """
    found = []
    if text := rose(lines, section) or stands_still(lines, section, early):
        found.append(text)
    outer = [tensor for name, tensor in weights.items() if "lora_B" in name]
    if outer and not any(bool(tensor.any()) for tensor in outer):  # LoRA's B is zero before the first step
        skipped = sum(line["skipped"] for line in lines)
        cause = (
            f"{counted(skipped, 'step')} of {len(lines)} skipped"
            if skipped
            else "was the learning rate above zero at all?"
        )
        found.append(f"the adapter equals its start: the model answers as the base model does. Likely cause: {cause}")
    return found


def rose(lines: Sequence[Mapping[str, Any]], section: schema.Train) -> str | None:
    """Return a warning where training ended far above the loss with which it began, or None."""
    losses = [x["loss"] for x in lines if math.isfinite(x["loss"])]
    third = len(losses) // 3
    if third == 0:
        return None
    first, last = losses[0], sum(losses[-third:]) / third
    if last <= _RISE * first:
        return None
    return (
        f"the loss rose: {first:.3f} in the first step, {last:.3f} on average in the last third of the steps; the "
        f"adapter is useless. Likely cause: train.learning_rate {section.learning_rate:g} is too high; common "
        "are 1e-5 to 1e-3"
    )


def stands_still(lines: Sequence[Mapping[str, Any]], section: schema.Train, early: str | None = None) -> str | None:
    """Return a warning where the loss of the last stage did not fall, or None. Fewer than 12 steps tell nothing.

    early: what ended training before its last step, in a sentence.
    """
    losses = [x["loss"] for x in lines if x["stage"] == lines[-1]["stage"] and math.isfinite(x["loss"])]
    third = len(losses) // 3
    if len(losses) < _STEPS:
        return None
    first, last = sum(losses[:third]) / third, sum(losses[-third:]) / third
    if last < first * (1 - _FALL):
        return None
    cause = f"train.learning_rate {section.learning_rate:g} is too low or too high for these rows"
    if (rising := warmup_steps(section, len(lines))) >= len(lines) // 2:
        cause = f"the warm-up of {rising} steps takes most of the {len(lines)} steps"
    cause = early or cause
    return (
        f"the loss stood still: {first:.3f} at first, {last:.3f} at last (means of the first and the last third of the "
        f"last stage's steps). Likely cause: {cause}"
    )


def answer_warnings(answers: Sequence[Any], max_new_tokens: int) -> list[str]:
    """Return what is suspicious in answers (generate.Answer): empty, all the same, or all cut off."""
    found, count = [], len(answers)
    empty = sum(not answer.text.strip() for answer in answers)
    if empty and empty >= _HALF * count:
        found.append(
            f"{empty} of {count} answers are empty. Likely cause: EOS comes first, as after rows whose responses are "
            "empty, or with another model.template than the base model's"
        )
    elif count > 1 and len({answer.text for answer in answers}) == 1:
        found.append(
            f"all {count} answers are the same. Likely cause: training went too far (train.learning_rate, epochs), or "
            "its rows all have one response"
        )
    if count > 1 and not any(answer.ended for answer in answers):
        found.append(
            f"all {count} answers were cut off at generate.max_new_tokens {max_new_tokens}. Likely cause: that is too "
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


def gave_up(section: schema.Train, step: int, adapter: Path, log: Path) -> str:
    """Return the error of a training that ends with its last good state."""
    return (
        f"training stopped: twice there was no finite loss or gradient, with half the learning rate too. {adapter} is "
        f"the adapter after step {step}, the last good one; the same command goes on with it. For a whole run lower "
        f"train.learning_rate ({section.learning_rate:g}), or set train.max_grad_norm: 1.0; {log} has the steps."
    )
