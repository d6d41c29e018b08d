"""python -m bench.pocket: what the quickstart's choices are worth, each against its absence, over three seeds.

Every variant takes the recipe's number of optimizer steps. The quickstart itself runs once more with its own seed, for
the base model's score and for the score on the fresh prompts, which no choice was made by.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import figures, machine
from fast_ft.common.atomic_files import sha256_file, write_json
from fast_ft.pipeline.rerun import generate_again, judge_again
from fast_ft.pipeline.run import run
from fast_ft.recipe.loader import load_recipe

RECIPE = "recipes/quickstart.yaml"
STEPS = 127
SEEDS = (1, 2, 3)
ONE_STAGE = ["curriculum.stages=[]", f"train.max_steps={STEPS}"]
ANY_ROW = ["select.where={}", "select.rank_by={}"]
VARIANTS: dict[str, list[str]] = {
    "selected": [],
    "selected_one_stage": [*ONE_STAGE, "train.num_train_epochs=10"],
    "top_score": ["select.where={}", "select.rank_by={score: 1.0}", "select.method=top"],
    "random": [*ANY_ROW, "select.method=random"],
    "longest": ["select.where={}", "select.rank_by={response_words: 1.0}", "select.method=top"],
    "prompt_and_response": ["train.completion_only_loss=false"],
    "rows_10": [*ONE_STAGE, "select.take=10", "train.num_train_epochs=64"],
    "rows_30": [*ONE_STAGE, "select.take=30", "train.num_train_epochs=32"],
}
COMMAND = "python -m bench.pocket"


def main() -> int:
    """Run all variants, and write bench/results/pocket.json and its figures."""
    with tempfile.TemporaryDirectory() as folder:
        whole = quickstart(Path(folder))
        print(json.dumps(whole), flush=True)
        variants: dict[str, list[dict[str, Any]]] = {}
        for seed in SEEDS:
            for name, overrides in VARIANTS.items():
                result = measure(Path(folder) / f"{name}-{seed}", [*overrides, f"seed={seed}", "judge.base_prompts=0"])
                variants.setdefault(name, []).append({"seed": seed, "overrides": overrides, **result})
                print(json.dumps({"variant": name, **variants[name][-1]}), flush=True)
    result = {
        **machine.stamp(COMMAND),
        "base_digest": sha256_file(Path("fast_ft/pocket/base/model.safetensors")),
        "quickstart": whole,
        "variants": variants,
    }
    write_json(figures.RESULTS / "pocket.json", result)
    figures.record(headline(result), result, source="pocket.json")
    return 0


def measure(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Run the recipe with overrides and return its scores on the test prompts, its steps and its seconds."""
    run(load_recipe(RECIPE, [*overrides, f"output_dir={folder}"]), RECIPE)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    phases = manifest["phases"]
    assert phases["train"]["steps"] == STEPS, f"{phases['train']['steps']} steps: variants would not compare"
    found = {
        "exact_match": scores["exact_match"],
        "rouge_l": scores["rouge_l"],
        "steps": phases["train"]["steps"],
        "seconds": round(sum(phase["seconds"] for phase in phases.values()), 1),
    }
    if "base" in scores:
        found["base_exact_match"] = scores["base"]["exact_match"]
    return found


def quickstart(folder: Path) -> dict[str, Any]:
    """Run the recipe unchanged: base and tuned on the test prompts, then the same adapter on the fresh prompts."""
    root = folder / "quickstart"
    result = measure(root, [])
    pocket = "fast_ft/pocket"
    generate_again(root, [f"data.test={pocket}/fresh.json"])
    judged = judge_again(root, [f"data.test={pocket}/fresh.json", f"judge.references={pocket}/fresh_references.json"])
    fresh = json.loads(judged.scores.read_text(encoding="utf-8"))
    return {**result, "fresh_exact_match": fresh["exact_match"], "fresh_count": fresh["count"]}


def headline(result: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Return {figure: (value, unit)}: shares, and differences of means over the seeds."""
    means = {name: statistics.fmean(each["exact_match"] for each in runs) for name, runs in result["variants"].items()}
    whole = result["quickstart"]
    share = "share of exact matches"
    return {
        "pocket.base_exact_match": (whole["base_exact_match"], f"{share}, 100 test prompts"),
        "pocket.tuned_exact_match": (whole["exact_match"], f"{share}, 100 test prompts"),
        "pocket.fresh_exact_match": (whole["fresh_exact_match"], f"{share}, 300 fresh prompts"),
        "pocket.selected_minus_random": (
            round(means["top_score"] - means["random"], 4), "difference of shares, top-scored 100, mean of 3 seeds",
        ),
    }  # fmt: skip


if __name__ == "__main__":
    argparse.ArgumentParser("python -m bench.pocket", description=__doc__).parse_args()
    sys.exit(main())
