"""fastdecode.hf.KVCache behind models of transformers, beside their own cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import fastdecode
from fastdecode.hf import KVCache
from support import raises
from transformers_models import ARCHITECTURES, VOCAB, build

SCHEMES = ("fp8_e4m3", "fp8_e5m2", "int8", "int4", "kivi4", "kivi2")
SMALL = {"group": 8, "block": 8}  # head sizes here are 8 or 16


def make(scheme: str) -> KVCache:
    return KVCache(scheme, **(SMALL if "kivi" in scheme else {"group": 8}))


def prompt(batch: int, length: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model, ids: torch.Tensor, cache, steps: list[int]) -> torch.Tensor:
    """Of all tokens, given to the model in steps of these lengths."""
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(steps, 1)], 1)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_plain_is_the_model_s_own_cache(name):
    """Windows and other head shapes included; float64."""
    model, ids = build(name), prompt(3, 40)
    steps = [23, 1, 1, 6, 1, 8]
    want = logits(model, ids, DynamicCache(), steps)
    got = logits(model, ids, KVCache("plain"), steps)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_error_is_that_of_the_codes(scheme):
    """Logits move, and by less the more bits there are; a cache that returned plain keys would not move them."""
    model, ids = build("llama"), prompt(2, 40)
    steps = [17] + [1] * 23
    want = logits(model, ids, DynamicCache(), steps)
    cache = make(scheme)
    error = (logits(model, ids, cache, steps) - want).norm() / want.norm()
    assert cache.get_seq_length() == 40 and cache.status == 0
    limits = {"int8": 0.03, "fp8_e4m3": 0.1, "fp8_e5m2": 0.2, "int4": 0.25, "kivi4": 0.25, "kivi2": 0.9}
    assert 1e-5 < error < limits[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bits_and_bytes_are_those_of_the_tensors(scheme):
    model, cache = build("llama"), make(scheme)
    logits(model, prompt(2, 40), cache, [40])
    bits = {"fp8_e4m3": 8 + 32 / 8, "fp8_e5m2": 8 + 32 / 8, "int8": 8 + 32 / 8, "int4": 4 + 32 / 8}
    bits |= {"kivi4": 4 + 32 / 8, "kivi2": 2 + 32 / 8}
    assert cache.bits_per_value == bits[scheme]
    assert 0 < cache.nbytes == sum(layer.nbytes for layer in cache.layers)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_per_token_schemes_do_not_depend_on_the_steps(scheme):
    """Kivi depends on them in a prompt only: single steps before and after a block give the same keys."""
    model, ids = build("qwen3"), prompt(2, 37)
    one = logits(model, ids, make(scheme), [1] * 37)
    cache = make(scheme)
    other = logits(model, ids, cache, [37] if "kivi" not in scheme else [7] + [1] * 30)
    torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_generate(scheme):
    """Beam search reorders rows; the same tokens as one forward per prefix through the same codes."""
    model, ids = build("llama"), prompt(2, 9)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    out = model.generate(ids, past_key_values=make(scheme), **options)
    cache = make(scheme)
    text = ids
    with torch.no_grad():
        step = model(ids, past_key_values=cache).logits
        for _ in range(12):
            token = step[:, -1].argmax(-1, keepdim=True)
            text = torch.cat((text, token), 1)
            step = model(token, past_key_values=cache).logits
    assert out.tolist() == text.tolist()
    beams = model.generate(ids, past_key_values=make(scheme), num_beams=3, **options)
    assert beams.shape == (2, 21)


def test_beams_equal_those_of_a_plain_cache():
    model, ids = build("llama"), prompt(2, 9)
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "num_beams": 4}
    want = model.generate(ids, past_key_values=DynamicCache(), **options)
    assert model.generate(ids, past_key_values=KVCache("plain"), **options).tolist() == want.tolist()


@pytest.mark.parametrize("scheme", ("plain", *SCHEMES))
def test_crop_takes_back(scheme):
    model, ids = build("llama"), prompt(2, 30)
    want = logits(model, ids, make(scheme) if scheme != "plain" else KVCache("plain"), [20] + [1] * 10)
    cache = make(scheme) if scheme != "plain" else KVCache("plain")
    logits(model, ids[:, :20], cache, [20])
    logits(model, prompt(2, 23)[:, :3] + 1, cache, [3])
    cache.crop(-3)
    torch.testing.assert_close(logits(model, ids[:, 20:], cache, [1] * 10), want[:, 20:], rtol=1e-9, atol=1e-9)


def test_crop_into_coded_blocks_is_refused_and_changes_nothing():
    model, cache = build("llama"), make("kivi4")
    logits(model, prompt(1, 21), cache, [21])
    for remove in (-6, 15):  # from the end, and transformers 4's length
        with raises(r"^hf.KVCache.crop: tokens_to_remove: expected to keep at least 16 of 21 tokens, .* of 8, got 15"):
            cache.crop(remove)
        assert cache.get_seq_length() == 21
    cache.crop(19)
    assert cache.get_seq_length() == 19


def test_a_call_over_a_block_boundary_reads_what_was_coded_before_it():
    """As the docstring says: like a call that ends at the boundary for the keys before it, plain keys for the rest."""
    model, ids = build("llama"), prompt(1, 16)
    steps = logits(model, ids, make("kivi2"), [1] * 16)
    crossing = logits(model, ids, make("kivi2"), [1] * 6 + [5] + [1] * 5)
    torch.testing.assert_close(crossing[:, :8], steps[:, :8], rtol=1e-9, atol=1e-9)
    assert (crossing[:, 8:11] - steps[:, 8:11]).abs().max() > 0.1, "tokens 0 to 7 were plain for them"
    plain = logits(model, ids[:, :11], DynamicCache(), [11])
    torch.testing.assert_close(crossing[:, :11], plain[:, :11], rtol=1e-9, atol=1e-9)


def test_status_tells_of_infinity():
    cache = make("int8")
    keys = torch.ones(1, 2, 3, 8)
    keys[0, 1, 1, 4] = torch.inf
    cache.update(keys, torch.ones(1, 2, 3, 8), 0)
    assert cache.status == fastdecode.Status.NAN


def test_bad_arguments():
    with raises(r"^hf.KVCache: scheme: expected one of .*, got 'int3'"):
        KVCache("int3")
    with raises(r"^hf.KVCache: block: expected an int of at least 1, got 0"):
        KVCache("kivi4", block=0)
    with raises(r"^hf.KVCache: block: expected a multiple of the token group 8, got 12"):
        KVCache("kivi4", group=8, block=12).update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), 0)
    with raises(r"^KVPages.allocate: group: expected a divisor of head_dim 8, got 5"):
        KVCache("int4", group=5).update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), 0)
    with raises(r"^hf.KVCache: value_states: expected \[1, 2, 3, 8\], as the keys, got \[1, 2, 3, 4\]"):
        KVCache("int4").update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 4), 0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_chosen_rows_go_on_as_if_they_had_been_alone(scheme):
    """Pages and rings: a row twice, one left out, another order."""
    model, ids, rows = build("llama"), prompt(3, 30), torch.tensor([2, 0, 2])
    cache = make(scheme)
    logits(model, ids[:, :13], cache, [13])  # kivi: one block in pages, five tokens in the rings
    cache.batch_select_indices(rows)
    got = logits(model, ids[rows, 13:], cache, [1] * 17)
    want = logits(model, ids[rows], make(scheme), [13] + [1] * 17)[:, 13:]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
