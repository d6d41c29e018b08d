"""Proof, on a trained model, that the trainer's step trains the response's tokens and EOS, and nothing else.

The real SFTTrainer's first step is compared with a reference in plain torch, which knows of no labels, no padding and
no batches: -log p of the response's tokens and EOS given the prompt, row by row, over the number of such tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.agreement import StepRecord, disagreements, first_step
from fast_ft.data import dataset
from fast_ft.data.batches import StageJob
from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow, Encoder
from fast_ft.data.examples import Example
from fast_ft.models.loaders import choose
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.recipe import schema
from fast_ft.train.session import TrainSession
from fast_ft.train.task import TrainTask
from tests.helpers.adapters import draw_lora_b
from tests.helpers.parts import POCKET

ENCODER = Encoder(POCKET)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Eight pocket rows with responses of different lengths."""
    pool = dataset.load_pool(schema.Data(train=str(POCKET.parent / "train.json")))
    chosen = sorted(pool.examples(range(200)), key=lambda e: len(e.prompt + e.response))[24::25]
    assert len({len(ENCODER.row(e).input_ids) for e in chosen}) >= 4
    return chosen


@pytest.fixture(scope="module")
def rows(examples: list[Example]) -> list[EncodedRow]:
    return [ENCODER.row(example) for example in examples]


@pytest.fixture(scope="module", params=["fp32", "nf4"])
def loaded(request: pytest.FixtureRequest) -> Iterator[LoadedModel]:
    """The trained pocket base with a LoRA whose B matrices are not zero, so that every matrix has a gradient."""
    import torch

    section = schema.Model(name_or_path=str(POCKET), max_length=256, load_in_4bit=request.param == "nf4")
    maker = choose.make_loader(section, schema.Lora(r=4), seed=1, name="peft")
    made = maker.for_training()
    torch.manual_seed(2)
    draw_lora_b(made.model, std=0.02)
    kinds = {type(module).__name__ for module in made.model.modules()}
    assert ("Linear4bit" in kinds) == (request.param == "nf4")
    yield made
    made.free()


def step(loaded: LoadedModel, rows: list[EncodedRow], folder: Path, micro_batch: int = 8) -> StepRecord:
    """The trainer's step; the adapter is put back as it was."""
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters() if p.requires_grad}
    record = first_step(loaded, rows, pad_id=ENCODER.pad_id, plan=TrainPlan(micro_batch), work_folder=folder)
    for name, weight in loaded.model.named_parameters():
        if name in before:
            assert not weight.detach().equal(before[name]), f"the step left {name} as it was"
            weight.data.copy_(before[name])
    return record


def reference(loaded: LoadedModel, examples: list[Example]) -> StepRecord:
    import torch

    loaded.model.train()
    loaded.model.zero_grad()
    losses, count = [], 0
    for example in examples:
        prompt = ENCODER.prompt_ids([{"role": "user", "content": example.prompt}])
        answer = [*ENCODER.tokenizer.encode([example.response])[0], 2]
        logits = loaded.model(input_ids=torch.tensor([prompt + answer])).logits[0].float()
        for position, token in enumerate(answer, len(prompt)):
            losses.append(-torch.log_softmax(logits[position - 1], dim=-1)[token])
            count += 1
    loss = torch.stack(losses).sum() / count
    loss.backward()
    named = {name: p.grad.clone() for name, p in loaded.model.named_parameters() if p.grad is not None}
    loaded.model.zero_grad()
    return StepRecord(count, float(loss.detach()), named)


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel, examples: list[Example]) -> StepRecord:
    return reference(loaded, examples)


def test_the_model_is_trained_and_the_reference_sees_the_adapter(expected: StepRecord) -> None:
    assert expected.loss < 6.0, "an untrained model's is near ln 2048 = 7.6"
    assert len(expected.gradients) == 4 * 7 * 2
    assert all(float(gradient.abs().max()) > 0 for gradient in expected.gradients.values())


def test_the_step_trains_exactly_response_and_eos(
    loaded: LoadedModel, rows: list[EncodedRow], expected: StepRecord, tmp_path: Path
) -> None:
    record = step(loaded, rows, tmp_path)
    assert disagreements(expected, record) == []
    assert record.supervised_tokens == sum(row.supervised for row in rows)


WRONG = {
    "the prompt is trained on": (lambda row: replace(row, labels=list(row.input_ids)), {"trained tokens", "loss"}),
    "labels are shifted by one": (lambda row: replace(row, labels=[*row.labels[1:], IGNORE_INDEX]), {"loss"}),
    "EOS is missing": (lambda row: EncodedRow(row.id, row.input_ids[:-1], row.labels[:-1]), {"trained tokens", "loss"}),
    "EOS is masked": (lambda row: replace(row, labels=[*row.labels[:-1], IGNORE_INDEX]), {"trained tokens", "loss"}),
}


@pytest.mark.parametrize("fault", WRONG)
def test_the_comparison_fails_where(
    fault: str, loaded: LoadedModel, rows: list[EncodedRow], expected: StepRecord, tmp_path: Path
) -> None:
    change, seen = WRONG[fault]
    found = disagreements(expected, step(loaded, [change(row) for row in rows], tmp_path))
    assert seen <= {text.split(":")[0] for text in found}, found


def test_a_fault_in_one_row_of_eight_is_seen(
    loaded: LoadedModel, rows: list[EncodedRow], expected: StepRecord, tmp_path: Path
) -> None:
    shifted = [WRONG["labels are shifted by one"][0](rows[0]), *rows[1:]]
    assert disagreements(expected, step(loaded, shifted, tmp_path))


