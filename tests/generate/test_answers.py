"""Answers: batched as alone, resumed as in one go, and never from an adapter that is not what was trained."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fast_ft.common.errors import InputError
from fast_ft.common.minutes import AnswerPace
from fast_ft.data import dataset
from fast_ft.data.encoding import Encoder
from fast_ft.data.examples import Prompt
from fast_ft.generate import answers as generate
from fast_ft.generate.engine.fused_model import FusedModel
from fast_ft.generate.engine.kv_cache import KVCache
from fast_ft.generate.engine.llm_engine import LLMEngine
from fast_ft.models import adapter_check, lora_files
from fast_ft.models.loaders import choose
from fast_ft.models.loaders.base import LoadedModel, Loader
from fast_ft.plan import base_fits
from fast_ft.plan.decode_pool import DecodePlan
from fast_ft.recipe import schema
from tests.helpers.adapters import draw_lora_b
from tests.helpers.parts import POCKET, save_random_llama

ENCODER = Encoder(POCKET)
GREEDY = schema.Generate(do_sample=False, max_new_tokens=12)
LORA = schema.Lora(r=4, lora_alpha=8)


def maker(base: Path = POCKET, load_in_4bit: bool = False) -> Loader:
    model = schema.Model(name_or_path=str(base), max_length=256, load_in_4bit=load_in_4bit)
    return choose.make_loader(model, LORA, seed=1, name="peft")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on the trained pocket base that changes its answers, with its self-check beside it."""
    loaded = maker().for_training()
    torch.manual_seed(3)
    draw_lora_b(loaded.model, std=0.08)
    folder = tmp_path_factory.mktemp("adapter")
    lora_files.save(loaded.model, folder, "pocket", "card")
    pool = dataset.load_pool(schema.Data(train=str(POCKET.parent / "train.json")))
    adapter_check.store(folder, loaded, [ENCODER.row(e) for e in pool.examples(range(5))], ENCODER.pad_id)
    return folder


@pytest.fixture(scope="module")
def loaded(adapter: Path) -> Iterator[LoadedModel]:
    made = maker().for_generation(adapter)
    yield made
    made.free()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Nine of the pocket world's test prompts, of different lengths."""
    return dataset.load_prompts(str(POCKET.parent / "test.json"))[0][::12]


def answer(loaded: LoadedModel, prompts: list[Prompt], partial: Path, batch_size: int = 4, **values: Any) -> Any:
    section = GREEDY.model_copy(update=values)
    return generate.generate(loaded, ENCODER, prompts, section, DecodePlan(batch_size), generate.Task(1, partial))


def disturbed_in_pools_over(slots: int) -> Any:
    """Return what stands in for FusedModel.logits: in pools of more than `slots` slots they are off."""
    undisturbed = FusedModel.logits

    def disturbed(self: FusedModel, hidden_TE: torch.Tensor) -> torch.Tensor:
        logits_TV = undisturbed(self, hidden_TE)
        return logits_TV + torch.randn_like(logits_TV) if len(logits_TV) > slots else logits_TV

    return disturbed


# The same answers, however they are batched


def test_greedy_batches_equal_transformers_one_by_one(
    loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path
) -> None:
    result = answer(loaded, prompts, tmp_path / "partial")
    assert result.batch_size == 4 and result.parity is not None and result.parity < 1e-4 and result.notes == []
    for prompt in prompts:
        ids = ENCODER.prompt_ids(prompt.messages)
        single = torch.tensor([ids])
        output = loaded.model.generate(input_ids=single, do_sample=False, max_new_tokens=12, eos_token_id=2)
        alone = output[0, len(ids) :].tolist()
        (given,) = result.answers[prompt.id]
        assert given.text == ENCODER.decode(alone)
        assert given.tokens == len(alone) and given.ended == (alone[-1] == ENCODER.eos_id)
    assert len({given.text for given in result.flat}) > 2, "answers that all agree would prove little"


def test_an_adapter_changes_the_answers(loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path) -> None:
    with loaded.model.disable_adapter():
        base = answer(loaded, prompts, tmp_path / "base")
        assert base.parity is not None and base.parity < 1e-4, "the base alone is what the pool computes too"
    assert base.answers != answer(loaded, prompts, tmp_path / "tuned").answers


def test_sampling_follows_the_seed(loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path) -> None:
    hot = {"do_sample": True, "temperature": 1.5}
    first, second = (answer(loaded, prompts, tmp_path / name, **hot) for name in ("a", "b"))
    assert first.answers == second.answers
    section = GREEDY.model_copy(update=hot)
    other = generate.generate(loaded, ENCODER, prompts, section, DecodePlan(4), generate.Task(2, tmp_path / "c"))
    assert other.answers != first.answers


