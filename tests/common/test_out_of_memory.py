"""Out of memory outside training (test_train.py has that): smaller pieces, or what to change; nothing is lost."""

from __future__ import annotations

import errno
import gc
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from trl import SFTTrainer

from fast_ft.common import gpu, host_memory
from fast_ft.common.errors import InputError
from fast_ft.common.out_of_memory import explained, is_short
from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow
from fast_ft.data.prepare import prepare
from fast_ft.generate import answers
from fast_ft.generate.engine.llm_engine import LLMEngine
from fast_ft.generate.engine.model_runner import ModelRunner
from fast_ft.models import adapter_check, lora_files, tensor_file
from fast_ft.models.loaders.peft import FusedLoader, PeftLoader
from fast_ft.pipeline.answer_apart import answer_apart
from fast_ft.pipeline.opening import opened
from fast_ft.pipeline.run import run
from fast_ft.pipeline.train_phase import train_phase
from fast_ft.plan.decode_pool import DecodePlan
from fast_ft.recipe import schema
from fast_ft.recipe.loader import load_recipe
from fast_ft.run.folder import RunDir
from fast_ft.sweep.resident_model import ResidentLoader
from fast_ft.train import forward_backward, optimizer, session, state
from tests.helpers.parts import POCKET, RecipeFactory


class Full:
    """Raise an out-of-memory error at the chosen calls of a function, counted from 1; else call it."""

    def __init__(self, function: Any, calls: set[int], error: type[BaseException] = torch.OutOfMemoryError) -> None:
        self.function, self.calls, self.error, self.count = function, calls, error, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.count += 1
        if self.count in self.calls:
            raise self.error("of a test")
        return self.function(*arguments, **options)

    def __get__(self, instance: Any, owner: Any) -> Any:
        return lambda *arguments, **options: self(instance, *arguments, **options)


