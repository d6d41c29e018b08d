"""Installed versions beside the pins, and the pairs of versions that are known to break."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from fast_ft.doctor.findings import Finding

ROOT = Path(__file__).parents[2]
#: Without these a run goes through other kernels.
OPTIONAL = ("unsloth", "unsloth_zoo", "xformers")


@dataclass(frozen=True)
class Pair:
    """Versions that do not go together: `what` with, or on, `other`. Read in their metadata, or tried."""

    what: str
    other: str | None
    on: Literal["cpu", "gpu", "any"]
    breaks: bool
    text: str
    remedy: str


PAIRS = (
    Pair("trl>=1.15", None, "cpu", True,
         "its fused head needs Triton with a driver, so it does not train on a CPU (tried)", "pip install trl==1.14.2"),
    Pair("trl>1.15.0", "unsloth", "gpu", True, "unsloth allows trl up to 1.15.0", "pip install trl==1.14.2"),
    Pair("transformers>5.17.0", "unsloth", "gpu", True, "unsloth allows transformers up to 5.17.0",
         "pip install transformers==5.17.0"),
    Pair("transformers<5", None, "any", True, "the caches and loaders of transformers 5 are used",
         "pip install transformers==5.17.0"),
    Pair("datasets>=5", "unsloth", "gpu", True, "unsloth wants datasets below 5", "pip install datasets==4.8.5"),
    Pair("torch>=2.15", "unsloth", "gpu", True, "unsloth wants torch below 2.15", "pip install 'torch<=2.13.0'"),
    Pair("unsloth>=2026.10.8", "certifi<2026.10.19", "gpu", True,
         "unsloth from 2026.10.8 on wants certifi 2026.10.19, which is not to be had everywhere",
         "pip install unsloth==2026.10.7 unsloth_zoo==2026.10.7"),
    Pair("xformers==0.0.35", "torch!=2.10.*", "gpu", False,
         "it is built for torch 2.10; under another Unsloth takes PyTorch's attention instead", "nothing need be done"),
    Pair("bitsandbytes<0.49", None, "cpu", True, "NF4 on CPUs came with 0.49", "pip install bitsandbytes==0.50.2"),
    Pair("huggingface-hub<1", "transformers>=5", "any", True, "transformers 5 wants huggingface-hub 1",
         "pip install huggingface-hub==1.33.0"),
)  # fmt: skip


def installed(name: str) -> str | None:
    """Return a package's installed version, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def pins(gpu: bool) -> tuple[str, list[Requirement]] | None:
    """Return what this machine wants, behind what `pip install` takes to install it.

    It stands in the requirements files of a checkout, and in the metadata of an installed package. None where the
    project came without either.
    """
    names = ("requirements-cpu.txt", "requirements-gpu.txt") if gpu else ("requirements-cpu.txt",)
    if all((ROOT / name).is_file() for name in names):
        texts = [
            line.partition("#")[0].strip() for name in names for line in (ROOT / name).read_text("utf-8").splitlines()
        ]
        return f"-r {'requirements.txt' if gpu else names[0]}", [Requirement(text) for text in texts if text]
    try:
        listed = importlib.metadata.requires("fast_ft") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    extra = {"extra": "gpu" if gpu else ""}
    found = [each for each in map(Requirement, listed) if each.marker is None or each.marker.evaluate(extra)]
    return f"--force-reinstall {'fast_ft[gpu]' if gpu else 'fast_ft'}", found


def install(gpu: bool) -> str:
    """Return the command that installs what this machine wants, from a checkout or for an installed package."""
    found = pins(gpu)
    return f"python -m pip install {found[0] if found else 'fast_ft[gpu]' if gpu else 'fast_ft'}"


def against_pins(gpu: bool) -> Iterator[Finding]:
    """Yield what is missing, and what is another version than the one that was tested."""
    found = pins(gpu)
    if found is None:
        yield Finding("versions", "note", "this copy of the project has no requirements files to compare with")
        return
    source, wanted = found
    have = {each.name: installed(each.name) for each in wanted}
    absent = [each for each in wanted if have[each.name] is None]
    missing = [str(each) for each in absent if each.name not in OPTIONAL]
    without = [str(each) for each in absent if each.name in OPTIONAL]
    other = [
        f"{each.name} {have[each.name]} ({each.specifier})"
        for each in wanted
        if (version := have[each.name]) is not None and not each.specifier.contains(version, prereleases=True)
    ]
    remedy = f"python -m pip install {source}"
    if missing:
        yield Finding("packages", "broken", f"missing: {', '.join(missing)}", remedy)
    if without:
        text = f"without {', '.join(without)}: a recipe with model.backend: unsloth stops; model.backend=auto goes on"
        yield Finding("packages", "note", text, remedy)
    if other:
        text = f"not the versions that were tested: {', '.join(other)}"
        yield Finding("versions", "warning", text, f"{remedy}, should something fail")
    if not absent and not other:
        yield Finding("versions", "fine", f"all {len(wanted)} packages are as pinned")


def known_pairs(gpu: bool, have: dict[str, str | None] | None = None) -> Iterator[Finding]:
    """Yield the pairs that are here and known to break; `have` stands in place of what is installed."""

    def matches(text: str | None) -> bool:
        """Return whether a requirement is met here; None, no requirement, is."""
        if text is None:
            return True
        wanted = Requirement(text)
        version = installed(wanted.name) if have is None else have.get(wanted.name)
        return version is not None and wanted.specifier.contains(version, prereleases=True)

    for pair in PAIRS:
        if pair.on in ("any", "gpu" if gpu else "cpu") and matches(pair.what) and matches(pair.other):
            name = Requirement(pair.what).name
            version = installed(name) if have is None else have.get(name)
            yield Finding(name, "broken" if pair.breaks else "note", f"{version}: {pair.text}", pair.remedy)
