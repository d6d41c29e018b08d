"""One micro-batch, forward and backward: run kernel by kernel, or captured in a CUDA graph and replayed.

A micro-batch is some rows of the effective batch, one behind the other (models/packed_attention.py says why nothing is
padded). The forward and backward passes of a 7B model are some thousands of kernels. On a large card Python takes
longer to launch them than the GPU to run them; a graph launches them all at once. A graph needs a fixed width, so the
last tokens of a pass are padding up to a multiple of 128. All graphs share one pool of memory and are captured before
the first step.

Shapes: T tokens of a pass, S places for rows, D hidden size.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fast_ft.common import out_of_memory
from fast_ft.data.encoding import EncodedRow
from fast_ft.models import packed_attention
from fast_ft.models.activation_checkpointing import has_dropout, recompute
from fast_ft.models.fused_block.dispatch import ops_of_the_loss
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.models.packed_attention import PackedRows
from fast_ft.plan.micro_batches import width
from fast_ft.plan.run_plan import TrainPlan
from fast_ft.train.loss import response_loss
from fast_ft.train.micro_batch import MicroBatch, MicroBatchShape, blank, lay_out
from fast_ft.train.neftune import Noise
from fast_ft.train.optimizer import FlatWeights


class CaptureFailed(Exception):
    """Something in this model's pass cannot be captured in a CUDA graph, such as waiting for the device."""


