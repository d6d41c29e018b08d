"""folding.py, shingles.py, duplicates.py: what counts as the same text, and which rows go for which."""

import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_ft.common.errors import InputError
from fast_ft.data import contamination
from fast_ft.data.dataset import load_pool
from fast_ft.data.duplicates import ExactDuplicates, Exchange, NearDuplicates
from fast_ft.data.examples import Pool
from fast_ft.data.folding import fold, ngrams, same_kinds
from fast_ft.data.selection import select
from fast_ft.recipe.loader import load_recipe, resolved, validated
from fast_ft.recipe.schema import Data, Select

CASES = Path(__file__).parents[3] / "shared" / "cases" / "rows"

#: Texts of which no two are the same.
DIFFERENT = [
    ["Write it in C.", "Write it in C++.", "Write it in C#."],
    ["12 + 3", "12 - 3", "12 * 3", "12 / 3", "12 = 3", "12 × 3", "123", "1.23", "12:3", "12,3", "12 3", "12 % 3"],
    ["x=2", "x=±2", "x=-2", "x^2", "x*2", "x_2", "x²", "x!", "x"],
    ["Is x < y?", "Is x > y?", "Is x ≤ y?", "Is x y?"],
    ["Compute 5!", "Compute 5", "Compute (5)!", "Compute 5%", "Compute $5", "Compute √5", "Compute 5'", 'Compute 5"'],
    ["y' = 0", "y'' = 0", "y = 0"],
    ["résumé", "resume", "resumé"],
    ["कि", "की", "क"],
    ["ครู", "คร", "ครุ"],
    [".NET", "NET"],
    ["f(x)", "fx", "f[x]", "f{x}"],
    ["What does ? do", "What does ! do", "What does * do", "What does do"],
    ["👍", "👎", "👍🏽"],
]
#: Texts that are all the same.
SAME = [
    ["Name a river.", "name  a\tRIVER", "Name a river!", "“Name a river”", " Name a river… ", "Name, a river;"],
    ["don't go", "Don’t go."],
    ["Cafe\u0301", "café."],
    ["你好。世界", "你好，世界！", "你 好 世界", "「你好」世界。"],
    ["¿Qué es?", "qué es"],
    ["Bonjour\u00a0!", "Bonjour!", "bonjour"],
    ["هل هذا صحيح؟", "هل هذا صحيح"],
    ["वह घर गया।", "वह घर गया"],
    ["It is 5.", "it is 5", "It is 5?!", '"It is 5."'],
    ["Compute 5!", "compute 5!.", "Compute 5!?"],
    ["a\u200bb", "a b"],
]


@pytest.mark.parametrize("texts", DIFFERENT, ids=range(len(DIFFERENT)))
def test_symbols_digits_signs_and_marks_do_not_fold(texts):
    assert Counter(map(fold, texts)).most_common(1)[0][1] == 1


@pytest.mark.parametrize("texts", SAME, ids=range(len(SAME)))
def test_case_spaces_and_sentence_punctuation_fold(texts):
    assert len({fold(text) for text in texts}) == 1


def test_marks_alone_are_a_text_and_a_fold_is_final():
    assert fold("!?") == "!?" and fold("  Hello,  WORLD! ") == "hello world" and fold("你好。") == "你 好"
    for text in (text for texts in (*DIFFERENT, *SAME) for text in texts):
        assert fold(fold(text)) == fold(text)


def test_a_question_is_no_statement():
    assert not same_kinds("Hello!", "Hello?") and not same_kinds("你好！", "你好？") and not same_kinds("So.", "So?")
    assert same_kinds("Hello!", "Hello.") and same_kinds("Hello", "Hello?")


def test_a_megabyte_of_marks_takes_no_longer_than_other_text():
    assert fold("." * 1_000_000 + "x") == "." * 1_000_000 + "x"


def taken(rows, method, **keys):
    """How many of (prompt, response) rows are taken."""
    table = pa.table(
        {
            "id": [str(n) for n in range(len(rows))],
            "prompt": [row[0] for row in rows],
            "response": [row[1] for row in rows],
            "score": pa.nulls(len(rows), pa.float64()),
        }
    )
    return select(Pool(table, "rows.json", ""), Select(deduplicate=method, **keys), seed=1, limit=None, typed=False)


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")
@pytest.mark.parametrize("method", ["exact", "near"])
@pytest.mark.parametrize(("name", "rows"), [("symbols", 15), ("chinese", 6), ("tickets", 12)])
def test_rows_that_differ_are_all_taken(name, rows, method):
    pool = load_pool(Data(train=str(CASES / f"{name}.json")))
    assert len(select(pool, Select(deduplicate=method), seed=1, limit=None).indices) == rows


LABELS = ("billing", "outage", "contract", "other")
WORDS = [f"word{n}" for n in range(300)]


def tickets(count, tasks=1):
    """Rows of a long instruction, a short text of their own, and one of four labels."""
    draw = random.Random(count)
    above = [f"You are agent {task}. " + " ".join(draw.choices(WORDS, k=50)) for task in range(tasks)]
    return [(f"{above[n % tasks]} {' '.join(draw.choices(WORDS, k=8))}.", LABELS[n % 4]) for n in range(count)]


