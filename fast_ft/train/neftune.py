"""NEFTune (arXiv 2310.05914): noise on the embeddings while a model is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fast_ft.models.patches import ModelPatches

if TYPE_CHECKING:
    from torch import nn


class Noise:
    """Noise within alpha / sqrt(L d): L is a row's own length, d the embeddings' size. `patches` takes it off again.

    Before each pass `row_lengths` (1, T) is set: for each token the length of its row.
    """

    def __init__(self, alpha: float) -> None:
        self.row_lengths: Any = None
        self._alpha = alpha

    def put_on(self, embeddings: nn.Module, patches: ModelPatches) -> None:
        """Add noise to what the embeddings return, until `patches` is undone."""
        patches.hook(embeddings.register_forward_hook(self._add))

    def _add(self, module: Any, _: Any, output: Any) -> Any:
        import torch

        if not module.training:
            return output
        scale_1T = self._alpha / torch.sqrt(self.row_lengths * float(output.shape[-1]))
        return output + torch.empty_like(output).uniform_(-1, 1) * scale_1T[..., None].to(output.dtype)