@pytest.mark.parametrize("call", ["for_training", "for_generation"])
def test_out_of_memory_while_loading_says_what_to_change(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = recipe_file()
    with monkeypatch.context() as patch:
        patch.setattr(PeftLoader, call, Full(getattr(PeftLoader, call), {1}))
        with pytest.raises(InputError, match=r"out of the card's memory while loading .*load_in_4bit.*nvidia-smi"):
            run(load_recipe(path), path)
    assert run(load_recipe(path), path).pred.is_file(), "the same command again"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_while_saving_goes_on_in_smaller_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    tensors = {
        "a": torch.randn(5, 3001), "b": torch.arange(70_001, dtype=torch.uint8), "c": torch.randn(7, 9).bfloat16(),
        "d": torch.tensor(2.0), "e": torch.empty(0, 4), "f": torch.randn(31, 40).T,
    }  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    asked = []

    def fetch(piece: Any) -> Any:
        asked.append(len(piece))
        if len(piece) > 5000:
            raise error("of a test")
        return piece.cpu()

    monkeypatch.setattr(tensor_file, "fetch", fetch)
    tensor_file.save(tmp_path / "ours", tensors, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert max(asked) > 5000 and len(asked) > 20
    monkeypatch.setattr(tensor_file, "fetch", Full(tensor_file.fetch, set(range(99)), error))
    with pytest.raises(error):
        tensor_file.save(tmp_path / "none", tensors)


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_an_adapter_is_saved_as_peft_saves_it(tiny: Path, tmp_path: Path, kind: dict[str, Any]) -> None:
    model = schema.Model(name_or_path=str(tiny), load_in_4bit=True)
    loaded = PeftLoader(model, schema.Lora(**kind), 1).for_training()
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir()
    lora_files.save(loaded.model, tmp_path / "ours", "base", "")
    loaded.model.save_pretrained(str(tmp_path / "theirs"))
    name = "adapter_model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    ours, theirs = (json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("ours", "theirs"))
    assert ours == theirs | {"base_model_name_or_path": "base"}


def test_out_of_memory_while_saving_loses_no_step(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of three checkpoints never fits, then neither does the adapter; the same command goes on."""
    path = recipe_file({"output_dir": str(tmp_path / "run"), "train.save_steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr(state, "save", Full(state.save, {2}))
        patch.setattr(lora_files, "save", Full(lora_files.save, {1}, MemoryError))
        with pytest.raises(
            InputError, match=r"out of the machine's memory while saving .* checkpoint after step 6 of 6"
        ):
            run(load_recipe(path), path)
    assert "no checkpoint after step 4: out of memory" in capsys.readouterr().err
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    assert len(before.splitlines()) == 6 and not (tmp_path / "run" / "adapter").exists()
    folder = run(load_recipe(path), path)
    assert (folder.root / "log.jsonl").read_bytes() == before, "no step was taken again"


def test_out_of_memory_in_the_optimizer_says_what_to_change_and_from_where_the_run_goes_on(
    recipe_file: RecipeFactory, tmp_path: Path
) -> None:
    path = recipe_file({"output_dir": str(tmp_path / "run"), "train.save_steps": 2})
    hook = register_optimizer_step_pre_hook(Full(lambda *_: None, {4}))
    try:
        with pytest.raises(
            InputError, match=r"while training\. .*lora\.r.* after step 2 of 6: the same command goes on"
        ):
            run(load_recipe(path), path)
    finally:
        hook.remove()
    assert run(load_recipe(path), path).pred.is_file()


def test_out_of_memory_while_measuring_an_adapter_measures_less_of_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = PeftLoader(schema.Model(name_or_path=str(tiny)), schema.Lora(), 1).for_training()
    row = EncodedRow("r", [1, *range(5, 25)], [IGNORE_INDEX] * 5 + list(range(9, 25)))
    measured = adapter_check.log_probabilities

    def small(model: Any, ids: Any, starts: Any, pad_id: int) -> Any:
        if len(ids[0]) > 10:
            raise torch.OutOfMemoryError("of a test")
        return measured(model, ids, starts, pad_id)

    with monkeypatch.context() as patch:
        patch.setattr(adapter_check, "log_probabilities", small)
        adapter_check.store(tmp_path, loaded, [row], 0)
    (stored,) = json.loads((tmp_path / adapter_check.FILE).read_text())["rows"]
    assert stored["input_ids"] == row.input_ids[:9] and len(stored["log_probabilities"]) == 4
    assert adapter_check.verify(tmp_path, loaded, 0) == 0
    adapter_check.store(tmp_path, loaded, [row], 0)
    monkeypatch.setattr(adapter_check, "log_probabilities", small)
    assert adapter_check.verify(tmp_path, loaded, 0) < 1e-6


def test_out_of_memory_while_answering_goes_on_with_a_smaller_pool(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file({"generate.batch_size": 4})
    monkeypatch.setattr(answers, "make_engine", Full(answers.make_engine, {1}))
    folder = run(load_recipe(path), path)
    assert len(json.loads(folder.pred.read_text())) == 5 and (folder.done("generate") or {})["batch_size"] == 3
    assert any("out of memory in batches of 4: went on with 3" in text for text in folder.manifest()["notes"])
    assert folder.manifest()["plan"] == json.loads(folder.plan.read_text())


def test_a_resumed_run_begins_with_the_pool_that_memory_has_left(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five prompts, and room for two. A stop comes before the first answer; other prompts leave the plan as it is."""
    path = recipe_file({"generate.batch_size": "auto"})
    made, asked = answers.make_engine, list[int]()

    def small(loaded: Any, encoder: Any, section: Any, plan: Any, longest: int) -> Any:
        asked.append(plan.slots)
        if plan.slots > 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return made(loaded, encoder, section, plan, longest)

    monkeypatch.setattr(answers, "make_engine", small)
    with monkeypatch.context() as patch:
        patch.setattr(answers._Work, "_made", Full(answers._Work._made, {1}, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(load_recipe(path), path)
    assert asked == [5, 4, 3, 2]
    asked.clear()
    folder = run(load_recipe(path), path)
    assert asked == [2], "nothing is tried that did not fit"
    content = folder.plan.read_bytes()
    assert json.loads(content)["generation_batch"] == 2
    monkeypatch.setattr(answers, "make_engine", Full(made, {1}))
    answer_apart(folder.root, ["generate.batch_size=2"], str(load_recipe(path).data.test), None, None)
    assert folder.plan.read_bytes() == content


def test_a_cpus_pool_is_settled_by_the_machines_memory(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file({"generate.batch_size": "auto"})
    monkeypatch.setattr(host_memory, "own_bytes", lambda: 2**28)
    folder = run(load_recipe(path), path)
    assert json.loads(folder.plan.read_text())["generation_batch"] == 1
    assert (folder.done("generate") or {})["batch_size"] == 1


def test_a_plan_for_more_memory_than_the_machine_has_is_settled_again_and_another_is_obeyed(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run stops before its first answer, and goes on with a plan that some other machine has settled."""
    path = recipe_file({"generate.batch_size": "auto"})
    with monkeypatch.context() as patch:
        patch.setattr(answers._Work, "_made", Full(answers._Work._made, {1}, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(load_recipe(path), path)
    (root,) = (path.parent / "runs").iterdir()
    folder = RunDir.at(root)
    settled = json.loads(folder.plan.read_text())
    used: list[DecodePlan] = []
    made = answers.make_engine
    monkeypatch.setattr(answers, "make_engine", lambda *given: used.append(given[3]) or made(*given))
    theirs = settled | {"generation_batch": 3, "cache_tokens": 4096}
    for gib in (0.1, 100_000.0):
        folder.plan.write_text(json.dumps(theirs | {"generate_gib": gib}))
        with monkeypatch.context() as patch:
            patch.setattr(answers._Work, "_made", Full(answers._Work._made, {1}, KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run(load_recipe(path), path)
    assert [(plan.slots, plan.cache_tokens) for plan in used] == [(3, 4096), (5, None)]
    assert json.loads(folder.plan.read_text()) == folder.manifest()["plan"] == settled


def test_out_of_memory_with_one_answer_says_what_to_change_and_keeps_the_adapter(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file({"generate.batch_size": 1})
    monkeypatch.setattr(answers, "make_engine", Full(answers.make_engine, {1}))
    with pytest.raises(InputError, match=r"one prompt at a time. Lower generate.max_new_tokens"):
        run(load_recipe(path), path)
    (root,) = (path.parent / "runs").iterdir()
    assert RunDir.at(root).done("train") is not None


def test_out_of_memory_while_checking_the_adapter_says_what_to_change(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file()
    monkeypatch.setattr(adapter_check, "verify", Full(adapter_check.verify, {1}))
    with pytest.raises(InputError, match=r"while checking the adapter. Lower generate"):
        run(load_recipe(path), path)


def peak(work: Callable[[], object]) -> int:
    """Return by how many bytes this process grew at most, mapped files' pages included, while `work` ran."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    except OSError:
        pytest.skip("no /proc/self/clear_refs here")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def test_no_phase_holds_the_model_twice(tmp_path: Path) -> None:
    """Training, then generation, in the room of one.

    Not in 4 bits: what this measures there is the mapped file, and how much malloc kept of what was freed before.
    """
    size = save_wide_llama(tmp_path / "base")
    maker = PeftLoader(schema.Model(name_or_path=str(tmp_path / "base"), load_in_4bit=False), schema.Lora(), 1)
    maker.for_training().free()  # libraries have their room by now
    adapter = tmp_path / "adapter"
    adapter.mkdir()

    def both_phases() -> None:
        loaded = maker.for_training()
        lora_files.save(loaded.model, adapter, "base", "")
        loaded.free()
        maker.for_generation(adapter).free()

    def at_once() -> None:
        plain = PeftLoader(schema.Model(name_or_path=str(tmp_path / "base"), load_in_4bit=False), schema.Lora(), 1)
        two = [plain.for_training().model for _ in range(2)]
        assert all(bool(weight.isfinite().all()) for model in two for weight in model.parameters()), "all of it is read"

    assert peak(both_phases) < 1.8 * size
    assert peak(at_once) > 1.9 * size, "what the measure shows where there are two"


class Traces:
    """Weak references to what was made over a model, by the phase that made it. No automatic collection runs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.phase = "train"
        self._found: list[tuple[str, str, weakref.ref[Any]]] = []
        patch.setattr(gc, "freeze", lambda: None)  # conftest would put a live model out of collections' reach
        self._patch = patch
        owners = (
            session.TrainSession,
            LLMEngine,
            ModelRunner,
            optimizer.FlatWeights,
            forward_backward.Passes,
            SFTTrainer,
        )
        for owner in owners:
            self.follow(owner, "__init__", lambda self, *_, **__: [self])

    def follow(self, owner: Any, name: str, made: Callable[..., list[Any]]) -> None:
        """Note what a call made or returned, as `made` says from its arguments; tensors within it too."""
        original = getattr(owner, name)

        def call(*given: Any, **named: Any) -> Any:
            result = original(*given, **named)
            for each in made(*(given or (result,)), result=result):
                tensors = [*each.parameters(), *each.buffers()] if isinstance(each, torch.nn.Module) else []
                tensors += [value for value in vars(each).values() if isinstance(value, torch.Tensor)]
                self._found += [(self.phase, type(one).__name__, weakref.ref(one)) for one in (each, *tensors)]
            return result

        self._patch.setattr(owner, name, call)

    def alive(self, phase: str) -> list[str]:
        """What of a phase is alive, by its type; it must have made something."""
        assert any(made == phase for made, _, _ in self._found), f"{phase} made nothing"
        return sorted({kind for made, kind, reference in self._found if made == phase and reference() is not None})


@pytest.fixture
def no_collections() -> Iterator[None]:
    """Leave collections to the program, so that none comes by chance."""
    gc.unfreeze()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collections")
@pytest.mark.parametrize(("kind", "dtype"), [("peft", "bfloat16"), ("fused", "float32")])
def test_nothing_of_a_phase_is_alive_when_the_next_one_begins(
    recipe_file: RecipeFactory, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str
) -> None:
    """A real run: model, parameters, gradients, trainer, pool. In 16 bits accelerate wraps the model's forward.

    "fused" is the card's backend, here in plain torch.
    """
    changes = {
        "model.load_in_4bit": False,
        "model.dtype": dtype,
        "train.neftune_noise_alpha": 5,
        "judge.base_prompts": 2,
    }
    path = recipe_file({**changes, "train.max_steps": 2, "train.save_steps": 1, "curriculum": {}})
    made = {"peft": PeftLoader, "fused": FusedLoader}[kind]
    monkeypatch.setattr(
        "fast_ft.models.loaders.choose.make_loader", lambda model, lora, *, seed, **_: made(model, lora, seed)
    )
    traces, seen = Traces(monkeypatch), []
    load = transformers.AutoModelForCausalLM.from_pretrained

    def loads(*given: Any, **named: Any) -> Any:
        if traces.phase == "train" and seen:
            assert traces.alive("train") == [], "before the base is loaded again"
            traces.phase = "generate"
        seen.append(traces.phase)
        return load(*given, **named)

    def reports(*given: Any) -> None:
        assert traces.alive("generate") == [], "before what follows the answers"
        seen.append("report")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loads)
    monkeypatch.setattr("fast_ft.report.write.try_report", reports)
    traces.follow(made, "for_training", lambda *_, result, **__: [result.model])
    traces.follow(made, "for_generation", lambda *_, result, **__: [result.model])
    run(load_recipe(path), path)
    assert seen == ["train", "generate", "report"]


@pytest.mark.usefixtures("no_collections")
def test_a_sweeps_trials_leave_nothing_but_the_base(
    recipe_file: RecipeFactory, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a trial that ends, nor one that fails, nor the base before another one."""
    changes = {"model.load_in_4bit": False, "train.max_steps": 1, "train.warmup_steps": 0, "curriculum": {}}
    traces, first, kept = Traces(monkeypatch), load_recipe(recipe_file(changes)), ResidentLoader()
    shutil.copytree(tiny, tmp_path / "other")
    second = first.model_copy(
        update={"model": first.model.model_copy(update={"name_or_path": str(tmp_path / "other")})}
    )
    prepared = prepare(first)

    def trial(each: schema.Recipe, name: str) -> RunDir:
        kept.use(each)
        with opened(each.model_copy(update={"output_dir": str(tmp_path / name)}), "x.yaml", prepared) as folder:
            train_phase(folder, each, prepared, maker=kept)
        return folder

    def fails(*_: Any, **__: Any) -> None:
        raise InputError("a trial's own fault")

    trial(first, "one")
    assert traces.alive("train") == []
    traces.phase = "failed"
    with monkeypatch.context() as patch, pytest.raises(InputError, match="own fault"):
        patch.setattr(lora_files, "save", fails)
        trial(first, "two")
    assert kept._loaded is not None
    traces.phase, base = "last", weakref.ref(kept._loaded.model)
    kept.for_training()
    assert traces.alive("failed") == [] and base() is not None
    trial(second, "three")
    assert base() is None, "another base took its place"


def save_wide_llama(folder: Path) -> int:
    """Write a Llama of few and large weights, all zero; return its bytes."""
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(str(folder))
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    tensor_file.save(
        folder / "model.safetensors", {k: torch.zeros(v.shape) for k, v in shapes.items()}, {"format": "pt"}
    )
    for path in POCKET.glob("tokenizer*"):
        shutil.copy(path, folder)
    return (folder / "model.safetensors").stat().st_size


def test_the_limit_is_the_same_for_each_phase_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan counts on it. What the CUDA context grew by in training is not taken off a second time."""
    limits: list[float] = []
    monkeypatch.setattr(gpu, "_first_context_gib", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: limits.append(80 * share))
    for held in (0.60, 0.74, 0.60, 0.80, 3.0):
        monkeypatch.setattr(gpu, "context_gib", lambda held=held: held)
        gpu.cap_gpu_gib(14.3)
    assert limits == pytest.approx([13.55, 13.55, 13.55, 13.5, 13.3])


def hiding(reason: Exception) -> Exception:
    """Return the error by which a CUDA graph's capture cannot end, where `reason` ended what was captured."""
    try:
        try:
            raise reason
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True), (torch.OutOfMemoryError("x"), True), (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True), (OSError(errno.ENOSPC, "full"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False), (ValueError("out of memory"), False),
        (RuntimeError("CUDA: out of memory"), True), (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True), (RuntimeError("CUDA: unknown error"), False),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (hiding(torch.OutOfMemoryError("x")), True), (hiding(RuntimeError("CUDA error: invalid argument")), False),
    ],
)  # fmt: skip
def test_out_of_memory_is_told_from_other_errors(error: Exception, short: bool) -> None:
    assert is_short(error) is short


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="a bug"), explained("x", "y"):
        raise RuntimeError("a bug")
