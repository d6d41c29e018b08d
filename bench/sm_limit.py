"""A T4-class processor out of a larger one: all work on a stream that may use N of the GPU's SMs (a green context).

A graph replays on the SMs of the stream that it was captured on, or so it should: `replayed_tflops` shows
whether the limit holds. Load the model first; the stream does not wait for the default one.
"""

from __future__ import annotations

from typing import Any


def limit_sms(count: int) -> Any:
    """Make a stream of `count` SMs the current one; keep what this returns alive. Its last item: SMs that were got."""
    import torch
    from cuda.bindings import driver

    def ok(result: Any) -> Any:
        error, *values = result
        if int(error):
            raise RuntimeError(f"CUDA driver: {error}")
        return values[0] if len(values) == 1 else values

    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    device = ok(driver.cuDeviceGet(torch.cuda.current_device()))
    whole = ok(driver.cuDeviceGetDevResource(device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    # below 8 the driver must be told that blocks need not be scheduled together (the flag has no name in some bindings)
    groups, *_ = ok(driver.cuDevSmResourceSplitByCount(1, whole, 1 if count < 8 else 0, count))
    description = ok(driver.cuDevResourceGenerateDesc(groups, 1))
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    context = ok(driver.cuGreenCtxCreate(description, device, flags))
    stream = ok(driver.cuGreenCtxStreamCreate(context, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, 0))
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

    def rate(work: Any) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        work()
        begin.record()
        for _ in range(10):
            work()
        end.record()
        torch.cuda.synchronize()
        return round(10 * 2 * 4096**3 / begin.elapsed_time(end) / 1e9, 1)

    return rate(lambda: torch.mm(a, b, out=out)), rate(graph.replay)
