"""A T4-class processor out of a larger one: all work on a stream that may use N of the GPU's SMs (a green context).

A graph should replay on the SMs of the stream that it was captured on. `replayed_tflops` shows whether the limit
holds. Load the model first; the stream does not wait for the default one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def limit_sms(count: int) -> tuple[Any, torch.cuda.ExternalStream, int]:
    """Make a stream of `count` SMs the current one; return (context, stream, SMs that were got).

    The stream works as long as what this returns is alive. Raises RuntimeError where the driver refuses.
    """
    import torch
    from cuda.bindings import driver

    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    device = _checked(driver.cuDeviceGet(torch.cuda.current_device()))
    whole = _checked(driver.cuDeviceGetDevResource(device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    # below 8 the driver must be told that blocks need not be scheduled together (the flag has no name in some bindings)
    groups, *_ = _checked(driver.cuDevSmResourceSplitByCount(1, whole, 1 if count < 8 else 0, count))
    description = _checked(driver.cuDevResourceGenerateDesc(groups, 1))
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    context = _checked(driver.cuGreenCtxCreate(description, device, flags))
    stream = _checked(driver.cuGreenCtxStreamCreate(context, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, 0))
    external = torch.cuda.ExternalStream(int(stream))
    torch.cuda.set_stream(external)
    return context, external, groups[0].sm.smCount


def replayed_tflops() -> tuple[float, float]:
    """Return TFLOP/s of a 4096-cubed fp16 product on the current stream: launched, and replayed from a graph."""
    import torch

    a, b = (torch.randn(4096, 4096, device="cuda").half() for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        torch.mm(a, b, out=out)

    return _tflops(lambda: torch.mm(a, b, out=out)), _tflops(graph.replay)


def _checked(result: tuple[Any, ...]) -> Any:
    """Return what a call of the driver returned besides its error; RuntimeError for an error."""
    error, *values = result
    if int(error):
        raise RuntimeError(f"CUDA driver: {error}")
    return values[0] if len(values) == 1 else values


def _tflops(work: Callable[[], object]) -> float:
    """Return the TFLOP/s of a product of two matrices of 4,096 x 4,096, done ten times."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()
    begin.record()
    for _ in range(10):
        work()
    end.record()
    torch.cuda.synchronize()
    return round(10 * 2 * 4096**3 / begin.elapsed_time(end) / 1e9, 1)
