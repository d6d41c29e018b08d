"""One micro-batch, forward and backward: run kernel by kernel, or captured in a CUDA graph and replayed.

A micro-batch is some rows of the effective batch, one behind the other (models/packed_attention.py says why nothing is
padded). A
7B's forward and backward are some thousands of kernels. On a large card Python takes longer to launch them than the
GPU to run them; a graph launches them all at once. It needs a fixed width, so the last tokens of a pass are padding up
to a multiple of 128. All graphs share one pool of memory and are captured before the first step.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fast_ft.common.console import note
from fast_ft.data.encoding import IGNORE_INDEX, EncodedRow
from fast_ft.models import packed_attention
from fast_ft.models.activation_checkpointing import has_dropout, recompute
from fast_ft.models.loaders.base import LoadedModel
from fast_ft.models.packed_attention import PackedRows
from fast_ft.plan.micro_batches import width
from fast_ft.train.loss import response_loss
from fast_ft.train.neftune import Noise
from fast_ft.train.optimizer import Flat


@dataclass(frozen=True)
class Micro:
    """A micro-batch on the host: `tokens` (4, T) int64 holds ids, targets, positions and each token's row's length."""

    tokens: Any
    starts: Any  #: (S + 1,) int32, as in attention.PackedRows


def lay_out(rows: Sequence[EncodedRow], *, tokens: int, places: int, pad_id: int) -> Micro:
    """Return the rows one behind the other, `tokens` in all, with `places` for rows besides the padding's.

    The target of a token is the label of the next one of its row; the last one's is IGNORE_INDEX.
    """
    import torch

    assert len(rows) <= places, "a micro-batch has at most the effective batch's rows"
    lengths = [len(row.input_ids) for row in rows]
    padding = tokens - sum(lengths)
    ids = [token for row in rows for token in row.input_ids] + [pad_id] * padding
    targets = [label for row in rows for label in [*row.labels[1:], IGNORE_INDEX]] + [IGNORE_INDEX] * padding
    each = [*lengths, padding]
    positions = [position for length in each for position in range(length)]
    own = [length for length in each for _ in range(length)]
    starts = [0, *itertools.accumulate(lengths)]
    starts += [tokens] * (places + 2 - len(starts))
    return Micro(torch.tensor([ids, targets, positions, own]), torch.tensor(starts, dtype=torch.int32))


def blank(tokens: int, *, places: int, longest: int, pad_id: int) -> Micro:
    """Return a micro-batch that trains nothing: rows of at most `longest` tokens, all targets masked."""
    each = min(longest, -(-tokens // places))
    rows = [EncodedRow("", [pad_id] * each, [IGNORE_INDEX] * each) for _ in range(tokens // each)]
    return lay_out(rows, tokens=tokens, places=places, pad_id=pad_id)


class Passes:
    """Forward and backward of micro-batches over one model.

    `begin` once a step, then call it for each micro-batch: it adds to the adapter's gradients and returns the loss
    summed over the micro-batch's trained tokens, divided by `supervised`, in nats, without the loss scale. The model is
    changed from `open`, or the first `begin`, until `close`: noise on its embeddings, layers that are computed again.
    `places` is how many rows a micro-batch may hold, `longest` the tokens of the longest of all rows.
    """

    def __init__(
        self, loaded: LoadedModel, flat: Flat, *, noise_alpha: float | None, capture: bool, recompute_layers: int,
        places: int, longest: int, pad_id: int,
    ) -> None:  # fmt: skip
        import torch

        self.model, self.device = loaded.model, loaded.device
        self.places, self.longest, self.pad_id = places, max(longest, 128), pad_id
        self._causal = loaded.model.get_base_model()
        self._dtype = None if loaded.dtype == "float32" else getattr(torch, loaded.dtype)
        self._flat = flat
        self._scale = torch.ones((), device=self.device)
        self._supervised = torch.ones((), device=self.device)
        self._graphs: dict[int, _Graph] = {}
        self._pool: Any = None
        self._noise = Noise(noise_alpha) if noise_alpha is not None else None
        self._open = False
        self.reshape(capture=capture, recompute_layers=recompute_layers)

    def open(self) -> None:
        """Put noise on the embeddings and let layers be computed again; nothing where that was done."""
        if self._open:
            return
        self._open = True
        if self._noise is not None:
            self._noise.put_on(self._causal.get_input_embeddings())
        recompute(self.model, self._recompute_layers)

    def close(self) -> None:
        """Take the noise off the embeddings, let go of graphs and their memory, keep all activations again."""
        if self._noise is not None:
            self._noise.take_off()
        self.reshape(capture=False, recompute_layers=0)
        self._open = False

    def reshape(self, *, capture: bool, recompute_layers: int) -> None:
        """Let go of graphs and their memory, and go on this way."""
        if self._graphs:
            import torch

            self._graphs.clear()
            # cuBLAS holds 32 MiB and more for each stream that a capture ran on: they stayed, some 64 MiB a run
            torch._C._cuda_clearCublasWorkspaces()
        self._pool = None
        random = recompute_layers > 0 and has_dropout(self.model)
        self.capture = capture and self.device == "cuda" and not random
        self._recompute_layers = recompute_layers
        if self._open:
            recompute(self.model, recompute_layers)

    def begin(self, supervised: float, scale: Any | None) -> None:
        """Start a step: `supervised` are its trained tokens, `scale` fp16's loss scale (a tensor) or None."""
        self.open()
        self._supervised.fill_(supervised)
        if scale is not None:
            self._scale.copy_(scale)
        self._flat.zero_gradients()

    def __call__(self, micro: Micro, *, seed: int) -> Any:
        """Add one micro-batch. `seed` is for dropout and noise; it is set after a capture, which draws too."""
        import torch

        tokens = micro.tokens.shape[1]
        if self.capture and tokens not in self._graphs:
            self._capture(tokens)
        torch.manual_seed(seed)
        if self.capture:
            return self._graphs[tokens].replay(micro)
        return self._run(micro.tokens.to(self.device), micro.starts.to(self.device))

    def rehearse(self, widths: Iterable[int]) -> dict[int, float]:
        """Capture and run a pass of each width, the widest first, and return the seconds that each takes.

        Without graphs the widest alone is run. All targets are masked, so nothing is learned; random states and
        gradients are left as they were.
        """
        import torch

        seconds = {}
        self.model.train()
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if self.device == "cuda" else []):
            self.begin(1.0, None)
            self._scale.fill_(1.0)
            for tokens in sorted(set(widths), reverse=True)[: None if self.capture else 1]:
                micro = self.blank(tokens)
                for _ in range(2):  # the first one captures, or compiles
                    started = time.perf_counter()
                    loss = self(micro, seed=0)
                    assert loss.item() == 0.0, "nothing is trained in a rehearsal"  # and waits for the device
                    seconds[tokens] = time.perf_counter() - started
        self.model.zero_grad()
        return seconds

    def lay_out(self, rows: Sequence[EncodedRow]) -> Micro:
        """Return these rows as a micro-batch, as wide as a pass over them is."""
        tokens = width(sum(len(row.input_ids) for row in rows), capture=self.capture)
        return lay_out(rows, tokens=tokens, places=self.places, pad_id=self.pad_id)

    def blank(self, tokens: int) -> Micro:
        """Return a micro-batch of this width that trains nothing."""
        return blank(tokens, places=self.places, longest=self.longest, pad_id=self.pad_id)

    def _capture(self, tokens: int) -> None:
        import torch

        try:
            self._graphs[tokens] = _Graph(self, tokens)
        except torch.OutOfMemoryError:
            raise  # the trainer makes room
        except RuntimeError as error:  # something in this model's pass synchronises
            note(f"the pass cannot be captured ({str(error).splitlines()[0]}): it runs kernel by kernel, more slowly")
            self._graphs.clear()
            self._pool, self.capture = None, False

    def _run(self, tokens_4T: Any, starts_S: Any) -> Any:
        import torch

        ids_1T, targets_1T, positions_1T, lengths_1T = tokens_4T[:, None].unbind(0)
        if self._noise is not None:
            self._noise.row_lengths = lengths_1T
        # Under capture autocast must not cache casts: they would be made outside of the next graph.
        autocast = (
            torch.autocast(self.device, dtype=self._dtype, cache_enabled=not self.capture)
            if self._dtype is not None
            else contextlib.nullcontext()
        )
        # the backward pass too: layers are computed again there
        with packed_attention.packed_pass(
            self._causal.config, PackedRows(starts_S, min(self.longest, tokens_4T.shape[1]))
        ):
            with autocast:
                hidden_1TD = self._causal.model(input_ids=ids_1T, position_ids=positions_1T, use_cache=False)[0]
                total = response_loss(hidden_1TD[0], self._causal.lm_head.weight, targets_1T[0])
            loss = total / self._supervised
            (loss * self._scale).backward()
        return loss.detach()


class _Graph:
    """The captured pass of one width, and the tensors that it reads and writes."""

    def __init__(self, passes: Passes, tokens: int) -> None:
        import torch

        empty = passes.blank(tokens)
        self.tokens, self.starts = empty.tokens.cuda(), empty.starts.cuda()
        if passes._pool is None:
            # Kernels are compiled and library workspaces taken on the first pass, which a capture could not hold. All
            # targets are masked, so that it adds nothing to the gradients.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    passes._run(self.tokens, self.starts)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        # One pool for all widths: graphs run one after another, so the activations of one may lie over another's.
        # thread_local: NCCL's watchdog, a thread of its own, may look at an event meanwhile.
        with torch.cuda.graph(self.graph, pool=passes._pool, capture_error_mode="thread_local"):
            self.loss = passes._run(self.tokens, self.starts)
        passes._pool = passes._pool or self.graph.pool()

    def replay(self, micro: Micro) -> Any:
        self.tokens.copy_(micro.tokens)
        self.starts.copy_(micro.starts)
        self.graph.replay()
        return self.loss.clone()  # the next graph's memory may lie over it
