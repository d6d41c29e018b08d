"""Compile every call's kernels for compute capability 7.5, on a machine without a card. Needs Triton.

    python -m tests.gpu.sm75.compile      prints a line of JSON for each kernel

ptxas, which comes with Triton, says what each takes of a T4: registers, shared memory, and what it spills to memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.gpu.sm75.calls import calls
from tests.gpu.sm75.inventory import kernel_of

CAPABILITY = 75
SHARED_BYTES = 64 * 1024  #: that a program may have on a T4


class NoCard:
    """What Triton asks of a driver while it compiles."""

    def get_current_device(self) -> int:
        """Return the device's number."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return a stream, on which nothing is launched."""
        return 0

    def get_current_target(self) -> Any:
        """Return the card that is compiled for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)


def compiled() -> list[dict[str, Any]]:
    """Compile every call's kernels; return what each takes, in the order of their first use."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(NoCard())
    found: dict[str, dict[str, Any]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        kernel = run(self, *given, grid=grid, warmup=True, **named)
        if kernel.hash not in found:
            module, name = kernel_of(self.fn.__module__, self.fn.__name__)
            found[kernel.hash] = {"module": module, "name": name, **taken(kernel)}
        return kernel

    JITFunction.run = compile_only
    try:
        for call in calls(small=True).values():
            list(call("cpu"))
    finally:
        JITFunction.run = run
    return list(found.values())


def taken(kernel: Any) -> dict[str, Any]:
    """Return what a compiled kernel takes: registers of a thread, bytes of stack, of spills and of shared memory."""
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        told = subprocess.run([str(tool), "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}
    return {
        "target": re.findall(r"\.target (\S+)", kernel.asm["ptx"])[0],
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "spilled": usage["LOCAL"],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }


if __name__ == "__main__":
    for each in compiled():
        print(json.dumps(each))
    sys.exit(0)
