"""The pool: transformers' answers whatever the slots, pages, passes and neighbours; replayed, and never leaking."""

from __future__ import annotations

import random
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_ft.common.errors import InputError
from fast_ft.generate.engine import kernel_checks, kernel_compare, nf4_linear, ops_torch, prefill, scheduler
from fast_ft.generate.engine.block_manager import PAGE, BlockManager, pages_for
from fast_ft.generate.engine.first_half import TOGETHER
from fast_ft.generate.engine.fused_model import FusedModel
from fast_ft.generate.engine.kv_cache import KVCache
from fast_ft.generate.engine.llm_engine import LLMEngine
from fast_ft.generate.engine.model_runner import EngineConfig
from fast_ft.generate.engine.prefill_passes import Part, passes
from fast_ft.generate.engine.projections import Product, base_of, dense
from fast_ft.generate.engine.sampler import Sampler
from fast_ft.generate.engine.scheduler import Burst
from fast_ft.generate.engine.sequence import Sequence
from fast_ft.models import nf4
from fast_ft.models.loaders import choose
from fast_ft.recipe import schema
from tests.helpers.adapters import draw_lora_b
from tests.helpers.parts import POCKET, save_random_llama
from tests.helpers.patience import PATIENCE

EOS = 2
GREEDY = Sampler(False)
HOT = Sampler(True, temperature=1.4, top_k=50, top_p=0.95)


def tuned(base: Path, load_in_4bit: bool = False, **lora: Any) -> Any:
    """A model with an adapter that changes its answers."""
    section = schema.Model(name_or_path=str(base), max_length=256, load_in_4bit=load_in_4bit)
    maker = choose.make_loader(section, schema.Lora(r=4, lora_alpha=8, **lora), seed=1, name="peft")
    model = maker.for_training().model.eval()
    torch.manual_seed(3)
    draw_lora_b(model, std=0.08)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return tuned(POCKET)


@pytest.fixture(scope="module")
def fused(model: Any) -> FusedModel:
    return FusedModel(model)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Sixteen prompts of 3 to 70 tokens."""
    draw = random.Random(5)
    return [[1, *(draw.randrange(3, 2048) for _ in range(n))] for n in [2, 69, 15, 16, 30, 31, 47, 8, *range(20, 28)]]


def pool_of(
    fused: FusedModel, sampler: Sampler = GREEDY, *, slots: int = 4, pages: int = 60, **values: Any
) -> LLMEngine:
    given = {"end_ids": (EOS,), "pad_id": 0, "longest": 400} | values
    return LLMEngine(fused, KVCache(fused, pages), sampler, EngineConfig(slots, **given))


def answers(pool: LLMEngine, rows: list[Sequence], **options: Any) -> list[list[int]]:
    ended = list(pool.run(rows, **options))
    assert sorted(map(id, ended)) == sorted(map(id, rows)), "each row ends once"
    assert sorted(pool.scheduler.blocks.free) == list(range(1, pool.scheduler.blocks.pages + 1)), (
        "every page was given back"
    )
    return [row.tokens for row in rows]


def reference(model: Any, prompt: list[int], limit: int, **values: Any) -> list[int]:
    given = {"do_sample": False, "eos_token_id": EOS, "pad_token_id": 0} | values
    output = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=limit, **given)
    return output[0, len(prompt) :].tolist()


# The same answers as transformers


@pytest.fixture(scope="module")
def expected(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    limits = [5 + 3 * i for i in range(len(prompts))]
    made = [reference(model, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    assert len({tuple(tokens[:3]) for tokens in made}) > 4, "answers that all agree would prove little"
    return made


@pytest.mark.parametrize(
    ("slots", "pages", "prefill_tokens"),
    [(4, 60, 2048), (3, 60, 7), (7, 11, 40), (1, 8, 16), (40, 200, 100), (16, 24, 2048)],
    ids=["refills", "chunked prefill", "rows preempted", "one slot", "more slots than prompts", "scarce pages"],
)
def test_greedy_equals_transformers_one_by_one(
    fused: FusedModel, prompts: list[list[int]], expected: list[list[int]], slots: int, pages: int, prefill_tokens: int
) -> None:
    pool = pool_of(fused, slots=slots, pages=pages, prefill_tokens=prefill_tokens)
    rows = [Sequence(prompt, 5 + 3 * i) for i, prompt in enumerate(prompts)]
    assert answers(pool, rows) == expected


def test_rows_are_preempted_and_taken_up_again(
    fused: FusedModel, prompts: list[list[int]], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "AHEAD", 1)  # hopeful admission: rows run out of pages
    computed: list[int] = []
    original = prefill.passes
    monkeypatch.setattr(
        prefill, "passes", lambda rows, *given, **named: computed.append(len(rows)) or original(rows, *given, **named)
    )
    rows = [Sequence(prompt, 5 + 3 * i) for i, prompt in enumerate(prompts)]
    assert answers(pool_of(fused, slots=9, pages=14), rows) == expected
    assert sum(computed) > len(rows)


def test_repetition_penalty_equals_transformers(model: Any, fused: FusedModel, prompts: list[list[int]]) -> None:
    rows = [Sequence(prompt, 12) for prompt in prompts[:6]]
    made = answers(pool_of(fused, Sampler(False, repetition_penalty=1.4)), rows)
    assert made == [reference(model, prompt, 12, repetition_penalty=1.4) for prompt in prompts[:6]]


def test_grouped_heads_biases_and_other_ropes(tmp_path: Path, prompts: list[list[int]]) -> None:
    import json

    import transformers

    folder = save_random_llama(tmp_path / "base")
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, initializer_range=0.3, attention_bias=True,
        mlp_bias=True, tie_word_embeddings=True, rope_parameters={
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    for name, weight in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.5)
    base.save_pretrained(str(folder))
    assert json.loads((folder / "config.json").read_text())["attention_bias"]
    model = tuned(folder, target_modules=("q_proj", "v_proj", "down_proj"))
    made = answers(pool_of(FusedModel(model), prefill_tokens=20), [Sequence(prompt, 20) for prompt in prompts[:8]])
    assert made == [reference(model, prompt, 20) for prompt in prompts[:8]]


def test_four_bits_on_a_cpu(prompts: list[list[int]]) -> None:
    model = tuned(POCKET, load_in_4bit=True)
    made = answers(pool_of(FusedModel(model)), [Sequence(prompt, 8) for prompt in prompts[:6]])
    same = [a == reference(model, prompt, 8) for a, prompt in zip(made, prompts, strict=False)]
    assert sum(same) >= 5, "bitsandbytes' CPU kernel may round otherwise for one row than for many"


def test_another_kind_of_model_is_refused() -> None:
    import transformers

    config = transformers.GraniteConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"decoding by our engine.*'granite' has no blocks of ours"):
        FusedModel(transformers.GraniteForCausalLM(config))


# Rows do not see one another


def drawn(fused: FusedModel, prompts: list[list[int]], *, slots: int = 4, **values: Any) -> list[list[int]]:
    rows = [Sequence(prompt, 12, key=1000 + i) for i, prompt in enumerate(prompts)]
    return answers(pool_of(fused, HOT, slots=slots, **values), rows)


def test_neighbours_slots_and_pages_do_not_change_what_a_row_draws(fused: FusedModel, prompts: list[list[int]]) -> None:
    together = drawn(fused, prompts)
    for slots, pages in ((16, 200), (5, 15)):
        assert drawn(fused, prompts, slots=slots, pages=pages) == together
    alone = [answers(pool_of(fused, HOT), [Sequence(p, 12, key=1000 + i)])[0] for i, p in enumerate(prompts[:5])]
    assert alone == together[:5]
    assert len({tuple(tokens) for tokens in together}) == len(prompts)


def test_every_token_is_drawn_with_its_rows_key_and_its_place(
    model: Any, fused: FusedModel, prompts: list[list[int]]
) -> None:
    """From the model's own logits the sampler draws the same again, the first token of each answer included."""
    flat = Sampler(True, temperature=6.0, top_k=200)  # under which no token is certain
    rows = [Sequence(prompts[i % 2], 4, key=(7 << 40) + i) for i in range(12)]
    made = answers(pool_of(fused, flat, slots=5), rows)
    for row, tokens in zip(rows, made, strict=True):
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*row.prompt, *tokens[:-1]]])).logits[0, len(row.prompt) - 1 :].float()
        key_T, place_T = torch.full((len(tokens),), row.key), torch.arange(len(tokens))
        assert flat.choose(logits_TV, key_T, place_T).tolist() == tokens
    assert len({tokens[0] for tokens in made[::2]}) > 2, "one prompt's answers begin differently"


