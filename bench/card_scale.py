"""How much of each thing an owner's ten minutes measure. A test has a scale of its own, for a CPU and seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fast_ft.recipe.policy_ntu_hw5 import LLAMA_2_7B


@dataclass(frozen=True)
class Scale:
    """Sizes of what is measured. `config`: of the random model; the two ways of training share its first `layers`.

    `matrix`: the side of the square matrices whose products are timed in windows of `window` seconds, for `least` to
    `most` seconds. `copied`: 16-bit numbers that are copied. `launches`: tiny kernels that are launched one by one.
    `rows` of `row_tokens` are trained on for `steps` steps by both ways; `simple_tokens` is a row of simple.yaml's.
    `slots`, `length`: sequences decoded side by side, and their tokens. `dtype`: as a recipe's model.dtype.
    """

    config: dict[str, Any] = field(
        default_factory=lambda: {**LLAMA_2_7B, "num_key_value_heads": 32, "rms_norm_eps": 1e-5}
    )
    layers: int = 8
    matrix: int = 4096
    window: float = 1.0
    least: float = 60.0
    most: float = 80.0
    copied: int = 2**27
    launches: int = 20_000
    rows: int = 8
    row_tokens: int = 256
    steps: int = 18
    simple_rows: int = 100
    simple_tokens: int = 136  #: the mean of the 100 shortest Alpaca rows in the recipe's template, counted
    slots: tuple[int, ...] = (16, 64)
    length: int = 128
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
