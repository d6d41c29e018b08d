"""What is loaded from elsewhere is data: it runs nothing, reads nothing, and writes nowhere but in its folder."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fast_ft.cli.main import main
from fast_ft.common import untrusted_files
from fast_ft.common.errors import InputError
from fast_ft.data.dataset import load_pool
from fast_ft.data.encoding import Encoder
from fast_ft.hub import download
from fast_ft.models import lora_config
from fast_ft.recipe import loader
from fast_ft.recipe.schema import Data
from fast_ft.run import folder as rundir
from tests.helpers.parts import POCKET, ROOT, RecipeFactory

SOURCES = sorted(path for folder in ("fast_ft", "bench") for path in (ROOT / folder).rglob("*.py"))


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Every call with its dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


# The program itself

#: Calls that read pickles, run text as code, start a shell, or unpack an archive onto the disk.
FORBIDDEN = {
    "eval", "exec", "pickle.load", "pickle.loads", "torch.load", "joblib.load", "np.load", "numpy.load",
    "marshal.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen",
    "shutil.unpack_archive",
}  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_program_trusts_no_remote_code_and_reads_no_pickle(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name, call in calls(tree):
        assert name not in FORBIDDEN, (name, call.lineno)
        if name.endswith((".extractall", ".extract")):  # tarfile refuses members that would leave, and devices
            assert "filter='data'" in ast.unparse(call), (name, call.lineno)
        for keyword in call.keywords:
            if keyword.arg in ("trust_remote_code", "shell", "allow_pickle"):
                assert isinstance(keyword.value, ast.Constant) and keyword.value.value is False, (name, call.lineno)
        automatic = name.endswith(".from_pretrained") and name.split(".")[-2].startswith(("Auto", "FastLanguage"))
        if automatic:
            assert any(keyword.arg == "trust_remote_code" for keyword in call.keywords), (name, call.lineno)


def test_that_check_sees_what_it_is_for(tmp_path: Path) -> None:
    for text in (
        "eval(x)",
        "torch.load(p)",
        "AutoModel.from_pretrained(p)",
        "f(trust_remote_code=True)",
        "z.extractall()",
    ):
        path = tmp_path / "wrong.py"
        path.write_text(text)
        with pytest.raises(AssertionError):
            test_the_program_trusts_no_remote_code_and_reads_no_pickle(path)


# Pickles


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["rows.bin", "rows.pt", "rows.pkl", "rows.json", "rows.jsonl"])
def test_foreign_pickles_are_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    import torch

    for write in (pickle.dump, torch.save):
        with (tmp_path / name).open("wb") as file:
            write(Evil(tmp_path / "OWNED"), file)
        with pytest.raises(InputError, match=r"opening one can run code\. Give JSON"):
            load_pool(Data(train=str(tmp_path / name)))
    assert not (tmp_path / "OWNED").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_weights_that_are_pickles_are_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    shutil.copy(POCKET / "config.json", tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Evil(tmp_path / "OWNED")))
    (tmp_path / "other.safetensors").write_bytes(b"")  # of no use: libraries would take the pickle beside it
    with pytest.raises(InputError, match=r"as pickles .*save_pretrained\(folder\) writes safetensors"):
        download.model_folder(str(tmp_path))
    assert not (tmp_path / "OWNED").exists()


def test_an_adapter_that_is_a_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    from fast_ft.models import lora_files

    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "OWNED")))
    with pytest.raises(InputError, match=r"is a pickle .*save_pretrained\(folder\) writes safetensors"):
        lora_files.check(tmp_path, POCKET)
    assert not (tmp_path / "OWNED").exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the pocket base, as a run saves it."""
    from fast_ft.models import lora_files
    from fast_ft.models.loaders.peft import PeftLoader
    from fast_ft.recipe import schema

    folder = tmp_path_factory.mktemp("made")
    loaded = PeftLoader(schema.Model(name_or_path=str(POCKET)), schema.Lora(r=2), 1).for_training()
    lora_files.save(loaded.model, folder, "base", "")
    lora_files.check(folder, POCKET)
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("base_model.model.model.embed_tokens.weight", (2048, 256), "absent was expected"),
        (f"{Q}.lora_magnitude_vector", (192,), "absent was expected"),
        (f"{Q}.lora_magnitude_vector", (192, 1), "only the matrices A and B of LoRA are read"),
        (f"{Q}.base_layer.weight", (256, 256), "only the matrices A and B of LoRA are read"),
        (f"{Q}.weight", (256, 256), "only the matrices A and B of LoRA are read"),
        (f"{Q}.lora_A.weight", (512,), "only the matrices A and B of LoRA are read"),
        (f"{Q}.lora_A.weight", (3, 192), r"is \[3, 192\]; .* \[2, 192\] was expected"),
        (f"{Q}.lora_B.weight", (192, 3), r"is \[192, 3\]; .* \[192, 2\] was expected"),
        (f"{Q.replace('q_', 'o_')}.lora_A.weight", (2, 99), r"is \[2, 99\]; .* \[2, 192\] was expected"),
        (f"{Q}.lora_B.weight", None, "is absent"),
        ("base_model.model.lm_head.lora_A.weight", (2, 192), "absent was expected"),
        ("base_model.model.evil\x1b[2J.lora_A.weight", (2, 256), "only the matrices A and B of LoRA are read"),
    ],
)
def test_an_adapter_holds_its_own_matrices_and_nothing_else(
    made: Path, tmp_path: Path, name: str, shape: tuple[int, ...] | None, words: str
) -> None:
    """Base weights in an adapter's file would take the place of the base model's, without a word."""
    import torch
    from safetensors.torch import load_file, save_file

    from fast_ft.models import lora_files

    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = torch.zeros(shape)
    save_file(tensors, path)
    with pytest.raises(InputError, match=words) as caught:
        lora_files.check(tmp_path, POCKET)
    assert "\x1b" not in str(caught.value)


