"""A merged model answers as the adapter on its base does, and a wrong merge is never kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit

from fast_ft.cli.main import main
from fast_ft.common.errors import InputError
from fast_ft.data.encoding import Encoder
from fast_ft.data.examples import Example, Message
from fast_ft.export import checks, merged
from fast_ft.export.chat_forms import JINJA
from fast_ft.export.export import Export
from fast_ft.export.merged import AdapterWeights
from tests.helpers.bases import save_in_4_bits
from tests.helpers.parts import POCKET


def log_probabilities(folder: Path) -> torch.Tensor:
    """Return a model's log-probabilities (2, 30, V) of fixed ids, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    ids_BL = torch.randint(3, 2000, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids_BL).logits.log_softmax(-1)


def test_the_merged_model_is_the_adapter_on_its_base(run: Path, tiny: Path, tmp_path: Path) -> None:
    export = Export.of(str(run), output=str(tmp_path))
    folder = export.merged_model()
    record = json.loads((folder / "fast_ft_export.json").read_text(encoding="utf-8"))
    assert record["against_adapter"]["same"] == record["against_adapter"]["count"] == 3
    assert record["against_adapter"]["nats"] < 1e-3 < record["against_run_nats"], "the run was on 4 bits"
    away = (log_probabilities(folder) - log_probabilities(tiny)).abs().mean()
    assert away > 0.05, "the adapter changes the model"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float16" and "quantization_config" not in config
    begun = (folder / "model.safetensors").stat().st_mtime_ns
    assert export.merged_model() == folder and (folder / "model.safetensors").stat().st_mtime_ns == begun


def test_a_merged_model_that_is_not_whole_is_made_again(run: Path, tmp_path: Path) -> None:
    export = Export.of(str(run), output=str(tmp_path))
    weights = export.merged_model() / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8])
    assert (export.merged_model() / "model.safetensors").read_bytes() == content
    weights.unlink()
    assert (export.merged_model() / "model.safetensors").read_bytes() == content


def test_what_no_export_wrote_is_not_replaced(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "merged" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(InputError, match="is not replaced, since no export wrote it"):
        Export.of(str(run), output=str(tmp_path))
    assert mine.read_text() == "mine"
    with pytest.raises(InputError, match=r"that is a file\. Name a folder"):
        Export.of(str(run), output=str(mine))


def test_a_base_in_four_bits_is_dequantised_tensor_by_tensor(run: Path, tiny: Path, tmp_path: Path) -> None:
    stored = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    quantised = tmp_path / "nf4"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(tiny), quantization_config=stored, dtype=torch.float32
    )
    model.save_pretrained(str(quantised))
    folder = Export.of(str(run), base=str(quantised), output=str(tmp_path / "out")).merged_model()
    record = json.loads((folder / "fast_ft_export.json").read_text(encoding="utf-8"))
    assert record["against_adapter"]["nats"] < 1e-3 and record["against_run_nats"] < 0.01, "the run's own base"
    names = merged.BaseWeights(folder).names()
    assert names == merged.BaseWeights(tiny).names() == merged.BaseWeights(quantised).names()


def test_four_bits_are_merged_as_products_round_them(tiny: Path, tmp_path: Path) -> None:
    """A base that says bfloat16 is not rounded to that on its way to a model in float16."""
    quantised = save_in_4_bits(tmp_path / "nf4", tiny, None)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(quantised), dtype=torch.float16)
    name = "model.layers.0.mlp.down_proj.weight"
    stored = model.get_parameter(name)
    coarse = dequantize_4bit(stored.data, stored.quant_state)
    assert coarse.dtype == torch.bfloat16
    made = merged.BaseWeights(quantised).get(name, "cpu")
    assert made.dtype == torch.float32 and not torch.equal(made, coarse.float())
    assert torch.equal(made.bfloat16(), coarse)


def wrong_scale(self: AdapterWeights, name: str, weight: torch.Tensor) -> torch.Tensor:
    self.scale *= self.config["r"] / (self.config["r"] + 1)
    try:
        return RIGHT(self, name, weight)
    finally:
        self.scale *= (self.config["r"] + 1) / self.config["r"]


def skipped_layer(self: AdapterWeights, name: str, weight: torch.Tensor) -> torch.Tensor:
    found = RIGHT(self, name, weight)
    return weight if ".layers.1." in name else found