@pytest.mark.parametrize("poison", [float("nan"), 6e4])
def test_a_page_keeps_nothing_of_the_row_before(
    fused: FusedModel, prompts: list[list[int]], expected_began: list[list[int]], poison: float
) -> None:
    pool = pool_of(fused, slots=3, pages=20)
    cache, blocks = pool.runner.cache, pool.scheduler.blocks
    cache.keys.fill_(poison)
    cache.values.fill_(poison)
    taken = BlockManager.release

    def release(sequence: Sequence) -> None:
        for page in sequence.block_table[len(blocks.shared) :]:
            cache.keys[:, page * PAGE : (page + 1) * PAGE] = poison
            cache.values[:, page * PAGE : (page + 1) * PAGE] = poison
        taken(blocks, sequence)

    blocks.release = release  # type: ignore[method-assign]
    assert answers(pool, [Sequence(prompt, 4 + i) for i, prompt in enumerate(began(prompts, 28))]) == expected_began


def test_the_caches_last_cell_is_usable(model: Any, fused: FusedModel) -> None:
    for length in (PAGE - 1, PAGE, PAGE + 1):
        prompt = [1, *range(100, 99 + length)]
        limit = 4 * PAGE - length  # prompt and answer fill the cache to its last cell
        model_says = reference(model, prompt, limit, eos_token_id=None)
        pool = pool_of(fused, pages=4, longest=4 * PAGE, slots=1, end_ids=())
        assert answers(pool, [Sequence(prompt, limit)]) == [model_says]
        assert len(model_says) == limit
        with pytest.raises(InputError, match=r"cache of 64 tokens\. Lower generate\.max_new_tokens"):
            list(pool.run([Sequence(prompt, limit + 1)]))


def test_columns_grow_in_the_middle_of_an_answer(model: Any, fused: FusedModel) -> None:
    rows = [Sequence([1, *range(50, 50 + n)], 40) for n in (230, 10)]
    pool = pool_of(fused, longest=400, end_ids=())
    seen: set[tuple[int, int]] = set()
    step = pool.runner._step
    pool.runner._step = lambda slots, columns: seen.add((slots, columns)) or step(slots, columns)  # type: ignore[method-assign, func-returns-value]
    made = answers(pool, rows)
    assert {columns for _, columns in seen} == {240, 256, 272}, "whole pages"
    assert made == [reference(model, list(row.prompt), 40, eos_token_id=None) for row in rows]