# JSON beside models and adapters

GOOD_ADAPTER = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none",
    "task_type": "CAUSAL_LM", "modules_to_save": None, "rank_pattern": {}, "megatron_core": "megatron.core",
    "qalora_group_size": 16, "loftq_config": {}, "lora_dropout": 0.05, "use_dora": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "only LORA is read"),
        ({"peft_type": ["LORA"]}, "only LORA is read"),
        ({"megatron_core": "antigravity"}, "leaves it empty"),
        ({"megatron_config": {"x": 1}}, "leaves it empty"),
        ({"target_modules": "(a+)+$"}, "no pattern"),
        ({"target_modules": ["q_proj", ".*(a+)+"]}, "no pattern"),
        ({"layers_pattern": "(a+)+$"}, "leaves it empty"),
        ({"rank_pattern": {"(a+)+$": 9}}, "leaves it empty"),
        ({"modules_to_save": ["q_proj"]}, "embed_tokens and lm_head are read"),
        ({"modules_to_save": "(a+)+$"}, "embed_tokens and lm_head are read"),
        ({"layer_replication": [[0, 9999]]}, "leaves it empty"),
        ({"use_dora": "yes"}, "true or false was expected"),
        ({"runtime_hook": "os.system"}, "leaves it empty"),
        ({"r": 10**9}, "a number up to 4096"),
        ({"r": True}, "a number up to 4096"),
        ({"r": 8.5}, "a number up to 4096"),
        ({"lora_alpha": float("nan")}, "a number up to"),
        ({"lora_alpha": "x" * 10_000}, "a number up to"),
        ({"bias": "all"}, "only 'none' is read"),
    ],
)
def test_adapter_config_is_plain_lora_or_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(GOOD_ADAPTER))
    lora_config.check(tmp_path)
    path.write_text(json.dumps(GOOD_ADAPTER | change))
    with pytest.raises(InputError, match=words) as caught:
        lora_config.check(tmp_path)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


DEEP = "[" * 100_000
GARBLED = {"deep": DEEP, "a list": "[]", "a number": "7", "nothing": "", "half": '{"r": 8', "latin": b"\xff\xfe{}"}


@pytest.mark.parametrize("case", GARBLED)
def test_garbled_json_beside_a_model_is_a_message(case: str, tmp_path: Path) -> None:
    content = GARBLED[case]
    data = content if isinstance(content, bytes) else content.encode()
    for name, read in (
        ("adapter_config.json", lambda: lora_config.check(tmp_path)),
        ("config.json", lambda: download.model_folder(str(tmp_path))),
        ("tokenizer_config.json", lambda: Encoder(tmp_path)),
    ):
        shutil.copy(POCKET / "tokenizer.json", tmp_path)
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError):
            read()


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(untrusted_files.MOST_JSON + 1)  # a sparse file: it takes no room
    with pytest.raises(InputError, match="at most 8,388,608 are read"):
        download.model_folder(str(tmp_path))
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputError, match="at most 134,217,728 are read"):
        Encoder(tmp_path)
    config = json.loads((POCKET / "config.json").read_text())
    for key, value in {"num_hidden_layers": 10**9, "vocab_size": 10**12, "hidden_size": -1}.items():
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(InputError, match=f"{key} is .* a model has at most"):
            download.model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match="only bitsandbytes is read"):
        download.model_folder(str(tmp_path))


@pytest.mark.parametrize("token", [["</s>"], {"content": ["</s>"]}, 7, {"x": 1}])
def test_special_tokens_of_another_type_count_as_absent(token: Any, tmp_path: Path) -> None:
    shutil.copy(POCKET / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token, "bos_token": token}))
    assert Encoder(tmp_path).eos_id == 2


