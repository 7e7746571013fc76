"""KVPages itself: what it reads off an engine's own tensors, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from fastdecode import KVScheme, ops
from fastdecode.ops import KVPages
from support import raises

SCHEMES = [kind.name.lower() for kind in KVScheme]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group", [None, 16])
def test_sizes_are_read_off_the_tensors(scheme, group):
    rings = {"batch": 2, "tail_size": 40} if "kivi" in scheme else {}
    group = None if scheme == "plain" else group
    made = KVPages.allocate(3, 32, 2, 64, scheme=scheme, group=group, **rings)
    stores = (made.k, made.v, made.k_scale, made.v_scale, made.k_tail, made.v_tail)
    read = KVPages(*stores, scheme=scheme)
    assert (read.head_dim, read.group, read.scheme) == (64, made.group, KVScheme[scheme.upper()])
    assert read.bits_per_value == made.bits_per_value
    assert KVPages.allocate(0, 32, 2, 64, scheme=scheme, group=group, **rings).bits_per_value == made.bits_per_value


def test_an_engine_s_own_pools_work_in_every_op():
    pages = KVPages(torch.zeros(4, 16, 2, 64), torch.zeros(4, 2, 16, 64).transpose(1, 2))
    k = torch.randn(3, 2, 64)
    table, three = torch.tensor([[2]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    assert not ops.kv_append_(k, k, torch.arange(32, 35), pages).any()
    assert torch.equal(ops.kv_dequant(pages, table, three, length=3).k[0], k)
    path, base = torch.tensor([[0, 2]], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    assert not ops.kv_keep_(pages, path, three - 1, base, page_table=table).any()
    assert torch.equal(ops.kv_dequant(pages, table, three - 1, length=2).v[0], k[[0, 2]])


@pytest.mark.parametrize("head_dim, group", [(80, 16), (48, 16), (6, 2), (64, 32), (128, 32), (32, 32)])
def test_kivi_finds_a_group_that_fits(head_dim, group):
    assert KVPages.allocate(2, 64, 1, head_dim, scheme="kivi4", batch=1, tail_size=64).group == group


def test_names():
    assert KVPages.allocate(1, 4, 1, 8, scheme="fp8").scheme == KVScheme.FP8_E4M3
    with raises(r"^KVPages.allocate: scheme: expected one of .*, got 'int5'"):
        KVPages.allocate(1, 4, 1, 8, scheme="int5")
    with raises(r"^KVPages.allocate: scheme: expected 0..6, got 99"):
        KVPages.allocate(1, 4, 1, 8, scheme=99)


@pytest.mark.parametrize(
    "message, change",
    [
        ("num_pages: expected at least 0, got -1", {"num_pages": -1}),
        ("page_size: expected at least 1, got 0", {"page_size": 0}),
        ("dtype: expected one of torch.float64, .*, got torch.int32", {"dtype": torch.int32}),
        ("batch: expected 0 for PLAIN, which has no rings, got 3", {"batch": 3}),
        ("layout: expected 'HND' or 'NHD', got 'DNH'", {"layout": "DNH"}),
        ("group: expected a divisor of head_dim 64, got 24", {"scheme": "int8", "group": 24}),
        ("page_size: expected a multiple of the token group 32", {"scheme": "kivi4", "group": 32, "page_size": 48}),
    ],
)
def test_messages(message, change):
    sizes = {"num_pages": 2, "page_size": 16, "num_kv_heads": 1, "head_dim": 64}
    with raises(f"^KVPages.allocate: {message}"):
        KVPages.allocate(**(sizes | change))


def test_another_head_dim_is_refused():
    with raises(r"^KVPages: head_dim: expected 64, as v has, got 32"):
        KVPages(torch.zeros(1, 4, 2, 64), torch.zeros(1, 4, 2, 64), head_dim=32)


def test_what_is_written_has_a_place_for_every_element():
    k = torch.randn(3, 2, 64)
    one = torch.zeros(1, 16, 2, 64)
    shared = KVPages(one.expand(4, 16, 2, 64), torch.zeros(4, 16, 2, 64))
    with raises(r"^kv_append_: k_cache: expected a place for every element, .* got stride 0 in dimension 0"):
        ops.kv_append_(k, k, torch.arange(3), shared)
    assert not one.any()
    pages, q = KVPages(torch.zeros(4, 16, 2, 64), torch.zeros(4, 16, 2, 64)), torch.randn(1, 4, 64)
    rope, positions = torch.ones(8, 2, 32), torch.arange(3)
    with raises(r"^kv_append_: q: expected a place for every element, .* got stride 0 in dimension 0"):
        ops.kv_append_(k, k, torch.arange(3), pages, q=q.expand(3, 4, 64), rope=rope, positions=positions)
    table, three = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    out, _, status = ops.paged_attention(q[None], shared, table, three)  # reading such a cache is fine
    assert not status.any() and not out.any()
