"""The two shipped models: how each was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor

from . import checkpoint, corpus, tokenizer
from .model import TINY_CODE, TINY_CODE_DRAFT, Llama
from .run import Recipe, train

Scorer = Callable[[Tensor], Tensor]  # tokens int64 [rows, n] -> logits [rows, n, V]

RECIPES = {
    "tiny-code": Recipe(tokens=9_000_000),
    "tiny-code-draft": Recipe(tokens=9_000_000),
}


def corpus_stream(out: Path) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    """Tokenizer, training stream and held-out stream; cached in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    file, cache = out / "tokenizer.json", out / "tokens.npz"
    if not (file.exists() and cache.exists()):
        tok = tokenizer.train(corpus.load("train").values(), TINY_CODE.vocab_size)
        tok.save(str(file))
        train_tokens, heldout_tokens = (
            tokenizer.encode_stream(tok, corpus.load(split).values()) for split in ("train", "heldout")
        )
        np.savez(cache, train=train_tokens, heldout=heldout_tokens)
    arrays = np.load(cache)
    return Tokenizer.from_file(str(file)), arrays["train"], arrays["heldout"]


def next_token_loss(model: Scorer, windows: Tensor) -> Tensor:
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
    _report("tiny-code", summary, checkpoint.bits_per_byte(model, tok))


def own_outputs(target: Path, stream: np.ndarray, num_texts: int, seed: int, batch: int = 64) -> np.ndarray:
    """What the target writes: prompts of 64 tokens from the corpus, each with 192 tokens of its own, int32 [total].

    Three quarters are drawn at temperature 1, one quarter is greedy: a draft is asked for both.
    """
    from .. import generate  # the trainer of a model for the library is its first user
    from ..models import load_model
    from ..types import Results

    model = load_model(target, dtype=torch.bfloat16)
    starts = np.random.default_rng(seed).integers(0, len(stream) - 64, num_texts)
    texts = []
    for first in track(range(0, num_texts, batch), description="tiny-code writes"):
        prompts = [stream[s : s + 64].astype(np.int64) for s in starts[first : first + batch]]
        temperatures = [0.0 if i % 4 == 3 else 1.0 for i in range(len(prompts))]
        seeds = list(range(first, first + len(prompts)))
        results = generate(model, prompts, max_new_tokens=192, temperature=temperatures, seeds=seeds, ignore_eos=True)
        assert isinstance(results, Results)
        texts += [np.concatenate([p, r.tokens]).astype(np.int32) for p, r in zip(prompts, results, strict=True)]
    return np.concatenate(texts)


def distillation_loss(draft: Scorer, target: Scorer, windows: Tensor) -> Tensor:
    """TV + KL / 4 of the draft from the target, mean per token (Zhou et al. 2024); windows int64 [rows, size + 1].

    1 - TV is the probability that a drawn draft is accepted (Leviathan et al. 2023, theorem 3.5), so TV is what should
    be small; alone it gives no gradient where the draft is far off.
    """
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            wanted = F.log_softmax(target(windows[:, :-1]).flatten(0, 1).float(), -1)
        logits = draft(windows[:, :-1])
    drafted = F.log_softmax(logits.flatten(0, 1).float(), -1)
    divergence = F.kl_div(drafted, wanted, reduction="batchmean", log_target=True)
    variation = 0.5 * (drafted.exp() - wanted.exp()).abs().sum(-1).mean()
    return variation + 0.25 * divergence


def train_tiny_code_draft(recipe: Recipe, out: Path) -> None:
    """The draft: two layers, distilled from tiny-code on the target's own outputs and on the corpus, half and half."""
    tok, stream, _ = corpus_stream(out)
    written = out / "own-outputs.npy"
    if not written.exists():
        np.save(written, own_outputs(out / "tiny-code", stream, num_texts=4096, seed=recipe.seed))
    own = np.load(written)
    taken = np.random.default_rng(recipe.seed).integers(0, len(stream) - len(own))
    mixed = np.concatenate([own, stream[taken : taken + len(own)]])
    torch.manual_seed(recipe.seed)
    target = checkpoint.load(Llama(TINY_CODE), out / "tiny-code").requires_grad_(False)
    draft = Llama(TINY_CODE_DRAFT)
    # in one piece: half of the time goes into passes over [4096 tokens, 4096 ids], which fuse
    loss_of = torch.compile(lambda windows: distillation_loss(draft, target, windows))
    summary = train(draft, mixed, loss_of, recipe, out / "tiny-code-draft.run")
    checkpoint.save(draft, tok, out / "tiny-code-draft")
    _report("tiny-code-draft", summary, checkpoint.bits_per_byte(draft, tok))


def _report(name: str, summary: dict[str, float], score: float) -> None:
    minutes = summary["seconds"] / 60
    print(f"{name}: {summary['tokens']:,} tokens in {minutes:.1f} minutes, held-out {score:.4f} bits per byte")


TRAINERS = {"tiny-code": train_tiny_code, "tiny-code-draft": train_tiny_code_draft}
