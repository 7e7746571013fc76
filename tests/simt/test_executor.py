"""The host SIMT executor: its primitives against models, built by the host compiler."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def build(directory: Path, *options: str) -> Path:
    subprocess.run(["cmake", "-S", HERE, "-B", directory, *options], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", directory, "--parallel", "2"], check=True, stdout=subprocess.DEVNULL)
    return directory


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("simt"))


def check_primitives(programs: Path, seed: int) -> None:
    ran = subprocess.run([programs / "primitives", str(seed)], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "0 failures\n", "")


@pytest.mark.parametrize("seed", range(5))
def test_primitives(plain, seed):
    check_primitives(plain, seed)
