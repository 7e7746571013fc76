"""The examples run."""

import importlib.util
from pathlib import Path

import pytest


def test_own_loop(capsys):
    pytest.importorskip("transformers")
    path = Path(__file__).parents[1] / "examples" / "own_loop.py"
    spec = importlib.util.spec_from_file_location("own_loop", path)
    assert spec is not None and spec.loader is not None
    own_loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own_loop)
    own_loop.main([])  # asserts that its tokens are those of plain decoding and of model.generate
    lines = capsys.readouterr().out.splitlines()
    per_pass = [float(line.split()[2]) for line in lines]
    assert len(per_pass) == 2 and all(value > 1.1 for value in per_pass)
