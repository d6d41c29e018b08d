"""Adapters that change what their model says: a new one has a B of zeros, and changes nothing."""

from __future__ import annotations

from torch import nn


def draw_lora_b(model: nn.Module, std: float) -> None:
    """Draw each LoRA's B from torch's own random numbers, normally distributed, with this standard deviation."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=std)
