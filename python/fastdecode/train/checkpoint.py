"""Writing and scoring a trained model: the Hugging Face folder and its held-out bits per byte."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from . import corpus
from .model import Llama


def save(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config, generation config, bfloat16 weights and tokenizer in Hugging Face's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.state_dict().items()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.shape.config(), indent=2) + "\n")
    (folder / "generation_config.json").write_text(
        json.dumps({"_from_model_config": True, "bos_token_id": 0, "eos_token_id": [0]}, indent=2) + "\n"
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "model_max_length": model.shape.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


def load(model: Llama, folder: Path) -> Llama:
    """Fill `model` with the weights that `save` wrote."""
    model.load_state_dict(load_file(str(folder / "model.safetensors")))
    return model


@torch.no_grad()
def bits_per_byte(model: Llama, tokenizer: Tokenizer, split: str = "heldout", stride: int = 512) -> float:
    """Mean bits per UTF-8 byte over the files of `split`, with at least `stride` tokens of context where there are."""
    size = model.shape.max_position_embeddings
    nats, num_bytes = 0.0, 0
    for text in corpus.load(split).values():
        ids = torch.tensor(tokenizer.encode(text).ids)
        num_bytes += len(text.encode())
        scored = 1  # tokens whose loss is counted; the first is the given END_OF_TEXT
        for start in range(0, len(ids), stride):
            window = ids[start : start + size]
            fresh = start + len(window) - scored
            if fresh <= 0:
                break
            losses = F.cross_entropy(model(window[None])[0, :-1].float(), window[1:], reduction="none")
            nats += losses[-fresh:].double().sum().item()
            scored += fresh
    return nats / math.log(2) / num_bytes