# Ends


def test_eos_at_the_first_token_and_a_limit_of_one(model: Any, fused: FusedModel, prompts: list[list[int]]) -> None:
    first = [reference(model, prompt, 1)[0] for prompt in prompts]
    assert answers(pool_of(fused), [Sequence(prompt, 1) for prompt in prompts]) == [[token] for token in first]
    pool = pool_of(fused, slots=2, end_ids=(first[0],))
    made = answers(pool, [Sequence(prompt, 9) for prompt in prompts[:5]])
    assert made[0] == [first[0]]
    for tokens in made:
        assert first[0] not in tokens[:-1], "nothing follows EOS"


def test_each_end_token_ends_an_answer(model: Any, fused: FusedModel, prompts: list[list[int]]) -> None:
    whole = [reference(model, prompt, 9, eos_token_id=None) for prompt in prompts[:4]]
    ends = (whole[0][3], whole[1][5])
    cut = [tokens[: next((i + 1 for i, each in enumerate(tokens) if each in ends), 9)] for tokens in whole]
    assert len(cut[0]) <= 4 and len(cut[1]) <= 6
    made = answers(pool_of(fused, end_ids=ends), [Sequence(prompt, 9) for prompt in prompts[:4]])
    assert made == cut


@pytest.fixture(scope="module")
def smallest() -> FusedModel:
    """A random model of 16 tokens, so that EOS comes often."""
    import transformers

    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128,
    )  # fmt: skip
    return FusedModel(transformers.LlamaForCausalLM(config).eval())


def lowers_limits(rows: list[Sequence], draw: random.Random, share: float) -> None:
    """Lower some limits: to a row's own length, as a budget of minutes does, to less, or to a little more."""
    for row in rows:
        if draw.random() < share:
            row.limit = max(0, min(row.limit, len(row.tokens) + draw.randint(-3, 12)))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    slots=st.integers(1, 6),
    spare=st.integers(0, 9),
    burst=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_a_run_ends_whatever_its_rows_and_limits(
    smallest: FusedModel, seed: int, slots: int, spare: int, burst: int, share: float
) -> None:
    """With prompts, candidates, limits that fall at any time, and replays; in a cache that hardly holds one row."""
    draw = random.Random(seed)
    begin = [4] * draw.choice([0, 10, 16, 30])
    prompts = [begin + [draw.randrange(3, 16) for _ in range(draw.randint(1, 40))] for _ in range(draw.randint(1, 5))]
    wanted = [(prompt, draw.randint(1, 40)) for prompt in prompts for _ in range(draw.randint(1, 2))]
    pages = max(pages_for(len(prompt) + limit) for prompt, limit in wanted) + spare
    pool = pool_of(smallest, Sampler(True), slots=slots, pages=pages, longest=112, prefill_tokens=32)
    known: dict[int, int] = {}
    for _ in range(2):
        rows = [Sequence(prompt, limit, key=i, known=known.get(i)) for i, (prompt, limit) in enumerate(wanted)]
        bursts, compute = 0, pool.decode

        def counted(burst: Burst, compute: Any = compute) -> None:
            nonlocal bursts
            bursts += 1
            assert burst.steps >= 1 and bursts <= sum(limit for _, limit in wanted), "a burst gives no row a token"
            compute(burst)

        pool.decode = counted  # type: ignore[method-assign]
        ended = []
        for row in pool.run(rows, burst=burst, on_look=lambda _, rows=rows: lowers_limits(rows, draw, share)):
            assert len(row.tokens) <= row.limit and not row.block_table
            assert row.known is not None or len(row.tokens) == row.limit or row.tokens[-1] == EOS
            ended.append(row)
            lowers_limits([other for other in rows if other not in ended], draw, share)
        assert sorted(map(id, ended)) == sorted(map(id, rows)), "each row ends once"
        assert sorted(pool.scheduler.blocks.free) == list(range(1, pages + 1))
        pool.decode = compute  # type: ignore[method-assign]
        known = {i: len(row.tokens) for i, row in enumerate(rows) if draw.random() < 0.5}


def test_a_row_that_was_preempted_ends_at_a_limit_that_fell_to_its_length(
    fused: FusedModel, prompts: list[list[int]]
) -> None:
    pool = pool_of(fused, slots=2, pages=6, longest=96, end_ids=())
    rows = [Sequence(prompts[0], 80, key=1), Sequence([8, 9, 10], 80, key=2)]
    aside: list[int] = []
    looks = 0

    def look(live: list[Sequence]) -> None:
        nonlocal looks
        looks += 1
        assert looks < 60, "the run does not end"
        if not aside and rows[1].tokens and rows[1] not in live:
            aside.append(len(rows[1].tokens))
            for row in rows:
                row.limit = min(row.limit, max(len(row.tokens), 20))

    made = answers(pool, rows, on_look=look)
    assert aside and aside[0] > 20
    assert [len(tokens) for tokens in made] == [row.limit for row in rows] and rows[1].limit == aside[0]


def test_the_pool_shrinks_with_what_is_left(fused: FusedModel, prompts: list[list[int]]) -> None:
    pool = pool_of(fused, slots=16, pages=200, end_ids=())
    assert pool.scheduler.shapes == [16, 8, 4]
    used: list[int] = []
    step = pool.runner._step
    pool.runner._step = lambda slots, columns: used.append(slots) or step(slots, columns)  # type: ignore[method-assign, func-returns-value]
    answers(pool, [Sequence(prompt, 2 + 2 * i) for i, prompt in enumerate(prompts)])
    assert used == sorted(used, reverse=True) and set(used) == {16, 8, 4}