def turned(gradient: Any, cosine: float) -> Any:
    """A gradient as long as the given one, at this cosine to it."""
    import torch

    other = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(5))
    other -= gradient * (other * gradient).sum() / (gradient * gradient).sum()
    return cosine * gradient + (1 - cosine**2) ** 0.5 * other * gradient.norm() / other.norm()


@pytest.mark.parametrize(("cosine", "agrees"), [(0.995, True), (0.985, False), (0.6, False), (-1.0, False)])
def test_one_matrix_whose_gradient_points_elsewhere_is_seen(expected: StepRecord, cosine: float, agrees: bool) -> None:
    """Everything else agrees: the trained tokens, the loss, the norm of all gradients, the other gradients."""
    name = sorted(expected.gradients)[5]
    changed = expected.gradients | {name: turned(expected.gradients[name], cosine)}
    found = disagreements(expected, replace(expected, gradients=changed))
    assert found == ([] if agrees else [f"gradient of {name}: cosine {cosine:.4f}, under 0.99"])


@pytest.mark.parametrize(
    ("factor", "of_loss", "says"),
    [(1.015, 1.0, []), (1.025, 1.0, ["gradient norm"]), (1.0, 1.0015, []), (1.0, 1.0025, ["loss"])],
)
def test_the_limits_of_norm_and_loss(expected: StepRecord, factor: float, of_loss: float, says: list[str]) -> None:
    gradients = {name: factor * gradient for name, gradient in expected.gradients.items()}
    found = disagreements(expected, replace(expected, gradients=gradients, loss=of_loss * expected.loss))
    assert [text.split(":")[0] for text in found] == says


def test_a_matrix_without_a_gradient_is_seen(expected: StepRecord) -> None:
    name, *others = sorted(expected.gradients)
    found = disagreements(expected, replace(expected, gradients={other: expected.gradients[other] for other in others}))
    assert found[-1] == f"weights with a gradient on one side only: 1, such as {name}"


def test_micro_batches_change_no_gradient(loaded: LoadedModel, rows: list[EncodedRow], tmp_path: Path) -> None:
    whole = step(loaded, rows, tmp_path, micro_batch=8)
    for size in (1, 3):
        cut = step(loaded, rows, tmp_path, micro_batch=size)
        assert disagreements(whole, cut, loss=1e-5, grad_norm=1e-4, cosine=0.99999) == []


def test_training_on_all_turns_is_the_weighted_sum_of_single_turns(
    loaded: LoadedModel, examples: list[Example], tmp_path: Path
) -> None:
    """The loss of a talk is the mean over its trained tokens, so each answer counts by its number of tokens."""
    turns = [each for example in examples[:3] for each in example.messages]
    talk = Example("talk", tuple(turns), None)
    answers = [index for index, turn in enumerate(turns) if turn.trained]
    single = [
        Example("single", tuple(replace(turn, trained=i == index) for i, turn in enumerate(turns)), None)
        for index in answers
    ]
    whole = step(loaded, [ENCODER.row(talk)], tmp_path)
    parts = [step(loaded, [ENCODER.row(each)], tmp_path) for each in single]
    counts = [part.supervised_tokens for part in parts]
    assert len(set(counts)) > 1 and sum(counts) == whole.supervised_tokens

    def weighted(values: list[Any]) -> Any:
        return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)

    gradients = {name: weighted([part.gradients[name] for part in parts]) for name in whole.gradients}
    expected = StepRecord(sum(counts), weighted([part.loss for part in parts]), gradients)
    assert disagreements(expected, whole, loss=1e-4, grad_norm=1e-3, cosine=0.9999) == []
    assert abs(whole.loss - sum(part.loss for part in parts) / 3) > 1e-4, "not the mean of the turns' means"


def test_neftune_scales_noise_by_each_rows_own_length(
    loaded: LoadedModel, rows: list[EncodedRow], tmp_path: Path
) -> None:
    import torch
    from transformers import TrainerCallback

    from fast_ft.train.sft_trainer import StageTrainer

    pair = [rows[0], rows[-1]]
    assert len(pair[1].input_ids) > 2 * len(pair[0].input_ids)
    section = schema.Train(effective_batch_size=2, optim="adamw_torch", warmup_steps=0, neftune_noise_alpha=5)
    task = TrainTask([StageJob(0, "one", pair, [[0, 1]], 1e-9)], section, schema.Carry(), seed=1, pad_id=0)
    session = TrainSession(loaded, task, TrainPlan(2), tmp_path)
    embeddings = loaded.model.get_input_embeddings()
    seen: list[tuple[Any, Any]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:  # after the trainer's own hook
            self.hook = embeddings.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.hook.remove()

    made = StageTrainer(session)
    made.add_callback(Watch())
    made.train()
    ((ids, output),) = seen
    noise = (output.detach() - embeddings.weight[ids].detach()).float().abs()[0]
    start = 0
    for row in pair:
        end = start + len(row.input_ids)
        assert ids[0, start:end].tolist() == row.input_ids
        bound = 5 / (len(row.input_ids) * output.shape[-1]) ** 0.5
        # uniform in (-bound, bound): the mean size is half of it
        assert 0.97 * bound < float(noise[start:end].max()) <= bound * 1.0001
        assert float(noise[start:end].mean()) == pytest.approx(bound / 2, rel=0.05)
        start = end
    loaded.model.eval()
    assert embeddings(ids).equal(embeddings.weight[ids]), "no noise in evaluation"
    session.steps.passes.close()
    loaded.model.train()
    assert embeddings(ids).equal(embeddings.weight[ids]), "no noise once the stage is over"
    assert torch.isfinite(output).all()
