"""The examples run."""

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch


@pytest.fixture
def own_loop() -> ModuleType:
    pytest.importorskip("transformers")
    path = Path(__file__).parents[1] / "examples" / "own_loop.py"
    spec = importlib.util.spec_from_file_location("own_loop", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_loop(own_loop, capsys):
    own_loop.main([])  # asserts that its tokens are those of plain decoding and of model.generate
    lines = capsys.readouterr().out.splitlines()
    per_pass = [float(line.split()[2]) for line in lines]
    assert len(per_pass) == 2 and all(value > 1.1 for value in per_pass)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_own_loop_ends_on_a_broken_row(own_loop, temperature):
    passes = []

    def model(tokens, past_key_values):
        passes.append(tokens)
        assert len(passes) < 5, "the loop goes on for ever"
        return SimpleNamespace(logits=torch.full((*tokens.shape, 8), float("nan")))

    with pytest.raises(ArithmeticError, match=r"no token can be drawn at position 2: .*NAN"):
        own_loop.speculative(model, [1, 2], 4, num_drafts=2, temperature=temperature, seed=1)
