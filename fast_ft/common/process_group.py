"""Several processes that train one recipe together, as torchrun and `accelerate launch` start them: who is who.

Process 0 is the run: it has the folder, the log, the terminal, and all that follows training. The others compute their
share of each batch (plan/micro_batches.py) and write nothing (train/worker.py). Every process has one GPU, or none has.

What a launcher puts into the environment is read once and taken out of it (common/environment.py). transformers,
accelerate and Unsloth would wrap the model and divide the batches again; this way each sees one process with one GPU,
as without a launcher.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import socket
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fast_ft.common import environment
from fast_ft.common.console import note
from fast_ft.common.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_TIMEOUT = dt.timedelta(minutes=30)  #: of one exchange: a checkpoint onto a slow Drive lies in between
_CONNECT = dt.timedelta(hours=12)  #: until process 0 has something to train: it may have to fetch the model
_WARM_UP = 2**22  #: numbers; with few, NCCL takes smaller buffers than with a gradient
_BEGIN, _ENDED = "fast_ft/begin", "fast_ft/ended"


class Lost(Exception):
    """Another process of this training is gone."""

    def __init__(self) -> None:
        super().__init__("another process of this training has ended")


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    """Turn torch's errors of a broken connection into Lost."""
    try:
        yield
    except RuntimeError as error:
        raise Lost from error


class Ranks:
    """This process's place among those that train together: number `rank` of `size`. Alone, everything is a no-op.

    All processes call `begin` and the methods below it at the same points, in the same order. These raise Lost where
    another process is gone.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._store: Any = None
        self._begun = False

    @property
    def first(self) -> bool:
        """Whether this is process 0, which is the run."""
        return self.rank == 0

    def begin(self) -> bool:
        """Join all processes, once process 0 calls this too. False: process 0 had nothing to train, and has ended."""
        if self.size == 1:
            return True
        import torch

        with contextlib.nullcontext() if self.first else _lost():  # process 0 may be gone already
            store = self._connected()
            if self.first:
                store.set(_BEGIN, "yes")
            while not store.check([_BEGIN]):
                time.sleep(0.1)
            if store.get(_BEGIN) != b"yes":
                return False
        self._begun = True
        on_card = torch.cuda.is_available()
        self._check_cards(store, on_card)
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_card else "gloo",
            store=torch.distributed.PrefixStore("fast_ft/group", store),
            rank=self.rank,
            world_size=self.size,
            timeout=_TIMEOUT,
            device_id=torch.device("cuda", 0) if on_card else None,
        )
        if on_card:  # so that what NCCL takes of the card is taken before anybody plans with the rest
            self.sum(torch.zeros(_WARM_UP, device="cuda"))
            torch.cuda.synchronize()
        return True

    def end(self) -> None:
        """Tell the others that process 0 has ended, or that there is nothing to train and they may end too."""
        if self.size == 1 or not self.first:
            return
        with contextlib.suppress(RuntimeError, OSError):  # the launcher is gone, and so are they
            store = self._connected(dt.timedelta(seconds=20))
            if not self._begun:
                store.set(_BEGIN, "no")
            store.set(_ENDED, "yes")

    def ended(self, within: float) -> bool:
        """Wait up to `within` seconds for process 0's `end`; return whether it came, or process 0 is gone."""
        until = time.monotonic() + within
        try:
            while not (there := self._connected().check([_ENDED])) and time.monotonic() < until:
                time.sleep(0.1)
        except (RuntimeError, OSError):
            return True
        return there

    def leave(self) -> None:
        """End the exchange: what follows is process 0's alone."""
        if self.size > 1:
            import torch

            torch.distributed.destroy_process_group()

    def share(self, value: object) -> Any:
        """Return process 0's value, which JSON can hold."""
        return value if self.size == 1 else json.loads(self.share_bytes(json.dumps(value).encode()))

    def share_bytes(self, data: bytes, source: int = 0) -> bytes:
        """Return the bytes of process `source`. torch's own exchange of objects would read pickles from the network."""
        if self.size == 1:
            return data
        import torch

        own = self.rank == source
        length = torch.tensor([len(data) if own else 0])
        with _lost():
            torch.distributed.broadcast(length, source)
            whole = bytearray(data) if own else bytearray(int(length))
            if whole:
                torch.distributed.broadcast(torch.frombuffer(whole, dtype=torch.uint8), source)
        return bytes(whole)

    def agree(self, problem: str | None = None) -> None:
        """Raise InputError in all processes if one of them has a problem."""
        who = self.most([0 if problem is None else self.rank + 1])[0] - 1
        if who >= 0 and self.size > 1:
            text = self.share_bytes((problem or "").encode(), who).decode()
            raise InputError(f"process {who} of {self.size}: {text}")

    def most(self, values: Sequence[int]) -> list[int]:
        """Return the largest of all processes' values, for each place."""
        if self.size == 1:
            return list(values)
        import torch

        largest = torch.tensor([int(value) for value in values])
        with _lost():
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return largest.tolist()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        return bool(self.most([flag])[0])

    def sum(self, tensor: Tensor) -> None:
        """Add up all processes' tensors, of one shape, in place. All get the same bits."""
        if self.size > 1:
            import torch

            with _lost():
                torch.distributed.all_reduce(tensor)

    def _connected(self, timeout: dt.timedelta = _CONNECT) -> Any:
        """Return the store through which processes find one another: torchrun's, else process 0's."""
        if self._store is None:
            import torch

            found = torch.distributed.rendezvous("env://", self.rank, self.size, timeout=timeout)
            self._store = next(iter(found))[0]
        return self._store

    def _check_cards(self, store: Any, on_card: bool) -> None:
        """Raise InputError, in all processes, if some have no GPU or two share one."""
        host = f"{socket.gethostname()} {environment.host_rank()}".rstrip()
        card = f"{host}'s GPU {environment.cuda_devices()}" if on_card else ""
        store.set(f"fast_ft/card/{self.rank}", card)
        cards = [store.get(f"fast_ft/card/{rank}").decode() for rank in range(self.size)]
        remedy = "Start as many processes on a host as it has GPUs."
        if any(cards) and not all(cards):
            raise InputError(f"process {cards.index('')} of {self.size} has no GPU, others have one. {remedy}")
        if on_card and len(set(cards)) < self.size:
            twice = next(each for each in cards if cards.count(each) > 1)
            raise InputError(f"{cards.count(twice)} processes would train on {twice}. {remedy}")


