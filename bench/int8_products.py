"""python -m bench.int8_products FOLDER: what int8 products would do to a real model's passes, layer by layer.

A Turing card multiplies int8 at twice the rate of fp16. Each frozen weight is rounded to int8 with a scale for each
output, each activation and gradient with a scale for each token; products of rounded numbers are exact. FOLDER is a
real model's, such as the one that recipes/smollm.yaml unpacks; that recipe's rows are used. A layer's errors are shares
of the exact result's norm, given exact activations and gradients. At last all products of a pass are rounded, forward
only and both ways, and the loss and LoRA's gradients are compared.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import figures, machine
from fast_ft.common.atomic_files import write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

ROWS = Path(__file__).parents[1] / "recipes" / "smollm" / "train.json"
FIRST_ROWS = 16


def main() -> int:
    """Measure, and write bench/results/int8-products.json."""
    parser = argparse.ArgumentParser(prog="python -m bench.int8_products", description=__doc__)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    stamp = machine.stamp(shlex.join(["python", "-m", "bench.int8_products", options.folder.name]))
    result = {"kind": "int8", **stamp, "rows": FIRST_ROWS, **measure(options.folder)}
    write_json(figures.RESULTS / "int8-products.json", result)
    json.dump(
        {key: value for key, value in result.items() if key in ("median", "worst", "whole")}, sys.stdout, indent=1
    )
    return 0


def measure(folder: Path) -> dict[str, Any]:
    """Return {"layers": errors by layer, "median" and "worst" by kind of layer, "whole": of all products at once}."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    base = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear) and "." in name}
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # as large as after some steps of training
            torch.nn.init.normal_(weight, std=0.001)
    batch = _rows(folder)
    exact_loss, exact = _pass(model, batch)
    layers: dict[str, dict[str, float]] = {}
    hooks = [_watch(layer, layers.setdefault(name, {})) for name, layer in base.items()]
    _pass(model, batch)
    for each in (hook for pair in hooks for hook in pair):
        each.remove()
    whole: dict[str, Any] = {"loss": round(exact_loss, 5)}
    ways: dict[str, Callable[[nn.Linear], Callable[[], None]]] = {
        "nf4": _in_nf4, "int8 forward": lambda layer: _round(layer, False), "int8": lambda layer: _round(layer, True),
        "int8, down in full": lambda layer: _round(layer, True) if layer.in_features < 1536 else lambda: None,
    }  # fmt: skip
    for name, change in ways.items():
        undo = [change(layer) for layer in base.values()]
        loss, gradient = _pass(model, batch)
        cosine = torch.nn.functional.cosine_similarity(gradient.double(), exact.double(), dim=0).item()
        whole[name] = {"loss": round(loss, 5), "gradient_cosine": round(cosine, 5)}
        for each in undo:
            each()
    kinds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, errors in layers.items():
        for what, error in errors.items():
            kinds[name.rpartition(".")[2]][what].append(error)
    median = {k: {w: sorted(e)[len(e) // 2] for w, e in errors.items()} for k, errors in kinds.items()}
    worst = {k: {w: max(e) for w, e in errors.items()} for k, errors in kinds.items()}
    return {"layers": layers, "median": median, "worst": worst, "whole": whole}


def _rows(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Return the first rows' token ids and labels, each (1, T); the answer alone is learned."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    made = []
    for row in json.loads(ROWS.read_text(encoding="utf-8"))[:FIRST_ROWS]:
        turns = row["messages"]
        asked = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), return_tensors="pt").input_ids
        labels = ids.clone()
        labels[:, : len(tokenizer(asked).input_ids)] = -100
        made.append((ids.to(torch.int64), labels))
    return made


def _pass(model: nn.Module, batch: list[tuple[Tensor, Tensor]]) -> tuple[float, Tensor]:
    """Return the mean loss over the rows and the gradient of all LoRA matrices, flat."""
    import torch

    model.zero_grad()
    total = 0.0
    for ids, labels in batch:
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss / len(batch)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _watch(layer: nn.Linear, found: dict[str, float]) -> tuple[Any, Any]:
    """Keep the errors of a layer's products by hooks, the mean over the passes, and how far activations lie out."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight_NE = layer.weight.detach()
    there_NE, back_NE = _int8(weight_NE), _int8(weight_NE.t()).t()
    four_NE = dequantize_4bit(*quantize_4bit(weight_NE, blocksize=64, quant_type="nf4")).float()

    def keep(name: str, error: float) -> None:
        found[name] = round(found.get(name, 0.0) + error / FIRST_ROWS, 6)

    def forward(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        x_TE = given[0].detach()[0]
        exact_TN = x_TE @ weight_NE.t()
        keep("forward", _error(_int8(x_TE) @ there_NE.t(), exact_TN))
        keep("forward_weights_alone", _error(x_TE @ there_NE.t(), exact_TN))
        keep("nf4", _error(x_TE @ four_NE.t(), exact_TN))
        keep("largest_over_rms", (x_TE.abs().amax(dim=1) / x_TE.square().mean(dim=1).sqrt()).max().item())

    def backward(_: nn.Module, __: Any, given: tuple[Tensor, ...]) -> None:
        dy_TN = given[0].detach()[0]
        keep("backward", _error(_int8(dy_TN) @ back_NE, dy_TN @ weight_NE))

    assert isinstance(layer, torch.nn.Linear)
    return layer.register_forward_hook(forward), layer.register_full_backward_hook(backward)


def _in_nf4(layer: nn.Linear) -> Callable[[], None]:
    """Give a layer the weights that NF4 makes of its own; return what undoes it."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    former_NE = layer.weight.data
    layer.weight.data = dequantize_4bit(*quantize_4bit(former_NE, blocksize=64, quant_type="nf4")).float()

    def undo() -> None:
        layer.weight.data = former_NE

    return undo


def _int8(rows: Tensor) -> Tensor:
    """Return rows rounded to 255 numbers, with a scale for each row."""
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    return (rows / scale).round() * scale


def _error(made: Tensor, exact: Tensor) -> float:
    return ((made - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def _round(layer: nn.Linear, backward: bool) -> Callable[[], None]:
    """Let a layer multiply rounded numbers, backward too where that is asked for; return what undoes it."""
    import torch

    weight_NE = layer.weight.detach()
    there_NE, back_NE = _int8(weight_NE), _int8(weight_NE.t()).t() if backward else weight_NE

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x_1TE: Tensor) -> Tensor:
            return (_int8(x_1TE[0]) @ there_NE.t())[None]

        @staticmethod
        def backward(ctx: Any, *dy_1TN: Tensor) -> Tensor:
            dy_TN = dy_1TN[0][0]
            return ((_int8(dy_TN) if backward else dy_TN) @ back_NE)[None]

    former = layer.forward
    layer.forward = Product.apply

    def undo() -> None:
        layer.forward = former

    return undo


if __name__ == "__main__":
    sys.exit(main())