def test_rows_are_admitted_several_at_a_time(fused: FusedModel, prompts: list[list[int]]) -> None:
    """Of 16 slots two must be free, and at the end enough for all that wait."""
    pool = pool_of(fused, slots=16, pages=200, end_ids=())
    admitted: list[int] = []
    fill = pool.prefill
    pool.prefill = lambda one: admitted.append(len(one.sequences)) or fill(one)  # type: ignore[method-assign, func-returns-value]
    answers(pool, [Sequence(prompts[i % 16], 1 + 7 * i % 41, key=i) for i in range(37)])
    assert admitted[0] == 16 and sum(admitted) == 37
    assert all(count >= 2 for count in admitted[1:-1]) and len(admitted) < 12


def test_looks_show_the_logits_of_each_new_token(fused: FusedModel, prompts: list[list[int]]) -> None:
    pool = pool_of(fused)
    looked: dict[int, list[int]] = {}

    def look(live: list[Sequence]) -> None:
        for logits_V, row in zip(pool.runner.logits, live, strict=False):
            looked.setdefault(id(row), []).append(int(logits_V.argmax()))

    rows = [Sequence(prompt, 9) for prompt in prompts]
    made = answers(pool, rows, burst=1, on_look=look)
    assert [looked[id(row)] for row in rows] == made


# Candidates


def test_candidates_share_the_first_pass_and_differ(fused: FusedModel, prompts: list[list[int]]) -> None:
    rows = [Sequence(prompt, 10, key=i * 100 + c) for i, prompt in enumerate(prompts[:4]) for c in range(5)]
    assert passes(rows, 2048)[0][1] == Part((5, 6, 7, 8, 9), 0, len(prompts[1]))
    made = answers(pool_of(fused, HOT, slots=20, pages=150), rows)
    singly = [answers(pool_of(fused, HOT), [Sequence(row.prompt, 10, key=row.key)])[0] for row in rows[::3]]
    assert made[::3] == singly
    for i in range(4):
        assert len({tuple(tokens) for tokens in made[5 * i : 5 * i + 5]}) > 2


def in_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, longest: int, window: int | None,
    keys: tuple[torch.Tensor, int] | None = None,
) -> torch.Tensor:  # fmt: skip
    """What ops_triton.packed_attention does, row by row."""
    key_starts, most_keys = keys or (starts, longest)
    assert window is None and starts[-1] == len(q) and starts.diff().max() <= longest
    assert key_starts[-1] <= len(k) and key_starts.diff().max() <= most_keys and len(key_starts) == len(starts)
    cuts = zip(pairwise(starts.tolist()), pairwise(key_starts.tolist()), strict=True)
    return torch.cat([ops_torch.causal(q[a:b], k[c:d], v[c:d]) for (a, b), (c, d) in cuts if b > a])


# A prefix that all prompts share

BEGIN = [7, 3, 9, 4, 6, 5, 8, 2, 7, 7, 3, 11, 12, *range(40, 59)]  #: two pages


def began(prompts: list[list[int]], shared: int) -> list[list[int]]:
    """Prompts that have `shared` common tokens in place of their first one, which is the same in all."""
    return [BEGIN[:shared] + prompt[1:] for prompt in prompts]


