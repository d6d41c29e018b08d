"""What may change between two starts of one run, what may not, and what is done again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fast_ft.cli.main import main
from fast_ft.common import atomic_files, console
from fast_ft.common.errors import InputError
from fast_ft.data.prepare import prepare
from fast_ft.generate import answers
from fast_ft.generate.engine.llm_engine import LLMEngine
from fast_ft.homework import package
from fast_ft.pipeline import changes
from fast_ft.pipeline.preview import preview
from fast_ft.pipeline.rerun import generate_again, judge_again, renew_scores
from fast_ft.pipeline.run import run
from fast_ft.recipe.loader import load_recipe
from fast_ft.report import comparison, run_data
from fast_ft.run import provenance
from fast_ft.run.folder import RunDir
from fast_ft.run.listing import differing, list_runs
from fast_ft.train import checkpoints, state
from tests.helpers.parts import RecipeFactory, answered, save_random_llama, write_recipe

Go = Callable[..., RunDir]


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): atomic_files.sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def one_run(tiny: Path, train_file: Path, test_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    for name, source in (("rows.json", train_file), ("prompts.json", test_file)):
        shutil.copy(source, folder / name)
    path = write_recipe(
        folder, tiny, folder / "rows.json", folder / "prompts.json", {"output_dir": str(folder / "run")}
    )
    return run(load_recipe(path), path).root.parent


@pytest.fixture
def again(one_run: Path, tiny: Path, tmp_path: Path) -> Go:
    """Run the finished run's recipe in a folder of the test's own, with overrides."""
    shutil.copytree(one_run, tmp_path, dirs_exist_ok=True)
    values = {"output_dir": str(tmp_path / "run")}
    path = write_recipe(tmp_path, tiny, tmp_path / "rows.json", tmp_path / "prompts.json", values)
    manifest = read(tmp_path / "run" / "manifest.json")
    for name in ("train", "test"):
        manifest["recipe"]["data"][name] = manifest["recipe"]["data"][name].replace(str(one_run), str(tmp_path))
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))

    def go(*overrides: str, **options: Any) -> RunDir:
        return run(load_recipe(path, overrides), path, **options)

    return go


def test_changed_training_keys_are_shown_as_a_diff_and_refused(again: Go, tmp_path: Path) -> None:
    before = digests(tmp_path / "run")
    with pytest.raises(InputError) as caught:
        again("train.learning_rate=0.02", "curriculum.stages.1.num_train_epochs=2", "generate.max_new_tokens=3")
    assert "  train.learning_rate: 0.01 -> 0.02\n" in str(caught.value) and "--force-resume" in str(caught.value)
    assert digests(tmp_path / "run") == before


def test_rows_that_differ_are_counted_by_what_became_of_them() -> None:
    was, is_ = ([{"id": str(n), "digest": "d"} for n in numbers] for numbers in (range(100), range(58, 158)))
    rows, told = changes._rows_differ(was, is_)
    assert rows == "100 rows" and told.startswith("100 rows: 58 new ('100', '101', '102' and 55 more), 58 gone ('0', ")
    assert changes._rows_differ(was[:1], is_[:1])[1] == "1 row: 1 new ('58'), 1 gone ('0')"
    assert changes._rows_differ(was, was[::-1])[1] == "100 rows: in another order or other stages"


def test_a_finished_run_takes_another_name_and_does_nothing_again(again: Go) -> None:
    before = again("run_name=first").manifest()
    named = again('run_name="the best"').manifest()
    assert named["recipe"]["run_name"] == "the best" and named["phases"] == before["phases"]
    assert named["recipe_digest"] == before["recipe_digest"]


def test_changed_rows_behind_the_same_path_are_refused(again: Go, tmp_path: Path) -> None:
    rows = read(tmp_path / "rows.json")
    rows[4]["conversations"][1]["value"] += " Yes."
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    before = digests(tmp_path / "run")
    with pytest.raises(InputError, match=r"the selected rows: 16 rows -> 16 rows: 1 changed \('r4'\)"):
        again()
    assert digests(tmp_path / "run") == before


def test_force_resume_goes_on_from_the_checkpoint_and_says_so(
    again: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    former = atomic_files.sha256_file(tmp_path / "run" / "pred.json")
    overrides = [
        "train.learning_rate=0.02",
        "train.max_steps=8",
        "curriculum.stages=[{name: all, upto: 1.0, num_train_epochs: 2}]",
    ]
    folder = again(*overrides, force_resume=True)
    said = capsys.readouterr().err
    assert "train.learning_rate: 0.01 -> 0.02" in said and "going on after step 6 of 8" in said
    manifest = folder.manifest()
    assert manifest["recipe"]["train"]["learning_rate"] == 0.02 and (folder.done("train") or {})["steps"] == 8
    (entry,) = manifest["resumed"]
    assert entry["forced"]["train.learning_rate"] == [0.01, 0.02]
    assert atomic_files.sha256_file(folder.root / f"pred-{former[:8]}.json") == former
    with pytest.raises(InputError, match=r"another lora\.r"):
        again(*overrides, "lora.r=8", force_resume=True)


LONGER = "curriculum.stages=[{name: all, upto: 1.0, num_train_epochs: 2}]"  # 8 steps, where the run has 6


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.r=8", r"another lora\.r, .*lora_A\.weight has the shape \[4, 128\], where .* has \[8, 128\]"),
        ("lora.target_modules=[q_proj]", r"another lora.*the recipe's adapter has no .*down_proj\.lora_A\.weight"),
        ("lora.use_dora=true", r"another lora.*lora_magnitude_vector is missing, where .* has \[64\]"),
        ("lora.modules_to_save=[lm_head]", r"lm_head\.weight is missing, where .* has \[2048, 64\]"),
        ("model.name_or_path=OTHER", r"another base model.*has the shape \[4, 128\], where .* has \[4, 256\]"),
    ],
)
def test_a_forced_resume_that_cannot_go_on_is_refused_before_anything_is_written(
    again: Go, tmp_path: Path, override: str, words: str
) -> None:
    if override.endswith("OTHER"):
        override = override.replace("OTHER", str(save_random_llama(tmp_path / "other", hidden=128)))
    before = digests(tmp_path / "run")
    with pytest.raises(InputError, match=words):
        again(LONGER, override, force_resume=True)
    assert digests(tmp_path / "run") == before
    again()
    assert digests(tmp_path / "run") == before, "the run's own recipe goes on as before"


def test_a_judge_that_cannot_judge_is_refused_before_former_scores_are_set_aside(again: Go, tmp_path: Path) -> None:
    again("judge.kind=reference", references(tmp_path, "a.json", "The hat is red."))
    before = digests(tmp_path / "run")
    one = json.loads((tmp_path / "a.json").read_text())[:1]
    (tmp_path / "few.json").write_text(json.dumps(one))
    for name, words in (("few.json", "no reference"), ("none.json", "none.json")):
        with pytest.raises(InputError, match=words):
            again("judge.kind=reference", f"judge.references={tmp_path / name}")
        assert digests(tmp_path / "run") == before


def test_best_weights_that_were_not_kept_are_missed_before_training_goes_on(again: Go, tmp_path: Path) -> None:
    checkpoint = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    content = read(checkpoint / "state.json")
    content["progress"] |= {"best_step": 4, "best_loss": 0.0}  # measured while train.load_best was off
    del content["digest"]
    (checkpoint / "state.json").write_text(json.dumps(content | {"digest": state._digest(content)}))
    before = digests(tmp_path / "run")
    validated = ("data.validation.take=4", "train.load_best=true")
    with pytest.raises(InputError, match=r"the weights after step 4.* were not kept.*Write false"):
        again(LONGER, *validated, force_resume=True)
    assert digests(tmp_path / "run") == before


def test_a_forced_resume_that_is_stopped_before_its_record_leaves_the_run_to_its_own_recipe(
    again: Go, tmp_path: Path
) -> None:
    def stopping(what: str, path: Path) -> None:
        if path.name == "manifest.json":
            manifest = read(path)
            assert manifest["recipe"]["train"]["learning_rate"] == 0.01 and "train" in manifest["phases"]
            if (
                what == "rename"
                and '"forced": {' in path.with_name(next(tmp_path.glob("run/.manifest*")).name).read_text()
            ):
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic_files, "before", stopping)
        again(LONGER, "train.learning_rate=0.02", force_resume=True)
    adapter = digests(tmp_path / "run" / "adapter")
    folder = again()
    assert digests(tmp_path / "run" / "adapter") == adapter and "resumed" not in folder.manifest()


@pytest.mark.parametrize("first", ["adamw_torch", "adamw_8bit"])
def test_a_forced_resume_with_another_optimizer_begins_with_new_moments_and_says_so(
    again: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str], first: str
) -> None:
    second = {"adamw_torch": "adamw_8bit", "adamw_8bit": "adamw_torch"}[first]
    if first == "adamw_8bit":
        shutil.rmtree(tmp_path / "run")
        again(f"train.optim={first}", "data.test=null")
    folder = again(LONGER, f"train.optim={second}", "data.test=null", force_resume=True)
    said = f"the checkpoint after step 6 has the moments of another optimizer than train.optim: {second}"
    assert said in capsys.readouterr().err and any(said in text for text in folder.record().notes)
    assert (folder.done("train") or {})["steps"] == 8
    log = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert all(0 < line["grad_norm"] < 100 and line["loss"] < 10 for line in log)


def test_before_anything_is_trained_any_recipe_may_come(again: Go, tmp_path: Path) -> None:
    for name in ("adapter", "checkpoints", "pred.json", "report.html"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    RunDir.at(tmp_path / "run").update(phases={})
    folder = again("lora.r=2", until="adapter")
    assert folder.manifest()["recipe"]["lora"]["r"] == 2 and (folder.done("train") or {})["steps"] == 6


def test_other_generate_keys_reuse_the_adapter_and_keep_the_old_answers(again: Go, tmp_path: Path) -> None:
    root = tmp_path / "run"
    adapter, former = digests(root / "adapter"), atomic_files.sha256_file(root / "pred.json")
    folder = again("generate.max_new_tokens=2")
    assert digests(root / "adapter") == adapter
    assert (
        atomic_files.sha256_file(root / f"pred-{former[:8]}.json")
        == former
        != atomic_files.sha256_file(root / "pred.json")
    )
    assert folder.manifest()["digests"]["pred"] == atomic_files.sha256_file(root / "pred.json")
    assert folder.manifest()["recipe"]["generate"]["max_new_tokens"] == 2
    before = digests(root)
    again("generate.max_new_tokens=2")
    assert digests(root) == before, "and then it is done"


def test_other_prompts_reuse_the_adapter_and_keep_the_old_answers(again: Go, tmp_path: Path) -> None:
    root, prompts = tmp_path / "run", read(tmp_path / "prompts.json")
    adapter, former = digests(root / "adapter"), atomic_files.sha256_file(root / "pred.json")
    (tmp_path / "prompts.json").write_text(json.dumps(prompts[:-1]))
    folder = again()
    assert digests(root / "adapter") == adapter and list(read(root / "pred.json")) == [p["id"] for p in prompts[:-1]]
    assert atomic_files.sha256_file(root / f"pred-{former[:8]}.json") == former
    assert folder.manifest()["digests"]["test"] == atomic_files.sha256_file(tmp_path / "prompts.json")


def test_another_judge_keeps_adapter_answers_and_former_scores(again: Go, tmp_path: Path) -> None:
    root = tmp_path / "run"
    references(tmp_path, "references.json", "The hat is red.")
    before = {name: digest for name, digest in digests(root).items() if name.startswith(("adapter", "pred"))}
    judged = ("judge.kind=reference", f"judge.references={tmp_path}/references.json")
    folder = again(*judged)
    assert folder.done("judge") is not None
    scores = folder.scores.read_bytes()
    shutil.copy(tmp_path / "references.json", tmp_path / "others.json")
    again(*judged, f"judge.references={tmp_path}/others.json")
    assert [path.read_bytes() for path in root.glob("scores-*.json")] == [scores]
    after = {name: digest for name, digest in digests(root).items() if name.startswith(("adapter", "pred"))}
    assert after == before


def references(folder: Path, name: str, text: str) -> str:
    """Write a file of reference answers to the run's prompts, and return the override that names it."""
    pred = read(folder / "run" / "pred.json")
    answer = {"role": "assistant", "content": text}
    rows = [{"id": id_, "messages": [*entry["input"], answer]} for id_, entry in pred.items()]
    (folder / name).write_text(json.dumps(rows))
    return f"judge.references={folder / name}"


