"""AdamW with moments of 8 bits, whose step is decided and counted on the device: nothing waits for it.

The moments are bitsandbytes' own (arXiv 2110.02861): codes of blocks of 256, each with its largest value, in the state
that bitsandbytes makes and checkpoints hold. Its own step takes the number of steps from the host, so that the host has
to wait until it knows whether a step was skipped. Here the number lies on the device, and a step with `found_inf`
changes nothing, as torch's fused AdamW does it (torch/optim/adamw.py).

Shapes: N weights, B blocks of 256 of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import bitsandbytes
import torch
from bitsandbytes import functional
from torch import Tensor

BLOCK = 256


class AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """bitsandbytes' AdamW8bit, for a GradScaler that does not wait (torch.amp.GradScaler.step).

    The scaler, or whoever finds gradients that are no finite numbers without one, sets `found_inf` (0-d, 1 or 0).
    """

    _step_supports_amp_scaling = True  #: what GradScaler asks an optimizer for
    first_moment = "state1"  #: bitsandbytes' name for it in the state of a weight
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Make the moments of a weight as bitsandbytes does; the number of steps is a tensor beside them."""
        super().init_state(group, p, gindex, pindex)
        self.state[p]["step"] = torch.zeros((), device=p.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Take a step with the gradients as they are: unscaled before, and clipped."""
        assert closure is None and self.grad_scale is None, "gradients are unscaled before they are clipped"
        for index, group in enumerate(self.param_groups):
            for place, weight in enumerate(group["params"]):
                if weight.grad is None:
                    continue
                if not self.state[weight]:
                    self.init_state(group, weight, index, place)
                self._update(weight, self.state[weight], group)

    def _update(self, weight: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        device = weight.device
        if not torch.is_tensor(state["step"]):  # a checkpoint of an earlier version
            state["step"] = torch.tensor(float(state["step"]), device=device)
        skip = torch.zeros((), device=device) if self.found_inf is None else self.found_inf.reshape(())
        state["step"] += 1 - skip
        count = state["step"].double().clamp(min=1)  # the first step of all may be skipped
        betas, rate = group["betas"], group["lr"]
        # On the device: what is taken off the weights at once, and 1 over the second moment's correction.
        numbers_3 = torch.stack([
            skip.double(), rate / (1 - betas[0] ** count), (1 - betas[1] ** count).rsqrt(),
        ]).float()  # fmt: skip
        decay = 1 - rate * group["weight_decay"]
        if weight.is_cuda and state["state1"].dtype == torch.uint8:
            from fast_ft.train import adamw_8bit_triton

            adamw_8bit_triton.update_(weight, weight.grad, state, numbers_3, (*betas, group["eps"], decay))
        else:
            update_(weight, weight.grad, state, numbers_3, (*betas, group["eps"], decay))


def update_(
    weight: Tensor,
    gradient: Tensor,
    state: Mapping[str, Any],
    numbers_3: Tensor,
    constants: tuple[float, float, float, float],
) -> None:
    """Change N weights and their moments in place, in plain torch; adamw_8bit_triton.py does the same in one kernel.

    `numbers_3` (fp32, on the device): 1 where the step is skipped, else 0; the learning rate over the first moment's
    correction; 1 over the root of the second moment's. `constants`: both betas, epsilon, and the factor of the decay.
    """
    skip, rate, correction = numbers_3.unbind()
    beta1, beta2, epsilon, decay = constants
    first_N, second_N = (_moment(state, index).to(gradient.device) for index in "12")
    first_N = first_N * beta1 + gradient * (1 - beta1)
    second_N = second_N * beta2 + gradient * gradient * (1 - beta2)
    moved_N = weight * decay - rate * (first_N / (second_N.sqrt() * correction + epsilon))
    is_skipped = skip > 0
    weight.copy_(torch.where(is_skipped, weight, moved_N))
    for index, moment_N in (("1", first_N), ("2", second_N)):
        _keep(state, index, moment_N, is_skipped)


def _moment(state: Mapping[str, Any], index: str) -> Tensor:
    codes_N: Tensor = state[f"state{index}"]
    if codes_N.dtype != torch.uint8:  # bitsandbytes keeps fewer than 4,096 numbers as they are
        return codes_N
    return functional.dequantize_blockwise(
        codes_N, absmax=state[f"absmax{index}"], code=state[f"qmap{index}"], blocksize=BLOCK
    )


def _keep(state: Mapping[str, Any], index: str, moment_N: Tensor, is_skipped: Tensor) -> None:
    former_N: Tensor = state[f"state{index}"]
    if former_N.dtype != torch.uint8:
        former_N.copy_(torch.where(is_skipped, former_N, moment_N))
        return
    codes_N, made = functional.quantize_blockwise(moment_N, code=state[f"qmap{index}"], blocksize=BLOCK)
    former_N.copy_(torch.where(is_skipped, former_N, codes_N))
    largest_B: Tensor = state[f"absmax{index}"]
    largest_B.copy_(torch.where(is_skipped, largest_B, made.absmax))
