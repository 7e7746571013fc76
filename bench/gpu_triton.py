# mypy: ignore-errors
"""Plain fused kernels in Triton: what one writes in an afternoon for the ops that are a pass over logits."""

import triton
import triton.language as tl


@triton.jit
def nothing():
    pass


@triton.jit
def race(logits, temperature, keys, ids, seed, vocab_size, parts, block: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    warm = tl.load(temperature + row)
    best = tl.full([block], float("-inf"), tl.float32)
    best_id = tl.zeros([block], tl.int32)
    for start in range(part * block, vocab_size, parts * block):
        v = start + tl.arange(0, block)
        inside = v < vocab_size
        x = tl.load(logits + row * vocab_size + v, mask=inside, other=float("-inf")).to(tl.float32)
        uniform = tl.maximum(tl.rand(seed, row * vocab_size + v), 1e-10)
        key = tl.where(inside, x / warm - tl.log(-tl.log(uniform)), float("-inf"))
        better = key > best
        best = tl.where(better, key, best)
        best_id = tl.where(better, v, best_id)
    at = tl.argmax(best, 0)
    found = tl.sum(tl.where(tl.arange(0, block) == at, best_id, 0), 0)
    tl.store(keys + row * parts + part, tl.max(best, 0))
    tl.store(ids + row * parts + part, found.to(tl.int64))


@triton.jit
def race_end(keys, ids, tokens, parts: tl.constexpr):
    row = tl.program_id(0)
    at = tl.argmax(tl.load(keys + row * parts + tl.arange(0, parts)), 0)
    tl.store(tokens + row, tl.load(ids + row * parts + at))


@triton.jit
def stats(logits, partial_stats, ids, vocab_size, parts, block: tl.constexpr):
    """Of a part: max m, sum of e^(x - m), sum of (x - m) e^(x - m), and where the max is."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    top = tl.full([block], float("-inf"), tl.float32)
    mass, weighted = tl.zeros([block], tl.float32), tl.zeros([block], tl.float32)
    top_id = tl.zeros([block], tl.int32)
    for start in range(part * block, vocab_size, parts * block):
        v = start + tl.arange(0, block)
        x = tl.load(logits + row * vocab_size + v, mask=v < vocab_size, other=float("-inf")).to(tl.float32)
        top_id = tl.where(x > top, v, top_id)
        new = tl.maximum(top, x)
        old = tl.where(top > float("-inf"), top - new, 0.0)
        here = tl.where(x > float("-inf"), x - new, 0.0)
        scale, term = tl.exp(old), tl.where(x > float("-inf"), tl.exp(here), 0.0)
        weighted = scale * (weighted + old * mass) + here * term
        mass = scale * mass + term
        top = new
    m = tl.max(top, 0)
    shift = tl.where(top > float("-inf"), top - m, 0.0)
    scale = tl.where(top > float("-inf"), tl.exp(shift), 0.0)
    first = tl.min(tl.where(top == m, top_id, 2147483647), 0)
    at = partial_stats + (row * parts + part) * 3
    tl.store(at, m)
    tl.store(at + 1, tl.sum(scale * mass, 0))
    tl.store(at + 2, tl.sum(scale * (weighted + shift * mass), 0))
    tl.store(ids + row * parts + part, first.to(tl.int64))


@triton.jit
def stats_end(partial_stats, ids, out, argmax, parts: tl.constexpr):
    row = tl.program_id(0)
    at = partial_stats + (row * parts + tl.arange(0, parts)) * 3
    top, mass, weighted = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    id = tl.load(ids + row * parts + tl.arange(0, parts))
    m = tl.max(top, 0)
    shift = tl.where(top > float("-inf"), top - m, 0.0)
    scale = tl.where(top > float("-inf"), tl.exp(shift), 0.0)
    total = tl.sum(scale * mass, 0)
    tl.store(out + row * 3, m)
    tl.store(out + row * 3 + 1, m + tl.log(total))
    tl.store(out + row * 3 + 2, tl.log(total) - tl.sum(scale * (weighted + shift * mass), 0) / total)
    tl.store(argmax + row, tl.min(tl.where(top == m, id, 9223372036854775807), 0))


@triton.jit
def bitmask(logits, words, vocab_size, num_words, block: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = part * block + tl.arange(0, block)
    word = tl.load(words + row * num_words + v // 32, mask=v // 32 < num_words, other=0)
    forbidden = ((word >> (v % 32)) & 1) == 0
    tl.store(logits + row * vocab_size + v, float("-inf"), mask=forbidden & (v < vocab_size))
