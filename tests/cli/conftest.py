"""Tiny random checkpoints on disk, and a way to run the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fastdecode.cli import main
from fastdecode.models import NativeConfig
from fastdecode.runtime import thread_settings

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 256,
}


def write_checkpoint(folder: Path, noise: float = 0.0, **changes: int) -> Path:
    """A Hugging Face folder with random weights, the same ones plus noise, and a tokenizer of single bytes."""
    safetensors = pytest.importorskip("safetensors.torch")
    tokenizers = pytest.importorskip("tokenizers")
    folder.mkdir(parents=True)
    config = {**CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    g, weights = torch.Generator().manual_seed(0), {}
    for name, shape in NativeConfig.from_hf(config).tensor_shapes().items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
        else:
            scale = 1.0 if "embed" in name else shape[1] ** -0.5
            weights[name] = scale * torch.randn(shape, generator=g)
        weights[name] += noise * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    safetensors.save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the names of the shipped checkpoints, and one with another vocabulary."""
    root = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(root / "tiny-code")
    write_checkpoint(root / "tiny-code-draft", noise=0.05)
    write_checkpoint(root / "wide", vocab_size=300)
    return root


@pytest.fixture
def shipped(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny checkpoints stand in for the shipped ones."""
    for module in ("cli.common", "cli.doctor", "compare"):
        monkeypatch.setattr(f"fastdecode.{module}.CHECKPOINTS", checkpoints)
    return checkpoints


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run(*arguments: object) -> Ran:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    with thread_settings():
        yield
