"""The scheduler by itself: no model, no torch; every sequence ends, and slots and pages are never overdrawn."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from fast_ft.common.errors import InputError
from fast_ft.generate.engine.block_manager import PAGE, BlockManager, pages_for
from fast_ft.generate.engine.scheduler import BURST, Admission, Scheduler, shapes
from fast_ft.generate.engine.sequence import Sequence


def test_decisions_need_no_torch() -> None:
    code = "import sys, fast_ft.generate.engine.scheduler; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("seed", range(20))
def test_all_sequences_end_within_slots_and_pages(seed: int) -> None:
    draw = random.Random(seed)
    slots, spare = draw.randint(1, 9), draw.randint(0, 12)
    sequences = [Sequence([1] * draw.randint(1, 60), draw.randint(1, 60)) for _ in range(draw.randint(1, 25))]
    pages = max(pages_for(len(each.prompt) + each.limit) for each in sequences) + spare
    scheduler = Scheduler(BlockManager(pages), shapes(slots, planes=False), longest=200, end_ids=(2,))
    scheduler.start(sequences)
    ended: list[Sequence] = []
    while scheduler.waiting or scheduler.live:
        if finished := scheduler.take_finished():
            ended += finished
            continue
        decision = scheduler.schedule()
        steps = 1 if isinstance(decision, Admission) else decision.steps
        assert 1 <= steps <= BURST and 0 < len(scheduler.live) <= slots
        held = [page for each in scheduler.live for page in each.block_table]
        assert len(set(held)) == len(held) and sorted([*held, *scheduler.blocks.free]) == list(range(1, pages + 1))
        for each in decision.sequences:
            assert len(each.block_table) * PAGE >= each.length(0 if isinstance(decision, Admission) else steps)
            made = [draw.choice([2, *[5] * 30]) for _ in range(min(steps, each.limit - len(each.tokens)))]
            each.add(made[: made.index(2) + 1] if 2 in made else made, 0)
    assert sorted(map(id, ended)) == sorted(map(id, sequences))
    assert sorted(scheduler.blocks.free) == list(range(1, pages + 1))


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
