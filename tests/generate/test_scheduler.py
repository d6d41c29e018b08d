"""The scheduler by itself: no model, no torch; every sequence ends, and slots and pages are never overdrawn."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from fast_ft.common.errors import InputError
from fast_ft.data.shared_start import shared_start
from fast_ft.generate.engine import scheduler as engine_scheduler
from fast_ft.generate.engine.block_manager import PAGE, BlockManager, pages_for
from fast_ft.generate.engine.scheduler import BURST, Admission, Scheduler, shapes
from fast_ft.generate.engine.sequence import Sequence


def test_decisions_need_no_torch() -> None:
    code = "import sys, fast_ft.generate.engine.scheduler; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def drawn(draw: random.Random, begin: list[int]) -> list[Sequence]:
    return [
        Sequence([*begin, *[3 + index] * draw.randint(1, 60)], draw.randint(1, 60))
        for index in range(draw.randint(2, 25))
    ]


@pytest.mark.parametrize("shared", [0, 7, 28, 32, 45])
@pytest.mark.parametrize("seed", range(20))
def test_all_sequences_end_within_slots_and_pages(seed: int, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fast_ft.data.shared_start._WORTH", 1 << 20)
    monkeypatch.setattr(engine_scheduler, "AHEAD", 1)  # so that sequences are preempted, too
    draw = random.Random(seed)
    slots, spare = draw.randint(1, 9), draw.randint(0, 12)
    sequences = drawn(draw, [1] * shared)
    beside = int(shared % PAGE > 0)  # pages of the prefix that are in no sequence's table
    pages = max(pages_for(len(each.prompt) + each.limit) for each in sequences) + beside + spare
    scheduler = Scheduler(BlockManager(pages), shapes(slots, planes=False), longest=200, end_ids=(2,), most_shared=2048)
    scheduler.start(sequences)
    prefix = list(scheduler.prefix.block_table)
    assert scheduler.prefix.prompt == [1] * shared and len(prefix) == pages_for(shared)
    whole = prefix[: shared // PAGE]
    ended: list[Sequence] = []
    fills: list[bool] = []
    while scheduler.waiting or scheduler.live:
        if finished := scheduler.take_finished():
            ended += finished
            continue
        decision = scheduler.schedule()
        steps = 1 if isinstance(decision, Admission) else decision.steps
        assert 1 <= steps <= BURST and 0 < len(scheduler.live) <= slots
        if isinstance(decision, Admission):
            assert decision.prefix is scheduler.prefix
            fills.append(decision.fills)
        own = [page for each in scheduler.live for page in each.block_table[len(whole) :]]
        assert sorted([*prefix, *own, *scheduler.blocks.free]) == list(range(1, pages + 1)), "each page has one owner"
        assert not any(each.block_table for each in scheduler.waiting)
        for each in decision.sequences:
            assert each.block_table[: len(whole)] == whole
            assert len(each.block_table) * PAGE >= each.length(0 if isinstance(decision, Admission) else steps)
            made = [draw.choice([2, *[5] * 30]) for _ in range(min(steps, each.limit - len(each.tokens)))]
            each.add(made[: made.index(2) + 1] if 2 in made else made, 0)
    assert sorted(map(id, ended)) == sorted(map(id, sequences))
    assert sorted(scheduler.blocks.free) == list(range(1, pages + 1))
    assert fills == [shared > 0, *[False] * (len(fills) - 1)], "the first admission fills the cache with the prefix"


def test_prompts_share_what_is_worth_it() -> None:
    def start(*prompts: list[int], most: int = 2048) -> int:
        return shared_start({tuple(each) for each in prompts}, most)

    assert start([1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 3, 9]) == 3
    assert start([1, 2, 3, 4], [1, 2, 3, 4, 5]) == 3, "each has a token of its own, whose logits are wanted"
    assert start([1, 2], [1, 2]) == start([1, 2, 3]) == start() == 0, "there is but one prompt"
    assert start([2, 3, 4], [1, 2, 3]) == start([1] + [2] * 40, [1] + [3] * 40) == 0
    assert start([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], most=3) == 3
    assert start([1, 2, 3, 4], [1, 2, 3, 5], most=0) == 0


@pytest.mark.parametrize(("shared", "pages", "kept"), [(28, 4, 16), (28, 5, 28), (32, 4, 32), (7, 4, 0), (7, 5, 7)])
def test_a_prefix_needs_room_beside_the_longest_sequence(shared: int, pages: int, kept: int) -> None:
    """A page that is not whole is needed twice, once by the prefix and once by the sequence; else it is not shared."""
    sequences = [Sequence([*[1] * shared, 3 + index], 4 * PAGE - shared - 1) for index in range(3)]
    scheduler = Scheduler(BlockManager(pages), [3], longest=200, end_ids=(), most_shared=2048)
    scheduler.start(sequences)
    assert len(scheduler.prefix.prompt) == kept


def test_shared_pages_are_counted_once() -> None:
    """Eight sequences of three pages fit into a cache of 11, since two of the three are everyone's."""
    sequences = [Sequence([*[1] * 32, 3 + index], 9) for index in range(8)]
    for most_shared, admitted in ((0, 3), (2048, 8)):
        scheduler = Scheduler(BlockManager(11), [8], longest=200, end_ids=(), most_shared=most_shared)
        scheduler.start([Sequence(list(each.prompt), each.limit) for each in sequences])
        assert len(scheduler.schedule().sequences) == admitted


def test_a_sequence_that_can_never_fit_is_refused() -> None:
    scheduler = Scheduler(BlockManager(3), [4], longest=100, end_ids=(2,))
    with pytest.raises(InputError, match=r"cache of 48 tokens\. Lower generate\.max_new_tokens"):
        scheduler.start([Sequence([1] * 40, 9)])


def test_the_next_number_of_slots_is_named_before_its_steps_come() -> None:
    """So that a step of each shape can be captured ahead: no burst has a shape that was not named before."""
    scheduler = Scheduler(BlockManager(200), shapes(16, planes=True), longest=200, end_ids=())
    scheduler.start([Sequence([1] * 20, 8 + 3 * index) for index in range(30)])
    named: set[int | None] = set()
    used: list[int] = []
    while scheduler.waiting or scheduler.live:
        if scheduler.take_finished():
            continue
        decision = scheduler.schedule()
        steps = 1
        if not isinstance(decision, Admission):
            assert decision.slots in named and decision.then != decision.slots
            assert decision.then is None or not scheduler.waiting, "slots are filled again while sequences wait"
            used.append(decision.slots)
            steps = decision.steps
        named.add(decision.then)
        for each in decision.sequences:
            each.add([5] * min(steps, each.limit - len(each.tokens)), 0)
    assert set(used) == {16, 8, 2}
