"""NEFTune (arXiv 2310.05914): noise on the embeddings while a model is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fast_ft.models.patches import ModelPatches


class Noise:
    """Noise within alpha / sqrt(L d): L is a row's own length, d the embeddings' size. `patches` takes it off again.

    Before each pass `row_lengths_1T` is set: for each token the length of its row.
    """

    def __init__(self, alpha: float) -> None:
        self.row_lengths_1T: Tensor | None = None
        self._alpha = alpha

    def put_on(self, embeddings: nn.Module, patches: ModelPatches) -> None:
        """Add noise to what the embeddings return in training, until `patches` is undone."""
        patches.hook(embeddings.register_forward_hook(self._add))

    def _add(self, module: nn.Module, _: object, output_1TD: Tensor) -> Tensor:
        if not module.training:
            return output_1TD
        assert self.row_lengths_1T is not None, "each pass says how long its rows are"
        scale_1T = self._alpha / torch.sqrt(self.row_lengths_1T * float(output_1TD.shape[-1]))
        noise_1TD = torch.empty_like(output_1TD).uniform_(-1, 1)
        return output_1TD + noise_1TD * scale_1T[..., None].to(output_1TD.dtype)
