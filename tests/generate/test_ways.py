"""Every family's greedy answers are those of transformers' `generate`, one by one, whichever way answers them."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch

from fast_ft.common.minutes import AnswerPace
from fast_ft.generate import engine_setup
from fast_ft.generate.engine.fused_model import FusedModel
from fast_ft.generate.engine.library_engine import LibraryEngine
from fast_ft.generate.engine.llm_engine import LLMEngine
from fast_ft.generate.engine.sequence import Sequence
from fast_ft.generate.pace import Cuts
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.plan.decode_pool import DecodePlan
from fast_ft.recipe import schema
from tests.helpers import bases
from tests.helpers.adapters import draw_lora_b

EOS, LIMIT = 2, 12
ENCODER: Any = SimpleNamespace(end_ids=(EOS,), pad_id=0)
GREEDY = schema.Generate(do_sample=False, max_new_tokens=LIMIT)
HOT = schema.Generate(temperature=1.3, top_k=50, top_p=0.95, max_new_tokens=LIMIT)


def loaded_base(name: str, **changes: Any) -> LoadedModel:
    """A base of a family with an adapter that changes its answers, as it is loaded to answer."""
    base = bases.random_base(name, **changes)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).eval()
    draw_lora_b(model, std=0.08)
    family = bases.ALL[name][0] if name in bases.GENERAL else None
    return LoadedModel(model, lambda: None, "peft", "cpu", "float32", general=family)


def prompts() -> list[list[int]]:
    """Prompts of 3 to 40 tokens: with 12 new ones the answers cross every window and a long rope's border."""
    draw = random.Random(5)
    return [[1, *(draw.randrange(3, 2048) for _ in range(length))] for length in (2, 39, 11, 26, 26)]


def engine(loaded: LoadedModel, section: schema.Generate = GREEDY, slots: int = 3) -> engine_setup.Engine:
    return engine_setup.make_engine(loaded, ENCODER, section, DecodePlan(slots), longest=64)


def answers(made: engine_setup.Engine, known: dict[int, int] | None = None, **options: Any) -> list[list[int]]:
    every = [Sequence(each, LIMIT, key=index, known=(known or {}).get(index)) for index, each in enumerate(prompts())]
    ended = list(made.run(list(every), **options))
    assert sorted(map(id, ended)) == sorted(map(id, every)), "each ends once"
    return [each.tokens for each in every]


def reference(loaded: LoadedModel, prompt: list[int], **values: Any) -> list[int]:
    given = {"do_sample": False, "eos_token_id": EOS, "pad_token_id": 0} | values
    output = loaded.model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=LIMIT, **given)
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", bases.ALL)
def test_greedy_answers_are_transformers_own(name: str) -> None:
    loaded = loaded_base(name)
    expected = [reference(loaded, prompt) for prompt in prompts()]
    assert len({tuple(each[:3]) for each in expected}) > 3, "answers that all agree would prove little"
    made = engine(loaded)
    assert isinstance(made, LibraryEngine if name in bases.GENERAL else LLMEngine)
    assert answers(made) == expected


@pytest.mark.parametrize("name", ["mistral", "qwen3 window"])
def test_a_prompt_in_several_passes_keeps_to_its_window(name: str) -> None:
    loaded = loaded_base(name)
    made = engine_setup.engine_over(FusedModel(loaded.model), ENCODER, GREEDY, DecodePlan(3), longest=64)
    made.runner._prefill.most = 7
    assert answers(made) == [reference(loaded, prompt) for prompt in prompts()]


def test_what_the_loaded_blocks_are_decides_where_the_configuration_is_silent() -> None:
    loaded = loaded_base("llama")
    for layer in loaded.model.get_base_model().model.layers:
        layer.self_attn.q_norm = torch.nn.Identity()
    assert isinstance(engine(loaded), LibraryEngine)
    assert "not those of llama" in (loaded.general or "")


# The general way


@pytest.fixture(scope="module")
def gemma() -> LoadedModel:
    return loaded_base("gemma3")


def test_draws_hang_on_the_prompt_alone(gemma: LoadedModel) -> None:
    first = answers(engine(gemma, HOT))
    assert first == answers(engine(gemma, HOT, slots=7)) == answers(engine(gemma, HOT, slots=1))
    assert first != answers(engine(gemma))


def test_a_replayed_run_goes_on_with_the_same_answers(gemma: LoadedModel) -> None:
    """Two of three in a batch are known: it is computed once more. Of a batch that is known whole nothing is."""
    whole = answers(engine(gemma, HOT))
    known = {index: len(each) for index, each in enumerate(whole) if index != 3}
    made = engine(gemma, HOT)
    again = answers(made, known)
    assert again[3] == whole[3]
    assert made.steps_made < sum(map(len, whole)) / 3
    assert [len(each) for each in again] == [len(each) for each in whole]
    everything = engine(gemma, HOT)
    answers(everything, known | {3: len(whole[3])})
    assert everything.steps_made == 0


def test_a_limit_that_is_lowered_ends_an_answer(gemma: LoadedModel) -> None:
    def look(live: list[Sequence]) -> None:
        for each in live:
            each.limit = min(each.limit, 6)

    whole = answers(engine(gemma))
    assert answers(engine(gemma), burst=4, on_look=look) == [each[:6] for each in whole]


def test_minutes_cut_answers_of_the_general_way_too(gemma: LoadedModel) -> None:
    """Two batches of three answers with 56 tokens would take 112 seconds; there are 60, less what is kept."""
    made, now = engine(gemma, HOT), 0.0
    assert isinstance(made, LibraryEngine)
    every = [Sequence([1, 5 + index], 56, key=index) for index in range(6)]
    whole = [Sequence(each.prompt, 56, key=each.key) for each in every]
    list(engine(gemma, HOT).run(whole))
    choose, pace = made.sampler.choose, AnswerPace(1, lambda: now)

    def choose_slowly(*given: Any) -> torch.Tensor:
        nonlocal now
        now += 1
        return choose(*given)

    object.__setattr__(made.sampler, "choose", choose_slowly)
    list(made.run(every, on_look=Cuts(pace, every, [], 56, (EOS,)).look))
    assert pace.is_kept() and now > 50
    for each, long in zip(every, whole, strict=True):
        assert each.tokens == long.tokens[: len(each.tokens)]
    assert min(len(each.tokens) for each in every) > 20


def test_repetition_penalty_is_transformers_own_and_the_bases_wishes_are_not_heard(gemma: LoadedModel) -> None:
    expected = [reference(gemma, prompt, repetition_penalty=1.4) for prompt in prompts()]
    config = gemma.model.get_base_model().generation_config
    config.repetition_penalty, config.top_k = 3.0, 5
    section = GREEDY.model_copy(update={"repetition_penalty": 1.4})
    assert answers(engine(gemma, section)) == expected
    assert gemma.model.get_base_model().generation_config is config
    config.repetition_penalty = 1.0


def test_rows_that_turn_a_batchs_rope_are_alone() -> None:
    made = engine(loaded_base("phi3 long"), slots=7)
    assert isinstance(made, LibraryEngine)
    rows = [Sequence(prompt, LIMIT) for prompt in prompts()]
    lengths = [[len(row.prompt) for row in batch] for batch in made.batches(rows, 7)]
    assert lengths == [[3, 12, 27, 27], [40]], "48 tokens are the short rope's"
