"""The two shipped models: how each was trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from . import checkpoint, corpus, tokenizer
from .model import TINY_CODE, Llama
from .run import Recipe, train

RECIPES = {"tiny-code": Recipe(tokens=11_000_000)}


def corpus_stream(out: Path) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    """Tokenizer, training stream and held-out stream; cached in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    file, cache = out / "tokenizer.json", out / "tokens.npz"
    if not (file.exists() and cache.exists()):
        tok = tokenizer.train(corpus.load("train").values(), TINY_CODE.vocab_size)
        tok.save(str(file))
        streams = {split: tokenizer.encode_stream(tok, corpus.load(split).values()) for split in ("train", "heldout")}
        np.savez(cache, **streams)
    arrays = np.load(cache)
    return Tokenizer.from_file(str(file)), arrays["train"], arrays["heldout"]


def next_token_loss(model: torch.nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token; windows int64 [rows, size + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def train_tiny_code(recipe: Recipe, out: Path) -> None:
    """The target: next-token prediction on the corpus."""
    tok, stream, heldout = corpus_stream(out)
    torch.manual_seed(recipe.seed)
    model = Llama(TINY_CODE)
    sample = torch.from_numpy(heldout[: 48 * 513].reshape(48, 513).astype(np.int64))
    compiled = torch.compile(model)

    @torch.no_grad()
    def monitor() -> float:
        return next_token_loss(model, sample).item()

    summary = train(
        model, stream, lambda w: next_token_loss(compiled, w), recipe, out / "tiny-code.run", monitor=monitor
    )
    checkpoint.save(model, tok, out / "tiny-code")
    score = checkpoint.bits_per_byte(model, tok)
    print(f"tiny-code: {summary['tokens']:,} tokens in {summary['seconds'] / 60:.1f} minutes, held-out {score:.4f} bits per byte")


TRAINERS = {"tiny-code": train_tiny_code}
