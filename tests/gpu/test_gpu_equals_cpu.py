"""The GPU gives the bits of the CPU: random calls of every op, many rows, rows of more than 2^31 elements together.

Floats of random_calls.ROUNDED are near the CPU's, and the same bits every time.
"""

from __future__ import annotations

import pytest
import torch

import backends
import fastdecode.ops
import random_calls
from fastdecode import ops
from random_calls import OPS
from support import assert_same, generator, same_bits


@pytest.mark.parametrize("op", OPS)
def test_equals_cpu(op):
    on_gpu = backends.Backend.make("cuda").ops
    for number in range(200):
        arguments = random_calls.call(op, number)
        want = random_calls.outputs(fastdecode.ops, op, arguments)
        first = random_calls.outputs(on_gpu, op, arguments)
        assert random_calls.agree(op, want, first), f"call {number}"
        for repeat in range(2):
            again = random_calls.outputs(on_gpu, op, arguments)
            assert all(map(same_bits, first, again)), f"call {number}, time {repeat + 2}"


def test_more_rows_than_a_grid_is_high():
    """Grids end at 65,535 in y and z."""
    batch, vocab_size, g = 70_001, 5, generator(70)
    logits = torch.randn(batch, vocab_size, generator=g)
    draft, target = torch.randint(2, (batch, 2), generator=g), torch.randint(2, (batch, 3), generator=g)
    tokens, lengths = torch.randint(vocab_size, (batch, 4), generator=g), torch.randint(5, (batch,), generator=g).int()
    keys = {"seed": torch.arange(batch), "offset": torch.arange(batch)}
    mask = torch.randint(1, 32, (batch, 1), generator=g).int()
    weight = ops.pack_weight(torch.randn(64, vocab_size, generator=g))
    state = {"lengths": lengths.clone(), "finished": torch.zeros(batch, dtype=torch.bool)}
    # Caches of a page for each request.
    pages = ops.KVPages.allocate(batch, 4, 1, 16, scheme="int8")
    coded = ops.KVPages.allocate(batch, 8, 1, 8, scheme="kivi4", group=8, batch=batch, tail_size=8)
    assert coded.k_tail is not None and coded.v_tail is not None
    for data in (coded.k_tail, coded.v_tail):
        data.copy_(torch.randn(data.shape, generator=g))
    table = torch.arange(batch, dtype=torch.int32)[:, None]
    new = torch.randn(batch, 1, 16, generator=g)
    lens, ones, zeros = (torch.full((batch,), n, dtype=torch.int32) for n in (3, 1, 0))
    ops.kv_append_(new, new, 4 * torch.arange(batch), pages)
    at = {"pages": pages, "page_table": table}
    parents = torch.tensor([-1, 0], dtype=torch.int32).expand(batch, 2).contiguous()
    calls = {
        "row_stats": {"logits": logits},
        "topk_logits": {"logits": logits, "k": 2},
        "target_probs": {"logits": logits, "top_p": 0.7},
        "sample": {"logits": logits, "top_k": 3, **keys},
        "token_logprobs": {"logits": logits, "tokens": tokens[:, 0].contiguous(), "top": 2},
        "apply_token_bitmask_": {"logits": logits, "bitmask": mask},
        "penalize": {"logits": logits, "tokens": tokens, "lengths": lengths, "repetition": 1.3, "frequency": 0.5},
        "linear": {"x": logits, "weight": weight, "out_features": 64},
        "verify_chain_greedy": {"draft_tokens": draft, "target_ids": target},
        "verify_chain": {"draft_tokens": draft, "target_logits": logits[:, None].expand(-1, 3, -1), **keys},
        "commit": {"tokens": tokens, "num_emitted": lengths, **state},
        "tree_check": {"parents": parents},
        "tree_mask": {"parents": parents},
        "kv_append_": {"k": new, "v": new, "slots": 4 * torch.arange(batch) + 1, "pages": pages},
        "kv_flush_": {"pages": coded, "page_table": table, "begin": zeros, "end": 8 * ones},
        "kv_dequant": {"kv_lens": lens, **at},
        "kv_keep_": {"path": ones[:, None], "num_keep": ones, "base_lens": zeros, **at},
        "kv_report": {"k": new[:, None], "v": new[:, None], "kv_lens": ones, **at},
        "paged_attention": {"q": torch.randn(batch, 1, 2, 16, generator=g), "kv_lens": lens, **at},
        "prefix_attention": {
            "q": torch.randn(batch, 2, 16, generator=g),
            "group_start": torch.arange(batch + 1, dtype=torch.int32),
            "prefix_lens": lens,
            **at,
        },
        "merge_states": {"outs": [new, new], "lses": [new[..., 0].contiguous(), new[..., 1].contiguous()]},
    }
    assert sorted(calls) == sorted(OPS)
    on_gpu = backends.Backend.make("cuda").ops
    for op, arguments in calls.items():
        want = random_calls.outputs(fastdecode.ops, op, arguments)
        assert random_calls.agree(op, want, random_calls.outputs(on_gpu, op, arguments)), op


def test_offsets_of_more_than_31_bits():
    """Rows that begin after element 2^31 of their tensor, and after byte 2^32."""
    vocab_size = 2**20 + 8
    batch = 2**31 // vocab_size + 4
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    logits = torch.empty(batch, vocab_size, dtype=torch.bfloat16, device="cuda")
    last = (3 * torch.randn(4, vocab_size, generator=generator(31))).to(torch.bfloat16)
    logits[:-4], logits[-4:] = 0, last.to("cuda")
    keys = {"seed": 3, "offset": 4}
    active = torch.arange(batch, device="cuda") >= batch - 4
    for call in (
        lambda x, **more: ops.row_stats(x, **more),
        lambda x, **more: ops.topk_logits(x, 50, **more),
        lambda x, **more: ops.sample(x, top_p=0.9, **keys, **more),
        lambda x, **more: ops.target_probs(x, top_k=20, **more),
        lambda x, **more: ops.token_logprobs(x, torch.full((len(x),), 77, device=x.device), **more),
    ):
        assert_same(tuple(call(last)), tuple(out[-4:].cpu() for out in call(logits, active=active)))
    mask = torch.randint(-(2**31), 2**31, (4, vocab_size // 32), generator=generator(32)).int()
    masks = torch.zeros(batch, vocab_size // 32, dtype=torch.int32, device="cuda")
    masks[-4:] = mask.to("cuda")
    ops.apply_token_bitmask_(logits, masks, active=active)
    assert same_bits(logits[-4:].cpu(), ops.apply_token_bitmask_(last, mask))
    assert not logits[:-4].any()


def test_tensors_on_two_devices_are_refused():
    logits, tokens = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^token_logprobs: tokens: expected cuda:0, got cpu$"):
        ops.token_logprobs(logits.to("cuda:0"), tokens)
    with pytest.raises(ValueError, match=r"^token_logprobs: tokens: expected cpu, got cuda:0$"):
        ops.token_logprobs(logits, tokens.to("cuda:0"))
