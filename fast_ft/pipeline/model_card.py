"""The adapter's model card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fast_ft.common.wording import counted
from fast_ft.data.prepare import PreparedData
from fast_ft.recipe.schema import Recipe
from fast_ft.run import epoch_loss


def model_card(recipe: Recipe, prepared: PreparedData, lines: Sequence[dict[str, Any]]) -> str:
    """Return the adapter's README.md: what it is, how it was made, how to load it."""
    base, section = recipe.model.name_or_path, recipe.train
    trained = "response tokens only" if section.completion_only_loss else "all tokens, prompts among them"
    said = epoch_loss.sentence(lines, prepared.staged(), section.effective_batch_size)
    return f"""---
base_model: {base}
library_name: peft
tags: [lora, sft, fast_ft]
---
# LoRA adapter for {base}

Trained with fast_ft on {counted(len(prepared.examples), "row")} of `{recipe.data.short_name}`, {trained}, in
{counted(len(lines), "step")} of {counted(section.effective_batch_size, "row")}:
r {recipe.lora.r}, alpha {recipe.lora.lora_alpha:g},
learning rate {section.learning_rate:g} ({section.lr_scheduler_type}), seed {recipe.seed}.
On the training rows {said or "no loss was finite"}; that is no measure of the answers' quality.

Prompts have the form `{"[INST] ... [/INST]" if recipe.model.template == "llama-2" else "of the chat template"}`.

    from peft import AutoPeftModelForCausalLM
    model = AutoPeftModelForCausalLM.from_pretrained("this folder")

`selfcheck.json` holds the log-probabilities of three training rows, by which a loaded copy can be checked. It holds
those rows' tokens: leave it out where the rows must not be shared.
"""
