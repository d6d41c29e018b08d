"""data/curriculum.py: which rows each stage holds, in what order, and with which training arguments."""

import pyarrow as pa
import pytest

from fast_ft.common.console import labelled
from fast_ft.common.errors import InputError
from fast_ft.data.curriculum import alike_stages, build_stages, metrics_needed, stage_spreads
from fast_ft.data.examples import Pool
from fast_ft.data.selection import select
from fast_ft.recipe.schema import Curriculum, Select, Train

TRAIN = Train(num_train_epochs=3, learning_rate=1e-4)


def stages(section, lengths=(40, 10, 30, 20), scores=None, limit=None):
    """Build stages over rows of these many words; ids are the number of words, ranks the longest first."""
    count = len(lengths)
    columns = {
        "id": [f"{length}" if lengths.count(length) == 1 else f"{length}-{n}" for n, length in enumerate(lengths)],
        "prompt": [f"Question {n}?" for n in range(count)],
        "response": [" ".join(f"w{n}x{i}" for i in range(length)) for n, length in enumerate(lengths)],
        "score": pa.array(scores or [None] * count, pa.float64()),
    }
    chosen = select(
        Pool(pa.table(columns), "rows.json", "0"),
        Select(rank_by={"response_words": 1.0}),
        seed=0,
        limit=None,
        also_measure=metrics_needed(section),
    )
    return build_stages(section, TRAIN, chosen, limit)


def ids(found):
    return {stage.name: [example.id for example in stage.examples] for stage in found}


def section(*specs, **keys):
    return Curriculum(stages=[{"name": name, **spec} for name, spec in specs], **keys)


def test_no_stages_mean_one_in_rank_order():
    found = stages(Curriculum())
    assert ids(found) == {"all": ["40", "30", "20", "10"]}
    assert (found[0].num_train_epochs, found[0].learning_rate, found[0].order) == (3, 1e-4, "shuffled")
    assert metrics_needed(Curriculum()) == []


def test_cumulative_and_disjoint_quantiles():
    specs = ("easy", {"upto": 0.5}), ("all", {"upto": 1.0})
    assert ids(stages(section(*specs))) == {"easy": ["10", "20"], "all": ["10", "20", "30", "40"]}
    assert ids(stages(section(*specs, cumulative=False))) == {"easy": ["10", "20"], "all": ["30", "40"]}


def test_a_third_of_a_hundred_is_34_rows():
    found = stages(section(("easy", {"upto": 0.34}), ("all", {"upto": 1.0})), tuple(range(1, 101)), limit=100)
    assert [len(stage.examples) for stage in found] == [34, 100]
    assert found[0].examples == found[1].examples[:34]


def test_ties_keep_file_order():
    assert ids(stages(section(("half", {"upto": 0.5})), (7, 5, 7, 7))) == {"half": ["5", "7-0"]}


def test_where_stages_are_cumulative_or_disjoint_too():
    specs = ("short", {"where": {"response_words": "<= 20"}}), ("long", {"where": {"response_words": ">= 20"}})
    assert ids(stages(section(*specs))) == {"short": ["10", "20"], "long": ["10", "20", "30", "40"]}
    assert ids(stages(section(*specs, cumulative=False))) == {"short": ["10", "20"], "long": ["30", "40"]}
    assert metrics_needed(section(("a", {"where": {"ends_cleanly": True}}))) == ["response_words", "ends_cleanly"]


def test_a_stage_may_override_the_training_arguments():
    spec = {"upto": 1.0, "num_train_epochs": 13, "learning_rate": 2e-5, "order": "ascending"}
    (found,) = stages(section(("all", spec)))
    assert (found.num_train_epochs, found.learning_rate, found.order) == (13, 2e-5, "ascending")


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([("a", {"upto": 0.1})], "a: it holds none of the 4 selected rows"),
        ([("a", {"where": {"response_words": "> 99"}})], "a: it holds none"),
        ([("a", {"upto": 0.9}), ("b", {"upto": 0.5})], "b.upto: 0.5 is below an earlier stage's 0.9"),
        ([("a", {"upto": 0.5, "where": {"response_words": 10}})], "a: both upto and where"),
        ([("a", {"upto": 0.5}), ("a", {"upto": 1.0})], "two are called 'a'"),
        ([("a", {"where": {"response_words": "=> 3"}})], "Allowed:"),
    ],
)
def test_impossible_stages_are_named(specs, words):
    with pytest.raises(InputError) as caught:
        stages(section(*specs))
    assert words in str(caught.value)


def test_disjoint_stages_leave_none_for_a_repeat():
    with pytest.raises(InputError, match="b: it holds none"):
        stages(section(("a", {"upto": 1.0}), ("b", {"upto": 1.0}), cumulative=False))


def test_rows_without_the_metric_are_refused():
    with pytest.raises(InputError, match=r"curriculum\.by: 1 of 4 selected rows have no score"):
        stages(section(("a", {"upto": 1.0}), by="score"), scores=[1.0, 2.0, None, 3.0])


def test_the_limit_counts_distinct_rows_over_all_stages():
    specs = ("easy", {"upto": 0.5}), ("all", {"upto": 1.0})
    assert len(stages(section(*specs), limit=4)) == 2
    with pytest.raises(InputError, match=r"4 rows over all stages, where data\.max_train_rows allows 3"):
        stages(section(*specs), limit=3)


def spread(section, lengths):
    """The spreads of stages over rows of these many words, and what is said of them."""
    found = stages(section, lengths)
    rows = [{"id": str(length), "response_words": length} for length in lengths]

    class Rows:
        pool = Pool(pa.table({"response_words": list(lengths)}), "rows.json", "0")

    Rows.rows = rows
    spreads = stage_spreads(section, Rows, found)
    return spreads, list(alike_stages(section, spreads))


def test_a_stage_is_described_by_the_rows_that_it_adds():
    specs = ("easy", {"upto": 0.5}), ("all", {"upto": 1.0})
    for cumulative in (True, False):
        (easy, all_), said = spread(section(*specs, cumulative=cumulative), (30, 40, 50, 60, 70, 100))
        assert tuple(easy) == ("easy", 3, 30, 40, 50, None) and tuple(all_) == ("all", 3, 60, 70, 100, 0.0)
        assert said == []
    assert all_.sentence("response_words") == (
        "3 rows that no stage before has: response_words: 60 to 100, median 70; 0% within the range before"
    )
    _, said = spread(section(*specs), (30, 40, 50, 51, 52, 53))
    assert len(said) == 1 and said[0].startswith("warning: curriculum.stages: stages easy and all hardly differ")
    assert "are 40 and 52, less than 1.5 times apart" in said[0]
    assert labelled(said[0]) == said[0] and labelled("a row is gone") == "note: a row is gone"
    assert spread(section(*specs), (1, 2, 3, 4, 5, 6))[1] == [], "a few words say nothing of how hard a row is"
    specs = ("a", {"where": {"response_words": "30..60"}}), ("b", {"where": {"response_words": "40..100"}})
    (_, other), _ = spread(section(*specs, cumulative=False), (30, 40, 60, 100))
    assert other.rows == 1 and other.overlap == 0.0


def test_a_recipe_with_one_stage_has_no_spreads():
    assert spread(Curriculum(), (30, 40))[0] == []
