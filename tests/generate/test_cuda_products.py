"""The CUDA products without a card: how work is dealt out, what is kept of the compiler's, and that it compiles."""

from __future__ import annotations

import hashlib
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast_ft.generate.engine import nf4_hopper, nf4_mma, nf4_turing, nvrtc


@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 300))
def test_parts_are_as_many_as_the_blocks_of_the_most_shared_tile(tiles: int, chunks: int, blocks: int) -> None:
    """Counted as the kernel deals chunks out: an even share for each block, in order."""
    blocks = min(blocks, tiles * chunks)
    owners = [set() for _ in range(tiles)]  # type: list[set[int]]
    for block in range(blocks):
        for chunk in range(tiles * chunks * block // blocks, tiles * chunks * (block + 1) // blocks):
            owners[chunk // chunks].add(block)
    assert nf4_mma.parts_of(tiles, chunks, blocks) == max(max(each) - min(each) for each in owners) + 1
    assert nf4_mma.parts_of(tiles, chunks, blocks) == max(map(len, owners))


@pytest.mark.parametrize("room", [99 << 10, 163 << 10, 227 << 10])
def test_every_number_of_rows_has_a_cut_that_fits(room: int) -> None:
    """For the shared memory of 8.6 and 8.9, 8.0, and 9.0."""
    for rows in range(1, 129):
        cut = nf4_mma.fitting(rows, room)
        assert rows <= 8 * cut.mt < rows + (8 if rows <= 64 else 32) and cut.shared <= room and cut.stages >= 3
    with pytest.raises(ValueError, match="49152 bytes of shared memory are too few for 64 rows"):
        nf4_mma.fitting(64, 48 << 10)


def test_every_number_of_rows_has_a_cut_that_fits_a_hopper_card() -> None:
    for rows, outputs in product(range(1, 129), (64, 4096, 22016)):
        cut = nf4_hopper.cut_for(rows, outputs, 132)
        assert rows <= 8 * cut.mt < rows + 8 and cut.shared <= 227 << 10 and cut.stages >= 3


def test_what_is_compiled_is_kept_and_a_damaged_file_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled: list[str] = []

    def compiler(library: object, source: str, options: object, kind: str) -> bytes:
        compiled.append(source)
        return f"machine code of {source}".encode()

    monkeypatch.setattr(nvrtc, "_library", lambda: None)
    monkeypatch.setattr(nvrtc, "_version", lambda library: "13.0")
    monkeypatch.setattr(nvrtc, "_compile", compiler)
    for _ in range(2):
        assert nvrtc.compiled("a", (), (9, 0)) == b"machine code of a"
    assert compiled == ["a"]
    (kept,) = nvrtc.folder().iterdir()
    assert tmp_path in kept.parents
    kept.write_bytes(kept.read_bytes()[:-1])
    assert nvrtc.compiled("a", (), (9, 0)) == b"machine code of a" and compiled == ["a", "a"]
    for source, options, capability in (("b", (), (9, 0)), ("a", ("-G",), (9, 0)), ("a", (), (8, 0))):
        nvrtc.compiled(source, options, capability)
    nvrtc.compiled("a", (), (9, 0), own=True)
    monkeypatch.setattr(nvrtc, "_version", lambda library: "12.8")
    nvrtc.compiled("a", (), (9, 0))
    assert len(compiled) == 7 and len(list(nvrtc.folder().iterdir())) == 6
    monkeypatch.setenv("CUDA_CACHE_PATH", str(tmp_path / "named"))
    assert tmp_path / "named" in nvrtc.folder().parents, "a measurement with empty caches finds none of ours either"
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # a file: nothing can be kept there
    assert nvrtc.compiled("a", (), (9, 0)) == b"machine code of a" and len(compiled) == 8


def test_the_sources_are_in_the_package_and_hold_the_codes() -> None:
    for dtype in ("float16", "bfloat16"):
        text = nf4_mma.source(nf4_mma.fitting(64, 227 << 10), dtype)
        hopper = nf4_hopper.source(nf4_hopper.cut_for(64, 4096, 132), dtype)
        kind = "bf16" if dtype == "bfloat16" else "f16"
        assert f"wgmma.mma_async.sync.aligned.m64n64k16.f32.{kind}.{kind} " in hopper and f'KIND "{kind}"' in hopper
        assert "#define MT 8\n" in text and ("bf16" in text.split("// y")[0]) == (dtype == "bfloat16")
    assert "mma.m16n8k8" in nf4_turing.source(8) and nf4_turing.size_for(17) == 4
    assert hashlib.sha256(nf4_turing.source(2).encode()) != hashlib.sha256(nf4_turing.source(4).encode())


@pytest.mark.soak
def test_the_products_compile_for_every_card_that_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By NVRTC, without a card. Skipped where torch is not built for CUDA and NVRTC is not installed beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        nvrtc.compiled("", (), (9, 0))
    except OSError as error:
        pytest.skip(str(error))
    cards = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227}
    for (capability, room), rows, dtype in product(cards.items(), (1, 16, 64, 128), ("float16", "bfloat16")):
        cubin = nvrtc.compiled(nf4_mma.source(nf4_mma.fitting(rows, room << 10), dtype), (), capability)
        assert cubin.startswith(b"\x7fELF"), (capability, rows)
    for rows, outputs, dtype in product((1, 16, 64, 128), (4096, 22016), ("float16", "bfloat16")):
        source = nf4_hopper.source(nf4_hopper.cut_for(rows, outputs, 132), dtype)
        assert nvrtc.compiled(source, (), (9, 0), own=True).startswith(b"\x7fELF"), rows
    for tiles in (2, 4, 8):
        assert nvrtc.compiled(nf4_turing.source(tiles), (), (7, 5)).startswith(b"\x7fELF")
    assert b".target sm_75" in nvrtc.compiled(nf4_turing.source(8), (), (7, 5), portable=True)
    with pytest.raises(RuntimeError, match=r"NVRTC: kernel\.cu"):
        nvrtc.compiled("no C++", (), (9, 0))
