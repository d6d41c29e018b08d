"""What keeps faulty and alike rows out: select.reject, strata, diversify, length_missed; and who can ask why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fast_ft.common.errors import InputError
from fast_ft.data.asked_length import asked_words, missed
from fast_ft.data.dataset import load_pool
from fast_ft.data.examples import Pool
from fast_ft.data.metrics import measure
from fast_ft.data.selection import Selection, select
from fast_ft.data.why import left_out, why
from fast_ft.recipe.lint import lint
from fast_ft.recipe.loader import load_recipe, validated
from fast_ft.recipe.schema import Data, Select

ROOT = Path(__file__).parents[2]
SHARED = Path(__file__).parents[3] / "shared" / "data"


def pool(rows: list[tuple[Any, ...]]) -> Pool:
    """A pool of (prompt, response, score), with ids "0", "1", ..."""
    prompts, responses, scores = zip(*((*row, None)[:3] for row in rows), strict=True)
    columns = {"id": [str(n) for n in range(len(rows))], "prompt": prompts, "response": responses}
    table = pa.table({**columns, "score": pa.array(scores, pa.float64())})
    return Pool(table, "rows.json", "0" * 64)


def chosen(rows: Pool, **keys: Any) -> Selection:
    return select(rows, Select(**{"deduplicate": "none", **keys}), seed=1, limit=None)


def words(count: int) -> str:
    return " ".join(["word"] * count) + "."


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("Write a 300-400 word essay about tea.", (300, 400)),
        ("Write an essay of 500\u2013700 words.", (500, 700)),
        ("Compose a 500-word story.", (500, 500)),
        ("Describe it in about 200 words.", (200, 200)),
        ("Write at least 150 words.", (150, float("inf"))),
        ("with a minimum of 200 words", (200, float("inf"))),
        ("150 words or more", (150, float("inf"))),
        ("no more than 150 words in length", (0, 150)),
        ("In 200 words or less, write a story.", (0, 200)),
        ("title and content in <100 words", (0, 100)),
        ("Write 3 paragraphs of 200 words each.", (600, 600)),
        ("Write four articles with a minimum of 300 words each.", None),  # of each part
        ("a story using these 4 words: carpet, lane", None),
        ("a sentence of 5 words", None),
        ("The year 2019 in words", None),
        ("It costs 1,500 words", None),  # no number is cut in two
        ("Explain tea.", None),
    ],
)
def test_the_length_that_a_prompt_asks_for(prompt: str, asked: tuple[float, float] | None) -> None:
    assert asked_words(prompt) == asked


def test_a_missed_length_is_a_share_of_what_was_asked() -> None:
    found = [missed("Write 200 words.", words(count)) for count in (150, 200, 300)]
    assert found == [0.25, 0.0, 0.5]
    assert missed("At least 200 words.", words(900)) == missed("At most 200 words.", words(9)) == 0.0
    rows = pool([("Write 200 words.", words(100)), ("Write.", words(100)), ("Say it in 100 words", words(100))])
    assert measure(rows, ["length_missed"]).table["length_missed"].to_pylist() == [0.5, 0.0, 0.0]
    assert chosen(rows, where={"length_missed": "<= 0.25"}).indices == [1, 2], "a row that asks for none stays"


REJECTED = pool([
    ("List ways to save.\n\nNo input", "One."), ("Noise inputs", "Two."), ("Hi", "Dear [Your Name],"), ("Ho", "Done."),
    ("noINPUT", ""),
])  # fmt: skip


def test_rows_with_a_pattern_are_left_out_and_counted() -> None:
    found = chosen(REJECTED, reject={"prompt": [r"\bno ?input\b"], "response": [r"\[your name\]"]})
    assert found.indices == [1, 3]
    assert r"select.reject.prompt '\bno ?input\b': 1 row left out." in found.notes, "as the recipe has it"
    assert "1 row with an empty response left out." in found.notes, "no row is counted twice"
    with pytest.raises(InputError, match=r"leaves no row of rows\.json.*pattern of select\.reject"):
        chosen(REJECTED, reject={"response": ["."]})


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"reject": {"prompt": ["ok", "(a"]}}, r"select\.reject\.prompt\.1: '\(a' is no regular expression"),
        ({"reject": {"response": [r"(?=a)"]}}, r"select\.reject\.response\.0: .* is no regular expression"),
        ({"reject": {"response": [""]}}, r"select\.reject\.response\.0: '' is found in nearly every text"),
        ({"method": "stratified", "strata": {"words": 3}}, r"select\.strata\.words: unknown metric"),
        ({"method": "stratified", "strata": {"score": [2, 1]}}, r"select\.strata\.score: .* no rising borders"),
        ({"method": "stratified", "strata": {"score": []}}, r"select\.strata\.score: .* no rising borders"),
    ],
)
def test_a_wrong_pattern_or_border_is_refused_before_any_row_is_read(section: dict[str, Any], said: str) -> None:
    tree = {"model": {"name_or_path": "m"}, "data": {"train": "rows"}, "select": {"take": 3, **section}}
    with pytest.raises(InputError, match=said):
        validated(tree, {}, "recipe")


def test_strata_over_borders_give_equal_shares_and_a_small_part_leaves_its_share() -> None:
    rows = pool([(f"Ask {n}", words(n)) for n in (*range(1, 40), 100, 101)])
    found = chosen(rows, method="stratified", strata={"response_words": [10, 20, 100]}, take=20,
                   rank_by={"response_words": 1.0})  # fmt: skip
    lengths = [row["response_words"] for row in found.rows]
    parts = [[x for x in lengths if low <= x < high] for low, high in ((0, 10), (10, 20), (20, 100), (100, 999))]
    assert [len(part) for part in parts] == [6, 6, 6, 2], "the two long ones are all there are"
    assert parts[1] == [19, 18, 17, 16, 15, 14], "the best ranks of a part first"


def test_strata_over_two_metrics_are_cells() -> None:
    rows = pool([(words(a), words(b), score) for a in (3, 9) for b in (3, 9) for score in (1.0, 2.0, 3.0)])
    found = chosen(rows, method="stratified", strata={"response_words": 2, "prompt_words": [5]}, take=4,
                   rank_by={"score": 1.0})  # fmt: skip
    shown = measure(found.pool, ["prompt_words"]).table
    cells = {(shown["prompt_words"][i].as_py(), shown["response_words"][i].as_py()) for i in found.indices}
    assert len(cells) == 4 and {found.metrics(i)["score"] for i in found.indices} == {3.0}
    assert len(chosen(rows, method="stratified", strata={"score": 3}, take=12).indices) == 12
    with pytest.raises(InputError, match=r"select\.strata.*no row has a value of type_token_ratio and of score"):
        unscored = pool([(f"q{n}", words(n)) for n in range(1, 5)])
        unscored = measure(unscored, ["type_token_ratio"])
        scores = pa.array([None, None, None, 1.0], pa.float64())
        table = unscored.table.set_column(3, "score", scores).set_column(
            unscored.table.column_names.index("type_token_ratio"), "type_token_ratio", pa.nulls(4, pa.float64())
        )
        chosen(Pool(table, "rows.json", "0"), method="stratified", strata={"type_token_ratio": 2, "score": [1]}, take=2)


STORIES = pool([
    ("Write a story of a fox.", "Once upon a time a fox met a hen near the barn."),
    ("Write about bread.", "Bread needs flour, yeast, water and an oven that is hot."),
    ("write a story of a fox and a hen.", "Once upon a time a hen and a fox lived in a barn, with a dog."),
    ("Tell of baking bread.", "Mix flour with yeast and water. Bake the bread in an oven."),
    ("Explain rain.", "Clouds cool, and drops fall down."),
    ("Explain snow.", "Crystals grow in cold clouds, and drift down."),
])  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "taken", "over"),
    [
        ({"verb": 1}, [0, 3, 4], [(1, "verb", 0), (2, "verb", 0), (5, "verb", 4)]),
        ({"verb": 2}, [0, 1, 3, 4, 5], [(2, "verb", 0)]),
        ({"opening": 1}, [0, 1, 3, 4, 5], [(2, "opening", 0)]),
        ({"topic": 1}, [0, 1, 4], [(2, "topic", 0), (3, "topic", 1), (5, "topic", 4)]),
        ({"topic": 1, "topic_similarity": 0.99}, [0, 1, 2, 3, 4, 5], []),
        ({"topic": 2}, [0, 1, 2, 3, 4, 5], []),
    ],
)
def test_few_rows_of_a_kind_are_taken(limits: dict[str, Any], taken: list[int], over: list[tuple[Any, ...]]) -> None:
    found = chosen(STORIES, diversify=limits)
    assert found.indices == taken and [tuple(each) for each in found.passed_over] == over
    assert chosen(STORIES, diversify=limits).indices == taken, "the same rows each time"
    assert len([note for note in found.notes if note.startswith("select.diversify.")]) == len({w for _, w, _ in over})


def test_a_topic_is_led_by_its_first_row_so_that_no_chain_of_likenesses_is_one_topic() -> None:
    chain = pool([
        ("a", "fox hen barn"), ("b", "hen barn milk cow"), ("c", "milk cow bull grass"), ("d", "bull grass meadow sun"),
        ("e", "meadow sun moon"), ("f", "fox moon stars"),
    ])  # fmt: skip
    found = chosen(chain, diversify={"topic": 1, "topic_similarity": 0.3})
    assert 0 in found.indices and 2 in found.indices, "c is like b, which is like a, and c is not of a's topic"


def test_a_duplicate_is_still_a_duplicate_beside_limits_on_kinds() -> None:
    rows = pool([("Write it.", "Done now."), ("Write it!", "Done now"), ("Say it.", "Other words here.")])
    found = chosen(rows, deduplicate="exact", diversify={"verb": 5})
    assert found.duplicates == [("1", "0")] and found.indices == [0, 2]


def test_it_is_said_where_limits_take_out_all_rows_of_the_best_score() -> None:
    rows = pool([("a", words(3), 5.0), ("b", words(4), 5.0), ("c", words(90), 4.5), ("d", "", 9.0)])
    said = "all 2 rows of the best score, 5, left out by these limits; the best score left is 4.5."
    assert said in chosen(rows, where={"response_words": ">= 60"}).notes
    assert not any("best score" in note for note in chosen(rows, where={"response_words": ">= 4"}).notes)


def test_why_a_row_was_not_taken_is_told_step_by_step() -> None:
    section = Select(
        where={"response_words": ">= 2"}, reject={"response": ["crystals"]},
        diversify={"topic": 1}, deduplicate="none", take=3,
    )  # fmt: skip
    found = select(STORIES, section, seed=1, limit=None)

    def steps(row: str) -> list[str]:
        return why(section, found, row)[2]

    assert steps("5")[0] == "left out: select.reject.response 'crystals' is found in it"
    assert (
        steps("2")[-2:]
        == [
            "passed over: select.diversify.topic: enough rows of its topic were taken, the first 0",
            "row 0: Write a story of a fox.",
        ]
        and steps("2")[1] == "rank 3 of 5 rows that could be taken"
    )
    assert steps("0")[-1] == "taken, as one of 3 rows"
    assert [(row.id, row.why, row.like) for row in left_out(section, found)] == [
        ("2", "topic", "0"), ("3", "topic", "1"), ("5", "select.reject.response 'crystals'", None)
    ]  # fmt: skip
    with pytest.raises(InputError, match="--why '9': none of 6 rows has this id"):
        why(section, found, "9")
    few = section.model_copy(update={"take": 1})
    assert (
        why(few, select(STORIES, few, seed=1, limit=None), "4")[2][-1]
        == "not reached: select.take was full, with 1 row"
    )
    narrow = Select(where={"response_words": ">= 11"}, deduplicate="none")
    assert why(narrow, select(STORIES, narrow, seed=1, limit=None), "4")[2] == [
        "left out: response_words is 6, where the recipe asks for >= 11"
    ]


@pytest.mark.skipif(not SHARED.is_dir(), reason="Alpaca's rows are not part of the project")
@pytest.mark.parametrize("name", ["medium", "strong"])
def test_the_homeworks_rows_have_none_of_the_faults_that_were_read_in_them(name: str) -> None:
    section = load_recipe(ROOT / "recipes" / f"{name}.yaml").select
    rows = load_pool(Data(train=str(SHARED / "filtered_alpaca_1k_longest.json")))
    found = select(rows, section, seed=3407, limit=100, also_measure=["length_missed", "response_words"])
    assert len(found.examples) == 100 and all(row["length_missed"] <= 0.25 for row in found.rows)
    texts = [f"{each.prompt}\n{each.response}".lower() for each in found.examples]
    for fault in ("no input", "noinput", "n/a", "[your name", "[insert", "\n2. instruction:"):
        assert not any(fault in text for text in texts), fault
    openings = [" ".join(each.response.lower().split()[:3]) for each in found.examples]
    assert max(map(openings.count, openings)) <= 2
    assert lint(load_recipe(ROOT / "recipes" / f"{name}.yaml")) == ([], [])
