"""Limits that every compared process runs under: memory as on a T4, and with `--emulate t4` a T4-class processor.

An emulation has a T4's class of arithmetic and a T4's memory, not its bandwidth, caches or instructions: it yields
ratios between ways of doing the same work, never minutes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.process import card_to_itself
from fast_ft.common import gpu, gpu_rates
from fast_ft.hub.families import GIB

T4_GIB = 14.7  #: usable on a T4, the process's context included
LABEL = "T4-class emulation, not a T4"


class Limits:
    """One process's limits. `cap_gib` (0: none) includes the CUDA context; `sms` None is the whole card.

    turn: the path, without its end, of the files by which `bench.best_peer` lets processes load and measure in turn.
    """

    def __init__(self, cap_gib: float, sms: int | None, t4_attention: bool, turn: str | None = None) -> None:
        self.cap_gib, self.sms, self.t4_attention = cap_gib, sms, t4_attention
        self._turn = turn
        self._card = contextlib.ExitStack()
        self.context_gib = 0.0
        self.rates: dict[str, Any] = {}
        self._kept: Any = None

    def may_load(self) -> None:
        """Say that all is imported, and wait until this process may load its model beside others that do."""
        self._wait_for("load")
        self._card.enter_context(card_to_itself(beside_others=True))

    def take_turn(self) -> None:
        """Wait until this process may use the card: for its turn, and for the lock that GPU_LOCK names, if it does."""
        self._card.close()
        self._wait_for("turn")
        self._card.enter_context(card_to_itself())

    def _wait_for(self, gate: str) -> None:
        """Say by a file that this process stands at a gate; wait until another file opens it."""
        if self._turn is None:
            return
        Path(f"{self._turn}.at-{gate}").touch()
        while not Path(f"{self._turn}.{gate}").exists():
            time.sleep(0.02)

    def end_turn(self) -> None:
        """Let others use the card: all that is timed is done."""
        self._card.close()

    def begin(self) -> None:
        """Cap the allocator and choose attention; with `sms`, make the limited stream. Before a model computes."""
        import torch

        if not torch.cuda.is_available():
            return
        self.context_gib = own_context_gib()
        if self.cap_gib:
            gpu.cap_gpu_gib(self.cap_gib)
        if self.t4_attention:
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_cudnn_sdp(False)
        if self.sms is not None:
            from bench.sm_limit import limit_sms

            self._kept = limit_sms(self.sms)
            torch.cuda.set_stream(torch.cuda.default_stream())
        with self.stream():
            self.rates = measured_rates()

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Work on the limited stream, if there is one; models are loaded outside of it, on all of the card.

        Entering and leaving waits for the work on either stream: the streams do not wait for one another.
        """
        if self._kept is None:
            yield
            return
        import torch

        torch.cuda.synchronize()
        torch.cuda.set_stream(self._kept[1])
        try:
            yield
        finally:
            torch.cuda.synchronize()
            torch.cuda.set_stream(torch.cuda.default_stream())

    def to_json(self) -> dict[str, Any]:
        """Return limits, rates and memory; at the end, since a context grows with the kernels in it."""
        import torch

        if not torch.cuda.is_available():
            nothing = {"context_gib": 0.0, "context_after_gib": 0.0, "peak_reserved_gib": 0.0}
            return {"cap_gib": None, "sms": None, "rates": {}, **nothing}
        return {
            "cap_gib": self.cap_gib or None,
            "sms": self.sms,
            "sms_got": self._kept[2] if self._kept else None,
            "flash_and_cudnn_attention": not self.t4_attention,
            "context_gib": round(self.context_gib, 3),
            "context_after_gib": round(own_context_gib(), 3),
            "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
            "rates": self.rates,
        }


def own_context_gib() -> float:
    """Return the GiB of this process's CUDA context. Processes that wait for their turn have contexts too.

    The driver says what each process holds. Where it does not, all that is held outside of our allocator counts.
    """
    import torch

    held = gpu.context_gib()
    try:
        import pynvml  # of nvidia-ml-py, where it is installed

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        used = {each.pid: each.usedGpuMemory for each in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
        own = used[os.getpid()] - torch.cuda.memory_reserved()
    except Exception:  # no package, no right to ask, or another name for this process inside a container
        return held
    return min(held, float(own) / GIB)


def measured_rates() -> dict[str, float]:
    """Return TFLOP/s of a large fp16 product, GB/s of a copy and microseconds of a launch, on the current stream."""
    import torch

    found = gpu_rates.measure()
    assert found is not None, "there is a card"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return {
        "tflops": round(found.tflops, 1),
        "gb_per_s": round(found.gb_per_s, 1),
        "launch_us": round(found.launch_seconds * 1e6, 2),
    }
