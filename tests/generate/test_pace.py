"""A budget of minutes while answers are made: the scheduler's own decisions, with a clock and lengths of the test's."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from fast_ft.common.minutes import AnswerPace
from fast_ft.generate.answers import Answer
from fast_ft.generate.engine.block_manager import BlockManager
from fast_ft.generate.engine.scheduler import Admission, Scheduler, shapes
from fast_ft.generate.engine.sequence import Sequence
from fast_ft.generate.pace import Cuts, shares_longer, told

EOS, MOST = 2, 1024


@dataclass
class Pool:
    """Makes answers as LLMEngine does, by the scheduler's decisions; a token is 1 or EOS, and takes a while.

    A step takes as long as an eighth of the slots at least, so the last answers are made more slowly. `slow` seconds
    are taken by the first steps on top. `decisions` tells what was decided, by the places of the answers in the list.
    """

    rate: float  #: tokens a second with all slots in use
    slots: int = 64
    pages: int = 10_000
    slow: float = 0.0
    now: float = 0.0
    decisions: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def run(
        self, lengths: list[int], pace: AnswerPace | None = None, *, known: dict[int, Answer] | None = None,
        stop_at: float | None = None,
    ) -> list[Sequence]:  # fmt: skip
        """Return the answers' sequences; `lengths` are those of whole answers. Those that are `known` are replayed."""
        there = known or {}
        rows = [
            Sequence([1] * 20, MOST, known=there[index].tokens if index in there else None)
            for index in range(len(lengths))
        ]
        want = dict(zip(rows, lengths, strict=True))
        place = {row: index for index, row in enumerate(rows)}
        look = Cuts(pace, rows, there.values(), MOST, {EOS}).look if pace else None
        scheduler = Scheduler(
            BlockManager(self.pages), shapes(self.slots, planes=True), longest=MOST + 20, end_ids={EOS}
        )
        scheduler.start(rows)
        while (scheduler.waiting or scheduler.live) and (stop_at is None or self.now < stop_at):
            if scheduler.take_finished():
                continue
            decision = scheduler.schedule()
            steps = 1 if isinstance(decision, Admission) else decision.steps
            self.decisions.append((steps, tuple(place[row] for row in decision.sequences)))
            for row in decision.sequences:
                end = want[row] if row.known is None else row.end
                new = [1] * min(steps, min(end, row.end) - len(row.tokens))
                if row.known is None and len(row.tokens) + len(new) == want[row]:
                    new[-1] = EOS
                row.add(new, 1)
            if any(row.known is None for row in decision.sequences):
                self.now += steps * max(len(decision.sequences), self.slots / 8) / self.rate + self.slow
                self.slow = 0.0
            if look:
                look(decision.sequences)
        return rows


def answered(rows: list[Sequence], pace: AnswerPace) -> dict[int, Answer]:
    """What generate() records of the answers that are over."""
    over = {
        index: row for index, row in enumerate(rows) if row.tokens[-1:] == [EOS] or 0 < row.limit <= len(row.tokens)
    }
    return {
        index: Answer(
            str(index), "", len(row.tokens), ended := row.tokens[-1] == EOS, at=pace.elapsed(),
            within=None if ended or len(row.tokens) == MOST else pace.minutes,
        )
        for index, row in over.items()
    }  # fmt: skip


def cut(rows: list[Sequence]) -> list[int]:
    return [len(row.tokens) for row in rows if row.tokens[-1] != EOS]


def drawn(count: int, seed: int = 1, low: int = 100, high: int = 400) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(low, high) for _ in range(count)]


