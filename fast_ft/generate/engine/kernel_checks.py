"""Do the Triton kernels work on this card, and say what plain torch says? Asked once in a process for each kind of use.

The checks compile what decoding will run. `ahead` lets threads do that while the base is being loaded.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from fast_ft.generate.engine import attention_compare, kernel_compare, nf4_linear
from fast_ft.generate.engine.kernel_kind import Kind
from fast_ft.generate.engine.sampler import Sampler, fits

#: that compile side by side: a kernel takes half a second of a CPU core. Few: each keeps a cuBLAS handle on the card.
_THREADS = 6
_passed: set[tuple[Any, ...]] = set()


def products(kind: Kind) -> None:
    """Raise where 4-bit products do not work here, or are wrong."""
    _do(_product_checks(kind))


def attention(kind: Kind, kernels: Any) -> None:
    """Raise where a layer's other kernels (the module ops_triton) do not work here, or are wrong."""
    _do(_layer_checks(kind, kernels))


def drawing(sampler: Sampler, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise where the kernel that draws a step's tokens does not work here, or draws others than the sampler."""
    _do([_draw_check(sampler, vocabulary, dtype, device)])


def _draw_check(sampler: Sampler, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Check:
    given = (sampler, vocabulary, dtype, device)
    return ("draw", given), lambda: kernel_compare.draws(*given)


def ahead(kind: Kind, sampler: Sampler | None = None, vocabulary: int = 0) -> Future[None]:
    """Do all checks in threads, that of a sampler's draws included.

    What fails there fails again where the kernels are wanted, and is said there.
    """
    with contextlib.suppress(Exception):  # libraries are imported by one thread, whatever becomes of it
        import bitsandbytes  # noqa: F401

        from fast_ft.generate.engine import draw_triton, ops_triton  # noqa: F401

    if kind.planes and kind.way is None:
        kind = kind.by(_first_way(kind))
    done: Future[None] = Future()
    threading.Thread(target=_do_all, args=(kind, sampler, vocabulary, done), name="kernels", daemon=True).start()
    return done


def _first_way(kind: Kind) -> nf4_linear.Way | None:
    """Return the fastest way for weights like these on this card, if there is one."""
    with contextlib.suppress(Exception):
        return nf4_linear.first_way(kind.products, torch.device(kind.device))
    return None


def _do_all(kind: Kind, sampler: Sampler | None, vocabulary: int, done: Future[None]) -> None:
    """Do all checks, several at a time, and tell `done` of the first failure."""
    try:
        from fast_ft.generate.engine import ops_triton

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="kernels") as threads:
            checks = [*(_product_checks(kind) if kind.planes else []), *_layer_checks(kind, ops_triton)]
            if sampler is not None and fits(sampler, vocabulary):
                dtype, device = getattr(torch, kind.dtype), torch.device(kind.device)
                checks.insert(0, _draw_check(sampler, vocabulary, dtype, device))  # it takes longest to compile
            made = [threads.submit(_do, [check]) for check in checks]
        for each in made:
            each.result()
    except BaseException as error:
        done.set_exception(error)
    else:
        done.set_result(None)


Check = tuple[tuple[Any, ...], Callable[[], None]]  #: what is remembered once it has passed, and the check


def _product_checks(kind: Kind) -> list[Check]:
    way = kind.way
    assert way is not None
    few: list[Check] = [
        (
            (f"products of {each} rows", kind),
            lambda each=each: nf4_linear.compare_few(way, kind.dtype, kind.device, each, kind.products),  # type: ignore[misc]
        )
        for each in kind.steps
        if each <= nf4_linear.FEW
    ]
    return [*few, (("products of many rows", kind), lambda: nf4_linear.compare_many(kind.dtype, kind.device))]


def _layer_checks(kind: Kind, kernels: Any) -> list[Check]:
    # other products than those by the way compute LoRA's first half themselves
    kinds = [kind, replace(kind, ranks=(0, 0, 0, 0))] if kind.mixed else [kind]
    found = [attention_compare.attention(each, kernels) | kernel_compare.between(each, kernels) for each in kinds]
    return [((name, each), check) for each, named in zip(kinds, found, strict=True) for name, check in named.items()]


def _do(checks: list[Check]) -> None:
    for name, check in checks:
        if name not in _passed:
            check()
            _passed.add(name)
