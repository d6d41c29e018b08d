"""The machine's memory, as a container's limits leave it."""

from __future__ import annotations

from pathlib import Path

import psutil

from fast_ft.common import host_memory

_GIB = 2**30


def test_what_is_free_and_what_this_process_may_hold_lie_within_the_machine() -> None:
    whole = psutil.virtual_memory().total
    assert 0 < host_memory.free_bytes() < whole
    held = bytearray(64 << 20)
    assert len(held) < host_memory.own_bytes() < whole
    assert host_memory.free_bytes() < host_memory.whole_bytes() <= whole


def group(folder: Path, **files: int | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_the_limits_of_a_process_own_groups_and_of_those_around_count(tmp_path: Path) -> None:
    told = "0::/slice/box\n"
    group(tmp_path / "slice", memory__max=8 * _GIB, memory__current=2 * _GIB, memory__stat="anon 5\ninactive_file 7")
    group(tmp_path / "slice" / "box", memory__max="max", memory__current=_GIB, memory__stat="anon 5")
    assert list(host_memory.groups(tmp_path, told)) == [(8 * _GIB, 6 * _GIB + 7)]
    group(tmp_path / "slice" / "box", memory__max=_GIB + 3)
    assert list(host_memory.groups(tmp_path, told)) == [(_GIB + 3, 3), (8 * _GIB, 6 * _GIB + 7)]
    group(tmp_path, memory__max=3, memory__current=5, memory__stat="")
    assert list(host_memory.groups(tmp_path, "0::/a/name/of/the/host\n")) == [(3, 0)], "a container sees its own"


def test_groups_of_the_first_version_count_too(tmp_path: Path) -> None:
    told = "9:name=systemd:/\n4:cpu,memory:/box\n0::/\n"
    group(
        tmp_path / "memory" / "box", memory__limit_in_bytes=4 * _GIB, memory__usage_in_bytes=_GIB,
        memory__stat="inactive_file 1\ntotal_inactive_file 9",
    )  # fmt: skip
    assert list(host_memory.groups(tmp_path, told)) == [(4 * _GIB, 3 * _GIB + 9)]
    assert list(host_memory.groups(tmp_path, "")) == []
