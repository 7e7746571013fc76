"""paged_attention beside torch's attention on contiguous keys, and on keys dequantised first."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdecode import KVScheme, ops
from fastdecode.ops import KVPages

from .. import report
from ..goals import Goal, at_most_times, times_faster
from ..harness import Call, Case
from ..inputs import copies

SDPA, DEQUANTISE, MATMUL, PLAIN = "torch SDPA", "kv_dequant + SDPA", "torch matmul, same products", "bfloat16 pages"
PAGE_SIZE, HEAD_DIM, HEADS, KV_HEADS = 32, 128, 32, 8


def pages_of(scheme: KVScheme, group: int, head_dim: int, stores: tuple[Tensor, ...]) -> KVPages:
    """Tokens of a page stand behind heads in memory."""
    k, v, *rest = stores
    if scheme == KVScheme.KIVI4:
        k_scale, v_scale, k_tail, v_tail = rest
        return KVPages(k, v.transpose(1, 2), k_scale, v_scale.transpose(1, 2), k_tail, v_tail, scheme, group, head_dim)
    scales: list[Tensor | None] = [None, None]
    if rest:
        scales = [scale.transpose(1, 2) for scale in rest]
    return KVPages(
        k.transpose(1, 2), v.transpose(1, 2), scales[0], scales[1], scheme=scheme, group=group, head_dim=head_dim
    )


def stores_of(pages: KVPages) -> tuple[Tensor, ...]:
    """Contiguous tensors, the inverse of pages_of."""
    by_head = [pages.v, pages.v_scale] if pages.has_ring else [pages.k, pages.v, pages.k_scale, pages.v_scale]
    order = (pages.k, pages.v, pages.k_scale, pages.v_scale, pages.k_tail, pages.v_tail)
    return tuple(
        t.transpose(1, 2).contiguous() if any(t is other for other in by_head) else t for t in order if t is not None
    )


def paged(q: Tensor, table: Tensor, lens: Tensor, *stores: Tensor, scheme: KVScheme, group: int) -> ops.Attention:
    pages = pages_of(scheme, group, q.shape[-1], stores[: 6 if scheme == KVScheme.KIVI4 else 4 if scheme else 2])
    tail_lens = torch.zeros_like(lens) if pages.has_ring else None
    return ops.paged_attention(q, pages, table, lens, tail_lens=tail_lens)


def plain_pages(q: Tensor, table: Tensor, lens: Tensor, *stores: Tensor) -> ops.Attention:
    return paged(q, table, lens, *stores[-2:], scheme=KVScheme.PLAIN, group=q.shape[-1])


def sdpa(q: Tensor, table: Tensor, lens: Tensor, *stores: Tensor) -> Tensor:
    k, v, mask = stores[2:5]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


def sdpa_of_one(q: Tensor, table: Tensor, lens: Tensor, *stores: Tensor) -> Tensor:
    k, v = stores[2:4]
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=True).transpose(1, 2)


def dequant_sdpa(q: Tensor, table: Tensor, lens: Tensor, *stores: Tensor, scheme: KVScheme, group: int) -> Tensor:
    count = 6 if scheme == KVScheme.KIVI4 else 4
    pages = pages_of(scheme, group, q.shape[-1], stores[:count])
    k, v, _ = ops.kv_dequant(pages, table, lens, dtype=q.dtype)
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=True
    )
    return out.transpose(1, 2)


def matmul(q: Tensor, table: Tensor, lens: Tensor, *stores: Tensor) -> Tensor:
    """A matrix product with as many multiplications."""
    nodes, heads, head_dim = q.shape[1:]
    rows = max(1, 2 * len(q) * nodes * heads * head_dim * int(table.shape[1]) * PAGE_SIZE // 1024**2)
    return stores[-1][:1].expand(rows, -1) @ stores[-1]


def reads_or_products() -> Goal:
    return Goal(
        f"<= 1.25x the larger of a read and {MATMUL} at 0.6 of its speed",
        lambda m: 1.25 * max(m.read_us, m.peers_us[MATMUL] / 0.6),
        MATMUL,
    )


def random_cache(scheme: str, length: int, head_dim: int, kv_heads: int, dtype: torch.dtype, batch: int) -> KVPages:
    rings, tail_size = (batch, 32) if scheme == "kivi4" else (0, 0)
    pages = KVPages.allocate(
        batch * -(-length // PAGE_SIZE), PAGE_SIZE, kv_heads, head_dim, scheme=scheme, dtype=dtype, batch=rings,
        tail_size=tail_size, device=torch.get_default_device(),
    )  # fmt: skip
    for data, scale in ((pages.k, pages.k_scale), (pages.v, pages.v_scale)):
        if scale is None:
            data.copy_(torch.randn(data.shape))
        else:
            data.random_(0, 100)
            scale.fill_(0.01)
    return pages


def case(
    scheme: str,
    length: int,
    nodes: int,
    *,
    goals: bool,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
) -> Case:
    cache = random_cache(scheme, length, head_dim, kv_heads, dtype, batch)
    stores = stores_of(cache)
    used = sum(t.nbytes for t in stores if t.numel() and t.dim() > 1)
    kind, group = cache.scheme, cache.group
    q = torch.randn(batch, nodes, heads, head_dim).to(dtype)
    table = torch.randperm(cache.num_pages).int().view(batch, -1)
    lens = torch.full((batch,), length, dtype=torch.int32)
    if scheme == "plain":
        k, v = torch.randn(2, batch, kv_heads, length, head_dim).to(dtype)
        mask = torch.ones(nodes, length, dtype=torch.bool).tril(length - nodes)
        square = torch.randn(1024, 1024).to(dtype)
        inputs = [
            (q, table, lens, *pages, *others, mask, square)
            for pages, others in zip(copies(*stores, used_bytes=used), copies(k, v), strict=False)
        ]
        peers: dict[str, Call] = {SDPA: sdpa, MATMUL: matmul}
        if nodes == 1:
            peers["torch SDPA without a mask"] = sdpa_of_one
        wanted = [reads_or_products(), times_faster(2, SDPA)]
    else:
        stores += stores_of(random_cache("plain", length, head_dim, kv_heads, dtype, batch))
        inputs = [(q, table, lens, *pair) for pair in copies(*stores, used_bytes=used)]
        peers = {DEQUANTISE: partial(dequant_sdpa, scheme=kind, group=group), PLAIN: plain_pages}
        wanted = [times_faster(1.5, DEQUANTISE)]
        if nodes == 1 and scheme in ("int8", "int4"):
            wanted.append(at_most_times(0.75 if scheme == "int8" else 0.6, PLAIN))
    return Case(
        shape=f"{scheme} B={batch}, {length} keys, {nodes} nodes, {heads}/{kv_heads} heads of {head_dim}",
        dtype=dtype,
        elements=2 * batch * nodes * heads * head_dim * length,
        flops=4 * batch * nodes * heads * head_dim * length,
        bytes_moved=used + 2 * q.nbytes,
        inputs=inputs,
        ours=partial(paged, scheme=kind, group=group),
        peers=peers,
        goals=wanted if goals else (),
    )


def cases(quick: bool) -> Iterator[Case]:
    small = partial(case, goals=False, heads=4, kv_heads=2, head_dim=64, dtype=torch.float32)
    if quick:
        for scheme in ("plain", "int8", "kivi4"):
            yield small(scheme, 256, 4)
        return
    if torch.get_default_device().type == "cuda":
        for batch in (1, 16, 64):
            yield case("plain", 8192, 1, goals=False, batch=batch)
        for scheme in ("int8", "int4", "fp8_e4m3", "kivi4"):
            yield case(scheme, 8192, 1, goals=False, batch=64)
        for batch in (1, 8):
            yield case("plain", 8192, 64, goals=False, batch=batch)
        yield case("plain", 8192, 1, goals=False, batch=64, head_dim=64)
        return
    yield small("plain", 512, 1)
    for length in (2048, 8192, 32768):
        for nodes in (1, 8, 16, 64):
            yield case("plain", length, nodes, goals=True)
        for scheme in ("int8", "int4"):
            for nodes in (1, 16):
                yield case(scheme, length, nodes, goals=True)
    for scheme in ("fp8_e4m3", "kivi4"):
        for nodes in (1, 16):
            yield case(scheme, 8192, nodes, goals=True)


if __name__ == "__main__":
    report.main(__file__)