ALONE = Ranks()
_here = ALONE  # of the module, since a process has one place from its start to its end; `enter` alone sets it


def here() -> Ranks:
    """Return this process's place, as `enter` found it."""
    return _here


def enter() -> Ranks:
    """Find this process's place by what a launcher says of it, and keep the process to its own GPU.

    Call it before torch is imported. Raises InputError where the launcher's variables make no sense.
    """
    global _here
    said = environment.take_launcher()
    given = said.given
    try:
        rank, size, local = int(given["RANK"] or 0), int(given["WORLD_SIZE"] or 1), int(given["LOCAL_RANK"] or 0)
    except ValueError:
        raise InputError(f"{said}: whole numbers were expected. torchrun sets them; unset them") from None
    if size > 1:
        if not (0 <= rank < size and local >= 0) or not said.master_address:
            raise InputError(
                f"{said}, MASTER_ADDR={said.master_address} are no place among several processes. "
                "Start them with `torchrun --nproc-per-node 2 -m fast_ft RECIPE`, or unset WORLD_SIZE."
            )
        environment.for_process(local)
    elif said.by_accelerate and given["WORLD_SIZE"] is None and said.master_port:
        note("warning: accelerate started one process only, as it does without GPUs: add --multi_gpu, or use torchrun")
    _here = Ranks(rank, size)
    return _here
