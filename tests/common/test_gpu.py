"""Which card a run says that it ran on: CUDA's first one, which is not always the first that nvidia-smi lists."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fast_ft.common import gpu

#: uuid, name, memory, driver, compute capability: a machine with a display card, and two others, one of them cut up.
CARDS = """\
GPU-aa11, NVIDIA T400, 2048 MiB, 560.35, 7.5
GPU-bb22, NVIDIA A100-SXM4-40GB, 40960 MiB, 560.35, 8.0
GPU-bb33, NVIDIA H100 80GB HBM3, 81559 MiB, 560.35, 9.0
"""
LISTED = """\
GPU 0: NVIDIA T400 (UUID: GPU-aa11)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bb22)
  MIG 3g.20gb     Device  0: (UUID: MIG-c6d4f1ef-42e4)
  MIG 1g.5gb      Device  1: (UUID: MIG-cba663e8-9bed)
GPU 2: NVIDIA H100 80GB HBM3 (UUID: GPU-bb33)
"""
#: In nvidia-smi's place. An old driver knows no compute_cap.
PROGRAM = """#!/bin/sh
case "$1" in
-L) cat {folder}/listed ;;
*compute_cap*) {old} cat {folder}/cards ;;
*) cut -d, -f1-4 {folder}/cards ;;
esac
"""
T400, A100, H100 = "NVIDIA T400", "NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3"


def put(folder: Path, monkeypatch: pytest.MonkeyPatch, *, old: bool = False, cards: str = CARDS) -> None:
    (folder / "cards").write_text(cards)
    (folder / "listed").write_text(LISTED)
    program = folder / "nvidia-smi"
    program.write_text(PROGRAM.format(folder=folder, old="exit 2;" if old else ""))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("visible", "order", "name"),
    [
        (None, None, H100),  # CUDA's default order: the fastest first
        (None, "PCI_BUS_ID", T400),
        ("0", None, H100),
        ("0", "PCI_BUS_ID", T400),
        ("1", "PCI_BUS_ID", A100),
        ("2,0", "PCI_BUS_ID", H100),
        (" 1 , 0", "FASTEST_FIRST", A100),
        ("GPU-bb22", None, A100),
        ("GPU-aa", None, T400),
        ("GPU-bb", None, None),  # two cards begin like this
        ("GPU-cc", None, None),
        ("MIG-cba663e8-9bed", None, f"{A100} MIG 1g.5gb"),
        ("MIG-GPU-bb22/3/0", None, A100),
        ("MIG-dead", None, None),
        ("", None, None),
        ("-1", None, None),
        ("-1,0", None, None),  # CUDA reads the list up to the first that it does not know
        ("3", None, None),
        ("NoDevFiles", None, None),
    ],
)
def test_the_card_is_the_one_that_cuda_shows_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, order: str | None, name: str | None
) -> None:
    put(tmp_path, monkeypatch)
    for key, value in (("CUDA_VISIBLE_DEVICES", visible), ("CUDA_DEVICE_ORDER", order)):
        if value is not None:
            monkeypatch.setenv(key, value)
    found = gpu.gpu()
    assert (found or {}).get("name") == name
    if name == H100:
        assert found == {"name": H100, "memory": "81559 MiB", "driver": "560.35"}


def test_the_card_is_told_by_an_old_driver_too_and_is_none_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, monkeypatch, old=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert (gpu.gpu() or {})["name"] == A100
    put(tmp_path, monkeypatch, cards="")
    assert gpu.gpu() is None
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert gpu.gpu() is None


def test_the_capability_is_the_cards_that_cuda_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By nvidia-smi, else by the driver itself; a machine without either has none."""
    put(tmp_path, monkeypatch)
    assert gpu.capability() == (9, 0) and "compute_cap" not in (gpu.gpu() or {})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu.capability() == (8, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.capability() is None, "nvidia-smi is there, and CUDA may use none"
    monkeypatch.setattr(gpu, "_by_driver", lambda: (7, 5))
    assert gpu.capability() is None
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert gpu.capability() == (7, 5), "a container without nvidia-smi"


def test_a_machine_without_a_driver_has_no_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(gpu.ctypes, "CDLL", absent)
    assert gpu._by_driver() is None
