"""What a key-value cache scheme costs and saves on a model: size, error of keys and values, held-out perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .models import NativeModel, Want
from .models.paged_cache import KVCacheConfig, PagedKVCache
from .ops import KVPages

__all__ = ["SCHEMES", "SchemeReport", "plot", "report"]

SCHEMES = ("bf16", "int8", "fp8_e4m3", "fp8_e5m2", "int4", "kivi4", "kivi2")
_STEP = 128  # tokens per forward: one that a query of the model's own decoding would see the same


@dataclass(frozen=True, slots=True)
class SchemeReport:
    """One line of the report; its fields are the keys of the command line's JSON.

    Attributes:
        scheme: name of the cache (see KVCacheConfig.parse); the first line is the model's own dtype, uncoded.
        bits_per_value: bits of a cached number in the pages, scales included; counted from the allocated tensors.
        bytes_per_token: memory of all pages and rings of the caches over the tokens they held.
        key_error, value_error: root of the squared errors over that of the squares, of the keys (after the rotary
            embedding) and values that the uncoded model computed, all layers and heads together.
        largest_key_error, largest_value_error: of a single number.
        perplexity: exp of the mean negative log-probability of a token, read with this cache.
        change: perplexity over that of the first line, minus 1.
        tokens: tokens scored.
    """

    scheme: str
    bits_per_value: float
    bytes_per_token: float
    key_error: float
    value_error: float
    largest_key_error: float
    largest_value_error: float
    perplexity: float
    change: float
    tokens: int


def report(
    model: NativeModel,
    texts: Sequence[Sequence[int]],
    schemes: Sequence[str | KVCacheConfig] = SCHEMES,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[SchemeReport]:
    """Score `texts` with each scheme.

    Args:
        model: its weights are shared, its own `kv_cache` plays no part.
        texts: token ids; each text, of 2 to max_context of them, is read by itself.
        schemes: names or configurations.
        progress: called with the number of texts that are done.
    Returns:
        a line for the model's own dtype, uncoded, then one for each scheme.
    Raises:
        ValueError: no text, one of another length, an unknown scheme, one that the model's head size does not allow.
    """
    if not texts:
        raise ValueError("kv_report: texts: expected at least one, got none")
    for text in texts:
        if not 2 <= len(text) <= model.config.max_context:
            raise ValueError(f"kv_report: texts: expected 2..{model.config.max_context} tokens, got {len(text)}")
    configs = [KVCacheConfig(), *map(KVCacheConfig.parse, schemes)]
    models = [model.with_kv_cache(config) for config in configs]
    sums = [_Sums() for _ in configs]
    for done, text in enumerate(texts):
        ids = torch.tensor([list(text)], dtype=torch.int64, device=model.device)
        plain: PagedKVCache | None = None
        for total, coded in zip(sums, models, strict=True):
            cache = total.read(coded, ids)
            plain = plain or cache
            total.compare(plain, cache.config)
        if progress:
            progress(done + 1)
    tokens = sum(map(len, texts))
    base = sums[0].nats / (tokens - len(texts))
    own = str(model.dtype).removeprefix("torch.")
    return [
        total.line(config.name if i else own, tokens, tokens - len(texts), base)
        for i, (config, total) in enumerate(zip(configs, sums, strict=True))
    ]


class _Sums:
    """What is known of a scheme so far."""

    def __init__(self) -> None:
        self.nats = 0.0
        self.num_bytes = 0
        self.bits_per_value = 0.0
        self.errors = torch.zeros(2, 3, dtype=torch.float64)  # keys, values: squared errors, squares, largest error

    @torch.no_grad()
    def read(self, model: NativeModel, ids: Tensor) -> PagedKVCache:
        """Negative log-probabilities of ids [1, n] after the first; the cache, all tokens in it."""
        cache = model.new_cache(1, ids.shape[1])
        assert isinstance(cache, PagedKVCache)
        for first in range(0, ids.shape[1], _STEP):
            step, after = ids[:, first : first + _STEP], ids[0, first + 1 : first + _STEP + 1]
            logits = model.forward(step, cache=cache, want=Want.LOGITS).logits
            assert logits is not None
            cache.keep(None, [step.shape[1]])
            wide = logits[0, : after.shape[0]].to(torch.promote_types(logits.dtype, torch.float32))
            self.nats += F.cross_entropy(wide, after, reduction="sum").item()
        self.num_bytes += cache.num_bytes
        self.bits_per_value = cache.bits_per_value
        return cache

    def compare(self, plain: PagedKVCache, config: KVCacheConfig) -> None:
        """Code the keys and values of an uncoded cache, and add up how far the codes are from them."""
        k, v = (
            x.permute(1, 3, 0, 2, 4).flatten(2, 3) for x in plain.dequantise(plain.pages.k.dtype)
        )  # [1, n, L * H, D]
        tokens, size = k.shape[1], config.page_size
        page_table = torch.arange(-(-tokens // size), dtype=torch.int32, device=k.device).unsqueeze(0)
        pages = KVPages.allocate(
            page_table.shape[1],
            size,
            k.shape[2],
            k.shape[3],
            scheme=config.scheme,
            group=config.group,
            dtype=config.dtype or k.dtype,
            batch=int(config.has_ring),
            tail_size=tokens if config.has_ring else 0,
            device=k.device,
        )
        ops.kv_append_(k[0], v[0], torch.arange(tokens, device=k.device), pages)  # page i is the i-th, slot i token i's
        kv_lens, tail_lens = torch.tensor([tokens], dtype=torch.int32, device=k.device), None
        if config.has_ring:
            tail_lens = kv_lens % config.flush_block
            ops.kv_flush_(pages, page_table, torch.zeros_like(kv_lens), kv_lens - tail_lens)
        found = ops.kv_report(k, v, pages, page_table, kv_lens, tail_lens=tail_lens)
        errors = found.errors.cpu()
        self.errors[:, :2] += errors[..., :2].sum((1, 2))
        self.errors[:, 2] = torch.maximum(self.errors[:, 2], errors[..., 2].amax((1, 2)))

    def line(self, scheme: str, cached: int, scored: int, base_nats: float) -> SchemeReport:
        key_error, value_error = (self.errors[:, 0] / self.errors[:, 1]).sqrt().tolist()
        nats = self.nats / scored
        return SchemeReport(
            scheme=scheme,
            bits_per_value=self.bits_per_value,
            bytes_per_token=self.num_bytes / cached,
            key_error=key_error,
            value_error=value_error,
            largest_key_error=self.errors[0, 2].item(),
            largest_value_error=self.errors[1, 2].item(),
            perplexity=math.exp(nats),
            change=math.expm1(nats - base_nats),
            tokens=scored,
        )


def plot(lines: Sequence[SchemeReport], path: Path) -> None:
    """Perplexity change and error of keys over bits per value, as PNG or what the suffix says."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    coded = lines[1:]
    for axes, label, values in (
        (left, "change of perplexity [%]", [100 * line.change for line in coded]),
        (right, "relative error of keys", [line.key_error for line in coded]),
    ):
        bits = [line.bits_per_value for line in coded]
        axes.scatter(bits, values)
        for line, x, y in zip(coded, bits, values, strict=True):
            axes.annotate(line.scheme, (x, y), textcoords="offset points", xytext=(4, 4))
        axes.set_xlabel("bits per value, scales included")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    right.set_yscale("log")
    figure.savefig(path, dpi=120)
    plt.close(figure)