# Paths


def test_an_index_names_files_of_its_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(POCKET / "config.json", folder)
    shutil.copy(POCKET / "model.safetensors", tmp_path)
    index = {"weight_map": {"w": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="which is not in its folder"):
        download.model_folder(str(folder))


def test_output_dir_and_stages_stay_in_their_folder(
    recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file({"output_dir": str(tmp_path / "runs" / ".." / ".." / "elsewhere")})
    assert main(["train", str(path)]) == 2
    assert "steps out of its folder by .." in capsys.readouterr().err
    dots = recipe_file().rename(tmp_path / "...yaml")  # {recipe} is the file's name without its ending
    with pytest.raises(InputError, match=r"steps out of its folder by \.\."):
        rundir.output_folder(loader.load_recipe(dots, ["output_dir=runs/{recipe}"]), dots)
    for name in ("../../evil", "a/b", "..", "a\\b", ""):
        stages = [{"name": name, "upto": 1.0}]
        assert main(["train", str(recipe_file({"curriculum.stages": stages}))]) == 2
        assert "curriculum.stages.0.name" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*evil*")) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["log.jsonl", "pred.partial.jsonl", "stages", "adapter", "manifest.json"])
def test_links_out_of_a_run_folder_are_refused(
    name: str, recipe_file: RecipeFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_file({"output_dir": str(tmp_path / "run")})
    recipe = loader.load_recipe(path)
    folder = rundir.RunDir.open(recipe, path)
    victim = tmp_path / "victim"
    if name in ("stages", "adapter"):
        victim.mkdir()
    else:
        victim.write_text((folder.manifest_path).read_text())
    (folder.root / name).unlink(missing_ok=True)
    (folder.root / name).symlink_to(os.path.relpath(victim, folder.root))
    before = victim.read_text() if victim.is_file() else sorted(victim.iterdir())
    for words in (["train", str(path)], ["generate", str(folder.root)], ["judge", str(folder.root)]):
        assert main(words) == 2
        assert "is a link out of its run folder" in capsys.readouterr().err
    assert before == (victim.read_text() if victim.is_file() else sorted(victim.iterdir()))


def test_a_run_folder_may_itself_be_a_link(recipe_file: RecipeFactory, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    path = recipe_file({"output_dir": str(tmp_path / "run")})
    recipe = loader.load_recipe(path)
    rundir.RunDir.open(recipe, path)
    assert rundir.RunDir.open(recipe, path).root == rundir.RunDir.at(tmp_path / "run").root == tmp_path / "run"


@pytest.mark.parametrize(
    "change",
    [{"dtype": "int8"}, {"rows": []}, {"rows": [{}]}, {"rows": [1] * 9}, {"rows": None}, {"dtype": None}]
    + [{"rows": [{"input_ids": [1, 2], "start": start, "log_probabilities": [0.0]}]} for start in (0, -1, 2, "x")],
)
def test_a_garbled_selfcheck_is_a_message(change: dict[str, Any], tmp_path: Path) -> None:
    from fast_ft.models import adapter_check

    row = {"input_ids": [1, 2], "start": 1, "log_probabilities": [0.0]}
    (tmp_path / adapter_check.FILE).write_text(json.dumps({"dtype": "float32", "rows": [row]} | change))
    loaded: Any = None  # it is read before the model is needed
    with pytest.raises(InputError, match=r"selfcheck\.json: cannot be read"):
        adapter_check.verify(tmp_path, loaded, 0)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_json_too_deep_for_its_readers_is_a_message(opening: str, closing: str, tmp_path: Path) -> None:
    """What writes or copies a value calls itself for each of its levels; json reads deeper ones than that."""
    from fast_ft.homework import archive, package

    inside = {f'{{"x": {opening * levels}1{closing * levels}}}': levels for levels in (20, 60, 330, 700, 100_000)}
    for text, levels in inside.items():
        if levels < untrusted_files.MOST_LEVELS:
            assert untrusted_files.parsed_object(text, "x")
            continue
        with pytest.raises(InputError, match=r"x: (lists and objects within one another|not valid JSON)"):
            untrusted_files.parsed_object(text, "x")
        run = rundir.RunDir(tmp_path)
        run.manifest_path.write_text(f'{{"recipe": {{"model": {text}, "lora": {{}}}}}}')
        with pytest.raises(InputError, match=r"manifest\.json: "):
            run.manifest()
        (tmp_path / "x.zip").write_bytes(package.packed({"manifest.json": text.encode()}, "top"))
        with pytest.raises(InputError, match=r"top/manifest\.json: "):
            archive.read(tmp_path / "x.zip")
