"""Every family's passes, by its way: transformers' own loss and gradients on the same rows, longer than any window."""

from __future__ import annotations

import itertools
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from fast_ft.common.errors import InputError
from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow
from fast_ft.hub.families import FamilySpec
from fast_ft.models import packed_attention
from fast_ft.models.fused_block import block
from fast_ft.models.loaders import choose
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.recipe import schema
from fast_ft.train.forward_backward import Passes
from fast_ft.train.micro_batch import MicroBatchShape
from fast_ft.train.optimizer import FlatWeights
from fast_ft.train.row_passes import RowPasses
from fast_ft.train.validation_loss import ValidationLoss
from tests.helpers import bases
from tests.helpers.adapters import draw_lora_b

LENGTHS = (5, 40, 29)
PACKAGES = metadata.packages_distributions


def rows() -> list[EncodedRow]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(300, 2000, (length,), generator=draw).tolist()
        made.append(EncodedRow(f"r{index}", ids, [IGNORE_INDEX] * 2 + ids[2:]))
    return made


def loaded_base(folder: Path, name: str, backend: str = "auto", **changes: Any) -> LoadedModel:
    """A base of a family with an adapter whose B is not zero."""
    base = bases.save_base(folder, name, **changes)
    section = schema.Model(name_or_path=str(base), load_in_4bit=False, max_length=64, backend=backend)
    made = choose.make_loader(section, schema.Lora(r=4, lora_alpha=12), seed=1).for_training()
    torch.manual_seed(5)
    draw_lora_b(made.model, std=0.1)
    return made


def passes_over(loaded: LoadedModel, recompute_layers: int = 0, longest: int = max(LENGTHS)) -> Passes:
    """The passes that training takes over this base."""
    kind = Passes if loaded.general is None else RowPasses
    loaded.model.train()
    shape, plan = MicroBatchShape(places=2, longest=longest, pad_id=0), TrainPlan(2, recompute_layers=recompute_layers)
    return kind(loaded, FlatWeights(loaded.model), plan, shape)


