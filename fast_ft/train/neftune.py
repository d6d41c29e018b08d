"""NEFTune (arXiv 2310.05914): noise on the embeddings while a model is trained."""

from __future__ import annotations

from typing import Any


class Noise:
    """Noise within alpha / sqrt(L d) from `put_on` to `take_off`: L is a row's own length, d the embeddings' size.

    Before each pass `row_lengths` (1, T) is set: for each token the length of its row.
    """

    def __init__(self, alpha: float) -> None:
        self.row_lengths: Any = None
        self._alpha = alpha
        self._handle: Any = None

    def put_on(self, embeddings: Any) -> None:
        self._handle = embeddings.register_forward_hook(self._add)

    def take_off(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _add(self, module: Any, _: Any, output: Any) -> Any:
        import torch

        if not module.training:
            return output
        scale_1T = self._alpha / torch.sqrt(self.row_lengths * float(output.shape[-1]))
        return output + torch.empty_like(output).uniform_(-1, 1) * scale_1T[..., None].to(output.dtype)
