"""NEFTune (arXiv 2310.05914): noise on the embeddings while a model is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Noise:
    """Noise within alpha / sqrt(L d) from `put_on` to `take_off`: L is a row's own length, d the embeddings' size.

    Before each pass `row_lengths_1T` is set: for each token the length of its row.
    """

    def __init__(self, alpha: float) -> None:
        self.row_lengths_1T: Tensor | None = None
        self._alpha = alpha
        self._handle: RemovableHandle | None = None

    def put_on(self, embeddings: nn.Module) -> None:
        """Add noise to what these embeddings return in training."""
        self._handle = embeddings.register_forward_hook(self._add)

    def take_off(self) -> None:
        """Leave the embeddings as they were."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _add(self, module: nn.Module, _: object, output_1TD: Tensor) -> Tensor:
        if not module.training:
            return output_1TD
        assert self.row_lengths_1T is not None, "each pass says how long its rows are"
        scale_1T = self._alpha / torch.sqrt(self.row_lengths_1T * float(output_1TD.shape[-1]))
        noise_1TD = torch.empty_like(output_1TD).uniform_(-1, 1)
        return output_1TD + noise_1TD * scale_1T[..., None].to(output_1TD.dtype)