def test_the_recipes_command_ends_with_the_recipes_answers_and_keeps_the_others(
    again: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    wanted = (root / "pred.json").read_bytes()
    generate_again(root, ["generate.max_new_tokens=2"])
    other = (root / "pred.json").read_bytes()
    assert other != wanted and RunDir.at(root).manifest()["generated_with"]["max_new_tokens"] == 2
    folder = again()
    assert folder.pred.read_bytes() == wanted
    assert (root / f"pred-{atomic_files.sha256_file(folder.pred)[:8]}.json").read_bytes() == wanted
    assert other in [path.read_bytes() for path in root.glob("pred-*.json")], "kept"
    assert "generate.max_new_tokens: 2 -> 6" in capsys.readouterr().err
    assert folder.manifest()["generated_with"] == folder.manifest()["recipe"]["generate"]
    before = digests(root)
    again()
    assert digests(root) == before, "and then it is done"


def test_the_recipes_command_ends_with_the_recipes_scores_and_keeps_the_others(again: Go, tmp_path: Path) -> None:
    root, first = tmp_path / "run", references(tmp_path, "a.json", "The hat is red.")
    again("judge.kind=reference", first)
    wanted = read(root / "scores.json")
    judge_again(root, [references(tmp_path, "b.json", "No.")])
    other = (root / "scores.json").read_bytes()
    assert json.loads(other) != wanted and json.loads(other)["judged_with"]["references"].endswith("b.json")
    again("judge.kind=reference", first)
    assert read(root / "scores.json") == wanted
    assert other in [path.read_bytes() for path in root.glob("scores-*.json")]
    before = digests(root)
    again("judge.kind=reference", first)
    assert digests(root) == before


def test_scores_by_another_judge_are_kept_beside_and_a_recipe_without_a_judge_leaves_scores_alone(
    again: Go, tmp_path: Path
) -> None:
    root, made = tmp_path / "run", []
    for name, text in (("a.json", "The hat is red."), ("b.json", "No."), ("c.json", "Yes, it is.")):
        folder = judge_again(root, ["judge.kind=reference", references(tmp_path, name, text)])
        made.append(folder.scores.read_bytes())
    kept = [path.read_bytes() for path in root.glob("scores-*.json")]
    assert sorted(kept) == sorted(made[:2]), "every judge's scores are there"
    judge_again(root, ["judge.kind=reference", f"judge.references={tmp_path}/c.json"])
    assert len(list(root.glob("scores-*.json"))) == 2, "the same judge's scores are the same scores"
    before = digests(root)
    again()
    assert digests(root) == before


@pytest.mark.parametrize("stop", ["before the record", "after it"])
def test_a_stop_beside_the_record_of_the_answers_makes_none_of_them_again(
    again: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    """The answers of the base model are answers too."""
    root, finish = tmp_path / "run", RunDir.finish

    def stopped(folder: RunDir, phase: str, seconds: float, beside: Any, spent: Any, **facts: Any) -> None:
        if stop == "after it":
            finish(folder, phase, seconds, beside, (), **facts)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunDir, "finish", stopped)
        again("judge.base_prompts=2", "generate.max_new_tokens=3")
    made = {path.name: path.read_bytes() for path in (root / "pred.json", root / "base_pred.json")}

    def answered_again(*given: Any, **options: Any) -> Any:
        raise AssertionError("an answer that was there is made again")

    monkeypatch.setattr(LLMEngine, "run", answered_again)
    folder = again("judge.base_prompts=2", "generate.max_new_tokens=3")
    assert {name: (root / name).read_bytes() for name in made} == made and not list(root.glob("*.partial.jsonl"))
    assert (folder.done("generate") or {})["base_answers"] == 2


def test_a_stopped_generate_goes_on_and_its_answers_never_mix_with_the_runs_own(
    again: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, former = tmp_path / "run", (tmp_path / "run" / "pred.json").read_bytes()
    shutil.copytree(root, tmp_path / "whole")
    generate_again(tmp_path / "whole", ["generate.max_new_tokens=3"])

    class Stopping(console.Bar):
        def advance(self, by: int = 1, facts: str = "") -> None:
            super().advance(by, facts)
            if self.done == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(answers, "Bar", Stopping)
        generate_again(root, ["generate.max_new_tokens=3"])
    assert again().pred.read_bytes() == former, "the run's own answers are as they were"
    drawn = []
    run_pool = LLMEngine.run
    monkeypatch.setattr(LLMEngine, "run", lambda pool, rows, **o: drawn.append(rows) or run_pool(pool, rows, **o))
    generate_again(root, ["generate.max_new_tokens=3"])
    assert sum(row.known is not None for row in drawn[-1]) == 2
    assert (root / "pred.json").read_bytes() == (tmp_path / "whole" / "pred.json").read_bytes()
    assert not list(root.glob("*.partial.jsonl"))


def test_runs_comparison_and_zip_name_the_settings_of_the_answers(again: Go, tmp_path: Path) -> None:
    """Two runs of one recipe; one of them answered with other settings."""
    again()
    shutil.copytree(tmp_path / "run", tmp_path / "runs" / "a")
    shutil.copytree(tmp_path / "run", tmp_path / "runs" / "b")
    generate_again(tmp_path / "runs" / "b", ["generate.max_new_tokens=2"])
    runs = list_runs(tmp_path / "runs")
    assert differing(runs) == [{"generate.max_new_tokens": 6}, {"generate.max_new_tokens": 2}]
    folders = [RunDir.at(run.folder) for run in runs]
    table = comparison.compared([run_data.read_run(folder) for folder in folders])
    assert "generate.max_new_tokens" in table and "The recipes are the same" not in table
    recipe = yaml.safe_load(package.contents(folders[1], "b12901001")["recipe.yaml"])
    assert recipe["generate"]["max_new_tokens"] == 2


@pytest.mark.parametrize(
    "content",
    ["[1]", '{"kind": "reference", "count": 1', '{"kind": "reference", "pred": "../../../evil"}', "[" * 99_999],
)
def test_former_scores_that_cannot_be_read_are_kept_aside_with_a_warning(
    again: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    root = tmp_path / "run"
    (root / "scores.json").write_text(content)
    folder = RunDir.at(root)
    renew_scores(folder, folder.recipe(), prepare(folder.recipe()))
    (beside,) = root.glob("scores-unreadable-*.json")
    assert beside.read_text() == content and not folder.scores.exists()
    said = capsys.readouterr().err
    assert "warning" in said and "scores.json" in said and beside.name in said


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("plan.json", '{"micro_batch": 4', "plan.json: not valid JSON .* Delete it"),
        ("plan.json", '{"micro_batch": "4"}', "the plan's micro_batch is of type str"),
        ("plan.json", '{"micro_batch": 4, "x": 1}', "the plan has 'x'"),
        ("manifest.json", '{"phases": {"train": {"seconds": "1"}}}', "phases.train.seconds"),
        ("log.jsonl", "{}\n" * 6, "stage: Field required"),
    ],
)
def test_damaged_files_of_a_run_are_a_message(again: Go, tmp_path: Path, name: str, content: str, words: str) -> None:
    folder = RunDir.at(tmp_path / "run")
    folder.update(phases={})
    (folder.root / name).write_text(content)
    with pytest.raises(InputError, match=words):
        again()


@pytest.mark.parametrize(
    ("name", "made_again"),
    [
        ("adapter/adapter_model.safetensors", {"train", "generate"}),
        ("adapter/selfcheck.json", {"train", "generate"}),
        ("pred.json", {"generate"}),
    ],
)
def test_a_file_of_a_finished_phase_that_is_gone_is_made_again(
    again: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, made_again: set[str]
) -> None:
    folder = RunDir.at(tmp_path / "run")
    lost, before = folder.root / name, digests(folder.root)
    phases = folder.record().phases
    lost.unlink()
    again()
    said = capsys.readouterr().err
    assert f"{name} is not there any more, and made again" in said
    after = digests(folder.root)
    assert {path: after[path] for path in (name, "pred.json")} == {path: before[path] for path in (name, "pred.json")}
    now = folder.record().phases
    assert {phase for phase in phases if now[phase] != phases[phase]} == made_again
    again()
    assert folder.record().phases == now and "made again" not in capsys.readouterr().err


def test_scores_that_are_gone_are_made_again(again: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    references = tmp_path / "references.json"
    references.write_text(answered(tmp_path / "prompts.json", "The hat."))
    judged = ("judge.kind=reference", f"judge.references={references}")
    folder = again(*judged)
    content, answered_at = folder.scores.read_bytes(), folder.done("generate")
    folder.scores.unlink()
    assert again(*judged).scores.read_bytes() == content and folder.done("generate") == answered_at
    assert "scores.json is not there any more, and made again" in capsys.readouterr().err


def test_a_preview_of_a_finished_run_needs_no_log(again: Go, tmp_path: Path) -> None:
    folder, path = RunDir.at(tmp_path / "run"), tmp_path / "small.yaml"
    steps = len(folder.log.read_text().splitlines())
    folder.log.unlink()
    content = preview(load_recipe(path), path, 2)
    assert content["steps"] == content["of"] == steps


def test_what_a_power_cut_left_after_the_last_checkpoint_is_cut_off(again: Go, tmp_path: Path) -> None:
    folder = RunDir.at(tmp_path / "run")
    folder.update(phases={})
    before = folder.log.read_bytes()
    folder.log.write_bytes(before + b"\0\0\0\n[[[\nhalf")
    folder.answers.write_text("[]")
    odd = {"id": ["t0"], "text": 7, "tokens": "1", "ended": True}
    folder.pred_partial.write_text(json.dumps(odd) + "\n" + "[" * 9999 + "\n")
    assert again().log.read_bytes() == before and len(read(folder.answers)["tuned"]) == 5


def test_a_checkpoint_of_another_version_is_a_message(again: Go, tmp_path: Path) -> None:
    checkpoint = max((tmp_path / "run" / "checkpoints").iterdir(), key=checkpoints.step)
    content = read(checkpoint / "state.json")
    content["progress"]["unheard_of"] = 1
    (checkpoint / "state.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="another version of fast_ft wrote this checkpoint"):
        state.read(checkpoint)


def test_budgets_and_saving_are_taken_as_they_are_now(again: Go) -> None:
    folder = again("budget.train_minutes=90", "train.save_steps=3")
    assert folder.manifest()["recipe"]["budget"]["train_minutes"] == 90 and "resumed" not in folder.manifest()


def test_other_package_versions_and_gpus_are_warned_and_recorded(
    again: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    again()
    assert "another environment" not in capsys.readouterr().err
    here = provenance.describe()
    other = {**here, "packages": {**here["packages"], "torch": "9.9"}, "gpu": {"name": "T4"}}
    monkeypatch.setattr(provenance, "describe", lambda: other)
    again()
    assert "another environment" not in capsys.readouterr().err, "there is nothing left to do"
    for _ in range(2):  # told once
        folder = RunDir.at(tmp_path / "run")
        folder.update(phases={"train": folder.done("train")})
        again()
    assert capsys.readouterr().err.count("packages.torch: " + here["packages"]["torch"] + " -> 9.9") == 1
    (entry,) = RunDir.at(tmp_path / "run").manifest()["resumed"]
    assert entry["changed"]["packages.torch"][1] == "9.9" and entry["environment"]["gpu"] == {"name": "T4"}


def test_the_settled_plan_is_obeyed(again: Go, tmp_path: Path) -> None:
    plan = read(again("generate.batch_size=auto").plan)
    RunDir.at(tmp_path / "run").update(phases={})
    (tmp_path / "run" / "plan.json").write_text(json.dumps(plan | {"generation_batch": 2}))
    folder = again("generate.batch_size=auto")
    assert read(folder.plan) == plan | {"generation_batch": 2}
    assert (folder.done("generate") or {})["batch_size"] == 2


def test_the_plan_is_made_again_for_another_memory_budget(
    again: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run" / "plan.json"
    plan = read(path)
    odd = json.dumps(plan | {"generation_batch": 2})
    path.write_text(odd)
    again("generate.batch_size=3", "budget.memory_gib=12")
    assert path.read_text() == odd, "nothing is left to plan for"
    RunDir.at(tmp_path / "run").update(phases={})
    folder = again("generate.batch_size=3", "budget.memory_gib=8")
    assert "budget.memory_gib: 12.0 -> 8.0" in capsys.readouterr().err
    assert read(folder.plan) == plan == folder.manifest()["plan"]
    assert folder.manifest()["recipe"]["budget"]["memory_gib"] == 8


def test_a_checkpoint_whose_digests_fail_is_refused_for_the_one_before(
    recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file({"train.save_steps": 1, "output_dir": str(tmp_path / "run")})
    whole = run(load_recipe(path, [f"output_dir={tmp_path}/whole"]), path, until="adapter")
    assert sorted(p.name for p in whole.checkpoints.iterdir()) == ["step-5", "step-6"], "the oldest are pruned"
    preview(load_recipe(path, ["data.test=null"]), path, 4)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-3", "step-4"]
    shutil.copytree(tmp_path / "run", tmp_path / "tasted")
    for name in ("adapter.safetensors", "optimizer.safetensors", "state.json"):
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "tasted", tmp_path / "run")
        damaged = tmp_path / "run" / "checkpoints" / "step-4" / name
        content = bytearray(damaged.read_bytes())
        content[-20] ^= 1
        damaged.write_bytes(content)
        capsys.readouterr()
        folder = run(load_recipe(path, ["data.test=null"]), path, until="adapter")
        said = capsys.readouterr().err
        assert f"step-4 is skipped: {name} is not as it was written" in said and "going on after step 3" in said
        assert folder.manifest()["digests"]["adapter"] == whole.manifest()["digests"]["adapter"]


def test_pruning_never_takes_the_whole_checkpoint_for_the_damaged_one(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "state.json").write_text("{}")

    for step in (9, 10, 11):
        checkpoints.save(tmp_path, step, write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-11"]
    assert checkpoints.newest(tmp_path) is None and len(list(tmp_path.iterdir())) == 2, "a question removes nothing"
    assert checkpoints.settle(tmp_path) is None and not list(tmp_path.iterdir()), "{} is no state"


def test_force_resume_is_a_flag(again: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(tmp_path / "small.yaml")
    assert main([recipe, "train.weight_decay=0.5"]) == 2
    assert "train.weight_decay: 0.01 -> 0.5" in capsys.readouterr().err
    assert main(["train", recipe, "train.weight_decay=0.5", "--force-resume"]) == 0


# The base model, the tokenizer and the chat template lie outside of the run's folder


@pytest.fixture(scope="module")
def once_stopped(
    tiny: Path, train_file: Path, test_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A folder with what `stopped` gives, made once, and a copy of it as it was."""
    folder = tmp_path_factory.mktemp("stopped") / "as-used"
    shutil.copytree(tiny, folder / "base")
    path = write_recipe(folder, folder / "base", train_file, test_file, {"output_dir": str(folder / "run")})
    preview(load_recipe(path), path, 4)
    run(load_recipe(path, [f"output_dir={folder}/trained"]), path, until="adapter")
    return folder, Path(shutil.copytree(folder, folder.with_name("as-made")))


@pytest.fixture
def stopped(once_stopped: tuple[Path, Path]) -> tuple[Path, Path]:
    """A recipe with a base of its own, stopped in `run` after 4 of 6 steps, and ended in `trained` beside it."""
    folder, made = once_stopped
    shutil.rmtree(folder)
    shutil.copytree(made, folder)
    return folder / "small.yaml", folder / "base"


def swap_weights(base: Path) -> None:
    save_random_llama(base, seed=1)


def swap_config(base: Path) -> None:
    config = read(base / "config.json")
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


def swap_tokenizer(base: Path) -> None:
    """Let two tokens that the rows hold change places."""
    tokenizer = read(base / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["."], vocabulary["?"] = vocabulary["?"], vocabulary["."]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("swap", "words"),
    [
        (swap_weights, r"the base model's model\.safetensors: samples:\w+ -> samples:"),
        (swap_config, r"the base model's config\.json: rms_norm_eps: 1e-06 -> 0\.5"),
        (swap_tokenizer, r"the rows' token ids: as trained -> another tokenizer or chat template: those of 16 rows"),
    ],
)
def test_another_base_or_tokenizer_in_the_same_place_is_refused(
    stopped: tuple[Path, Path], swap: Callable[[Path], None], words: str
) -> None:
    path, base = stopped
    trained = RunDir.at(path.parent / "trained")
    swap(base)
    for folder in (path.parent / "run", trained.root):  # one is to be trained further, the other is to answer
        before = digests(folder)
        with pytest.raises(InputError, match=words) as caught:
            run(load_recipe(path, [f"output_dir={folder}"]), path)
        assert "--force-resume" in str(caught.value)
        assert digests(folder) == before
    with pytest.raises(InputError, match=words):
        generate_again(trained.root, [])
    assert not trained.pred.exists()
    folder = run(load_recipe(path), path, force_resume=True)
    assert any("base" in key or "token" in key for entry in folder.manifest()["resumed"] for key in entry["forced"])
    assert folder.done("generate") is not None


def test_prompts_that_another_template_renders_otherwise_are_answered_again(
    again: Go, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunDir.at(tmp_path / "run")
    folder.update(tokens=folder.manifest()["tokens"] | {"prompts": "of another template"})
    finished = (folder.done("generate") or {})["finished"]
    adapter = digests(folder.adapter)
    again()
    assert "the prompts' token ids: of another template -> " in capsys.readouterr().err
    assert digests(folder.adapter) == adapter and (folder.done("generate") or {})["finished"] >= finished
    again()
    assert "answered again" not in capsys.readouterr().err
