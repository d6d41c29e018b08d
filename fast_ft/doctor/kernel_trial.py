"""The start-up checks of every kernel on this machine's card, on one layer of Llama-2-7B's shape with random weights.

python -m fast_ft.doctor.kernel_trial prints one line of JSON before each check and one behind it, and a last one for
the way that decoding takes. It is a process of its own: a broken kernel may end it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from fast_ft.common import gpu
from fast_ft.hub.families import ModelShape
from fast_ft.recipe.policy_ntu_hw5 import LLAMA_2_7B

BLOCKS, UNPACKING, INSTALLED = "training blocks", "NF4 unpacking", "blocks in a model"
ATTENTION, PRODUCTS, DECODING = "packed attention", "bitsandbytes' products", "decoding"
UNSLOTH = "unsloth"
TIMED = ((12288, 4096), (4096, 11008))  #: (outputs, inputs) of products that are timed: q, k and v; the MLP's last
CONFIG = {**LLAMA_2_7B, "num_hidden_layers": 1, "vocab_size": 2048}

Check = tuple[str, Callable[[], "str | None"]]  #: a check's name, and what returns why it failed, or None


def trial(config: dict[str, Any], device: str) -> Iterator[dict[str, Any]]:
    """Yield {"begins": name} before each check, {"check", "problem"} behind it, at last {"dtype", "decoding"}.

    On a card the last has its compute "capability", too, and the times of 4-bit "products" (product_times.py).
    "decoding" is {"planes", "few_rows", "triton", "notes"}: whether 4-bit weights are decoded in registers, by which
    kernel, whether Triton's kernels are taken, and why not; None where it could not be found out.
    """
    from fast_ft.models.loaders.base import compute_dtype

    dtype = compute_dtype("auto", device)
    decoding: dict[str, Any] = {}
    for name, check in _checks(config, dtype, device, decoding):
        yield {"begins": name}
        try:
            problem = check()
        except Exception as error:  # whatever it is, it is what was to be found out
            problem = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0][:300]}"
        yield {"check": name, "problem": problem}
    of_card = {"capability": gpu.capability(), "products": _products(dtype, device)} if device != "cpu" else {}
    yield {"dtype": dtype, **of_card, "decoding": decoding or None}


def _products(dtype: str, device: str) -> list[dict[str, Any]]:
    """Return how long our 4-bit products and bitsandbytes' take; nothing where that cannot be found out."""
    with contextlib.suppress(Exception):  # bitsandbytes or the card was found broken by a check
        from fast_ft.generate.engine.product_times import time_products

        return time_products(TIMED, (16, 64), dtype, device)
    return []


def _checks(config: dict[str, Any], dtype: str, device: str, decoding: dict[str, Any]) -> Iterator[Check]:
    """Yield the checks, in the order in which a run would meet what they look at."""
    import torch

    from fast_ft.models import packed_attention
    from fast_ft.models.fused_block import block, group_weights
    from fast_ft.models.patches import ModelPatches
    from fast_ft.models.random_base import random_model

    shape, like = ModelShape.from_config(config), torch.empty(1, dtype=getattr(torch, dtype), device=device)
    heads = (shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim)
    models: list[Any] = []

    def model() -> Any:
        """Return the random layer, which is made at first use."""
        if not models:
            models.append(random_model(config, dtype))
        return models[0]

    def base() -> Any:
        """Return the random layer's down projection, below its adapter."""
        return model().get_base_model().model.layers[0].mlp.down_proj.get_base_layer()

    def decode() -> None:
        """Find out which way decoding takes with such a layer."""
        from fast_ft.generate.engine import ops_torch
        from fast_ft.generate.engine.fused_model import FusedModel

        engine = FusedModel(model())
        ours = engine.ops is not ops_torch
        decoding.update(planes=engine.planes, few_rows=engine.few_rows, triton=ours, notes=engine.notes)

    def products() -> None:
        """Compare bitsandbytes' own products with its own weights."""
        from fast_ft.generate.engine import nf4_linear

        nf4_linear.compare_pieces(dtype, device)

    def unsloth() -> str | None:
        from fast_ft.models.loaders.unsloth import import_problem

        return import_problem()

    yield ATTENTION, lambda: packed_attention.check(like, *heads)
    yield BLOCKS, lambda: block.check(like, shape)
    yield UNPACKING, lambda: group_weights.check_unpacking(base(), getattr(torch, dtype))
    yield INSTALLED, lambda: block.install(model(), ModelPatches())
    yield PRODUCTS, products
    yield DECODING, decode
    yield UNSLOTH, unsloth  # last: it patches what is imported already


def main() -> int:
    """Print what the trial yields, on the card; nothing else goes to stdout."""
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        from fast_ft.common import environment

        environment.for_libraries()
        for line in trial(CONFIG, "cuda:0"):
            print(json.dumps(line), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
