"""The environment variables that this program reads or sets, in one place.

Set, unless the user has set them:

| when | variables |
|---|---|
| a command starts (`at_start`) | OMP_WAIT_POLICY |
| a model is about to be loaded (`for_libraries`) | UNSLOTH_DISABLE_STATISTICS, TOKENIZERS_PARALLELISM, \
TRANSFORMERS_VERBOSITY, PYTORCH_CUDA_ALLOC_CONF |
| a recipe asks for the same bits each time (`for_determinism`) | CUBLAS_WORKSPACE_CONFIG |
| bitsandbytes is imported (`without_compiler`) | TORCHDYNAMO_DISABLE |
| several processes train (`for_process`) | CUDA_VISIBLE_DEVICES, TORCH_CPP_LOG_LEVEL |
| in all but the first of these (`without_progress_bars`) | TQDM_DISABLE |
| a sweep starts workers (`during`) | CUDA_VISIBLE_DEVICES or OMP_NUM_THREADS and MKL_NUM_THREADS, OMP_WAIT_POLICY |
| a Ray cluster is used (`for_ray`) | RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO |

Read: CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER (which card), COLUMNS and LINES (how wide tables are), PIP_INDEX_URL
(what `doctor` asks), XDG_CACHE_HOME (`cache_folder`), CUDA_CACHE_PATH (`kernel_folder`), and what torchrun or
accelerate says of a process (`take_launcher`). Three other places read some for reasons of their own:
common/redaction.py all values that look like keys, judge/ the address and key of a judge (OPENAI_BASE_URL,
OPENAI_API_KEY), and data/jinja_sandbox.py four harmless ones, which it passes on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_LEAST = {"COLUMNS": 20, "LINES": 2}  #: in fewer columns no table says anything


def cache_folder() -> Path:
    """Return the folder for what a machine keeps between runs. It is not made here."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fast_ft"


def kernel_folder() -> Path:
    """Return the folder for compiled kernels: within CUDA's where the user has named that. Not made here."""
    named = os.environ.get("CUDA_CACHE_PATH")
    return Path(named) / "fast_ft" if named else cache_folder() / "kernels"


class Launcher(NamedTuple):
    """What torchrun or accelerate says of this process, as the environment had it; None: nothing was said."""

    given: Mapping[str, str | None]  #: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE
    by_accelerate: bool
    master_address: str | None
    master_port: str | None

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.given.items() if value is not None)


def take_launcher() -> Launcher:
    """Return a launcher's variables, and take them out of the environment, but for the address of process 0.

    transformers, accelerate and Unsloth would wrap the model and divide the batches if they found them. accelerate's
    own (its precision, device and dynamo) go too, since the recipe decides these.
    """
    of_accelerate = [name for name in os.environ if name.startswith("ACCELERATE_")]
    found = Launcher(
        {name: os.environ.pop(name, None) for name in _LAUNCHER},
        bool(of_accelerate),
        os.environ.get("MASTER_ADDR"),
        os.environ.get("MASTER_PORT"),
    )
    for name in of_accelerate:
        del os.environ[name]
    return found


def launched() -> bool:
    """Return whether a launcher says that this process is one of several. Ask before take_launcher."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def host_rank() -> str:
    """Return torchrun's number of this host, or "" where nobody gave one."""
    return os.environ.get("GROUP_RANK", "")


def at_start() -> None:
    """Set what has to stand before torch loads OpenMP.

    Threads that spin while they wait take shared vCPUs from those that work: a step on 2 cores beside one busy process
    took 0.67 s with spinning and 0.12 s without.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def for_process(local_rank: int) -> None:
    """Keep one of several processes to the GPU of its number on this host. Before torch is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a process that leaves first makes the others talk
    cards = cuda_devices()
    seen = cards.split(",") if cards is not None else [str(each) for each in range(local_rank + 1)]
    os.environ["CUDA_VISIBLE_DEVICES"] = seen[local_rank] if local_rank < len(seen) else seen[-1]


def without_compiler() -> contextlib.AbstractContextManager[None]:
    """Let torch.compile do nothing within, for libraries that call it as they are imported.

    bitsandbytes does so for functions that a card never calls; that loads the whole compiler, for a second or two.
    """
    return during({"TORCHDYNAMO_DISABLE": os.environ.get("TORCHDYNAMO_DISABLE", "1")})


def without_progress_bars() -> None:
    """Let libraries draw no bars: the first process of a training draws them."""
    os.environ.setdefault("TQDM_DISABLE", "1")


def for_libraries() -> None:
    """Set what Unsloth, tokenizers, transformers and torch read when they are imported. Before a model is loaded."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # no telemetry
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no threads forked under a data loader
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it repeats one hint with each batch
    expand_segments()


def expand_segments() -> None:
    """Let torch's blocks of GPU memory grow: else those of one pass that fit none of the next pile up.

    It counts before the card is touched.
    """
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def for_determinism() -> None:
    """Let cuBLAS pick kernels that do not hang on what memory is at hand. Before the first product on a card."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def for_ray() -> None:
    """Let Ray leave CUDA_VISIBLE_DEVICES alone where an actor was promised no GPU, as will be its own default."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def cuda_devices() -> str | None:
    """Return CUDA_VISIBLE_DEVICES: the GPUs that this process may use, separated by commas; None: all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def by_bus() -> bool:
    """Return whether CUDA numbers its devices by the bus; by default the fastest comes first."""
    return os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"


def pip_index() -> str | None:
    """Return the package index that the user gave pip, if any."""
    return os.environ.get("PIP_INDEX_URL") or None


def drop_impossible_sizes() -> None:
    """Take COLUMNS and LINES out where they are no size of a terminal: rich prints nothing in a width of 0."""
    for name, least in _LEAST.items():
        value = os.environ.get(name, "")
        if value and not (value.isascii() and value.isdigit() and len(value) < 5 and int(value) >= least):
            del os.environ[name]


def for_child(path: str, **changes: str) -> dict[str, str]:
    """Return the environment of a process that imports modules from `path` first, with some variables changed."""
    paths = [path, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | changes


@contextlib.contextmanager
def during(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables within: for a process that is started, or a library that is imported."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
