"""The mean loss of rows that training leaves out, measured in passes that become smaller where memory runs out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fast_ft.common import out_of_memory
from fast_ft.common.console import note
from fast_ft.common.errors import InputError
from fast_ft.common.wording import counted
from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow
from fast_ft.plan.micro_batches import cut
from fast_ft.train.forward_backward import Passes


class ValidationLoss:
    """Measures the mean loss of some rows. Rows share a pass as the plan says, and as memory allows.

    The plan stays as it is, so that one of several processes may measure alone.
    """

    def __init__(self, passes: Passes, rows: Sequence[EncodedRow]) -> None:
        self.passes, self.rows = passes, rows
        self.most_rows = len(rows)  #: of a pass: memory ran out over more, now or in an earlier measurement

    def measure(self) -> float:
        """Return the mean loss in nats per trained token, by the weights as they are. Random states stay as they are.

        Where memory runs out, a pass takes half as many rows. Where one row is too much, the graphs of the training
        passes give up their memory; the next step captures them again.

        Raises:
            InputError: A row does not fit into memory by itself.
        """
        lengths, plan = [len(row.input_ids) for row in self.rows], self.passes.plan
        supervised = sum(label != IGNORE_INDEX for row in self.rows for label in row.labels[1:])
        while True:
            pieces = cut(lengths, most_rows=min(plan.micro_batch, self.most_rows), most_tokens=plan.most_tokens)
            try:
                with torch.random.fork_rng(
                    devices=[torch.cuda.current_device()] if self.passes.device == "cuda" else []
                ):
                    return sum(self.passes.measure([self.rows[i] for i in piece]) for piece in pieces) / supervised
            except Exception as error:
                if not out_of_memory.is_short(error):
                    raise
            self._make_room(max(map(len, pieces)), max(lengths))  # outside of the handler, whose error holds much

    def _make_room(self, rows: int, longest: int) -> None:
        """Make room after passes of at most `rows` rows, none of more than `longest` tokens, had too little."""
        if rows > 1:
            self.most_rows = rows // 2
            most = counted(self.most_rows, "row")
            note(f"out of memory: the validation loss is measured again with at most {most} in a pass")
        elif self.passes.drop_graphs():
            note("out of memory: the validation loss is measured again without the graphs of the training passes")
        else:
            raise InputError(
                f"out of memory over one validation row by itself; the longest has {longest:,} tokens. Lower "
                "model.max_length, free the card, or take data.validation out of the recipe"
            )
        out_of_memory.release()