def exchanged(self: AdapterWeights, name: str, weight: torch.Tensor) -> torch.Tensor:
    found = RIGHT(self, name, weight)
    return weight + (found - weight).T if weight.dim() == 2 and len(weight) == weight.shape[1] else found


RIGHT = AdapterWeights.added_to


@pytest.mark.parametrize("wrong", [wrong_scale, skipped_layer, exchanged])
def test_a_wrong_merge_is_found_and_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Any]
) -> None:
    monkeypatch.setattr(AdapterWeights, "added_to", wrong)
    with pytest.raises(InputError, match="is not the one that was trained, and was not kept"):
        Export.of(str(run), output=str(tmp_path)).merged_model()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_adapter_of_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another base model"):
        Export.of(str(run), base=str(POCKET), output=str(tmp_path)).merged_model()


def test_shards_are_listed_in_the_index(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged, "SHARD", 100_000)
    folder = Export.of(str(run), output=str(tmp_path)).merged_model()
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) > 2
    assert {path.name for path in folder.glob("*.safetensors")} == set(index["weight_map"].values())


CONVERSATIONS = [
    [("user", "Name two colours."), ("assistant", "Red and blue.")],
    [("system", "Be brief."), ("user", "Why?"), ("assistant", "Because."), ("user", "So?"), ("assistant", "So it is.")],
]


@pytest.mark.parametrize("template", JINJA)
@pytest.mark.parametrize("turns", CONVERSATIONS, ids=["one exchange", "a system turn and two exchanges"])
def test_the_chat_template_gives_the_tokens_of_training(template: Any, turns: list[tuple[str, str]]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(POCKET))
    encoder = Encoder(POCKET, template)
    messages = [{"role": role, "content": content} for role, content in turns]
    row = encoder.row(Example("a", tuple(Message(role, content) for role, content in turns), None))
    theirs = tokenizer.apply_chat_template(messages, chat_template=JINJA[template])["input_ids"]
    assert list(theirs) == row.input_ids
    prompt = messages[:-1]
    theirs = tokenizer.apply_chat_template(prompt, chat_template=JINJA[template], add_generation_prompt=True)[
        "input_ids"
    ]
    assert list(theirs) == encoder.prompt_ids(prompt)


def test_greedy_answers_that_part_at_a_tie_are_told_from_others() -> None:
    reference = checks.Answers([[-1.0]], [[5, 6, 7]], [[3.0, 0.001, 2.0]])
    tie = checks.compare("x", reference, checks.Answers([[-1.0]], [[5, 9, 7]], [[3.0, 0.1, 2.0]]))
    other = checks.compare("x", reference, checks.Answers([[-1.0]], [[4, 6, 7]], [[3.0, 0.1, 2.0]]))
    assert (tie.same, tie.ties) == (0, 1) and (other.same, other.ties) == (0, 0)
    checks.refuse_wrong(tie)
    with pytest.raises(InputError, match="0 of 1 greedy answers"):
        checks.refuse_wrong(other)
    nan = checks.compare("x", reference, checks.Answers([[float("nan")]], [[5, 6, 7]], [[1.0, 1.0, 1.0]]))
    with pytest.raises(InputError):
        checks.refuse_wrong(nan)


def test_what_cannot_be_exported_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert main(["export", *words]) == 2
        return capsys.readouterr().err

    assert "--repo OWNER/NAME" in refused(str(run), "--to", "hub")
    assert "go with --to hub" in refused(str(run), "--to", "merged", "--push")
    assert "one of float16" in refused(str(run), "--to", "merged", "--dtype", "int8")
    assert "one of f16, q8_0, q4_k_m" in refused(str(run), "--to", "gguf", "--outtype", "q3_k")
    assert "no run folder" in refused(str(tmp_path), "--to", "merged")
    assert main(["export", str(run), "--to", "hub", "--repo", "me/mine"]) == 0
    said = capsys.readouterr().err
    assert "nothing was uploaded" in said and "adapter_model.safetensors" in said and "selfcheck.json" not in said


def test_a_homeworks_run_is_not_published(run: Path) -> None:
    export = Export.of(str(run))
    ruled = Export(**{**vars(export), "recipe": export.recipe.model_copy(update={"rules": "ntu-ml-2025-hw5"})})
    with pytest.raises(InputError, match="is not published"):
        ruled.hub("me/mine", whole=False, push=True)