class Passes:
    """Forward and backward passes of micro-batches over one model.

    `begin` once a step, then call it for each micro-batch: that adds to the adapter's gradients. The model is changed
    from `open`, or the first `begin`, until `close`: noise on its embeddings, layers that are computed again.

    `plan` is the plan that the passes follow, and the one place where it is kept; `follow` takes another one.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        flat: FlatWeights,
        plan: TrainPlan,
        shape: MicroBatchShape,
        noise_alpha: float | None = None,
    ) -> None:
        self.model, self.device = loaded.model, loaded.device
        self.shape = replace(shape, longest=max(shape.longest, 128))
        self._causal = loaded.model.get_base_model()
        self._dtype: torch.dtype | None = None if loaded.dtype == "float32" else getattr(torch, loaded.dtype)
        self._loss_ops = ops_of_the_loss(torch.empty(0, dtype=self._dtype, device=self.device))
        self._flat = flat
        self._scale = torch.ones((), device=self.device)
        self._supervised = torch.ones((), device=self.device)
        self._graphs: dict[int, Graph] = {}
        self._noise = Noise(noise_alpha) if noise_alpha is not None else None
        self._model_patches = loaded.patches
        self._open = False
        self.follow(plan)

    def open(self) -> None:
        """Put noise on the embeddings and let layers be computed again. Does nothing where that was done."""
        if self._open:
            return
        self._open = True
        self._patches = self._model_patches.group()
        if self._noise is not None:
            self._noise.put_on(self._causal.get_input_embeddings(), self._patches)
        self._recomputed = self._patches.group()
        recompute(self.model, self.plan.recompute_layers, self._recomputed)

    def close(self) -> None:
        """Take the noise off the embeddings, let go of graphs and their memory, keep all activations again."""
        self.drop_graphs()
        if self._open:
            self._patches.undo()
        self._open = False

    def follow(self, plan: TrainPlan) -> None:
        """Let go of graphs and their memory, and follow this plan from here on.

        Graphs are for a card. A layer that draws random numbers and is computed again cannot be captured: it puts
        random states back.
        """
        self.drop_graphs()
        random = plan.recompute_layers > 0 and has_dropout(self.model)
        self.plan = replace(plan, capture=plan.capture and self.device == "cuda" and not random)
        if self._open:
            self._recomputed.undo()
            recompute(self.model, plan.recompute_layers, self._recomputed)

    def drop_graphs(self) -> bool:
        """Let go of all graphs and their memory; return whether there were any. A call captures again what it needs."""
        had = bool(self._graphs)
        if had:
            self._graphs.clear()
            # cuBLAS holds 32 MiB and more for each stream that a capture ran on: they stayed, some 64 MiB a run
            torch._C._cuda_clearCublasWorkspaces()
        return had

    def begin(self, supervised: float, scale: Tensor | None) -> None:
        """Start a step: `supervised` are its trained tokens, `scale` (0-d) is fp16's loss scale or None."""
        self.open()
        self._supervised.fill_(supervised)
        if scale is not None:
            self._scale.copy_(scale)
        self._flat.zero_gradients()

    def __call__(self, micro: MicroBatch, *, seed: int) -> Tensor:
        """Add one micro-batch to the gradients and return its loss, a 0-d tensor.

        The loss is summed over the micro-batch's trained tokens and divided by the step's, in nats, without the loss
        scale. `seed` is for dropout and noise; it is set after a capture, which draws too.

        Raises:
            CaptureFailed: The plan wants graphs, and this pass cannot be captured.
        """
        tokens = micro.tokens_4T.shape[1]
        if self.plan.capture:
            self._capture(tokens)
        torch.manual_seed(seed)
        if self.plan.capture:
            return self._graphs[tokens].replay(micro)
        return self.run(*micro.to(self.device))

    def rehearse(self, widths: Iterable[int]) -> dict[int, float]:
        """Capture a pass of each width, the widest first; run the widest, and return the seconds that it takes.

        Without graphs nothing is captured. All targets are masked, so nothing is learned; random states and gradients
        are left as they were. Raises what a call raises.
        """
        seconds: dict[int, float] = {}
        self.model.train()
        if self.device == "cuda":
            torch.cuda.empty_cache()  # where weights were before they were laid side by side
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if self.device == "cuda" else []):
            self.begin(1.0, None)
            self._scale.fill_(1.0)
            for tokens in sorted(set(widths), reverse=True)[: None if self.plan.capture else 1]:
                if seconds:  # a narrower one takes its share of them, and memory that the widest has taken
                    self._capture(tokens)
                    continue
                micro = self.blank(tokens)
                for _ in range(2):  # the first one captures, or compiles
                    started = time.perf_counter()
                    loss = self(micro, seed=0)
                    assert loss.item() == 0.0, "nothing is trained in a rehearsal"  # and waits for the device
                    seconds[tokens] = time.perf_counter() - started
        self.model.zero_grad()
        return seconds

    def measure(self, rows: Sequence[EncodedRow]) -> float:
        """Return the loss of some rows in nats, summed over their trained tokens; nothing is trained or drawn.

        There is no dropout and no noise. The pass runs kernel by kernel, and keeps no activations. All other modules
        stay in training, since bitsandbytes packs the 4-bit weight of a module that does not train, and rounds it then.
        """
        tokens = width(sum(len(row.input_ids) for row in rows), capture=False)
        micro = lay_out(rows, tokens=tokens, places=len(rows), pad_id=self.shape.pad_id)
        longest = max(128, *(len(row.input_ids) for row in rows))
        drawing = [each for each in self.model.modules() if isinstance(each, torch.nn.Dropout)]
        drawing.append(self._causal.get_input_embeddings())
        modes = [each.training for each in drawing]
        try:
            for each in drawing:
                each.training = False
            with torch.no_grad():
                return self.loss(*micro.to(self.device), longest).item()
        finally:
            for each, mode in zip(drawing, modes, strict=True):
                each.training = mode

    def lay_out(self, rows: Sequence[EncodedRow]) -> MicroBatch:
        """Return these rows as a micro-batch, as wide as a pass over them is."""
        tokens = width(sum(len(row.input_ids) for row in rows), capture=self.plan.capture)
        micro = lay_out(rows, tokens=tokens, places=self.shape.places, pad_id=self.shape.pad_id)
        return micro.pinned() if self.device == "cuda" else micro

    def blank(self, tokens: int) -> MicroBatch:
        """Return a micro-batch of this width that trains nothing."""
        shape = self.shape
        return blank(tokens, places=shape.places, longest=shape.longest, pad_id=shape.pad_id)

    def run(self, tokens_4T: Tensor, starts_S: Tensor) -> Tensor:
        """Run the passes kernel by kernel over a micro-batch on the device; return its loss as a call does."""
        if self._noise is not None:
            self._noise.row_lengths_1T = tokens_4T[3:]
        rows = PackedRows(starts_S, min(self.shape.longest, tokens_4T.shape[1]))
        # The backward pass stands inside too: layers are computed again there.
        with packed_attention.packed_pass(self._causal.config, rows):
            loss = self._total(tokens_4T) / self._supervised
            (loss * self._scale).backward()
        return loss.detach()

    def loss(self, tokens_4T: Tensor, starts_S: Tensor, longest: int) -> Tensor:
        """Return the loss (0-d) of a micro-batch on the device, summed over its trained tokens, by the same pass.

        No row has more than `longest` tokens. There is no backward pass.
        """
        with packed_attention.packed_pass(self._causal.config, PackedRows(starts_S, min(longest, tokens_4T.shape[1]))):
            return self._total(tokens_4T)

    def _total(self, tokens_4T: Tensor) -> Tensor:
        """Return the loss (0-d) of the micro-batch whose rows are laid out for attention, summed over its tokens."""
        ids_1T, targets_1T, positions_1T, _ = tokens_4T[:, None].unbind(0)
        with self._autocast():
            hidden_1TD = self._causal.model(input_ids=ids_1T, position_ids=positions_1T, use_cache=False)[0]
            return response_loss(hidden_1TD[0], self._causal.lm_head.weight, targets_1T[0], self._loss_ops)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self._dtype is None:
            return contextlib.nullcontext()
        # Under capture autocast must not cache casts: they would be made outside of the next graph.
        return torch.autocast(self.device, dtype=self._dtype, cache_enabled=not self.plan.capture)

    def _capture(self, tokens: int) -> None:
        """Capture the pass of this width, unless that was done."""
        if tokens in self._graphs:
            return
        try:
            self._graphs[tokens] = Graph(self, tokens, next(iter(self._graphs.values()), None))
            return
        except RuntimeError as error:  # something in this model's pass synchronises
            if out_of_memory.is_short(error):
                raise  # the session makes room
            reason = str(error).splitlines()[0]
        raise CaptureFailed(reason)  # not within the handler, since the error's traceback holds the activations


