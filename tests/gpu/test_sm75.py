"""The T4's code path (compute capability 7.5), executed on whatever newer card is here.

Run on a machine with an NVIDIA GPU: pytest -m gpu tests/gpu/test_sm75.py
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.helpers.parts import ROOT

pytestmark = pytest.mark.gpu


def test_a_t4s_kernels_and_whole_runs_say_what_torch_says() -> None:
    """In a process of its own: from its first kernel on, Triton compiles as for a T4."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-s", "-p", "no:cacheprovider", "tests/gpu/sm75/cases.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"executed as sm_75: \d+ kernels", done.stdout)
    assert "skipped" not in done.stdout and re.search(r"\d+ passed", done.stdout)
