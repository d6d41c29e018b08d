"""Reading a recipe: YAML, overrides, and messages that name place, value, what is allowed and the remedy."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fast_ft.common.errors import InputError
from fast_ft.recipe import key_owners
from fast_ft.recipe.loader import digest, json_schema, load_recipe, resolved, with_overrides
from fast_ft.recipe.schema import METRICS
from fast_ft.recipe.steps import warmup_steps

SMALL = "model: {name_or_path: base}\ndata: {train: rows}\n"


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def message(tmp_path: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(write(tmp_path, text), overrides)
    said = str(caught.value)
    for jargon in ("pydantic", "type=", "Input should", "Traceback", "yaml."):
        assert jargon not in said
    return said.replace(str(tmp_path) + "/", "")


def test_defaults_are_written_out(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL))
    assert resolved(recipe)["train"]["optim"] == "adamw_8bit"
    assert json.loads(json.dumps(resolved(recipe))) == resolved(recipe)


def test_numbers_are_read_as_yaml_12_reads_them(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL + "train: {learning_rate: 2e-4, weight_decay: 0}\nseed: 0012\n"))
    assert recipe.train.learning_rate == 2e-4 and recipe.train.weight_decay == 0.0 and recipe.seed == 12


def test_a_yaml_11_truth_value_is_text(tmp_path: Path) -> None:
    said = message(tmp_path, SMALL + "generate: {do_sample: yes}\n")
    assert said == 'r.yaml:3: generate.do_sample: "yes" is not allowed; it takes true or false; write true, unquoted'


def test_all_problems_come_at_once_in_the_files_order(tmp_path: Path) -> None:
    said = message(
        tmp_path,
        "model: {max_length: '16'}\nlora:\n  r: true\n  rank: 3\ndata: []\nseeed: 1\n"
        "train: {optim: adam, save_steps: 0}\n",
    )
    lines = said.splitlines()
    assert lines[0] == "r.yaml has 8 problems:"
    assert lines[1].startswith("  r.yaml:1: model.name_or_path: missing; it takes text")
    assert lines[2] == '  r.yaml:1: model.max_length: "16" is not allowed; it takes a whole number at least 8; ' \
        "write it without quotes"  # fmt: skip
    assert lines[3] == "  r.yaml:3: lora.r: true is not allowed; it takes a whole number at least 0"
    assert lines[4].startswith("  r.yaml:4: lora.rank: unknown key")
    assert lines[5].startswith("  r.yaml:5: data: [] is not allowed; it takes a section with the keys train, test")
    assert lines[6] == "  r.yaml:6: seeed: unknown key (did you mean 'seed'?)"
    assert "adamw_torch or adamw_8bit (did you mean 'adamw" in lines[7]
    assert "train.save_steps: 0 is not allowed; it takes a whole number at least 1, or null" in lines[8]


def test_any_key_takes_a_value_of_any_kind_or_says_what_it_takes(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "curriculum: {stages: [{name: all, upto: 1.0}]}\n")
    for key, _ in key_owners.fields():
        for value in ("null", "x", "[[1]]", "{a: {b: 1}}"):
            with contextlib.suppress(InputError):
                load_recipe(path, [f"{key.replace('stages.', 'stages.0.')}={value}"])
    said = message(tmp_path, SMALL, "judge.dollars_per_million_tokens=5")
    assert said.endswith("5 is not allowed; it takes a list of 2, each entry a number at least 0, or null")


def test_wrong_values_and_wrong_consequences_come_together(tmp_path: Path) -> None:
    said = message(tmp_path, SMALL + "lora: {r: 0}\ntrain: {learning_rate: fast}\n")
    assert "r.yaml:3: lora.r: rank 0" in said and "r.yaml:4: train.learning_rate" in said


def test_no_consequence_is_drawn_from_a_misspelt_key(tmp_path: Path) -> None:
    # The default of one epoch would make ten steps of warm-up too long: not what this user wrote.
    said = message(tmp_path, SMALL + "select: {take: 8}\ntrain: {num_train_epoch: 30}\n")
    assert "num_train_epochs" in said and "warm-up" not in said


def test_a_misspelt_key_hides_nothing_about_a_key_that_is_there(tmp_path: Path) -> None:
    said = message(tmp_path, SMALL + "lora: {r: 0, rnk: 3}\n")
    assert "unknown key (did you mean 'r'?)" in said and "lora.r: rank 0" in said


def test_overrides_over_a_finished_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL))
    assert with_overrides(recipe, ["generate.top_k=5"]).generate.top_k == 5
    with pytest.raises(InputError, match=r"override lora\.r=0: lora\.r: rank 0"):
        with_overrides(recipe, ["lora.r=0"])


def test_a_key_in_the_wrong_section_is_shown_the_right_one(tmp_path: Path) -> None:
    assert "(did you mean 'train.learning_rate'?)" in message(tmp_path, SMALL + "learning_rate: 1e-4\n")


def test_a_key_that_recipes_once_had_says_what_to_write_instead(tmp_path: Path) -> None:
    for given in ("error", "first", "last"):
        said = message(tmp_path, SMALL.replace("data: {", f"data: {{multi_turn: {given}, "))
        assert "data.multi_turn: this key is gone" in said and "data.train_on says whether" in said
        assert "Take the key out" in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "r.yaml is empty"),
        ("# only a comment\n", "r.yaml is empty"),
        ("- a\n- b\n", "this is a list"),
        ("hello", "this is a single value"),
        ("model:\n\tname_or_path: x\n", "r.yaml:2:1: not valid YAML: a tab"),
        ("model: {name_or_path: a\ndata: b", "not valid YAML"),
        ("select: {where: {score: >= 4.5}}\n", "in quotes"),
        ("select:\n  where:\n    score: >= 4.5\n", "in quotes"),
        ("seed: 1\nmodel: {}\nseed: 2\n", "r.yaml:3: seed stands twice, first at r.yaml:1"),
        ("model: {name_or_path: a, name_or_path: b}\n", "model.name_or_path stands twice"),
        ("a: 1\n---\nb: 2\n", "a second document"),
        ("model: !!python/name:os.getcwd x\n", "takes no tags"),
        ("a: &a [*a]\n", "levels"),
        ("<<: {a: 1}\n", "merges"),
        ("? [a]\n: 1\n", "cannot be keys"),
        ("a: " + "[" * 1500, "not valid YAML|nested deeper"),
        (b"model: \xff\n", "not UTF-8 text .byte 7."),
        ("seed: 1\n".encode("utf-16"), "not UTF-8 text but UTF-16"),
        ("seed: 1\nlora: {r: 8}\n".encode("utf-16-le"), "not UTF-8 text but UTF-16"),
        (b"seed: 1\nmodel: \x00\n", r"r.yaml:2: not valid YAML: a control character \(code 0\)"),
        ("seed:\u00a01\nrun_name: x\n", r"the line before holds U\+00A0 \(no-break space\)"),
        ("lora:\n\u00a0\u00a0r: 4\n", r"r.yaml:2: the key '\\xa0\\xa0r' holds U\+00A0"),
        ("seed: 1\u200b\n", r"r.yaml:1: '1\\u200b' holds U\+200B \(zero width space\)"),
        ("seed: \u201c4\u201d\n", "these quotes are a part of the text: write straight ones"),
        ("seed:1\nrun_name: x\n", "the line before has no space behind its colon: write seed: and a space"),
        ('data: {train: "C:\\Users\\me"}\n', "a backslash in double quotes begins an escape: write / in a path"),
        ("a" * 1_000_001, "at most 1,000,000"),
        ("seed: [1\n", "not valid YAML"),
        ('model: {name_or_path: "a\\0b"}\n', "character number 2"),
        ('model: {name_or_path: "\\ud800"}\n', "character number 1"),
        ("seed: " + "9" * 5000, "seed"),
    ],
)
def test_broken_files_get_one_message(tmp_path: Path, text: str | bytes, expected: str) -> None:
    import re

    assert re.search(expected, message(tmp_path, text))


def test_aliases_cannot_grow_without_bound(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "aliases" in message(tmp_path, "\n".join(lines))


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="is a folder"):
        load_recipe(tmp_path)


def test_overrides(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, SMALL + "curriculum: {stages: [{name: all, upto: 1.0}]}\n"),
        ["lora.r=32", "select.where.score=4.5", "data.test=null", "train.learning_rate=2e-4",
         "curriculum.stages.0.num_train_epochs=3", "lora.target_modules=[q_proj, v_proj]", "data.train=my #1 rows"],
    )  # fmt: skip
    assert recipe.lora.r == 32 and recipe.select.where == {"score": 4.5} and recipe.data.test is None
    assert recipe.train.learning_rate == 2e-4 and recipe.curriculum.stages[0].num_train_epochs == 3
    assert recipe.lora.target_modules == ("q_proj", "v_proj") and recipe.data.train == "my #1 rows"


def test_a_condition_needs_no_second_quotes_in_an_override(tmp_path: Path) -> None:
    for text in (">= 4.5", '">= 4.5"'):
        recipe = load_recipe(write(tmp_path, SMALL), [f"select.where.score={text}"])
        assert recipe.select.where == {"score": ">= 4.5"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora.r", "write it as key=value"),
        ("lora..r=1", "write it as key=value"),
        ("lora.r=x", 'override lora.r=x: lora.r: "x" is not allowed'),
        ("lora.rnak=1", "override lora.rnak=1: lora.rnak: unknown key"),
        ("lor.r=1", "override lor.r=1: lor: unknown key"),
        ("seed.x=1", "unknown key|not allowed"),
        ("model.name_or_path.x=1", 'model.name_or_path is "base", which has no keys'),
        ("curriculum.stages.0.name=a", "not allowed|has 0 entries"),
        ("lora.target_modules=[a", "override lora.target_modules=.a.*not valid YAML"),
    ],
)
def test_overrides_name_themselves_in_errors(tmp_path: Path, override: str, expected: str) -> None:
    import re

    assert re.search(expected, message(tmp_path, SMALL, override))


def test_the_digest_follows_every_key_but_output_dir(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    base = digest(load_recipe(path))
    assert digest(load_recipe(path, ["output_dir=elsewhere", "lora.lora_alpha=32.0"])) == base
    assert digest(load_recipe(path, ["lora.r=8"])) != base and len(base) == 64


def test_the_schema_describes_every_leaf() -> None:
    def leaves(part: dict, name: str) -> None:
        if "$ref" in part:
            part = content["$defs"][part["$ref"].rsplit("/", 1)[-1]]
        for key, inner in part.get("properties", {}).items():
            leaves(inner, f"{name}.{key}")
        assert part.get("additionalProperties") is not None or "properties" not in part, name

    content = json_schema()
    leaves(content, "recipe")
    assert "conversation_words" in METRICS


def test_reading_a_recipe_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from fast_ft.recipe.loader import load_recipe; load_recipe(sys.argv[1])\n"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    path = write(tmp_path, SMALL)
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_share_of_warm_up_takes_the_place_of_the_default_steps(tmp_path: Path) -> None:
    """Alone it is enough; beside steps that somebody wrote it is an error, and what is written out reads back."""
    path = tmp_path / "r.yaml"
    path.write_text("model: {name_or_path: base}\ndata: {train: rows}\ntrain: {warmup_ratio: 0.1}\n")
    recipe = load_recipe(path)
    assert (recipe.train.warmup_steps, recipe.train.warmup_ratio) == (None, 0.1)
    assert with_overrides(recipe, ["lora.r=8"]).train == recipe.train
    assert [warmup_steps(recipe.train, total) for total in (10, 13, 20)] == [1, 2, 2]
    path.write_text("model: {name_or_path: base}\ndata: {train: rows}\ntrain: {warmup_steps: 3}\n")
    with pytest.raises(InputError, match=r"warmup_ratio: 0\.1 of all steps, but train\.warmup_steps says 3"):
        load_recipe(path, ["train.warmup_ratio=0.1"])
    both = load_recipe(path, ["train.warmup_ratio=0.1", "train.warmup_steps=null"])
    assert warmup_steps(both.train, 30) == 3


def test_whole_epochs_stay_whole_and_keep_their_digest(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {name_or_path: base}\ndata: {train: rows}\ntrain: {num_train_epochs: 2}\n")
    whole, half = load_recipe(path), load_recipe(path, ["train.num_train_epochs=1.5"])
    assert resolved(whole)["train"]["num_train_epochs"] == 2 and type(whole.train.num_train_epochs) is int
    assert half.train.num_train_epochs == 1.5
    with pytest.raises(InputError, match="num_train_epochs"):
        load_recipe(path, ["train.num_train_epochs=0"])
    with pytest.raises(InputError, match="num_train_epochs"):
        load_recipe(path, ["train.num_train_epochs=-0.5"])
