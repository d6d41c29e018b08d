"""A homework's rules, kept by code: NTU Machine Learning 2025 Spring, homework 5 (rules: ntu-ml-2025-hw5).

Each check returns a list of sentences, which is empty when all is well; a sentence about a recipe begins with the
key's dotted path. A recipe without `rules` has no cap on rows, and may have any seed and model.
"""

from __future__ import annotations

from typing import Any

from fast_ft.common.folders import is_folder
from fast_ft.recipe.schema import Recipe

SEED = 3407
MAX_ROWS = 100
#: Minutes that the homework allows on a T4, by the budget's key: training over all attempts, and answering. `plan`,
#: `runs` and the report compare with these minutes. No clock ends a run by them: such a run could not be done again.
MINUTES = {"train_minutes": 240.0, "generate_minutes": 15.0}
#: The same weights under different names: Meta's own, a copy without the gate, and both of Unsloth's.
MODELS = (
    "unsloth/llama-2-7b-bnb-4bit",
    "unsloth/llama-2-7b",
    "meta-llama/Llama-2-7b-hf",
    "NousResearch/Llama-2-7b-hf",
)
#: What config.json says of Llama-2-7B, and of no other Llama 2.
LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}


#: What the rules say of each kind of adapter that a recipe can ask for: "" allows it, else why it is refused.
ADAPTERS = {
    "lora.target_modules": "",  # any linear layers
    "lora.lora_dropout": "",
    "lora.use_rslora": "",
    "lora.use_dora": "",
    "lora.modules_to_save": "the homework trains an adapter of the 4-bit model, not the model's own weights: write []",
    "model.adapter": "an adapter that is there has seen other rows: write null",
}


def check_recipe(recipe: Recipe) -> list[str]:
    """Return how `recipe` breaks the rules that it names; a local model folder is left to check_model_config."""
    if recipe.rules is None:
        return []
    problems = []
    why = f"under rules: {recipe.rules}"
    if recipe.seed != SEED:
        problems.append(f"seed: {recipe.seed} is not allowed {why}; the homework fixes it at {SEED}")
    if not recipe.model.load_in_4bit:
        problems.append(f"model.load_in_4bit: false is not allowed {why}; the homework's model has 4 bits: write true")
    if recipe.generate.kv_cache != "16bit":
        problems.append(
            f"generate.kv_cache: {recipe.generate.kv_cache} is not allowed {why}; the homework quantises the model's "
            "weights and nothing else: write 16bit"
        )
    for key, rows in (("data.max_train_rows", recipe.data.max_train_rows), ("select.take", recipe.select.take)):
        if rows is not None and rows > MAX_ROWS:
            problems.append(f"{key}: {rows} is not allowed {why}; the homework allows at most {MAX_ROWS} rows")
    if not isinstance(recipe.data.train, str):
        problems.append(f"data.train: a list is not allowed {why}; the homework gives one set of rows: write its path")
    if recipe.train.load_best:
        problems.append(
            f"train.load_best: true is not allowed {why}; validation rows may not choose what is handed in: write false"
        )
    for name, allowed in MINUTES.items():
        if (minutes := getattr(recipe.budget, name)) is not None:
            problems.append(
                f"budget.{name}: {minutes:g} is not allowed {why}; a run that a clock ends early cannot be done again: "
                f"write null. `plan` compares with the homework's {allowed:g} minutes by itself"
            )
    for key, reason in ADAPTERS.items():
        section, name = key.split(".")
        if reason and (value := getattr(getattr(recipe, section), name)):
            shown = f"[{', '.join(value)}]" if isinstance(value, tuple) else repr(value)
            problems.append(f"{key}: {shown} is not allowed {why}; {reason}")
    if recipe.train.report_to != "none":
        problems.append(
            f"train.report_to: {recipe.train.report_to} is not allowed {why}; nothing of a homework's run goes to "
            "a tracker or a hub: write none, report.html has the curves"
        )
    name = recipe.model.name_or_path
    if name.lower() not in {model.lower() for model in MODELS} and not is_folder(name):
        problems.append(
            f"model.name_or_path: {name!r} is not allowed {why}; it takes LLaMA2-7B only: {', '.join(MODELS)}, "
            "or a folder with that model, which is not there under this name"
        )
    return problems


def minutes(recipe: Recipe, name: str) -> float | None:
    """Return the minutes that a run is compared with, the homework's or the budget's; `name` is a key of MINUTES."""
    return MINUTES[name] if recipe.rules is not None else getattr(recipe.budget, name)


def without_clock(recipe: Recipe) -> Recipe:
    """Return the recipe; where it names rules, without budgets of minutes, which an earlier version allowed."""
    if recipe.rules is None:
        return recipe
    return recipe.model_copy(update={"budget": recipe.budget.model_copy(update=dict.fromkeys(MINUTES))})


def max_train_rows(recipe: Recipe) -> int | None:
    """Return the most distinct rows that a run may train on over all stages; None: no limit."""
    if recipe.rules is None:
        return recipe.data.max_train_rows
    return min(recipe.data.max_train_rows or MAX_ROWS, MAX_ROWS)


def check_model_config(config: dict[str, Any]) -> list[str]:
    """Return how a model's config.json differs from Llama-2-7B's, in shape or in quantisation."""
    problems = [
        f"the model's config.json has {key} {config.get(key)!r}, LLaMA2-7B has {value!r}"
        for key, value in LLAMA_2_7B.items()
        if config.get(key) != value
    ]
    if (heads := config.get("num_key_value_heads", 32)) != 32:
        problems.append(f"the model's config.json has num_key_value_heads {heads!r}, LLaMA2-7B has 32")
    quantization = config.get("quantization_config") or {}
    if quantization and not (quantization.get("quant_method") == "bitsandbytes" and quantization.get("load_in_4bit")):
        method = quantization.get("quant_method", "of an unknown kind")
        problems.append(f"the model is quantised ({method}); the rules allow bitsandbytes' 4 bits only")
    return problems


def check_rows(count: int) -> list[str]:
    """Return a sentence if `count` distinct training rows are more than the rules allow."""
    if count <= MAX_ROWS:
        return []
    return [f"{count} distinct training rows over all stages; the homework allows {MAX_ROWS}: lower select.take"]