@pytest.fixture(scope="module")
def expected_began(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """The greedy answers to prompts that begin with 28 common tokens, of 4 to 19 tokens."""
    made = [reference(model, prompt, 4 + i) for i, prompt in enumerate(began(prompts, 28))]
    assert len({tuple(tokens[:3]) for tokens in made}) > 4, "answers that all agree would prove little"
    return made


@pytest.fixture
def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[FusedModel, list[int]]:
    """A model, and the numbers of tokens of the passes that it computes, decoding apart."""
    fused, computed = FusedModel(model), list[int]()
    forward = fused.forward

    def count(ids: torch.Tensor, *given: Any, keep_P: torch.Tensor | None = None, **named: Any) -> torch.Tensor:
        if keep_P is not None:
            computed.append(len(ids))
        return forward(ids, *given, keep_P=keep_P, **named)

    monkeypatch.setattr(fused, "forward", count)
    return fused, computed


PACKS = SimpleNamespace(**vars(ops_torch) | {"PACKED": True, "packed_attention": in_rows})  #: as a card attends


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize(
    ("slots", "pages", "prefill_tokens"),
    [(16, 200, 2048), (5, 200, 160), (9, 16, 160), (5, 60, 40), (1, 8, 2048)],
    ids=["one admission", "refills", "rows preempted", "prompts in several passes", "one slot"],
)
def test_answers_behind_a_shared_prefix_are_transformers_own(
    counted: tuple[FusedModel, list[int]], prompts: list[list[int]], expected_began: list[list[int]], packs: bool,
    slots: int, pages: int, prefill_tokens: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whoever is admitted when, each prompt's own tokens are computed, and the prefix once."""
    monkeypatch.setattr(scheduler, "AHEAD", 1)
    fused, computed = counted
    if packs:
        fused.ops = PACKS
    pool = pool_of(fused, slots=slots, pages=pages, prefill_tokens=prefill_tokens)
    again: list[int] = []
    fill = pool.prefill
    pool.prefill = lambda one: again.extend(row.length() - 28 for row in one.sequences if row.tokens) or fill(one)  # type: ignore[method-assign, func-returns-value]
    rows = [Sequence(prompt, 4 + i) for i, prompt in enumerate(began(prompts, 28))]
    assert answers(pool, rows) == expected_began
    assert bool(again) == (pages == 16), "rows that were preempted"
    least = 28 + sum(len(prompt) - 1 for prompt in prompts) + sum(again)
    assert sum(computed) >= least if packs else sum(computed) == least


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("shared", [13, 16, 28, 32])
def test_a_shared_prefix_changes_no_draw(
    fused: FusedModel, prompts: list[list[int]], shared: int, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of candidates, of a prompt with one token of its own, and of a run after one with another prefix."""
    monkeypatch.setattr(fused, "ops", PACKS if packs else ops_torch)
    asked = [*began([[1, 900], [1, 901, 7]], shared), *began(prompts[3:7], shared)]
    others = [[5, *prompt] for prompt in asked]

    def rows(asked: list[list[int]]) -> list[Sequence]:
        return [Sequence(prompt, 8, key=10 * i + c) for i, prompt in enumerate(asked) for c in range(3)]

    with monkeypatch.context() as apart:
        apart.setattr("fast_ft.data.shared_start._WORTH", 0)
        pool = pool_of(fused, HOT, slots=7, pages=100)
        expected, expected_others = answers(pool, rows(asked)), answers(pool, rows(others))
    pool = pool_of(fused, HOT, slots=7, pages=100)
    assert answers(pool, rows(asked)) == expected
    assert answers(pool, rows(others)) == expected_others
    run = pool.run(rows(others))
    next(run)
    assert len(pool.scheduler.prefix.prompt) == shared + 1
    run.close()  # one that was left in the middle
    assert answers(pool, rows(asked)) == expected


def test_passes_are_captured_once_each_while_sequences_wait(
    fused: FusedModel, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pass is launched at once; then a burst captures at most one, and none when nobody waits any more."""
    monkeypatch.setattr(fused, "ops", PACKS)
    pool = pool_of(fused, slots=2, pages=100, prefill_tokens=64)
    events: list[Any] = []
    prefill, forward, decode = pool.runner._prefill, fused.forward, pool.decode
    graphs = SimpleNamespace(capture_ahead=lambda work: events.append(work.__self__))

    def recorded(burst: Burst) -> None:
        events.append(burst)
        decode(burst)
        events.append("burst ends")

    def rows() -> list[Sequence]:
        return [Sequence(prompt, 30) for prompt in prompts[:9]]

    expected = answers(pool_of(fused, slots=2, pages=100, prefill_tokens=64), rows())
    monkeypatch.setattr(prefill, "graphs", graphs)
    monkeypatch.setattr(pool, "decode", recorded)
    monkeypatch.setattr(fused, "forward", lambda *given, **more: (events.append("pass"), forward(*given, **more))[1])
    assert answers(pool, rows()) == expected
    captured = [each for each in events if hasattr(each, "tokens")]
    assert events[0] == "pass", "nothing is captured before the card has work"
    assert len({id(each) for each in captured}) == len(captured), "each is captured once"
    assert {each.tokens for each in captured} == set(prefill.sizes)
    in_bursts = 0
    for start in (index for index, each in enumerate(events) if isinstance(each, Burst)):
        within = [each for each in events[start : events.index("burst ends", start)] if each in captured]
        in_bursts += len(within)
        assert len(within) <= events[start].others_wait
    assert in_bursts >= 4


def test_a_pass_of_fixed_size_holds_64_prompts_and_their_prefix(model: Any) -> None:
    """One prompt more gets a pass of its own; the answers are the same."""
    fused, sizes = FusedModel(model), set[int]()

    def packed_attention(q: torch.Tensor, *given: Any) -> Any:
        sizes.add(len(q))
        return in_rows(q, *given)

    fused.ops = SimpleNamespace(**vars(PACKS) | {"packed_attention": packed_attention})
    made = []
    for count, expected in ((64, {80}), (65, {80, 20})):
        rows = [Sequence([*BEGIN[:5], 100 + index], 3) for index in range(count)]
        made.append(answers(pool_of(fused, slots=65, pages=100, prefill_tokens=160), rows)[:64])
        assert sizes == expected
    assert made[0] == made[1]


def test_a_long_prefix_takes_no_more_memory_than_a_pass_has(model: Any) -> None:
    """Its keys lie side by side once for each prompt: a pass of 64 prompts behind 2,048 tokens held 130,000 of them."""
    fused, keys = FusedModel(model), list[int]()

    def packed_attention(q: torch.Tensor, k: torch.Tensor, *given: Any) -> Any:
        keys.append(len(k))
        return in_rows(q, k, *given)

    prefix, most = [3 + 7 * place % 2000 for place in range(130)], 160
    asked = [[*prefix, 100 + index, *range(50, 53)] for index in range(24)]
    expected = answers(pool_of(fused, slots=24, pages=300, prefill_tokens=most), [Sequence(row, 4) for row in asked])
    fused.ops = SimpleNamespace(**vars(PACKS) | {"packed_attention": packed_attention})
    pool = pool_of(fused, slots=24, pages=300, prefill_tokens=most)
    assert answers(pool, [Sequence(row, 4) for row in asked]) == expected
    assert len(pool.scheduler.prefix.prompt) == 130 and max(keys) <= 5 * most


def test_a_cache_that_has_room_for_the_longest_row_alone_shares_whole_pages(
    fused: FusedModel, prompts: list[list[int]], expected_began: list[list[int]]
) -> None:
    asked = began(prompts, 28)
    rows = [Sequence(prompt, 4 + i) for i, prompt in enumerate(asked)]
    pool = pool_of(fused, pages=max(pages_for(len(row.prompt) + row.limit) for row in rows))
    assert answers(pool, rows) == expected_began
    assert pool.scheduler.prefix.prompt == BEGIN[:PAGE]


def test_passes_of_fixed_size_with_padding(model: Any, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """The way of a GPU, on the CPU: prompts fill a pass up with padding, and one call attends to all of them."""
    sizes: list[tuple[int, int]] = []

    def packed_attention(*given: Any) -> Any:
        sizes.append((len(given[0]), given[4]))
        return in_rows(*given)

    fused = FusedModel(model)
    fused.ops = SimpleNamespace(**vars(ops_torch) | {"PACKED": True, "packed_attention": packed_attention})
    rows = [Sequence(prompt, 5 + 3 * i) for i, prompt in enumerate(prompts)]
    assert answers(pool_of(fused, slots=5, prefill_tokens=160), rows) == expected
    assert len(set(sizes)) > 2 and {size for size, _ in sizes} <= {20, 40, 80, 100, 120, 140, 160}
    made = answers(
        pool_of(fused, HOT, slots=16, pages=150), [Sequence(p, 9, key=k) for p in prompts[:4] for k in range(4)]
    )
    fused.ops = ops_torch
    again = answers(
        pool_of(fused, HOT, slots=16, pages=150), [Sequence(p, 9, key=k) for p in prompts[:4] for k in range(4)]
    )
    assert made == again


def test_passes_hold_every_token_once_and_no_more_than_fit() -> None:
    draw = random.Random(1)
    for _ in range(50):
        most = draw.choice([1, 5, 16, 100])
        rows = [Sequence([index] * draw.randrange(1, 40), 9) for index in range(draw.randrange(1, 12))]
        for row in rows[::3]:
            row.tokens = [7] * draw.randrange(0, 5)
        found: dict[int, list[int]] = {index: [] for index in range(len(rows))}
        shared = min(draw.choice([0, 3]), most, *(row.length() - 1 for row in rows))
        fills = shared > 0 and draw.random() < 0.5
        cut = passes(rows, most, shared, fills=fills)
        assert [part for one in cut for part in one if not part.rows] == [Part((), 0, shared)] * fills
        assert not fills or not cut[0][0].rows, "the prefix comes before all that attends to it"
        for one in cut:
            assert 0 < sum(part.stop - part.start for part in one) <= most
            prompts = sum(bool(part.rows) for part in one)
            assert prompts <= 64 and (prompts == 1 or prompts * shared <= 4 * most)
            for part in one:
                for index in part.rows:
                    found[index] += range(part.start, part.stop)
        assert found == {index: list(range(shared, row.length())) for index, row in enumerate(rows)}


# Replay


@pytest.mark.parametrize("shared", [1, 28])
def test_a_replay_makes_every_decision_again_and_computes_only_what_it_must(
    counted: tuple[FusedModel, list[int]], prompts: list[list[int]], shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows known up to any point, the others come out the same to the last bit of their logits."""
    monkeypatch.setattr(scheduler, "AHEAD", 4)  # so that rows are preempted, too
    fused, computed = counted
    asked = began(prompts, shared)
    last: dict[int, torch.Tensor] = {}

    def run(known: dict[int, int]) -> tuple[list[list[int]], list[int], int]:
        pool = pool_of(fused, HOT, slots=5, pages=13)
        computed.clear()
        steps = 0
        step = pool.runner._step

        def count(slots: int, columns: int) -> None:
            nonlocal steps
            steps += 1
            step(slots, columns)

        pool.runner._step = count  # type: ignore[method-assign]
        rows = [Sequence(prompt, 6 + 7 * i % 19, key=i, known=known.get(i)) for i, prompt in enumerate(asked)]

        def look(live: list[Sequence]) -> None:
            for logits_V, row in zip(pool.runner.logits, live, strict=False):
                if row.known is None:
                    last[rows.index(row)] = logits_V.clone()

        order = [rows.index(row) for row in pool.run(rows, on_look=look)]
        assert len(pool.scheduler.prefix.prompt) == (shared if shared > 1 else 0)
        return [row.tokens for row in rows], order, steps

    whole, order, all_steps = run({})
    logits = dict(last)
    assert order != sorted(order)
    for finished in (1, 5, 9, 15):
        last.clear()
        known = {index: len(whole[index]) for index in order[:finished]}
        again, same_order, steps = run(known)
        assert same_order == order and steps <= all_steps
        for index in order[finished:]:
            assert again[index] == whole[index]
            assert torch.equal(last[index], logits[index])
    assert steps < all_steps / 2
    nothing_left = {index: len(tokens) for index, tokens in enumerate(whole)}
    assert run(nothing_left)[1:] == (order, 0) and not computed


# Parts


def test_fused_products_equal_the_layers(model: Any, fused: FusedModel) -> None:
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(1))
    attention = model.get_base_model().model.layers[1].self_attn
    modules = [attention.q_proj, attention.k_proj, attention.v_proj]
    with torch.no_grad():
        apart = torch.cat([module(x) for module in modules], dim=-1)
        torch.testing.assert_close(fused.layers[1][1](x), apart, atol=1e-5, rtol=1e-5)
        with model.disable_adapter():
            base_alone = torch.cat([module(x) for module in modules], dim=-1)
            without = Product(modules, dense([base_of(module) for module in modules]), x.dtype)
            torch.testing.assert_close(without(x), base_alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(apart, base_alone, atol=1e-2)
    storage = {module.get_base_layer().weight.untyped_storage().data_ptr() for module in modules}
    assert len(storage) == 1, "side by side, and held once"


@pytest.mark.parametrize("bias", [False, True])
def test_what_a_lora_adds_is_not_lost_in_rounding(bias: bool) -> None:
    """In bf16 a young LoRA adds less than half a step of the base's output. On average all of it must arrive."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    plain = torch.nn.Sequential(torch.nn.Linear(128, 96, bias=bias, dtype=torch.bfloat16))
    (module,) = get_peft_model(plain, LoraConfig(r=8, target_modules=["0"])).base_model.model
    x, weight = torch.randn(512, 128, dtype=torch.bfloat16), module.lora_B["default"].weight.data
    made = []
    for size in (0.0, 1e-4):
        weight.copy_(size * torch.randn(96, 8, generator=torch.Generator().manual_seed(5)))
        product = Product([module], dense([module.get_base_layer()]), torch.bfloat16)
        made.append(product(x).float())
    assert product.a_ER is not None and product.b_RN is not None
    added = x.float() @ product.a_ER.float() @ product.b_RN.float()
    assert added.square().mean().sqrt() < 2**-9 * made[0].square().mean().sqrt(), "less than half a step"
    arrived = ((made[1] - made[0]) * added).sum() / added.square().sum()
    assert 0.9 < arrived < 1.1


@pytest.mark.parametrize("rows", [2, 200])
def test_the_products_of_4_bit_weights_equal_their_dequantised_ones(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, on the CPU: scales undone, weights side by side and in pieces of 64 rows."""
    import bitsandbytes.functional
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    monkeypatch.setattr(nf4_linear, "fused_rows", lambda device: 4)
    if not torch.cuda.is_available():  # its CPU build has no variant that writes into a given tensor
        monkeypatch.setattr(
            bitsandbytes.functional, "dequantize_4bit", lambda w, state, out: out.copy_(dequantize_4bit(w, state))
        )
    draw = torch.Generator().manual_seed(2)

    class Layer:
        def __init__(self, outputs: int) -> None:
            whole = torch.randn(outputs, 128, generator=draw)
            packed, state = quantize_4bit(whole, quant_type="nf4", compress_statistics=True)
            self.weight = torch.nn.Parameter(packed, requires_grad=False)
            self.weight.quant_state = state
            self.bias = torch.nn.Parameter(torch.randn(outputs, generator=draw))

    layers = [Layer(192), Layer(64), Layer(72)]
    dense = torch.cat([dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    x = torch.randn(rows, 128, generator=draw)
    with torch.no_grad():
        product, add = nf4_linear.pieces(layers, torch.float32, torch.empty(64 * 128)), torch.randn(rows, 328)
        torch.testing.assert_close(product(x), x @ dense.T + bias, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(product(x, add.clone()), x @ dense.T + bias + add, atol=1e-4, rtol=1e-4)
        for layer in layers:  # the layers' own weights are views now, and still theirs
            dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        apart = torch.cat([dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in layers])
    assert torch.equal(apart, dense)


def test_attention_over_pages_equals_attention_over_the_row() -> None:
    draw = torch.Generator().manual_seed(1)
    free = BlockManager(9).free
    keys, values = torch.zeros(2, 10 * PAGE, 2, 8)
    lengths = [0, PAGE - 1, PAGE, 2 * PAGE + 3]
    table = torch.zeros(4, 5, dtype=torch.int64)
    q = torch.randn(4, 6, 8, generator=draw)
    expected = []
    for index, length in enumerate(lengths):
        pages = [free.pop() for _ in range(pages_for(length + 1))]
        table[index, : len(pages)] = torch.tensor(pages)
        k, v = (torch.randn(length + 1, 2, 8, generator=draw) for _ in range(2))
        cells = torch.tensor([pages[t // PAGE] * PAGE + t % PAGE for t in range(length + 1)])
        keys[cells], values[cells] = k, v
        expected.append(ops_torch.causal(q[index : index + 1], k, v)[0])
    made = ops_torch.paged_attention(q, keys, values, table, torch.tensor(lengths), columns=3 * PAGE)
    torch.testing.assert_close(made, torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert pages_for(0) == 0 and pages_for(PAGE) == 1 and pages_for(PAGE + 1) == 2


def test_steps_that_are_not_captured_copy_no_more_pages_than_the_longest_row_has(
    fused: FusedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[int] = set()

    def noted(*given: Any, columns: int, **named: Any) -> torch.Tensor:
        asked.add(columns)
        return ops_torch.paged_attention(*given, columns=columns, **named)

    monkeypatch.setattr(fused, "ops", SimpleNamespace(**vars(ops_torch) | {"paged_attention": noted}))
    list(pool_of(fused, slots=2).run([Sequence([5, 6, 7], 20), Sequence([8, 9], 4)]))
    assert asked == {PAGE, 2 * PAGE}, "a captured step asks for a multiple of 256, since each number is captured anew"


def test_grouped_heads_give_what_repeated_ones_give() -> None:
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(9, heads, 16, generator=draw) for heads in (6, 2, 2))
    repeated = (part.repeat_interleave(3, dim=1) for part in (k, v))
    assert torch.equal(ops_torch.causal(q, k, v), ops_torch.causal(q, *repeated))


# Checks of the kernels


ORDERED: Any = ModuleType("a way that wants x in an order of its own, by the number of rows")
ORDERED.order_for = lambda rows: nf4.Order.PLANES if rows < 8 else nf4.Order.PIECES


def kind_of(**values: Any) -> kernel_checks.Kind:
    given = {
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 32,
        "hidden": 128,
        "inner": 256,
        "dtype": "float32",
        "device": "cpu",
        "steps": (8, 4),
    }
    return kernel_checks.Kind(**{**given, "planes": False, **values})


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_checks, "_passed", set())


@pytest.mark.usefixtures("unchecked")
def test_kernels_are_compared_once_for_each_kind_of_use() -> None:
    calls: list[int] = []

    def counted(q: Any, *given: Any, **named: Any) -> Any:
        calls.append(len(q))
        return ops_torch.paged_attention(q, *given, **named)

    ops = SimpleNamespace(**vars(ops_torch) | {"paged_attention": counted})
    for _ in range(2):
        kernel_checks.attention(kind_of(), ops)
    assert calls == [18, 18], "with a window and without, once"
    kernel_checks.attention(kind_of(head_dim=16), ops)
    assert len(calls) == 4
    divided = SimpleNamespace(**vars(ops) | {"FUSES": True, "splits_for": lambda rows, heads: 64 // rows})
    kernel_checks.attention(kind_of(kv_heads=4), divided)
    assert len(calls) == 8, "a step's rows decide over how many programs each is divided: another kernel"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["paged_attention", "gated", "add_norm"])
def test_a_wrong_kernel_is_found_each_time(name: str) -> None:
    right = getattr(ops_torch, name)
    ops = SimpleNamespace(**vars(ops_torch) | {name: lambda *given, **named: right(*given, **named) * 1.1})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="differ from plain torch by"):
            kernel_checks.attention(kind_of(), ops)
    kernel_checks.attention(kind_of(), ops_torch)


@pytest.mark.usefixtures("unchecked")
def test_checks_ahead_leave_nothing_to_check_or_their_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import fast_ft.generate.engine

    without_planes: Any = SimpleNamespace(**vars(ops_torch))  # for the card's kernels
    monkeypatch.setitem(sys.modules, "fast_ft.generate.engine.ops_triton", without_planes)
    monkeypatch.setattr(fast_ft.generate.engine, "ops_triton", without_planes, raising=False)
    products: list[int] = []
    monkeypatch.setattr(nf4_linear, "compare_few", lambda way, dtype, device, rows, shapes: products.append(rows))
    monkeypatch.setattr(nf4_linear, "compare_many", lambda dtype, device: products.append(129))
    wanted = kind_of(planes=True, steps=(24,), way=ORDERED)
    found = kernel_checks.ahead(wanted).exception(timeout=PATIENCE)
    assert sorted(products) == [24, 129] and isinstance(found, RuntimeError), "plain torch knows no order"
    assert {name for name, _ in kernel_checks._passed} == {
        "products of 24 rows", "products of many rows", "rope, cache and attention over prompts", "rope over parts",
    }  # fmt: skip
    assert kernel_checks.ahead(kind_of()).exception(timeout=PATIENCE) is None
    kernel_checks.attention(kind_of(), SimpleNamespace(FUSES=False))  # it was done
    kernel_checks.products(wanted)
    assert sorted(products) == [24, 129], "these were done, too"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", ["", "norm", "gate", "parts", "order", "half", "half of many"])
def test_kernels_that_add_parts_and_order_columns_are_compared(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a card's kernels do, here in plain torch: right ones pass, and each fault is found."""
    monkeypatch.setattr(kernel_compare, "_parts", lambda kind, shapes: [2, 4])

    def whole(x: torch.Tensor) -> torch.Tensor:
        lost = int(wrong == "parts" and len(x) == 4)
        return x[lost:].sum(dim=0) if x.dim() == 3 else x

    def ordered(x: torch.Tensor, order: nf4.Order) -> torch.Tensor:
        return nf4.arranged(x, nf4.Order.PLANES if order and wrong == "order" else order)

    def add_norm(
        x: Any, delta: Any, weight: Any, eps: float, *, order: nf4.Order = nf4.Order.ROWS, first: Any
    ) -> torch.Tensor:
        made = ops_torch.add_norm(x, None if delta is None else whole(delta), weight, eps, first=first)
        return ordered(made * (1.1 if wrong == "norm" and order else 1.0), order)

    def gated(x: Any, dtype: Any, *, order: nf4.Order = nf4.Order.ROWS, first: Any) -> torch.Tensor:
        made = ops_torch.gated(whole(x), dtype, first=first) * (1.2 if wrong == "gate" and order else 1.0)
        if wrong == "half" or (wrong == "half of many" and len(made) > TOGETHER):
            first.xa_TR.mul_(1.1)
        return ordered(made, order)

    def paged_attention(*given: Any, order: nf4.Order, **named: Any) -> torch.Tensor:
        return ordered(ops_torch.paged_attention(*given, **named), order)

    def rotate_into_cache(qkv: Any, *given: Any) -> Any:
        return ops_torch.rotate_into_cache(whole(qkv), *given)

    made = {"add_norm": add_norm, "gated": gated, "paged_attention": paged_attention}
    made |= {"FUSES": True, "splits_for": lambda rows, heads: 1}
    ops = SimpleNamespace(**vars(ops_torch) | made | {"rotate_into_cache": rotate_into_cache})
    kind = kind_of(planes=True, way=ORDERED, ranks=(48, 16, 32, 16), steps=(TOGETHER + 1, 8))
    if not wrong:
        kernel_checks.attention(kind, ops)
    else:
        with pytest.raises(RuntimeError, match="differ from plain torch by"):
            kernel_checks.attention(kind, ops)
