"""One micro-batch, forward and backward: run kernel by kernel, or captured in a CUDA graph and replayed.

A 7B's forward and backward are some thousands of kernels. On a large card Python takes longer to launch them than the
GPU to run them; a graph launches them all at once. It needs fixed shapes, so rows are padded to buckets of length, and
memory for all activations, so nothing is recomputed.

Rows are padded on the right. Causal attention keeps a row's tokens from seeing the padding after them, and the loss
leaves the padding out, so no attention mask is needed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

from fast_ft.backend import Loaded
from fast_ft.progress import note
from fast_ft.template import IGNORE_INDEX

#: Lengths are padded to a multiple of it. 8: tensor cores. 64: few graphs, each for many micro-batches.
EAGER_MULTIPLE = 8
GRAPH_MULTIPLE = 64
_CHUNK = 1024  #: positions whose logits exist at a time: 1,024 x 32,000 in fp32 are 0.12 GiB
_OWN_LOSS = ("llama", "mistral", "qwen2", "qwen3")  #: model types whose logits are lm_head's output and nothing more


class Passes:
    """Forward and backward of micro-batches over one model.

    `begin` once a step, then call it for each micro-batch: it adds to the adapter's gradients and returns the loss
    summed over the micro-batch's trained tokens, divided by `supervised`, in nats, without the loss scale.
    """

    def __init__(self, loaded: Loaded, *, noise_alpha: float | None, capture: bool) -> None:
        import torch

        self.model, self.device = loaded.model, loaded.device
        self.capture = capture and self.device == "cuda" and can_capture(loaded)
        self.multiple = GRAPH_MULTIPLE if self.capture else EAGER_MULTIPLE
        causal = loaded.model.get_base_model()
        self._own_loss = causal.config.model_type in _OWN_LOSS
        self._dtype = None if loaded.dtype == "float32" else getattr(torch, loaded.dtype)
        self._weights = [p for p in loaded.model.parameters() if p.requires_grad]
        self._gradients: list[Any] = []
        self._scale = torch.ones((), device=self.device)
        self._supervised = torch.ones((), device=self.device)
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._pool: Any = None
        self._noise = _Noise(causal.get_input_embeddings(), noise_alpha) if noise_alpha is not None else None

    def close(self) -> None:
        """Take the noise off the embeddings, and let go of graphs and their memory."""
        if self._noise is not None:
            self._noise.remove()
        self.forget()

    def forget(self, *, capture: bool = False) -> None:
        """Let go of graphs and their memory; go on with `capture`."""
        self._graphs.clear()
        self._gradients, self._pool = [], None
        self.capture, self.multiple = capture, GRAPH_MULTIPLE if capture else EAGER_MULTIPLE

    def begin(self, supervised: Any, scale: Any | None) -> None:
        """Start a step: `supervised` are its trained tokens, `scale` fp16's loss scale (a tensor) or None."""
        import torch

        self._supervised.copy_(supervised)
        if scale is not None:
            self._scale.copy_(scale)
        if not self.capture:
            return
        if not self._gradients:
            self._gradients = [torch.zeros_like(p) for p in self._weights]
        else:
            torch._foreach_zero_(self._gradients)
        # Trainer drops gradients after each step, but a graph adds to the tensors that it was captured with.
        for weight, gradient in zip(self._weights, self._gradients, strict=True):
            weight.grad = gradient

    def __call__(self, input_ids: Any, labels: Any, lengths: Any, *, seed: int) -> Any:
        """Add one micro-batch: ids and labels of shape (rows, length), and each row's own length (rows,).

        `seed` is for dropout and noise. It is set after a capture, which draws too: a run that goes on captures at
        other steps than one that was never stopped.
        """
        import torch

        shape = (int(input_ids.shape[0]), int(input_ids.shape[1]))
        if self.capture and shape not in self._graphs:
            try:
                self._graphs[shape] = _Graph(self, shape)
            except torch.OutOfMemoryError:
                raise  # the trainer makes room
            except RuntimeError as error:  # something in this model's pass synchronises
                note(
                    f"the pass cannot be captured ({str(error).splitlines()[0]}): it runs kernel by kernel, more slowly"
                )
                self.forget()
        torch.manual_seed(seed)
        run = self._graphs[shape].replay if self.capture else self._run
        return run(input_ids, labels, lengths)

    def _run(self, input_ids: Any, labels: Any, lengths: Any) -> Any:
        import torch

        if self._noise is not None:
            self._noise.row_lengths = lengths
        # Under capture autocast must not cache casts: they would be made outside of the next graph.
        autocast = (
            torch.autocast(self.device, dtype=self._dtype, cache_enabled=not self.capture)
            if self._dtype is not None
            else contextlib.nullcontext()
        )
        with autocast:
            total = self._summed_loss(input_ids, labels)
        loss = total / self._supervised
        (loss * self._scale).backward()
        return loss.detach()

    def _summed_loss(self, input_ids: Any, labels: Any) -> Any:
        import torch

        if not self._own_loss:
            one = torch.ones((), device=labels.device)
            return self.model(input_ids=input_ids, labels=labels, num_items_in_batch=one, use_cache=False).loss
        causal = self.model.get_base_model()
        causal.model._has_no_labels = False  # Unsloth's forward would take labels' absence for inference
        hidden_BLD = causal.model(input_ids=input_ids, use_cache=False)[0]
        target_BL = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        return response_loss(hidden_BLD.flatten(0, 1), causal.lm_head.weight, target_BL.flatten())


