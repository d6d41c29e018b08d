"""The GPU that this process uses: which one it is, how fast, and the memory that is free on it."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

from fast_ft.common import environment

PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "unsloth", "unsloth_zoo", "xformers",
    "datasets", "tokenizers", "sentencepiece", "safetensors", "pyarrow",
)  # fmt: skip
_VENDOR = {"nvidia", "tesla", "geforce", "graphics", "device", "generation"}
_FORM = re.compile(r"sxm\d*|pcie|hbm\w*|\d+gb")  #: the board's form and memory, which no name of a figure carries
_CONTEXT_GROWS_GIB = 0.15  #: 0.60 GiB became 0.74 in training and 0.67 in decoding (H200)
_MAJOR, _MINOR = 75, 76  #: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h
#: Of this process, when its memory was first limited. It is the module's, since a process has one CUDA context.
_first_context_gib: float | None = None


def gpu() -> dict[str, str] | None:
    """Return the name, memory and driver of the NVIDIA GPU that this process uses, or None where it may use none.

    That is CUDA's first device: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER are read as CUDA reads them. nvidia-smi
    alone lists every card, whatever these say.
    """
    card = _card()
    return {key: value for key, value in card.items() if key != "compute_cap"} if card is not None else None


def capability() -> tuple[int, int] | None:
    """Return the compute capability of the GPU that this process uses, or None without one. torch is not needed.

    The driver itself is asked where nvidia-smi is not there, as in some containers, or does not tell.
    """
    card = _card()
    if card is not None and (match := re.fullmatch(r"(\d+)\.(\d+)", card["compute_cap"])):
        return int(match[1]), int(match[2])
    return _by_driver() if card is not None or shutil.which("nvidia-smi") is None else None


def _by_driver() -> tuple[int, int] | None:
    """Return the compute capability of CUDA's first device, by libcuda; None without driver or device."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    calls = (
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(device), 0),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
    )
    return None if any(call() for call in calls) else (major.value, minor.value)


def _card() -> dict[str, str] | None:
    """Return what `gpu` does, and the card's compute capability as text; it is empty where the driver tells none."""
    cards = _cards()
    wanted = environment.cuda_devices()
    if wanted is None:
        return _facts(cards[0]) if cards else None
    first = wanted.split(",")[0].strip()
    if first.isdecimal():
        return _facts(cards[int(first)]) if int(first) < len(cards) else None
    if first.startswith("MIG-"):
        return _slice(first, cards)
    return _facts(card) if (card := _named(first, cards)) is not None else None


def card_slug(card: str) -> str:
    """Return h200 for NVIDIA H200, h100 for NVIDIA H100 80GB HBM3, t4 for Tesla T4.

    A part of a card (MIG) keeps its profile.
    """
    whole, mig, profile = card.lower().partition(" mig ")
    words = [word for word in re.split(r"[\s-]+", whole) if word not in _VENDOR and not _FORM.fullmatch(word)]
    return "-".join([*words, *(["mig", profile.replace(".", "-")] if mig else [])])


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, each as CUDA_VISIBLE_DEVICES names it."""
    given = environment.cuda_devices()
    if given is not None:
        return [part.strip() for part in given.split(",") if part.strip() and part.strip() != "-1"]
    listed = _smi("-L") or ""
    return [str(n) for n, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


def _cards() -> list[dict[str, str]]:
    """Return nvidia-smi's cards in CUDA's order: by the bus, or the fastest first, which is CUDA's default."""
    keys = ["uuid", "name", "memory.total", "driver_version"]
    listed = _smi(f"--query-gpu={','.join([*keys, 'compute_cap'])}", "--format=csv,noheader")
    if listed is None:  # a driver that does not know compute_cap
        listed = _smi(f"--query-gpu={','.join(keys)}", "--format=csv,noheader") or ""
    rows = [[part.strip() for part in line.split(",")] for line in listed.splitlines()]
    cards = [dict(zip((*keys, "compute_cap"), row, strict=False)) for row in rows if len(row) >= len(keys)]
    if not environment.by_bus():
        cards.sort(key=lambda card: [-int(n) for n in card.get("compute_cap", "").split(".") if n.isdecimal()])
    return cards