def ours(loaded: LoadedModel, recompute_layers: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients by the passes that training takes: two rows in the first, one in the second."""
    passes = passes_over(loaded, recompute_layers)
    passes.begin(sum(row.supervised for row in rows()), None)
    loss = sum(passes(passes.lay_out(part), seed=1).item() for part in (rows()[:2], rows()[2:]))
    passes.close()
    return loss, gradients(loaded)


def theirs(loaded: LoadedModel) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients by the model's own forward pass over one row at a time, whole logits, autograd."""
    loaded.model.zero_grad()
    total = torch.zeros(())
    for row in rows():
        logits_TV = loaded.model(input_ids=torch.tensor([row.input_ids])).logits[0]
        total = total + cross_entropy(logits_TV[:-1].float(), torch.tensor(row.labels[1:]), reduction="sum")
    loss = total / sum(row.supervised for row in rows())
    loss.backward()
    return loss.item(), gradients(loaded)


def gradients(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {key: p.grad.clone() for key, p in loaded.model.named_parameters() if p.grad is not None}


def assert_equal(found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    for key, gradient in expected[1].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-3, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", bases.ALL)
def test_loss_and_gradients_are_transformers_own(tmp_path: Path, name: str) -> None:
    loaded = loaded_base(tmp_path, name)
    assert (loaded.general is None) == (name in bases.OWN)
    assert bool([note for note in loaded.notes if note.startswith("general way")]) == (name in bases.GENERAL)
    expected = theirs(loaded)
    for recomputed in (0, 1):
        assert_equal(ours(loaded, recomputed), expected)


@pytest.mark.parametrize("name", bases.ALL)
def test_the_validation_loss_is_transformers_own(tmp_path: Path, name: str) -> None:
    loaded = loaded_base(tmp_path, name)
    expected = theirs(loaded)[0]
    passes = passes_over(loaded)
    supervised = sum(row.supervised for row in rows())
    assert sum(map(passes.measure, (rows()[:2], rows()[2:]))) / supervised == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", next(iter(bases.GENERAL))])
def test_a_measurement_that_had_no_memory_says_the_same_in_smaller_passes(tmp_path: Path, name: str) -> None:
    """Memory is short at the first pass of the model; on the general way a pass takes one row whatever it is given."""
    loaded = loaded_base(tmp_path, name)
    loss = ValidationLoss(passes_over(loaded), rows())
    expected, count = loss.measure(), itertools.count()

    def full(module: Any, given: Any, named: Any) -> None:
        if next(count) == 0:
            raise MemoryError

    hook = loaded.model.get_base_model().get_input_embeddings().register_forward_pre_hook(full, with_kwargs=True)
    assert loss.measure() == pytest.approx(expected, rel=1e-6) and loss.most_rows == 1
    hook.remove()
    modes = {each.training for each in loaded.model.modules()}
    assert modes == {True}, "as it was before the pass that failed"


def test_on_the_general_way_a_rehearsal_holds_rows_as_long_as_the_longest(tmp_path: Path) -> None:
    """Rows go one by one there, so the longest of them takes the most memory."""
    loaded = loaded_base(tmp_path, next(name for name in bases.GENERAL))
    seen: list[int] = []
    hook = loaded.model.get_base_model().register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    assert passes_over(loaded, longest=130).rehearse({144}).keys() == {144}
    hook.remove()
    assert seen == [130, 14] * 2


@pytest.mark.parametrize("name", [name for name in bases.OWN if name != "llama"])
def test_our_blocks_give_the_same_gradients(tmp_path: Path, name: str) -> None:
    loaded = loaded_base(tmp_path, name)
    expected = theirs(loaded)
    assert block.install(loaded.model, loaded.patches) is None
    for recomputed in (0, 1):
        assert_equal(ours(loaded, recomputed), expected)


def test_a_window_makes_a_difference_to_these_rows(tmp_path: Path) -> None:
    """Else the tests above would pass without any."""
    with_window = ours(loaded_base(tmp_path / "a", "mistral"))[0]
    without = ours(loaded_base(tmp_path / "b", "mistral", sliding_window=None))[0]
    assert abs(with_window - without) > 0.01


def test_a_base_whose_numbers_differ_in_our_pass_goes_the_general_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever config.json says: 16 tokens through both passes show it before the first step."""
    without_window = packed_attention.attend
    monkeypatch.setattr(packed_attention, "attend", lambda q, k, v, rows, scale=None, window=None: without_window(
        q, k, v, rows, scale))  # fmt: skip
    loaded = loaded_base(tmp_path, "mistral", sliding_window=4)
    assert "differs from the model's own" in (loaded.general or "")
    assert [note for note in loaded.notes if note.startswith("general way: our pass differs")]
    assert_equal(ours(loaded), theirs(loaded))


def test_unsloths_passes_take_a_window_that_no_row_is_longer_than(tmp_path: Path) -> None:
    family = FamilySpec.of(bases.save_base(tmp_path, "qwen2 window"))
    assert choose.unfit("unsloth", family, bases.WINDOW) is None
    assert "longer than the window of 12" in (choose.unfit("unsloth", family, bases.WINDOW + 1) or "")
    assert choose.unfit("fused", family, 64) is None and choose.unfit("peft", family, 64) is None


@pytest.mark.parametrize("backend", ["fused", "unsloth"])
def test_a_backend_that_cannot_train_a_family_says_so_before_anything_is_loaded(tmp_path: Path, backend: str) -> None:
    base = bases.save_base(tmp_path, "gemma3")
    section = schema.Model(name_or_path=str(base), load_in_4bit=False, max_length=64, backend=backend)
    with pytest.raises(InputError, match=f"'{backend}' .*gemma3_text.*model.backend=auto"):
        choose.make_loader(section, schema.Lora(), seed=1)


def test_installed_packages_are_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers and TRL each ask for them as they are imported; a hundred thousand files may be looked for then."""
    monkeypatch.setattr(metadata, "packages_distributions", getattr(PACKAGES, "__wrapped__", PACKAGES))
    choose.prepare_libraries()
    found = metadata.packages_distributions()
    choose.prepare_libraries()
    assert metadata.packages_distributions() is found and "torch" in found
