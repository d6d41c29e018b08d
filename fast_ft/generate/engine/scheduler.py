"""Which sequences are admitted, decoded or preempted next. Pure: lengths in, decisions out; no torch.

    waiting -> admitted (prefill, several prompts a pass) -> live -> bursts of 8 steps -> finished
                  ^                                            |
                  +------- preempted when no page is left -----+

The tokens with which all prompts begin, such as those of a template or a system prompt, are the prefix. They are
computed once, with the first sequences that are admitted, and lie in pages that all sequences share.

Every decision follows from the sequences' prompts and lengths alone, never from timing. So a run that was stopped is
replayed: sequences whose answers are known already keep their places and lengths.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from fast_ft.common.errors import InputError
from fast_ft.data.shared_start import shared_start
from fast_ft.generate.engine.block_manager import PAGE, BlockManager, pages_for
from fast_ft.generate.engine.sequence import Sequence

BURST = 8  #: steps between two looks at the tokens
#: New tokens for which a sequence is given room when it is admitted. Sequences of all ages share the cache, and what
#: ends makes room for what grows, so few are best (of 1 to 384, replayed with answers of 100 to 1,024 tokens). Where
#: that was too hopeful, the youngest sequence is preempted, and its tokens are prefilled again.
AHEAD = 32
_SMALLEST = 4  #: slots
#: Slots of steps whose 4-bit weights are decoded in registers. On an H200 a step of 63 slots takes 6 ms, one of 32
#: slots 4.5 and one of 8 slots 3.4. Steps of 56 and 40 slots saved less than their captures cost, so each shape has a
#: fifth fewer slots than the one before, or less. The last of long answers are often alone.
_EIGHTS = (96, 64, 48, 32, 24, 16, 8, 2)
_GROUPS = 8  #: of sequences that are admitted at once fill the slots


@dataclass(frozen=True)
class Admission:
    """What to do next: fill the cache with these sequences' tokens, and draw the next token of each.

    All of them begin with the `prefix`, which is in the cache already unless this admission `fills` it. `then` is the
    number of slots that the next steps will likely have.
    """

    sequences: list[Sequence]
    prefix: Sequence
    fills: bool
    then: int


@dataclass(frozen=True)
class Burst:
    """What to do next: make `steps` tokens for each of these sequences, in steps of `slots` slots.

    `then` is the number of slots that later steps will likely have, if it is another one; while sequences wait for a
    slot (`others_wait`), it is not.
    """

    sequences: list[Sequence]
    steps: int
    slots: int
    then: int | None = None
    others_wait: bool = False


class Scheduler:
    """Decides for `slots` sequences at a time. `shapes` are the numbers of slots that a step may have.

    A prefix has at most `most_shared` tokens.
    """

    def __init__(
        self, blocks: BlockManager, shapes: list[int], *, longest: int, end_ids: Collection[int], most_shared: int = 0
    ) -> None:
        self.blocks, self.shapes, self.slots = blocks, shapes, shapes[0]
        self.longest, self.end_ids, self.most_shared = longest, end_ids, most_shared
        self.waiting, self.live = deque[Sequence](), list[Sequence]()
        self.prefix, self._fills = Sequence([], 0), False

    def start(self, sequences: list[Sequence]) -> None:
        """Take sequences up, and forget former ones. InputError where one is too long for the cache."""
        for sequence in sequences:
            need = len(sequence.prompt) + sequence.limit
            if need > self.longest or pages_for(need) > self.blocks.pages:
                raise InputError(
                    f"a prompt of {len(sequence.prompt)} tokens and {sequence.limit} new ones do not fit into the "
                    f"pool's cache of {self.blocks.pages * PAGE} tokens. Lower generate.max_new_tokens, or free memory "
                    "on the card."
                )
        self.blocks.clear()
        self.waiting, self.live = deque(sequences), []
        self.prefix = self._prefix(sequences)
        self.blocks.share(self.prefix)
        # A replay computes the prefix in the pass in which it was computed at first, even if those answers are known.
        self._fills = bool(self.prefix.prompt) and any(each.known is None for each in sequences)

    def take_finished(self) -> list[Sequence]:
        """Take out the sequences that are finished, give their pages back, and return them.

        Asked before each decision: a limit may have been lowered since, that of a waiting sequence too.
        """
        finished = [each for each in (*self.live, *self.waiting) if self.is_finished(each)]
        for sequence in finished:
            self.blocks.release(sequence)
        if finished:
            self.live = [each for each in self.live if each not in finished]
            self.waiting = deque(each for each in self.waiting if each not in finished)
        if not (self.live or self.waiting):
            self.blocks.end_sharing(self.prefix)
        return finished

    def schedule(self, burst: int = BURST, slots: int | None = None) -> Admission | Burst:
        """Return what to do next. Some sequence must wait or be live, and take_finished must have been called.

        `burst` is the most steps between two looks; `slots` fixes a step's shape.
        """
        if admitted := self._admit():
            self.live += admitted
            fills, self._fills = self._fills, False
            return Admission(admitted, self.prefix, fills, then=slots or self.shape_for(len(self.live)))
        steps = min(burst, BURST, max(each.limit - len(each.tokens) for each in self.live))
        self._make_room(steps)
        shape = slots or self.shape_for(len(self.live))
        fewer = None if self.waiting or slots else next((few for few in self.shapes if few < shape), None)
        return Burst(self.live, steps, shape, then=fewer, others_wait=bool(self.waiting))

    def is_finished(self, sequence: Sequence) -> bool:
        """Return whether a sequence has ended, by an end token or at its limit."""
        if sequence.known is None and sequence.tokens and sequence.tokens[-1] in self.end_ids:
            return True
        return len(sequence.tokens) >= sequence.end

    def shape_for(self, count: int) -> int:
        """Return the smallest of the shapes that holds `count` sequences."""
        return next(slots for slots in reversed(self.shapes) if slots >= count)

    def _prefix(self, sequences: list[Sequence]) -> Sequence:
        """Return the tokens with which all prompts begin, as a sequence; an empty one where there is nothing to gain.

        A last page that is not a whole one needs room beside the longest sequence. Without that room only whole pages
        are shared, which each sequence needs anyway.
        """
        shared = shared_start({tuple(each.prompt) for each in sequences}, self.most_shared)
        most = max((pages_for(len(each.prompt) + each.limit) for each in sequences), default=0)
        if most == self.blocks.pages:
            shared = shared // PAGE * PAGE
        return Sequence(sequences[0].prompt[:shared] if shared else [], 0)

    def _admit(self) -> list[Sequence]:
        """Take sequences from the front while there is a slot and room for what they and the live ones may come to.

        Several at a time, since a pass over one prompt takes nearly as long as one over eight: as long as sequences
        are live, an eighth of the slots must be free at once, or enough for all that wait.
        """
        shared = len(self.blocks.shared)
        held = len(self.prefix.block_table)
        held += sum(max(_room(each), len(each.block_table)) - shared for each in self.live)
        count = 0
        for sequence in self.waiting:
            held += _room(sequence) - shared
            if len(self.live) + count == self.slots or (held > self.blocks.pages and (self.live or count)):
                break
            count += 1
        if self.live and count < min(len(self.waiting), self.slots // _GROUPS):
            return []
        admitted = [self.waiting.popleft() for _ in range(count)]
        for sequence in admitted:
            self.blocks.grow(sequence, sequence.length())
        return admitted

    def _make_room(self, steps: int) -> None:
        """Give each live sequence pages for its next steps, the oldest first; without pages, preempt the youngest."""
        for sequence in list(self.live):
            while sequence in self.live and not self.blocks.grow(sequence, sequence.length(steps)):
                self._preempt()

    def _preempt(self) -> None:
        """Let the youngest sequence wait again, at the front."""
        youngest = self.live.pop()
        self.blocks.release(youngest)
        self.waiting.appendleft(youngest)


def shapes(slots: int, *, planes: bool) -> list[int]:
    """Return the numbers of slots that steps may have: a few, since each is captured; the largest comes first.

    Products of few rows are compiled for eights of rows, so these are the same in every run.
    """
    if planes:
        return [slots, *(few for few in _EIGHTS if 5 * few <= 4 * slots)]
    found = [slots]
    while (fewer := (found[-1] + 1) // 2) >= _SMALLEST:
        found.append(fewer)
    return found


def _room(sequence: Sequence) -> int:
    """Return the pages that are held free for a sequence when others are admitted, shared ones included."""
    ahead = max(len(sequence.tokens) + BURST, AHEAD)
    return pages_for(len(sequence.prompt) + min(sequence.limit, ahead))