@pytest.mark.parametrize(("count", "tasks"), [(12, 1), (500, 1), (500, 20), (40, 4), (4, 1)])
def test_an_instruction_that_many_rows_share_tells_nothing(count, tasks):
    assert len(taken(tickets(count, tasks), "near").indices) == count


def test_what_all_answers_begin_with_tells_nothing_either():
    draw = random.Random(3)
    thanks = "Thank you for your message. We are sorry to hear of this, and will see to it at once. "
    rows = [(" ".join(draw.choices(WORDS, k=9)), thanks + " ".join(draw.choices(WORDS, k=5))) for _ in range(60)]
    assert len(taken(rows, "near").indices) == 60


def test_near_compares_prompt_and_response():
    draw = random.Random(5)
    text, other, question = (" ".join(draw.choices(WORDS, k=40)) for _ in range(3))
    rows = [(question, text), (question, other), (question + " please", text + " indeed"), ("Else?", text)]
    found = taken(rows, "near")
    assert found.indices == [0, 1, 3]
    assert found.duplicates == [("2", "0")]
    assert "1 near-duplicate skipped: 2 (like 0)." in found.notes
    assert taken(rows, "exact").indices == [0, 1, 2, 3]


def test_near_duplicates_in_a_script_without_spaces():
    text = "月亮的引力使海水涨落，太阳也有影响，每天两次涨潮，两次退潮"
    rows = [
        ("海潮是什么？", f"{text}。"),
        ("说说海潮。", f"{text}了。"),
        ("河流呢？", "带来泥沙和养分。"),
    ]
    assert taken(rows, "near").indices == [0, 2]


def test_many_near_duplicates_are_said_and_most_stop():
    draw = random.Random(7)
    texts = [" ".join(draw.choices(WORDS, k=60)) for _ in range(20)]
    rows = [(f"Question {n}", text) for n, text in enumerate(texts)]
    twice = [*rows, *((prompt, text + " more") for prompt, text in rows[:4])]
    assert any(
        text.startswith("warning: 4 of 24 rows (17%) are near-duplicates") for text in taken(twice, "near").notes
    )
    thrice = [*rows, *((prompt, f"{text} {end}") for prompt, text in rows for end in ("more", "again"))]
    with pytest.raises(InputError, match=r"select.deduplicate: 40 of 60 rows \(67%\).*select.deduplicate=near on the"):
        taken(thrice, "near")
    equal = [*rows, *rows, *rows]
    assert len(taken(equal, "near").indices) == 20, "exact duplicates are no reason to stop"
    assert not any("WARNING" in text for text in taken(equal, "near").notes)


def test_who_types_the_method_is_not_stopped():
    assert not load_recipe("recipes/quickstart.yaml").typed("select.deduplicate")
    typed = load_recipe("recipes/quickstart.yaml", ["select.deduplicate=near"])
    assert typed.typed("select.deduplicate") and not typed.typed("select.take")
    again = validated(json.loads(json.dumps(resolved(typed))), {}, "a run's recipe")
    assert again.typed("select.deduplicate"), "a run that goes on was let through already"


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), max_size=8), st.sampled_from([0.3, 0.6, 1.0])
)
def test_the_gram_index_finds_what_comparing_all_pairs_finds(texts, threshold):
    rows = [Exchange(" ".join(text[::-1]), " ".join(text)) for text in texts]
    sides = [[ngrams(text.split(), 5) for text in side] for side in zip(*dict.fromkeys(rows), strict=True)]
    held = [Counter(gram for grams in side for gram in grams) for side in sides]

    def alike(which, one, other):
        own = [{(s, g) for s in which for g in sides[s][row] if held[s][g] <= 3} for row in (one, other)]
        full = [{(s, g) for s in which for g in sides[s][row]} for row in (one, other)]
        a, b = own if all(own) else full
        return len(a & b) / len(a | b)

    kept: list[int] = []
    for row in range(len(dict.fromkeys(rows))):
        # A pair without a gram of their own in common is not compared: only texts of many rows could make it alike.
        linked = [k for k in kept if any(g for s in (0, 1) for g in sides[s][row] & sides[s][k] if held[s][g] <= 3)]
        if not any(alike((1,), row, k) >= threshold and alike((0, 1), row, k) >= threshold for k in linked):
            kept.append(row)
    near = NearDuplicates(rows, threshold)
    assert sum(near.add(place, row) is None for place, row in enumerate(rows)) == len(kept)


def test_exact_duplicates_name_the_row_they_are_like():
    exact = ExactDuplicates()
    rows = [Exchange("Hi", "Hello!"), Exchange("hi.", "hello"), Exchange("Hi", "Hello?"), Exchange("Hi", "Hello.")]
    assert [exact.add(n, row) for n, row in enumerate(rows)] == [None, 0, None, 0]


def test_the_contamination_check_folds_in_the_same_way():
    assert contamination.text_digest("Solve 12 + 3.") != contamination.text_digest("Solve 12 - 3.")
    assert contamination.text_digest("Where is it?") == contamination.text_digest("“where  is it”")
