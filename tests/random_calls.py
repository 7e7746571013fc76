"""Random calls of every op: any shape, layout, dtype, filter and rule that its contract allows, hostile values in all.

`call(op, seed)` gives the same arguments for the same seed. The ops are enumerated: one without an entry in CALLS fails
the tests that use this.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import attention_inputs
import fastdecode.ops
from fastdecode import KVScheme
from fastdecode.ops import KVPages
from kv_inputs import KIVI, SCHEMES, hostile_tokens, make_pages, some_rope, some_slots
from support import DTYPES, hostile, map_tensors, same_bits, tensors_of, views

I32, I64, F32 = torch.int32, torch.int64, torch.float32
NAN, INF = float("nan"), float("inf")
# Sizes around vector widths, words of a mask, tiles (2048), and rows that several blocks share.
VOCAB_SIZES = (1, 2, 3, 7, 31, 32, 33, 70, 100, 257, 1000, 2047, 2048, 2049, 4097, 6151, 10_007)
MANY_TILES = 257 * 2048 - 3  # more tiles than a block has threads


class Draw:
    """Random choices, from one seed."""

    def __init__(self, *seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def integer(self, low: int, high: int) -> int:
        """low..high, both included."""
        return int(self.rng.integers(low, high + 1))

    def one(self, values: Any) -> Any:
        return values[self.integer(0, len(values) - 1)]

    def integers(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = I64) -> Tensor:
        """low..high, both included."""
        return torch.from_numpy(self.rng.integers(low, high, shape, dtype=np.int64, endpoint=True)).to(dtype)

    def floats(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
        """Standard normal."""
        return torch.from_numpy(self.rng.standard_normal(shape)).to(dtype)

    def some(self, values: list, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype)[self.integers(0, len(values) - 1, shape)]

    def layout(self, tensor: Tensor) -> Tensor:
        """The same values, behind other strides and offsets now and then."""
        return self.one([view for _, view in views(tensor)]) if tensor.dim() > 1 and self.chance(0.4) else tensor

    def shared(self, tensor: Tensor) -> Tensor:
        """Now and then one row for all, without a copy."""
        if tensor.dim() > 1 and tensor.shape[0] > 0 and self.chance(0.15):
            return tensor[:1].expand(tensor.shape)
        return self.layout(tensor)

    def logits(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        rows = hostile(int(np.prod(shape[:-1])), shape[-1], dtype, seed=self.integer(0, 2**31))
        if rows.shape[0] and self.chance(0.2):
            rows[self.integer(0, rows.shape[0] - 1), self.integer(0, shape[-1] - 1)] = self.one([NAN, INF, -INF])
        return self.shared(rows.view(shape))

    def active(self, batch: int) -> dict[str, Tensor]:
        return {"active": torch.from_numpy(self.rng.random(batch) < 0.7)} if self.chance(0.3) else {}

    def keys(self, batch: int) -> dict[str, Tensor]:
        return {
            "seed": self.integers(-(2**63), 2**63 - 1, (batch,)),
            "offset": self.integers(0, 2**40, (batch,)),
        }

    def filters(self, batch: int, rows: tuple[int, ...], vocab_size: int, *, positions: bool) -> dict[str, Any]:
        """`rows`: the shape of a mask of its own for each row; () where there is none.
        positions: with min_lengths, which need offset."""
        if self.chance(0.2):
            return {}
        made: dict[str, Any] = {}
        numbers: dict[str, tuple[list, torch.dtype]] = {
            "temperature": ([0.0, 0.3, 0.7, 1.0, 1.0, 1.7, -1.0, 1e-3, NAN, INF], F32),
            "top_k": ([0, 0, 1, 2, 3, 20, 100, vocab_size // 64, vocab_size, vocab_size + 1, -5, 2**31 - 1], I32),
            "top_p": ([1.0, 1.0, 0.1, 0.6, 0.95, 0.0, 2.0, NAN], F32),
            "min_p": ([0.0, 0.0, 0.05, 0.5, 1.0, -1.0, NAN], F32),
            "typical_p": ([1.0, 1.0, 0.2, 0.9, 0.0, NAN], F32),
        }
        for name, (values, dtype) in numbers.items():
            if self.chance(0.4):
                made[name] = self.some(values, (batch,), dtype)
        if self.chance(0.2):
            bias = self.floats((batch, vocab_size), F32)
            bias[torch.from_numpy(self.rng.random(bias.shape) < 0.1)] = -INF
            made["bias"] = bias[0] if batch and self.chance(0.3) else self.layout(bias)
        if self.chance(0.25):
            count = self.integer(0, 4)
            bans = self.integers(-1, vocab_size, (batch, count))
            made["ban_ids"] = bans[0] if batch and self.chance(0.3) else self.layout(bans)
            if positions and self.chance(0.5):
                made["min_lengths"] = self.integers(0, 20, (batch, count))
                made["offset"] = self.integers(0, 20, (batch,))
        if self.chance(0.3):
            own_rows = rows and self.chance(0.5)
            shape = (*(rows if own_rows else (batch,)), -(-vocab_size // 32))
            words = self.integers(-(2**31), 2**31 - 1, shape) | self.integers(-(2**31), 2**31 - 1, shape)
            words[torch.from_numpy(self.rng.random(shape) < 0.3)] = self.one([-1, 0])
            made["bitmask"] = self.shared(words.to(I32))
        if self.chance(0.3):
            made["order"] = "joint"
        return made

    def row_start(self, batch: int, lens: Tensor) -> tuple[Tensor, int]:
        """Where each request's rows begin among flat ones, some of which nobody owns, and how many there are."""
        before, after = self.integer(0, 2), self.integer(0, 2)
        starts = before + torch.cat([torch.zeros(1, dtype=I64), lens.cumsum(0)])
        return starts.to(I32), int(starts[-1]) + after