def _named(prefix: str, cards: list[dict[str, str]]) -> dict[str, str] | None:
    """Return the card whose UUID begins like this; CUDA takes none where several do."""
    found = [card for card in cards if prefix.startswith("GPU-") and card["uuid"].startswith(prefix)]
    return found[0] if len(found) == 1 else None


def _slice(uuid: str, cards: list[dict[str, str]]) -> dict[str, str] | None:
    """Return a MIG device: its card's facts, with the slice's profile, such as 3g.20gb, in the name and as memory."""
    if uuid.startswith("MIG-GPU-"):  # an older driver's name: MIG-GPU-UUID/instance/instance
        card = _named(uuid.removeprefix("MIG-").partition("/")[0], cards)
        return _facts(card) if card is not None else None
    card = None
    for line in (_smi("-L") or "").splitlines():
        if at := re.match(r"GPU \d+:.*\(UUID: (GPU-[^)]+)\)", line):
            card = _named(at[1], cards)
        elif card is not None and (at := re.match(rf"\s+MIG (\S+)\s.*\(UUID: {re.escape(uuid)}", line)):
            return _facts(card) | {"name": f"{card['name']} MIG {at[1]}", "memory": at[1].rpartition(".")[2]}
    return None


def _facts(card: dict[str, str]) -> dict[str, str]:
    known = {"name": card["name"], "memory": card["memory.total"], "driver": card["driver_version"]}
    return known | {"compute_cap": card.get("compute_cap", "")}


def _smi(*arguments: str) -> str | None:
    """Return what nvidia-smi prints, or None where it is absent or fails."""
    if shutil.which("nvidia-smi") is None:  # said without a process: a run asks more than ten times
        return None
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def capabilities() -> tuple[tuple[int, int], list[str]]:
    """Return the compute capability of this process's GPU, and those that torch was built for, as sm_75, sm_80."""
    import torch

    return torch.cuda.get_device_capability(), torch.cuda.get_arch_list()


def be_deterministic() -> None:
    """Let torch use only operations that give the same bits each time. Before the first matrix product on a card."""
    environment.for_determinism()
    import torch

    torch.use_deterministic_algorithms(True)


def segments_expand() -> bool:
    """Return whether torch's allocator lets its blocks grow (environment.expand_segments)."""
    import torch

    if not torch.cuda.is_available():
        return False
    return bool(torch.cuda.memory._snapshot().get("allocator_settings", {}).get("expandable_segments"))


def cap_gpu_gib(memory_gib: float) -> float:
    """Keep this process within `memory_gib` of GPU memory; return how much of that the CUDA context takes, in GiB.

    The context is counted as at the first call, with what it grows by as kernels and libraries are loaded, so that a
    later phase gets as much memory as the first one. Without a GPU nothing is done, and the context takes 0.
    """
    global _first_context_gib
    import torch

    if not torch.cuda.is_available():
        return 0.0
    # what others hold on a shared card counts as context, up to 1 GiB: rather too little than too much
    now = context_gib()
    _first_context_gib = now if _first_context_gib is None else _first_context_gib
    context = min(1.0, max(now, _first_context_gib + _CONTEXT_GROWS_GIB))
    share = (memory_gib - context) * 2**30 / torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)))
    return context


def context_gib() -> float:
    """Return what is held on the GPU outside this process's allocator: its CUDA context, and what others hold."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    torch.zeros(1, device="cuda")  # the context exists from here on
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return float(total - free - torch.cuda.memory_reserved()) / 2**30


def whole_gpu_gib() -> float | None:
    """Return the memory of this process's GPU, in GiB, whatever is taken of it; None without a GPU."""
    import torch

    return float(torch.cuda.mem_get_info()[1]) / 2**30 if torch.cuda.is_available() else None


def free_gpu_gib() -> float | None:
    """Return the GPU memory that this process may still take, in GiB, or None without a GPU.

    A cap set by torch.cuda.set_per_process_memory_fraction counts.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    cap = torch.cuda.get_per_process_memory_fraction() * total
    return min(free, cap) / 2**30