class Graph:
    """The captured pass of one width, and the tensors that it reads and writes.

    All graphs of a training share one pool of memory: they run one after another, so the activations of one may lie
    over another's. `other` is any graph that was captured before, or None.
    """

    def __init__(self, passes: Passes, tokens: int, other: Graph | None) -> None:
        empty = passes.blank(tokens)
        self.tokens_4T, self.starts_S = empty.tokens_4T.cuda(), empty.starts_S.cuda()
        if other is None:
            # Kernels are compiled and library workspaces taken on the first pass, which a capture could not hold. All
            # targets are masked, so that it adds nothing to the gradients.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    passes.run(self.tokens_4T, self.starts_S)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog, a thread of its own, may look at an event meanwhile.
        with torch.cuda.graph(
            self.graph, pool=None if other is None else other.graph.pool(), capture_error_mode="thread_local"
        ):
            self.loss = passes.run(self.tokens_4T, self.starts_S)

    def replay(self, micro: MicroBatch) -> Tensor:
        """Run the pass over this micro-batch and return its loss."""
        self.tokens_4T.copy_(micro.tokens_4T, non_blocking=True)
        self.starts_S.copy_(micro.starts_S, non_blocking=True)
        self.graph.replay()
        return self.loss.clone()  # the next graph's memory may lie over it