def _sizes(draw: Draw, *, most_rows: int = 5) -> tuple[int, int, torch.dtype]:
    """Requests, vocabulary, dtype."""
    if draw.chance(0.02):
        return 1, MANY_TILES, draw.one(DTYPES)
    return draw.integer(0 if draw.chance(0.1) else 1, most_rows), draw.one(VOCAB_SIZES), draw.one(DTYPES)


def _aim(draw: Draw, logits: Tensor, made: dict[str, Any]) -> None:
    """Filters that forbid the most likely id of a row, which all that is computed from it hangs on, and ids that are
    forbidden and broken: those are errors too."""
    likely = logits.reshape(-1, logits.shape[-1])[:1].double().nan_to_num(-INF).argmax(-1)
    if likely.numel() == 0 or not draw.chance(0.5):
        return
    if "ban_ids" in made and made["ban_ids"].numel():
        made["ban_ids"] = made["ban_ids"].clone()
        made["ban_ids"].view(-1)[-1] = likely
    if "bitmask" in made and made["bitmask"].numel():
        made["bitmask"] = made["bitmask"].clone()
        word = torch.tensor(~(1 << int(likely) % 32), dtype=I64).to(I32)
        made["bitmask"].view(-1, made["bitmask"].shape[-1])[:, int(likely) // 32] &= word
    if draw.chance(0.3) and any(name in made for name in ("ban_ids", "bitmask", "bias")):
        logits.select(-1, int(likely)).fill_(draw.one([NAN, INF]))


def _rows(draw: Draw) -> tuple[dict[str, Any], int, int]:
    """{"logits": [B, V] or [B, n, V]}, B, V."""
    batch, vocab_size, dtype = _sizes(draw)
    lead = (batch, draw.integer(0, 3)) if draw.chance(0.3) else (batch,)
    return {"logits": draw.logits((*lead, vocab_size), dtype)}, batch, vocab_size


def _law_rows(draw: Draw) -> tuple[dict[str, Any], tuple[int, ...], int]:
    """Rows of a law with its filters: [B, V], [B, n, V] or flat; the shape of the rows, V."""
    batch, vocab_size, dtype = _sizes(draw)
    if draw.chance(0.3):
        starts, num_rows = draw.row_start(batch, draw.integers(0, 3, (batch,)))
        shape: tuple[int, ...] = (num_rows,)
        given: dict[str, Any] = {"logits": draw.logits((num_rows, vocab_size), dtype), "row_start": starts}
        masks = shape
    else:
        shape = (batch, draw.integer(0, 3)) if draw.chance(0.3) else (batch,)
        given = {"logits": draw.logits((*shape, vocab_size), dtype)}
        masks = shape if len(shape) == 2 else ()
    made = draw.filters(batch, masks, vocab_size, positions=True)
    if "row_start" in given and "bitmask" in made:  # flat rows have a mask each
        made["bitmask"] = draw.integers(-(2**31), 2**31 - 1, (*shape, -(-vocab_size // 32)), I32)
    _aim(draw, given["logits"], made)
    return given | made | draw.active(batch), shape, vocab_size


def row_stats(draw: Draw) -> dict[str, Any]:
    given, batch, _ = _rows(draw)
    return given | draw.active(batch)


def topk_logits(draw: Draw) -> dict[str, Any]:
    given, batch, vocab_size = _rows(draw)
    counts = (
        [1, 2, 7, 50, 257, 1025, vocab_size // 64 + 1, vocab_size] if vocab_size < MANY_TILES else [700, 1500, 3000]
    )
    return given | draw.active(batch) | {"k": min(vocab_size, draw.one(counts))}


def target_probs(draw: Draw) -> dict[str, Any]:
    return _law_rows(draw)[0]


def sample(draw: Draw) -> dict[str, Any]:
    batch, vocab_size, dtype = _sizes(draw)
    given = {"logits": draw.logits((batch, vocab_size), dtype)} | draw.active(batch)
    if draw.chance(0.7):
        made = draw.filters(batch, (), vocab_size, positions=False) | draw.keys(batch)
        _aim(draw, given["logits"], made)
        return given | made | {"stream": draw.integer(0, 255), "node": draw.integer(0, 2**24 - 1)}
    made = draw.filters(batch, (), vocab_size, positions=True)
    _aim(draw, given["logits"], made)
    return given | made | {"uniforms": torch.from_numpy(draw.rng.random(batch))}


def token_logprobs(draw: Draw) -> dict[str, Any]:
    given, shape, vocab_size = _law_rows(draw)
    given["tokens"] = draw.layout(draw.integers(-2, vocab_size, shape))
    given["top"] = min(vocab_size, draw.one([0, 1, 2, 20, vocab_size if vocab_size < MANY_TILES else 1025]))
    if draw.chance(0.3):
        kept = ("logits", "tokens", "top", "row_start", "active")
        return {name: value for name, value in given.items() if name in kept}
    return given | {"filtered": True}


def apply_token_bitmask_(draw: Draw) -> dict[str, Any]:
    batch, vocab_size, dtype = _sizes(draw)
    lead = (batch, draw.integer(0, 3)) if draw.chance(0.3) else (batch,)
    logits = hostile(int(np.prod(lead)), vocab_size, dtype, seed=draw.integer(0, 999)).view(*lead, vocab_size)
    words, options = draw.integer(0, -(-vocab_size // 32)), {}
    if len(lead) == 1 and draw.chance(0.5):
        count = draw.integer(0, 7)
        options["indices"] = draw.integers(-1, batch, (count,), I32)
        lead = (count,)
    mask = draw.integers(-(2**31), 2**31 - 1, (*lead, words), I32)
    mask[torch.from_numpy(draw.rng.random(mask.shape) < 0.5)] = draw.one([-1, 0])
    return {"logits": draw.layout(logits), "bitmask": draw.shared(mask), **options, **draw.active(batch)}


def penalize(draw: Draw) -> dict[str, Any]:
    batch, vocab_size, dtype = _sizes(draw)
    lead = (batch, draw.integer(1, 4)) if draw.chance(0.5) else (batch,)
    longest = draw.one([0, 1, 5, 40, 300])
    lengths = draw.integers(0, longest, (batch,), I32)
    made: dict[str, Any] = {
        "logits": draw.logits((*lead, vocab_size), dtype),
        "tokens": draw.layout(draw.integers(-1, min(vocab_size, 50), (batch, longest))),
        "lengths": lengths,
    }
    if batch and draw.chance(0.1):
        lengths[0] = draw.one([-1, longest + 1])
    if draw.chance(0.5):
        made["prompt_lengths"] = (lengths.double() * draw.rng.random()).int()
    if len(lead) == 2 and draw.chance(0.7):
        made["draft_tokens"] = draw.layout(draw.integers(-1, min(vocab_size, 20), (batch, lead[1] - 1)))
    for name, values in (
        ("repetition", [1.0, 1.0, 1.3, 0.5, 0.0, NAN]),
        ("presence", [0.0, 0.0, 0.7, -0.4]),
        ("frequency", [0.0, 0.0, 0.3, -2.0]),
    ):
        if draw.chance(0.6):
            made[name] = draw.some(values, (batch,), F32)
    return made | draw.active(batch)


def linear(draw: Draw) -> dict[str, Any]:
    rows, columns, inner = draw.integer(0, 14), draw.one([0, 1, 63, 64, 65, 200]), draw.one([0, 1, 7, 64, 333])
    dtype = draw.one([torch.float32, torch.float64])
    given = {
        "x": draw.shared(draw.floats((rows, inner), dtype)),
        "weight": fastdecode.ops.pack_weight(draw.floats((columns, inner), dtype)),
        "out_features": columns,
    }
    if rows and inner and draw.chance(0.2):
        given["x"] = given["x"].clone().mul_(torch.finfo(dtype).smallest_normal)
    if draw.chance(0.5):
        given["bias"] = draw.floats((columns,), dtype)
    if draw.chance(0.5):
        given["residual"] = draw.shared(draw.floats((rows, columns), dtype))
    return given


def verify_chain_greedy(draw: Draw) -> dict[str, Any]:
    batch, longest = draw.integer(0, 70), draw.one([0, 1, 2, 5, 31, 33, 70])
    given = {
        "draft_tokens": draw.shared(draw.integers(0, 1, (batch, longest))),
        "target_ids": draw.shared(draw.some([-1, 0, 0, 0, 1, 1, 1], (batch, longest + 1), I64)),
    }
    if draw.chance(0.6):
        given["draft_lens"] = draw.integers(-1, longest + 1, (batch,), I32)
    return given | draw.active(batch)


def trees(draw: Draw) -> dict[str, Any]:
    """Parents mostly of earlier slots; in some rows anything."""
    batch, slots = draw.integer(0, 9), draw.one([0, 1, 2, 31, 32, 33, 65, 129, 256, 257, 300, 1024])
    uniform = draw.rng.random((batch, slots))
    parents = torch.from_numpy((uniform * np.arange(slots)).astype(np.int32))
    if slots:
        parents[:, 0] = -1
    for b in range(batch):
        if slots and draw.chance(0.3):
            parents[b, draw.integer(0, slots - 1)] = draw.one([-2, -1, 0, slots - 1, slots, 2**31 - 1, -(2**31)])
    given: dict[str, Any] = {"parents": draw.shared(parents)}
    if draw.chance(0.6):
        given["num_nodes"] = draw.integers(-1, slots + 1, (batch,), I32)
    return given


def paged_attention(draw: Draw) -> dict[str, Any]:
    """Any scheme; now and then a page or a length that is wrong."""
    batch, slots, kv_heads = draw.integer(0, 4), draw.one([1, 1, 2, 3, 9, 33]), draw.integer(1, 3)
    scheme = draw.one([*attention_inputs.SCHEMES, "fp8_static"])
    options: dict[str, Any] = {"softcap": draw.one([None, None, 20.0]), "window": draw.one([None, None, 1, 40])}
    if draw.chance(0.3):
        words = -(-slots // 32)
        options["tree_mask"] = draw.integers(-(2**31), 2**31 - 1, (batch, slots, words), I32)
    elif draw.chance(0.3):
        options["causal"] = False
    own_coded = scheme.startswith("kivi") and draw.chance(0.4)
    dtype = draw.one(DTYPES)
    given = attention_inputs.make(
        scheme=scheme,
        dtype=dtype,
        cache_dtype=draw.one([dtype, *DTYPES]),
        lens=tuple(draw.one([0, 1, 7, 63, 64, 65, 100, 130, 511, 513, 1100]) for _ in range(batch)),
        slots=slots,
        heads=kv_heads * draw.integer(1, 5),
        kv_heads=kv_heads,
        head_dim=draw.one([16, 48, 64, 128, 256]),
        tail=None if own_coded else draw.one([20, 20, 600]),
        page_size=draw.one([16, 64]) if scheme.startswith("kivi") else draw.one([1, 5, 16, 70]),
        group=draw.one([8, 16]) if scheme.startswith("kivi") else draw.one([None, 16, 1]),
        layout=draw.one(["HND", "NHD"]),
        seed=draw.integer(0, 10**6),
        **options,
    )
    if own_coded:  # all is in pages, and the newest tokens in the rings as well, with other values
        for tail in (given.pages.k_tail, given.pages.v_tail):
            assert tail is not None
            tail.copy_(draw.floats(tuple(tail.shape)))
            size = tail.shape[1]
        given.options["tail_lens"] = torch.minimum(given.kv_lens, draw.integers(0, size, (batch,), I32))
        first, share = given.kv_lens - given.options["tail_lens"], draw.integers(0, 4, (batch, slots), I32)
        given.options["coded_lens"] = first[:, None] + given.options["tail_lens"][:, None] * share // 4
        if batch and draw.chance(0.1):
            given.options["coded_lens"][0, 0] += draw.one([-1, 1000])
    if given.pages.scheme == KVScheme.PLAIN and draw.chance(0.3):  # in keys of some nodes, or past some windows
        for b in range(batch):
            if (length := int(given.kv_lens[b])) > 0:
                token = max(0, length - draw.integer(1, slots + 2))
                where = int(given.page_table[b, token // given.pages.page_size]), token % given.pages.page_size
                given.pages.v[where][..., draw.integer(0, 3) :: 5] = draw.one([INF, NAN])
    if batch and draw.chance(0.2):
        given.page_table[0, 0] = -1
    if batch and draw.chance(0.1):
        given.kv_lens[0] = draw.one([-1, 2**30])
    made = {"q": draw.layout(given.q), "pages": given.pages, "page_table": draw.layout(given.page_table)}
    return made | {"kv_lens": given.kv_lens, **given.options}


def prefix_attention(draw: Draw) -> dict[str, Any]:
    groups = draw.integer(0, 4)
    given = attention_inputs.make(
        scheme=draw.one([*attention_inputs.SCHEMES, "fp8_static"]),
        dtype=draw.one(DTYPES),
        lens=tuple(draw.one([0, 1, 64, 65, 130]) for _ in range(groups)),
        slots=draw.integer(1, 40),
        tail=None,
        seed=draw.integer(0, 10**6),
    )
    q = given.q.flatten(0, 1)
    starts, _ = torch.sort(draw.integers(-1 if draw.chance(0.1) else 0, len(q), (groups + 1,), I32))
    made = {"q": draw.layout(q), "pages": given.pages, "group_start": starts, "page_table": given.page_table}
    return made | {"prefix_lens": given.kv_lens, "scale": draw.one([None, 0.3])}


def merge_states(draw: Draw) -> dict[str, Any]:
    states, rows, heads = draw.one([1, 2, 3, 16]), draw.integer(0, 40), draw.integer(1, 5)
    dtype, head_dim = draw.one(DTYPES), draw.one([0, 1, 16, 33, 128])
    lses = 5 * draw.floats((states, rows, heads), torch.float64 if dtype == torch.float64 else F32)
    lses[torch.from_numpy(draw.rng.random(lses.shape) < 0.2)] = -INF
    return {"outs": list(draw.floats((states, rows, heads, head_dim), dtype)), "lses": list(lses)}


RULES = ("ratio", "block", "coupled", "typical", "typical, sampled", "top_beta")


def verify_chain(draw: Draw, rule: str | None = None) -> dict[str, Any]:
    """Drafts near the target, so that some are kept."""
    batch, vocab_size, dtype = _sizes(draw, most_rows=4)
    rule = rule or draw.one(RULES)
    longest = draw.integer(0, 4) if vocab_size < MANY_TILES else 1
    logits = hostile(batch * (longest + 1), vocab_size, dtype, seed=draw.integer(0, 999), broken=draw.chance(0.1))
    logits = logits.view(batch, longest + 1, vocab_size)
    lens = draw.integers(0, longest, (batch,), I32)
    work = torch.float64 if dtype == torch.float64 else F32
    draft_probs = torch.softmax(logits[:, :longest].double() + 0.7 * draw.floats((batch, longest, vocab_size)), -1)
    flat = draft_probs.nan_to_num(nan=0.5).view(-1, vocab_size)
    picked = (flat.cumsum(-1) / flat.sum(-1, keepdim=True) > torch.from_numpy(draw.rng.random((len(flat), 1)))).long()
    tokens = picked.argmax(-1).view(batch, longest)
    if draw.chance(0.3):  # the most likely ones: greedy rules keep them
        tokens = draft_probs.nan_to_num().argmax(-1)
    tokens[torch.from_numpy(draw.rng.random(tokens.shape) < 0.05)] = draw.one([-1, vocab_size, 2**40])
    made: dict[str, Any] = {"draft_tokens": draw.layout(tokens), "rule": rule.split(",")[0]}
    if draw.chance(0.6):
        made["draft_lens"] = lens
    draws = rule in ("ratio", "block", "coupled", "typical, sampled")
    if rule in ("ratio", "block") and draw.chance(0.7):
        given = draft_probs.to(draw.one([dtype, work]))
        if draw.chance(0.3):  # a vocabulary of its own, with ids that mean nothing and ids that mean the same
            size = 0 if draw.chance(0.05) else draw.integer(1, vocab_size + 2)
            made["draft_to_target"] = draw.integers(-1, draw.one([vocab_size, min(vocab_size, 3)]), (size,))
            given = torch.softmax(draw.floats((batch, longest, size)), -1).to(given.dtype)
            made["draft_tokens"] = draw.integers(0, max(size - 1, 0), (batch, longest))
        made["draft_probs"] = draw.layout(given)
    elif draw.chance(0.2):
        made["draft_to_target"] = draw.integers(-1, vocab_size, (vocab_size,))
    as_probs = rule not in ("coupled", "top_beta") and draw.chance(0.25)
    target = torch.softmax(logits.to(work), -1).to(dtype) if as_probs else logits
    masks: tuple[int, ...] = (batch, longest + 1)
    if draw.chance(0.25):
        lengths = made.get("draft_lens", torch.full((batch,), longest)).long()
        made["row_start"], num_rows = draw.row_start(batch, lengths + 1)
        own = torch.arange(longest + 1) <= lengths[:, None]
        whole = torch.full((num_rows, vocab_size), NAN, dtype=dtype)
        first = int(made["row_start"][0])
        whole[first : first + int(own.sum())] = target[own]
        target, masks = whole, (num_rows,)
    made["target_probs" if as_probs else "target_logits"] = draw.layout(target)
    if not as_probs:
        filters = draw.filters(batch, masks, vocab_size, positions=not draws)
        if "row_start" in made and "bitmask" in filters:
            filters["bitmask"] = draw.integers(-(2**31), 2**31 - 1, (*masks, -(-vocab_size // 32)), I32)
        if rule == "top_beta":
            filters = {k: v for k, v in filters.items() if k in ("bias", "ban_ids", "min_lengths", "offset", "bitmask")}
        made |= filters
    if rule.startswith("typical"):
        made |= {"eps": 0.3 * draw.floats((batch,), F32).abs(), "delta": draw.floats((batch,), F32).abs()}
        made |= {"bonus": "sample"} if "sampled" in rule else {}
    if rule == "top_beta":
        made |= {"beta": draw.integers(0, 5, (batch,), I32), "tau": 3 * draw.floats((batch,), F32).abs()}
    if draws:
        uniform = "min_lengths" not in made and draw.chance(0.3)
        uniforms = torch.from_numpy(draw.rng.random((batch, longest + 1)))
        made |= {"uniforms": draw.layout(uniforms)} if uniform else draw.keys(batch)
    return made | draw.active(batch) | ({"emit_bonus": False} if draw.chance(0.2) else {})


def commit(draw: Draw) -> dict[str, Any]:
    batch, width = draw.integer(0, 150), draw.integer(1, 9)
    made = {
        "tokens": draw.shared(draw.integers(-1, 9, (batch, width))),
        "num_emitted": draw.integers(-1, width + 1, (batch,), I32),
        "lengths": draw.integers(0, 50, (batch,), I32),
        "finished": torch.from_numpy(draw.rng.random(batch) < 0.2),
    }
    if draw.chance(0.7):
        made["max_lengths"] = draw.integers(0, 60, (batch,), I32)
    if draw.chance(0.7):
        made["stop_ids"] = draw.shared(draw.integers(-1, 9, (batch, draw.integer(0, 3))))
    return made


# ----------------------------------------------------------------------------------------------------------------------
# Calls made for what random ones would hardly meet


def counts_to_confuse() -> dict[str, Any]:
    """The k-th largest is found by counting blocks of ids by their distance from the largest; here the counts are such
    that a sum mixed up with the position of another would name a distance within which there are less than k."""
    blocks = torch.full((1601, 64), -50.0)
    blocks[:, 0] = torch.tensor([10.0] + [9.4] * 600 + [7.0] * 1000)
    return {"logits": blocks.view(1, -1), "k": 1300}


def sum_in_order() -> dict[str, Any]:
    """300 draft ids of one meaning. Added in order their mass stays 1, since each of the others is lost in rounding;
    were some of them added before the first, it would take away all that the target has there, and another id be drawn.
    """
    draft_probs = torch.full((2, 1, 300), 2.0**-25)
    draft_probs[..., 0] = 1
    return {
        "draft_tokens": torch.zeros(2, 1, dtype=I64),
        "draft_probs": draft_probs,
        "draft_to_target": torch.zeros(300, dtype=I64),
        "target_probs": torch.tensor([1 + 2.0**-23, 2.0**-30]).expand(2, 2, 2),
        "uniforms": torch.tensor([[0.9999999, 0.5]] * 2, dtype=torch.float64),
        "rule": "ratio",
    }


def none_lost() -> dict[str, Any]:
    """300 draft ids of one meaning again, of equal mass, a little more than the target has there: were one of them
    passed over, the target would have more, and its id be drawn."""
    mass = 2.0**-25
    return {
        "draft_tokens": torch.zeros(2, 1, dtype=I64),
        "draft_probs": torch.full((2, 1, 300), mass),
        "draft_to_target": torch.zeros(300, dtype=I64),
        "target_probs": torch.tensor([300 * mass * (1 - 2.0**-10), 2.0**-40]).expand(2, 2, 2),
        "uniforms": torch.tensor([[0.9999999, 0.5]] * 2, dtype=torch.float64),
        "rule": "ratio",
    }


def many_drafts() -> dict[str, Any]:
    """More drafts than are read at once, nearly all of them accepted, and each another token."""
    drafts = torch.arange(130).expand(6, 130) % 7
    likely = torch.nn.functional.one_hot(torch.cat([drafts, drafts[:, :1]], 1), 7) * 0.993 + 0.001
    return {"draft_tokens": drafts.clone(), "target_probs": likely.float(), "rule": "ratio"} | {
        "seed": torch.arange(6) + 40,
        "offset": torch.arange(6),
    }


def typical_rows() -> dict[str, Any]:
    """Every thread needs the sum of each row before anyone adds up the next one."""
    return {"logits": hostile(16, 3000, F32, seed=5, broken=False), "typical_p": 0.5}


def many_rows() -> dict[str, Any]:
    """Rows enough that none is cut into parts, of several tiles each."""
    return {"logits": hostile(64, 9000, F32, seed=6, broken=False)}


def broken_sibling() -> dict[str, Any]:
    """Of each request three nodes of a tree, one with a value that is inf in all channels and that no sibling sees."""
    mask = torch.tensor([[0b001], [0b011], [0b101]], dtype=I32).repeat(8, 1, 1)
    given = attention_inputs.make(
        dtype=torch.bfloat16, lens=(70,) * 8, heads=4, kv_heads=4, head_dim=256, page_size=128, tree_mask=mask
    )
    given.pages.v[given.page_table[:, 0].long(), 68] = INF
    made = {"q": given.q, "pages": given.pages, "page_table": given.page_table}
    return made | {"kv_lens": given.kv_lens, **given.options}


TELLING: dict[str, tuple[Callable[[], dict[str, Any]], ...]] = {
    "paged_attention": (broken_sibling,),
    "row_stats": (many_rows,),
    "target_probs": (typical_rows,),
    "topk_logits": (counts_to_confuse,),
    "verify_chain": (sum_in_order, none_lost, many_drafts),
}


def cache(draw: Draw, schemes: tuple[str, ...], **sizes: Any) -> KVPages:
    kivi_group, page_groups = draw.one([4, 8, 16]), draw.integer(1, 3)
    scheme = draw.one(schemes)
    group = kivi_group if scheme in KIVI else draw.one([None, 2, 4])
    head_dim = draw.one([4, 6, 16, 40, 64, 96, 128]) if scheme not in KIVI else kivi_group * draw.integer(1, 5)
    options: dict[str, Any] = {
        "num_pages": draw.integer(1, 6),
        "page_size": kivi_group * page_groups if scheme in KIVI else draw.integer(1, 9),
        "heads": draw.integer(1, 3),
        "head_dim": head_dim,
        "group": group if group is None or head_dim % group == 0 else 2,
        "tail_size": draw.integer(1, 40),
        "dtype": draw.one(DTYPES),
        "layout": draw.one(["HND", "NHD"]),
    }
    if scheme.startswith("fp8"):
        options["static_scales"] = draw.chance(0.3)
    return make_pages(scheme, seed=draw.integer(0, 2**31), **(options | sizes))


def table_of(draw: Draw, pages: KVPages, batch: int) -> Tensor:
    table = draw.integers(0, pages.num_pages - 1, (batch, draw.integer(1, 4)), I32)
    if batch and draw.chance(0.2):
        table[draw.integer(0, batch - 1), draw.integer(0, table.shape[1] - 1)] = draw.one([-1, pages.num_pages])
    return draw.layout(table)


def kv_append_(draw: Draw) -> dict[str, Any]:
    heads = {"heads": 11} if draw.chance(0.3) else {}  # more of k and v than a block has warps
    pages, dtype, tokens = cache(draw, SCHEMES, **heads), draw.one(DTYPES), draw.integer(0, 20)
    seed = draw.integer(0, 2**31)

    def rows(heads: int, i: int) -> Tensor:
        return draw.layout(hostile_tokens(tokens, heads, pages.head_dim, dtype, seed, i, first=i))

    given = {
        "k": rows(pages.num_kv_heads, 0),
        "v": rows(pages.num_kv_heads, 1),
        "slots": some_slots(pages, tokens, seed, bad=draw.chance(0.7)),
        "pages": pages,
    }
    if draw.chance(0.6):
        given["rope"] = some_rope(draw.integer(1, 30), pages.head_dim, dtype)
        given["positions"] = draw.integers(-1 if draw.chance(0.3) else 0, 20, (tokens,), draw.one([I32, I64]))
        given["interleaved"] = draw.chance(0.5)
        if draw.chance(0.7):
            given["q"] = rows(draw.integer(1, 6), 2)
    return given


def kv_flush_(draw: Draw) -> dict[str, Any]:
    batch = draw.integer(0, 4)
    pages = cache(draw, KIVI, batch=batch)
    tail = pages.k_tail
    assert tail is not None and pages.v_tail is not None
    for i, ring in enumerate((tail, pages.v_tail)):
        ring.copy_(hostile_tokens(batch * ring.shape[1], *ring.shape[2:], ring.dtype, i).view(ring.shape))
    groups, width = max(tail.shape[1] // pages.group, 1), draw.integer(1, 4)
    begin = draw.integers(0, 3, (batch,), I32) * pages.group
    end = begin + draw.integers(0, groups, (batch,), I32) * pages.group + (1 if draw.chance(0.1) else 0)
    # A page for each request and place: two that share one may not both write to it.
    order = np.random.default_rng(draw.integer(0, 2**31)).permutation(max(pages.num_pages, batch * width))
    table = torch.from_numpy(order[: batch * width]).to(I32).view(batch, width)
    return {"pages": pages, "page_table": table, "begin": begin, "end": end}


def kv_dequant(draw: Draw, **sizes: Any) -> dict[str, Any]:
    batch = draw.integer(0, 5)
    pages = cache(draw, SCHEMES, batch=batch, **sizes)
    table = table_of(draw, pages, batch)
    length = table.shape[1] * pages.page_size
    given = {"pages": pages, "page_table": table, "dtype": draw.one(DTYPES)}
    given["kv_lens"] = draw.integers(-1 if draw.chance(0.1) else 0, length, (batch,), I32)
    if pages.k_tail is not None and draw.chance(0.8):
        given["tail_lens"] = draw.integers(0, pages.k_tail.shape[1], (batch,), I32).minimum(given["kv_lens"] + 1)
    if draw.chance(0.3):
        given["length"] = draw.integer(0, length)
    return given


def kv_report(draw: Draw) -> dict[str, Any]:
    # Now and then more tokens than a block takes in one round.
    long = {"page_size": 288, "head_dim": 16, "heads": 1}
    given = kv_dequant(draw, **(long if draw.chance(0.3) else {}))
    pages, table, lens = given["pages"], given["page_table"], given["kv_lens"]
    length = given.get("length", table.shape[1] * pages.page_size)
    shape, dtype = (len(lens), length, pages.num_kv_heads, pages.head_dim), draw.one(DTYPES)
    for name in "kv":
        given[name] = draw.floats(shape, dtype)
        if draw.chance(0.4):
            given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    return {k: given[k] for k in ("k", "v", "pages", "page_table", "kv_lens", "tail_lens") if k in given}


def kv_keep_(draw: Draw) -> dict[str, Any]:
    batch, width = draw.integer(0, 4), draw.integer(1, 8)
    pages = cache(draw, SCHEMES, batch=batch)
    given = {"pages": pages, "num_keep": draw.integers(-1 if draw.chance(0.1) else 0, width, (batch,), I32)}
    given["path"] = draw.layout(draw.integers(1, 3, (batch, width), I32).cumsum(1).to(I32) - draw.integer(1, 2))
    given["base_lens"] = draw.integers(0, 12, (batch,), I32)
    if pages.k_tail is None:
        columns = draw.integer(1, 8)  # no page of two requests
        order = np.random.default_rng(draw.integer(0, 2**31)).permutation(max(pages.num_pages, batch * columns))
        given["page_table"] = torch.from_numpy(order[: batch * columns]).to(I32).view(batch, columns)
    return given


CALLS: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "apply_token_bitmask_": apply_token_bitmask_,
    "commit": commit,
    "kv_append_": kv_append_,
    "kv_dequant": kv_dequant,
    "kv_flush_": kv_flush_,
    "kv_keep_": kv_keep_,
    "kv_report": kv_report,
    "linear": linear,
    "merge_states": merge_states,
    "paged_attention": paged_attention,
    "penalize": penalize,
    "prefix_attention": prefix_attention,
    "row_stats": row_stats,
    "sample": sample,
    "target_probs": target_probs,
    "token_logprobs": token_logprobs,
    "topk_logits": topk_logits,
    "tree_check": trees,
    "tree_mask": trees,
    "verify_chain": verify_chain,
    "verify_chain_greedy": verify_chain_greedy,
}
IN_TORCH = ("pack_weight",)  # no kernel of its own
OPS = [
    name
    for name in fastdecode.ops.__all__
    if inspect.isfunction(getattr(fastdecode.ops, name)) and name not in IN_TORCH
]


def call(op: str, seed: int) -> dict[str, Any]:
    """The first seeds give the calls of TELLING."""
    if seed < len(TELLING.get(op, ())):
        return TELLING[op][seed]()
    return CALLS[op](Draw(OPS.index(op), seed))


# Ops whose sums every device takes in an order of its own, with how many float outputs come first: these agree to a
# tolerance, all else in every bit.
ROUNDED = {"paged_attention": 2, "prefix_attention": 2, "merge_states": 2}
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def agree(op: str, want: list[Tensor], got: list[Tensor]) -> bool:
    """Whether two devices' `outputs` are the same."""
    floats = ROUNDED.get(op, 0)
    return all(map(same_bits, want[floats:], got[floats:])) and all(
        _close(a, b, _TOLERANCE[want[0].dtype]) for a, b in zip(want[:floats], got[:floats], strict=True)
    )


def _close(want: Tensor, got: Tensor, tolerance: float) -> bool:
    """inf and NaN in the same places, and no error larger than this part of the largest value, or of 1."""
    if want.dtype != got.dtype or want.shape != got.shape:
        return False
    finite, number = want.isfinite(), ~want.isnan()
    if not (torch.equal(finite, got.isfinite()) and torch.equal(number, ~got.isnan())):
        return False
    if not torch.equal(want[number & ~finite], got[number & ~finite]):
        return False
    error = (want[finite].double() - got[finite].double()).abs()
    return error.numel() == 0 or bool(error.max() <= tolerance * max(1.0, float(want[finite].abs().max())))


def outputs(ops: Any, op: str, arguments: dict[str, Any]) -> list[Tensor]:
    """Everything the op returns or could have changed; the arguments stay as they are."""
    from backends import Copies

    copies = Copies("cpu")
    given = {k: map_tensors(copies, v) for k, v in arguments.items()}
    out = getattr(ops, op)(**given)
    changed = tensors_of(given.values())
    return [*([out] if isinstance(out, Tensor) else out), *changed]