def test_the_models_own_generation_config_decides_nothing(
    loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path
) -> None:
    plain = answer(loaded, prompts[:3], tmp_path / "plain").answers
    config = loaded.model.generation_config
    before = config.to_dict()
    try:
        config.update(max_new_tokens=1, repetition_penalty=9.0, temperature=9.0, do_sample=True)
        assert answer(loaded, prompts[:3], tmp_path / "changed").answers == plain
    finally:
        loaded.model.generation_config = type(config).from_dict(before)


# pred.json


def test_predictions_have_the_homeworks_shape_in_the_files_order(prompts: list[Prompt]) -> None:
    mixed = [prompts[2], prompts[0], prompts[1]]
    answers = {p.id: [generate.Answer(p.id, f"answer to {p.id}", 3, True)] for p in prompts[:3]}
    made = generate.predictions(mixed, answers)
    assert list(made) == [p.id for p in mixed]
    assert json.loads(json.dumps(made))[mixed[0].id] == {
        "input": [{"role": "user", "content": mixed[0].text}],
        "output": [f"answer to {mixed[0].id}"],
    }


def test_a_stopped_run_goes_on_to_the_same_answers(loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path) -> None:
    hot = {"do_sample": True, "temperature": 1.5}  # the draw must not depend on what was there already
    whole = answer(loaded, prompts, tmp_path / "whole", **hot)
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    assert len(lines) == len(prompts)
    for kept, torn in ((0, b""), (4, b""), (5, lines[5][:20]), (3, b"{}\n"), (9, b"")):
        partial = tmp_path / f"partial-{kept}-{len(torn)}"
        partial.write_bytes(b"".join(lines[:kept]) + torn)
        again = answer(loaded, prompts, partial, **hot)
        assert again.answers == whole.answers
        assert sorted(partial.read_bytes().splitlines()) == sorted(line.rstrip() for line in lines)


def test_finished_batches_are_not_decoded_again(loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path) -> None:
    answer(loaded, prompts, tmp_path / "partial")
    text = (tmp_path / "partial").read_text("utf-8").replace('"text": "', '"text": "kept: ')
    (tmp_path / "partial").write_text(text, encoding="utf-8")
    assert all(a.text.startswith("kept: ") for a in answer(loaded, prompts, tmp_path / "partial").flat)


# Room and memory


def test_a_start_with_all_answers_there_says_nothing_of_what_it_did_not_measure(
    loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path
) -> None:
    whole = answer(loaded, prompts, tmp_path / "partial")
    again = answer(loaded, prompts, tmp_path / "partial")
    assert again.answers == whole.answers
    assert whole.parity is not None and again.parity is None
    assert (again.steps, again.cache_tokens) == (0, 0) < (whole.steps, whole.cache_tokens)


def test_a_prompt_without_room_for_its_answer_is_refused_before_decoding(
    loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path
) -> None:
    longest = max(prompts, key=lambda p: len(ENCODER.prompt_ids(p.messages)))
    room = 512 - len(ENCODER.prompt_ids(longest.messages))
    with pytest.raises(InputError, match=rf"{longest.id}.*Use at most generate.max_new_tokens={room}"):
        answer(loaded, prompts, tmp_path / "partial", max_new_tokens=room + 1)
    assert not (tmp_path / "partial").exists()
    ids = [ENCODER.prompt_ids(p.messages) for p in prompts]
    base_fits.check_room(512, prompts, ids, room)