class _Graph:
    """The captured pass of one shape, and the tensors that it reads and writes."""

    def __init__(self, passes: Passes, shape: tuple[int, int]) -> None:
        import torch

        rows, _ = shape
        self.input_ids = torch.zeros(shape, dtype=torch.int64, device="cuda")
        self.labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64, device="cuda")
        self.lengths = torch.ones(rows, dtype=torch.int64, device="cuda")
        first = passes._pool is None
        if first:
            # Kernels are compiled and library workspaces taken on the first pass, which a capture could not hold. All
            # labels are masked, so that it adds nothing to the gradients.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    passes._run(self.input_ids, self.labels, self.lengths)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        # One pool for all shapes: graphs run one after another, so the activations of one may lie over another's.
        with torch.cuda.graph(self.graph, pool=passes._pool):
            self.loss = passes._run(self.input_ids, self.labels, self.lengths)
        passes._pool = passes._pool or self.graph.pool()

    def replay(self, input_ids: Any, labels: Any, lengths: Any) -> Any:
        self.input_ids.copy_(input_ids)
        self.labels.copy_(labels)
        self.lengths.copy_(lengths)
        self.graph.replay()
        return self.loss.clone()  # the next graph's memory may lie over it


class _Noise:
    """NEFTune (arXiv 2310.05914): noise within alpha / sqrt(L d) on the embeddings, L being a row's own length."""

    def __init__(self, embeddings: Any, alpha: float) -> None:
        self.row_lengths: Any = None
        self._alpha = alpha
        self._handle = embeddings.register_forward_hook(self._add)

    def remove(self) -> None:
        self._handle.remove()

    def _add(self, module: Any, _: Any, output: Any) -> Any:
        import torch

        if not module.training:
            return output
        scale = self._alpha / torch.sqrt(self.row_lengths * float(output.shape[-1]))
        return output + torch.empty_like(output).uniform_(-1, 1) * scale[:, None, None].to(output.dtype)


def response_loss(hidden: Any, weight: Any, target: Any) -> Any:
    """Return the cross-entropy summed over the positions whose target is not IGNORE_INDEX, a 0-d fp32 tensor.

    `hidden` (N, D) goes through the head `weight` (V, D); `target` (N,) holds ids. Logits exist for 1,024 positions at
    a time, in fp32, and their gradient is computed at once, so that they need not be kept. `weight` gets none.
    """
    import torch

    class ResponseLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden_ND: Any, weight_VD: Any, target_N: Any) -> Any:
            total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
            gradient_ND = torch.empty(hidden_ND.shape, dtype=weight_VD.dtype, device=hidden_ND.device)
            for start in range(0, hidden_ND.shape[0], _CHUNK):
                part = slice(start, start + _CHUNK)
                kept_C = target_N[part] != IGNORE_INDEX
                index_C1 = target_N[part].clamp(min=0)[:, None]
                logits_CV = (hidden_ND[part].to(weight_VD.dtype) @ weight_VD.t()).float()
                norm_C = torch.logsumexp(logits_CV, dim=-1)
                total += ((norm_C - logits_CV.gather(1, index_C1)[:, 0]) * kept_C).sum()
                p_CV = logits_CV.sub_(norm_C[:, None]).exp_()
                p_CV.scatter_add_(1, index_C1, -torch.ones_like(index_C1, dtype=p_CV.dtype))
                gradient_ND[part] = p_CV.mul_(kept_C[:, None]).to(weight_VD.dtype) @ weight_VD
            ctx.save_for_backward(gradient_ND)
            ctx.dtype = hidden_ND.dtype
            return total

        @staticmethod
        def backward(ctx: Any, *outer: Any) -> Any:
            (gradient_ND,) = ctx.saved_tensors
            return (gradient_ND * outer[0]).to(ctx.dtype), None, None

    with torch.autocast(hidden.device.type, enabled=False):
        return ResponseLoss.apply(hidden, weight, target)


def cut(lengths: Sequence[int], *, most_rows: int, most_tokens: int | None, multiple: int) -> list[list[int]]:
    """Return row indices in micro-batches, longest rows first, so that little is padded.

    A micro-batch has at most `most_rows` rows and, padding included, at most `most_tokens` tokens (None: no limit); a
    row that is longer goes alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    pieces = []
    while order:
        width = math.ceil(lengths[order[0]] / multiple) * multiple
        rows = most_rows if most_tokens is None else min(most_rows, max(1, most_tokens // width))
        pieces.append(order[:rows])
        order = order[rows:]
    return pieces


def can_capture(loaded: Loaded) -> bool:
    """Whether this model's pass can be captured: checkpointing synchronises, and unknown models may."""
    causal = loaded.model.get_base_model()
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in causal.modules())
    return causal.config.model_type in _OWN_LOSS and not checkpointing