@pytest.mark.parametrize(("minutes", "rate"), [(60, 2000.0), (8, 600.0), (8, 500.0), (5, 600.0)])
def test_answers_that_fit_are_whole_and_so_are_the_base_models_after_them(
    minutes: float, rate: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """640 answers of 250 tokens take 1.4 to 5.5 minutes. At their limit of 1,024 they would not have fitted."""
    pool = Pool(rate)
    pace = AnswerPace(minutes, pool.clock)
    assert cut(pool.run(drawn(640), pace)) == [] and pace.left() > 0
    assert cut(pool.run(drawn(20, seed=2), pace)) == [] and pace.left() > 0
    assert capsys.readouterr().err == "", "nothing is said of what did not happen"


def test_each_run_of_the_engine_has_its_own_speed() -> None:
    """Out of memory: the answers that were not over are made again, by fewer slots. Known ones are replayed first."""
    pool, lengths = Pool(2000.0), drawn(640)
    pace = AnswerPace(3, pool.clock)
    known = answered(pool.run(lengths, pace, stop_at=60.0), pace)
    assert 300 < len(known) < 600 and not any(each.within for each in known.values())
    again = Pool(2000.0, slots=56, now=pool.now + 20)
    pace.clock = again.clock
    assert cut([row for row in again.run(lengths, pace, known=known) if row.known is None]) == []
    assert pace.left() > 0


@pytest.mark.parametrize("slow", [0.0, 5.0])
@pytest.mark.parametrize(("share", "slots"), [(0.9, 64), (0.6, 64), (0.5, 8), (0.2, 8), (0.3, 1)])
def test_answers_that_do_not_fit_are_cut_where_all_of_them_end_in_time(
    share: float, slots: int, slow: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """`slow` is what the first steps take to compile: no answer is cut to a stub for that."""
    lengths = drawn(150)
    whole = Pool(600.0, slots)
    whole.run(lengths)
    pool = Pool(600.0, slots, slow=slow)
    pace = AnswerPace(share * whole.now / 60, pool.clock)
    rows = pool.run(lengths, pace)
    assert pace.is_kept() and pool.now > 0.93 * pace.minutes * 60, "the minutes are kept, and used"
    shortest, longest = min(cut(rows)), max(cut(rows))
    assert shortest > 0.5 * share * 250 - 9, "a share of the mean length"
    said = capsys.readouterr().err
    assert said.count("warning: answers of up to 1024 new tokens will not end within") == 1
    assert any(f"the first one at {length} new tokens" in said for length in cut(rows))
    (told_,) = told(pace, answered(rows, pace).values(), "answers")
    assert f"{len(cut(rows))} of 150 answers were cut, at {shortest} to {longest} new tokens" in told_
    assert told_.endswith(f"What would fit: generate.max_new_tokens={shortest}, or more minutes")


def test_answers_that_begin_after_the_time_is_over_still_have_a_token() -> None:
    pool = Pool(600.0, slots=4)
    pace = AnswerPace(1, pool.clock)
    pool.now += 100
    rows = pool.run(drawn(10), pace)
    assert cut(rows) == [1] * 10
    (said,) = told(pace, answered(rows, pace).values(), "answers")
    assert "10 of 10 answers were cut, at 1 new token:" in said and said.endswith("What would fit: more minutes")


@pytest.mark.parametrize(("pages", "stop_at"), [(10_000, 20.0), (10_000, 45.0), (400, 30.0)])
def test_a_replay_decides_as_the_run_before_did_though_that_one_was_cut(pages: int, stop_at: float) -> None:
    """The answers of a stopped run, cut ones among them, are replayed without the clock that cut them.

    With 400 pages sequences are preempted.
    """
    lengths = drawn(200)
    first = Pool(600.0, pages=pages)
    pace = AnswerPace(1, first.clock)
    known = answered(first.run(lengths, pace, stop_at=stop_at), pace)
    assert 20 < sum(each.within is not None for each in known.values()) <= len(known) < 200
    again = Pool(600.0, pages=pages)
    again.run(lengths, known=known)
    assert again.decisions[: len(first.decisions)] == first.decisions


def test_the_share_of_longer_answers_counts_those_that_have_not_ended() -> None:
    shares = shares_longer(Counter({2: 2, 4: 1}), Counter({1: 1, 3: 2, 4: 2}), 8)
    assert shares == pytest.approx([1, 1, 5 / 7, 5 / 7, *[5 / 7 * 2 / 3] * 4])


def test_earlier_sessions_count_once() -> None:
    now = 1000.0
    pace = AnswerPace(30, lambda: now)
    now += 60  # the model is loaded
    pace.resume(900)  # the adapter's answers were made by then
    assert pace.elapsed() == 960
    pace.resume(1020)  # and some of the base model's
    assert pace.elapsed() == 1080
    pace.resume(0)
    assert pace.elapsed() == 1080
