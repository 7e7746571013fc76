"""Every barrier of the CUDA kernels is there for something that the simulation sees; see remove_barriers.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import backends

SCRIPT = Path(__file__).parent / "remove_barriers.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(backends.why_not("simt") is not None, reason=str(backends.why_not("simt"))),
]


def test_every_barrier_is_missed():
    ran = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " caught by " in ran.stdout