def test_parity_that_fails_halves_the_batch_and_says_so(
    loaded: LoadedModel,
    prompts: list[Prompt],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fault is real: in pools of more than two slots the logits are off."""
    with monkeypatch.context() as patched:
        patched.setattr(FusedModel, "logits", disturbed_in_pools_over(2))
        result = answer(loaded, prompts, tmp_path / "partial", batch_size=8)
    assert result.batch_size == 2 and result.parity is not None and result.parity < 1e-4
    assert len(result.notes) == 2 and "in batches of 8: went on with 4" in result.notes[0]
    assert "batched and single decoding differ by" in capsys.readouterr().err
    assert result.answers == answer(loaded, prompts, tmp_path / "undisturbed").answers


def test_memory_that_runs_out_takes_an_eighth_of_the_batch(
    loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path
) -> None:
    wanted = answer(loaded, prompts, tmp_path / "wanted").answers

    def full(module: Any, given: Any) -> None:
        if 2 < len(given[0]) < 10:  # a step of more than two slots; prompts are longer
            raise torch.OutOfMemoryError("as a small card would")

    hook = loaded.model.get_input_embeddings().register_forward_pre_hook(full)
    try:
        result = answer(loaded, prompts, tmp_path / "partial", batch_size=9)
    finally:
        hook.remove()
    assert result.batch_size == 2 and result.answers == wanted
    assert result.notes[0] == "out of memory in batches of 9: went on with 7"


def test_memory_that_runs_out_gives_up_weights_in_16_bits_before_slots(
    loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan is one for a larger card. A run that is resumed begins with what memory left of it."""
    initialised, asked = FusedModel.__init__, []

    def small(self: FusedModel, model: Any, *, dequantise: bool = False, **options: Any) -> None:
        asked.append((dequantise, options["step_rows"][0]))
        if dequantise:
            raise torch.OutOfMemoryError("as a small card would")
        initialised(self, model, **options)

    monkeypatch.setattr(FusedModel, "__init__", small)
    kept: list[DecodePlan] = []
    plan, task = DecodePlan(64, 64 * 200, dequantise=True), generate.Task(1, tmp_path / "partial", on_plan=kept.append)
    result = generate.generate(loaded, ENCODER, prompts, GREEDY, plan, task)
    assert asked == [(True, 9), (False, 9)] and result.batch_size == 9
    assert kept == [replace(plan, dequantise=False)] == [result.plan]
    assert result.notes == ["out of memory with weights dequantised to 16 bits: went on with weights in 4 bits"]


@pytest.mark.parametrize(
    "said",
    [
        "CUDA: out of memory", "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
    ],
)  # fmt: skip
def test_memory_that_runs_out_is_known_by_whatever_says_so(
    loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    made = KVCache.__init__

    def small(self: KVCache, model: Any, pages: int, **options: Any) -> None:
        if pages > 40:
            raise RuntimeError(said)
        made(self, model, pages, **options)

    monkeypatch.setattr(KVCache, "__init__", small)
    result = answer(loaded, prompts[:4], tmp_path / "partial", batch_size=2, max_new_tokens=400)
    assert result.batch_size == 1 and result.notes == ["out of memory in batches of 2: went on with 1"]


def test_a_cache_that_is_never_filled_is_given_up_before_slots(
    loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = KVCache.__init__

    def small(self: KVCache, model: Any, pages: int, **options: Any) -> None:
        if pages > 100:
            raise torch.OutOfMemoryError("as a small card would")
        made(self, model, pages, **options)

    monkeypatch.setattr(KVCache, "__init__", small)
    for slots in (1, 3):
        partial = tmp_path / str(slots)
        task = generate.Task(1, partial)
        result = generate.generate(loaded, ENCODER, prompts, GREEDY, DecodePlan(slots, 100_000), task)
        assert result.batch_size == slots and "with a cache of 100000 tokens: went on with" in result.notes[0]


def test_other_errors_than_out_of_memory_are_no_reason_to_try_again(
    loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path
) -> None:
    def broken(module: Any, given: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    hook = loaded.model.get_input_embeddings().register_forward_pre_hook(broken)
    try:
        with pytest.raises(RuntimeError, match="device-side assert"):
            answer(loaded, prompts, tmp_path / "partial")
    finally:
        hook.remove()


def test_no_two_engines_are_there_at_once(
    loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card holds one cache of 48 pages, and every pool of more than two slots answers otherwise than alone."""
    made, there = KVCache.__init__, weakref.WeakSet[KVCache]()

    def small(self: KVCache, model: Any, pages: int, **options: Any) -> None:
        if pages + sum(each.pages for each in there) > 48:
            raise torch.OutOfMemoryError("as a full card would")
        made(self, model, pages, **options)
        there.add(self)

    monkeypatch.setattr(KVCache, "__init__", small)
    monkeypatch.setattr(FusedModel, "logits", disturbed_in_pools_over(2))
    task = generate.Task(1, tmp_path / "partial")
    result = generate.generate(loaded, ENCODER, prompts, GREEDY, DecodePlan(8, 48 * 16), task)
    assert result.batch_size == 2 and len(result.notes) == 2 and "out of memory" not in " ".join(result.notes)


def test_transformers_generate_gets_all_slots_where_our_decoding_is_off_in_any_pool(
    loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = answer(loaded, prompts, tmp_path / "wanted").answers
    monkeypatch.setattr(FusedModel, "logits", disturbed_in_pools_over(0))
    result = answer(replace(loaded), prompts, tmp_path / "partial", batch_size=4)
    assert result.batch_size == 4 and "transformers' generate answers" in result.notes[-1]
    assert result.answers == wanted


def test_no_memory_for_one_prompt_is_a_clear_error(loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path) -> None:
    def full(module: Any, given: Any) -> None:
        raise torch.OutOfMemoryError("always")

    hook = loaded.model.get_input_embeddings().register_forward_pre_hook(full)
    try:
        with pytest.raises(InputError, match=r"one prompt at a time\. Lower generate\.max_new_tokens"):
            answer(loaded, prompts, tmp_path / "partial", batch_size=2)
    finally:
        hook.remove()


# Minutes


def test_answers_that_end_early_are_whole_though_all_at_their_limit_would_not_fit(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 16 answers and two steps a second. By the second look no answer has ended, and all might reach the limit."""
    hot = {"do_sample": True, "temperature": 1.0, "max_new_tokens": 200, "num_return_sequences": 2}
    asked = dataset.load_prompts(str(POCKET.parent / "test.json"))[0][::6]
    alone = answer(loaded, asked, tmp_path / "alone", 16, **hot).answers
    long = [prompt for prompt in asked if all(each.tokens > 10 for each in alone[prompt.id])]
    decode, now = LLMEngine.decode, 0.0

    def slow(self: Any, burst: Any) -> None:
        nonlocal now
        now += burst.steps * 0.5
        decode(self, burst)

    monkeypatch.setattr(LLMEngine, "decode", slow)
    minutes = 0.6 * 200 * len(long) * 2 / 16 / 2 / 60
    pace = AnswerPace(minutes, lambda: now)
    result = generate.generate(
        loaded, ENCODER, long, GREEDY.model_copy(update=hot), DecodePlan(16),
        generate.Task(1, tmp_path / "partial", pace=pace),
    )  # fmt: skip
    assert len(long) > 5 and now < minutes * 60
    lengths = [[each.tokens for each in result.answers[prompt.id]] for prompt in long]
    assert lengths == [[each.tokens for each in alone[prompt.id]] for prompt in long]
    assert result.notes == [] and not any(each.within for each in result.flat)


# Is it the adapter that was trained?


def test_the_stored_log_probabilities_are_the_answers_own(adapter: Path, loaded: LoadedModel) -> None:
    stored = json.loads((adapter / adapter_check.FILE).read_text())
    assert len(stored["rows"]) == 3 and stored["dtype"] == "float32"
    row = stored["rows"][0]
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(dim=-1)
    positions = range(row["start"], len(row["input_ids"]))
    assert row["log_probabilities"] == pytest.approx(
        [float(logits[t - 1, row["input_ids"][t]]) for t in positions], abs=1e-4
    )
    assert row["input_ids"][-1] == ENCODER.eos_id


def test_rows_padded_to_one_width_have_the_log_probabilities_of_rows_alone(loaded: LoadedModel) -> None:
    rows = [[1, 400, 500, 600, 2], [1, 700, 2], [1, 800, 900, 1000, 1100, 1200, 1300, 2]]
    together = adapter_check.log_probabilities(loaded.model, rows, [2, 1, 5], 0)
    for row, start, values in zip(rows, [2, 1, 5], together, strict=True):
        assert len(values) == len(row) - start
        assert values == pytest.approx(adapter_check.log_probabilities(loaded.model, [row], [start], 0)[0], abs=1e-4)


def test_a_card_takes_several_rows_in_one_pass_with_the_same_numbers(
    adapter: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the rows' lengths; only the logits that are asked for are computed. A wrong adapter still shows."""
    rows = [[1, *range(300, 300 + n), 2] for n in (5, 90, 17, 3, 60, 200)]
    starts = [3, 40, 17, 1, 2, 150]
    alone = [adapter_check.log_probabilities(loaded.model, [r], [s], 0)[0] for r, s in zip(rows, starts, strict=True)]
    assert adapter_check.log_probabilities_of(loaded, rows, starts, 0) == alone, "on a CPU each has its own pass"
    passes: list[int] = []
    one_pass = adapter_check.log_probabilities

    def counted(model: Any, ids: list[list[int]], *given: Any) -> list[list[float]]:
        passes.append(len(ids))
        return one_pass(model, ids, *given)

    monkeypatch.setattr(adapter_check, "log_probabilities", counted)
    monkeypatch.setattr(adapter_check, "_PASS_TOKENS", 400)
    for values, expected in zip(
        adapter_check.log_probabilities_that_fit(loaded, rows, starts, 0, exactly=False), alone, strict=True
    ):
        assert values == pytest.approx(expected, abs=1e-3)
    assert sum(passes) == 6 and max(passes) > 2, "on a CPU, where 4-bit products may differ a little"
    passes.clear()
    on_card = replace(loaded, device="cuda")
    for values, expected in zip(adapter_check.log_probabilities_of(on_card, rows, starts, 0), alone, strict=True):
        assert values == pytest.approx(expected, abs=1e-4)
    assert sum(passes) == 6 and max(passes) > 2 and len(passes) > 1, "as many as have room, and no more"
    passes.clear()
    adapter_check.log_probabilities_of(replace(on_card, backend="unsloth"), rows, starts, 0)
    assert passes == [1] * 6, "whose forward takes no list of logits to keep"
    assert adapter_check.verify(adapter, on_card, ENCODER.pad_id) < 1e-5
    with loaded.model.disable_adapter(), pytest.raises(InputError, match="this adapter is not what was trained"):
        adapter_check.verify(adapter, on_card, ENCODER.pad_id)


def changed(adapter: Path, folder: Path, scale: float = 1.0, **config: Any) -> Path:
    """A copy of the adapter with its B matrices scaled or its config changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, folder)
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    scaled = {name: t * scale if "lora_B" in name else t for name, t in tensors.items()}
    save_file(scaled, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_verify_passes_on_the_right_adapter(adapter: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    assert adapter_check.verify(adapter, loaded, ENCODER.pad_id) < 1e-5
    copy = changed(adapter, tmp_path / "copy")
    assert adapter_check.verify(copy, maker().for_generation(copy), ENCODER.pad_id) < 1e-5


@pytest.mark.parametrize("change", [{"scale": 1.02}, {"scale": 0.0}, {"lora_alpha": 8.5}, {"scale": float("nan")}])
def test_verify_stops_at_an_adapter_that_is_another(adapter: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    other = changed(adapter, tmp_path / "other", **change)
    with pytest.raises(InputError, match="this adapter is not what was trained"):
        adapter_check.verify(other, maker().for_generation(other), ENCODER.pad_id)


def test_verify_stops_at_another_base_and_at_other_quantisation(adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    near = tmp_path / "base"
    shutil.copytree(POCKET, near)
    tensors = load_file(str(near / "model.safetensors"))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name] * 1.05
    save_file(tensors, str(near / "model.safetensors"), metadata={"format": "pt"})
    for other in (maker(near), maker(load_in_4bit=True)):
        with pytest.raises(InputError, match="Is it the same base model, quantisation and tokenizer"):
            adapter_check.verify(adapter, other.for_generation(adapter), ENCODER.pad_id)


def test_a_lost_self_check_is_a_clear_error(adapter: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    copy = changed(adapter, tmp_path / "copy")
    (copy / adapter_check.FILE).write_text('{"rows": [')
    with pytest.raises(InputError, match=r"selfcheck\.json: cannot be read"):
        adapter_check.verify(copy, loaded, ENCODER.pad_id)
    (copy / adapter_check.FILE).write_text('{"rows": []}')
    with pytest.raises(InputError, match=r"selfcheck\.json: cannot be read"):
        adapter_check.verify(copy, loaded, ENCODER.pad_id)


def test_an_adapter_that_does_not_fit_the_base_is_refused(adapter: Path, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is \[4, 512\]; .* \[4, 128\] was expected.* made for another base model"):
        maker(tiny).for_generation(adapter)
    shallow = save_random_llama(tmp_path / "shallow", hidden=192)
    with pytest.raises(InputError, match="made for another base model"):
        maker(shallow).for_generation(adapter)
    with pytest.raises(InputError, match="no adapter here"):
        maker().for_generation(tmp_path)
    cut = changed(adapter, tmp_path / "cut")
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        maker().for_generation(cut)
    garbled = changed(adapter, tmp_path / "garbled")
    (garbled / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        maker().for_generation(garbled)


def test_unsloth_without_a_gpu_is_a_clear_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    model = schema.Model(name_or_path=str(POCKET))
    with pytest.raises(InputError, match=r"needs an NVIDIA GPU.*model\.backend=auto"):
        choose.make_loader(model, LORA, seed=1, name="unsloth")
    assert choose.make_loader(model, LORA, seed=1).name == "peft"


def test_the_saved_adapter_names_the_recipes_base_and_holds_no_pickle(adapter: Path) -> None:
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "pocket"
    assert {path.name for path in adapter.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "README.md", adapter_check.FILE,
    }  # fmt: skip
