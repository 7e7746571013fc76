"""Every op on 1,000 hostile rows: the portable, AVX2 and AVX-512 builds and any thread count give the same bits.

The ops are enumerated: one without an entry in CALLS fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import attention_inputs
import fastdecode
import fastdecode.ops
from chain_inputs import NEW_FILTERS, pack, random_inputs
from kv_inputs import KIVI, PAGED, SCHEMES, hostile_tokens, make_pages, some_rope, some_slots
from support import DTYPES, generator, hostile, map_tensors, same_bits, tensors_of

# (rows, V); one past a vector, a word of a mask, a tile; 1,000 rows in all
SIZES = ((60, 2), (100, 3), (240, 17), (240, 33), (200, 257), (100, 1000), (40, 2049), (20, 5000))
I32, F32 = torch.int32, torch.float32


def filters(num_rows: int, vocab_size: int) -> dict[str, Tensor]:
    g = generator(82, num_rows, vocab_size)

    def some(values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (num_rows,), generator=g)]

    return {
        "temperature": some([0.0, 0.3, 0.7, 1.0, 1.0, 1.7], F32),
        "top_k": some([0, 0, 1, 3, 20, 100], I32),
        "top_p": some([1.0, 1.0, 0.1, 0.6, 0.95], F32),
        "min_p": some([0.0, 0.0, 0.05, 0.5], F32),
        "typical_p": some([1.0, 1.0, 0.2, 0.9], F32),
        "bitmask": pack(torch.rand(num_rows, vocab_size, generator=g) < 0.9),
        "bias": torch.randn(num_rows, vocab_size, generator=g),
        "ban_ids": torch.randint(-1, vocab_size, (num_rows, 2), generator=g),
    }


def seeds(num_rows: int) -> dict[str, Tensor]:
    g = generator(83, num_rows)
    return {
        "seed": torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=g),
        "offset": torch.randint(2**40, (num_rows,), generator=g),
    }


Call = tuple[str, dict]  # the op and its arguments


def logits_of(dtype: torch.dtype, *names: str) -> Iterator[tuple[dict, dict]]:
    """({"logits": ...} and `names` among the filters, everything that is known of the rows), per size."""
    for num_rows, vocab_size in SIZES:
        extra = filters(num_rows, vocab_size) | seeds(num_rows)
        extra["uniforms"] = torch.rand(num_rows, generator=generator(84, num_rows), dtype=torch.float64)
        extra["tokens"] = torch.randint(-1, vocab_size, (num_rows,), generator=generator(85, num_rows))
        yield {"logits": hostile(num_rows, vocab_size, dtype)} | {k: extra[k] for k in names}, extra


FILTERS = (*NEW_FILTERS, "bias", "ban_ids")


def row_stats(dtype: torch.dtype) -> Iterator[dict]:
    yield from (given for given, _ in logits_of(dtype))


def target_probs(dtype: torch.dtype) -> Iterator[dict]:
    for given, _ in logits_of(dtype, *FILTERS):
        yield from ({"logits": given["logits"]}, given, given | {"order": "joint"})


def sample(dtype: torch.dtype) -> Iterator[dict]:
    for given, extra in logits_of(dtype):
        chosen = {k: extra[k] for k in FILTERS}
        for random in ({k: extra[k] for k in ("seed", "offset")}, {"uniforms": extra["uniforms"]}):
            yield from (given | random, given | random | chosen, given | random | chosen | {"order": "joint"})


def token_logprobs(dtype: torch.dtype) -> Iterator[dict]:
    for given, extra in logits_of(dtype, "tokens"):
        yield given | {"top": 2}
        yield given | {"top": 2, "filtered": True} | {k: extra[k] for k in FILTERS}


def topk_logits(dtype: torch.dtype) -> Iterator[dict]:
    for given, _ in logits_of(dtype):
        yield from (given | {"k": k} for k in {1, 2, min(40, given["logits"].shape[1])})


def apply_token_bitmask_(dtype: torch.dtype) -> Iterator[dict]:
    yield from (given for given, _ in logits_of(dtype, "bitmask"))


def penalize(dtype: torch.dtype) -> Iterator[dict]:
    for given, _ in logits_of(dtype):
        num_rows, vocab_size = given["logits"].shape
        g = generator(86, num_rows)
        lengths = torch.randint(41, (num_rows,), generator=g, dtype=I32)
        yield given | {
            "tokens": torch.randint(vocab_size, (num_rows, 40), generator=g),
            "lengths": lengths,
            "prompt_lengths": lengths // 2,
            "repetition": 0.5 + torch.rand(num_rows, generator=g),
            "presence": torch.randn(num_rows, generator=g),
            "frequency": torch.randn(num_rows, generator=g),
        }


def linear(dtype: torch.dtype) -> Iterator[dict]:
    if dtype not in (torch.float32, torch.float64):
        return
    for num_rows, inner in ((1, 1), (3, 17), (16, 257), (480, 64), (500, 333)):
        g = generator(87, num_rows, inner)
        x, weight = (torch.randn(n, inner, generator=g, dtype=torch.float64).to(dtype) for n in (num_rows, 77))
        x[::5] *= torch.finfo(dtype).smallest_normal
        bias, residual = torch.randn(77, generator=g).to(dtype), torch.randn(num_rows, 77, generator=g).to(dtype)
        packed = fastdecode.ops.pack_weight(weight)
        yield {"x": x, "weight": packed, "out_features": 77}
        yield {"x": x, "weight": packed, "out_features": 77, "bias": bias, "residual": residual}


def pack_weight(dtype: torch.dtype) -> Iterator[dict]:
    yield {"weight": torch.randn(1000, 33, generator=generator(88), dtype=torch.float64).to(dtype)}


def verify_chain_greedy(dtype: torch.dtype) -> Iterator[dict]:
    if dtype == torch.float32:  # integers only
        g = generator(89)
        lens = torch.randint(-1, 7, (1000,), generator=g, dtype=I32)
        draft, target = torch.randint(2, (1000, 5), generator=g), torch.randint(2, (1000, 6), generator=g)
        yield {"draft_tokens": draft, "target_ids": target, "draft_lens": lens}


def trees(dtype: torch.dtype) -> Iterator[dict]:
    """1,000 of them, some broken."""
    if dtype == torch.float32:  # integers only
        columns = [torch.randint(-1, i, (1000,), generator=generator(91, i), dtype=I32) for i in range(1, 9)]
        parents = torch.stack([torch.full((1000,), -1, dtype=I32), *columns], 1)
        nodes = torch.randint(-1, 11, (1000,), generator=generator(92), dtype=I32)
        yield {"parents": parents, "num_nodes": nodes}


def verify_chain(dtype: torch.dtype) -> Iterator[dict]:
    """Every rule over 1,000 rows of targets that are hostile and drafts that are near them."""
    for num_rows, vocab_size in SIZES:
        batch = num_rows // 4
        inputs = random_inputs(batch, 3, vocab_size, dtype, seed=90)
        inputs["target_logits"] = hostile(num_rows, vocab_size, dtype).view(batch, 4, vocab_size)
        g = generator(91, batch, vocab_size)
        inputs["draft_tokens"][torch.rand(batch, 3, generator=g) < 0.05] = vocab_size
        drafts = {k: inputs[k] for k in ("draft_tokens", "draft_lens")}
        logits, drawn = {"target_logits": inputs["target_logits"]}, {"draft_probs": inputs["draft_probs"]}
        chosen = {k: inputs[k] for k in NEW_FILTERS}
        uniforms, keys = {"uniforms": inputs["uniforms"]}, {k: inputs[k] for k in ("seed", "offset")}
        for rule in ("ratio", "block"):
            yield drafts | logits | drawn | keys | {"rule": rule}
            yield drafts | logits | drawn | chosen | uniforms | {"rule": rule}
            yield drafts | logits | chosen | keys | {"rule": rule, "order": "joint"}
            yield drafts | drawn | keys | {"rule": rule, "target_probs": inputs["target_probs"]}
        yield drafts | logits | chosen | keys | {"rule": "coupled"}
        thresholds = {k: inputs[k] for k in ("eps", "delta")}
        yield drafts | logits | thresholds | {"rule": "typical"}
        yield drafts | logits | thresholds | chosen | keys | {"rule": "typical", "bonus": "sample"}
        yield drafts | logits | {k: inputs[k] for k in ("beta", "tau", "bitmask")} | {"rule": "top_beta"}


def commit(dtype: torch.dtype) -> Iterator[dict]:
    if dtype == torch.float32:  # integers only
        g = generator(92)

        def count(high: int) -> Tensor:
            return torch.randint(high, (1000,), generator=g, dtype=I32)

        yield {
            "tokens": torch.randint(9, (1000, 6), generator=g),
            "num_emitted": count(8) - 1,
            "lengths": count(100),
            "finished": torch.rand(1000, generator=g) < 0.1,
            "max_lengths": count(100),
            "stop_ids": torch.randint(-1, 9, (1000, 2), generator=g),
        }


def kv_append_(dtype: torch.dtype) -> Iterator[dict]:
    for scheme in SCHEMES:
        for number, (head_dim, group) in enumerate(((64, 64), (96, 48), (40, 8))):
            pages = make_pages(
                scheme, num_pages=12, heads=3, head_dim=head_dim, group=group if scheme in PAGED else 8, seed=number
            )
            k, v, q = (hostile_tokens(90, heads, head_dim, dtype, number, heads) for heads in (3, 3, 5))
            given = {"k": k, "v": v.flip(0), "slots": some_slots(pages, 90), "pages": pages}
            yield given
            rope = {"rope": some_rope(80, head_dim, dtype), "positions": torch.arange(90), "q": q}
            yield given | rope | {"interleaved": number == 1}


def kv_flush_(dtype: torch.dtype) -> Iterator[dict]:
    for scheme in KIVI:
        for head_dim in (24, 64):
            pages = make_pages(scheme, num_pages=40, head_dim=head_dim, batch=20, tail_size=37, dtype=dtype)
            for i, ring in enumerate((pages.k_tail, pages.v_tail)):
                ring.copy_(hostile_tokens(20 * 37, 2, head_dim, dtype, i, first=i).view(ring.shape))
            begin = torch.arange(20, dtype=I32) % 3 * 8
            table = torch.arange(-1, 99, dtype=I32).view(20, 5)[:, :2].contiguous()
            yield {"pages": pages, "page_table": table, "begin": begin, "end": begin + begin.flip(0)}


def kv_dequant(dtype: torch.dtype) -> Iterator[dict]:
    for scheme in SCHEMES:
        for head_dim in (40, 96):
            pages = make_pages(scheme, num_pages=20, head_dim=head_dim, batch=30)
            g = generator(93)
            table = torch.randint(20, (30, 5), generator=g, dtype=I32)
            lens = {"kv_lens": torch.randint(41, (30,), generator=g, dtype=I32)}
            if scheme in KIVI:
                lens["tail_lens"] = lens["kv_lens"].minimum(torch.randint(17, (30,), generator=g, dtype=I32))
            yield {"pages": pages, "page_table": table, "dtype": dtype, **lens}


def kv_report(dtype: torch.dtype) -> Iterator[dict]:
    for given in kv_dequant(dtype):
        del given["dtype"]
        shape = (30, 40, 2, given["pages"].head_dim)
        yield given | {n: torch.randn(shape, generator=generator(95), dtype=torch.float64).to(dtype) for n in "kv"}


def kv_keep_(dtype: torch.dtype) -> Iterator[dict]:
    for scheme in SCHEMES:
        pages = make_pages(scheme, num_pages=90, batch=30, dtype=dtype)
        g = generator(94)
        path = torch.randint(1, 3, (30, 6), generator=g, dtype=I32).cumsum(1).int() - 1
        counts = torch.randint(7, (30,), generator=g, dtype=I32)
        table = torch.randperm(90, generator=g).int().view(30, 3)
        given = {} if scheme in KIVI else {"page_table": table}
        yield {"pages": pages, "path": path, "num_keep": counts, "base_lens": torch.arange(30, dtype=I32) % 14, **given}


def paged_attention(dtype: torch.dtype) -> Iterator[dict]:
    """Every scheme. bfloat16 has products of its own on AVX-512, see tests/ops/test_paged_attention.py."""
    for scheme in attention_inputs.SCHEMES if dtype != torch.bfloat16 else ():
        for lens, window in (((1, 70, 33), None), ((1090, 250), 77)):
            given = attention_inputs.make(
                scheme=scheme, dtype=dtype, lens=lens, window=window, softcap=None if window else 5.0
            )
            yield {
                "q": given.q,
                "pages": given.pages,
                "page_table": given.page_table,
                "kv_lens": given.kv_lens,
                **given.options,
            }


def prefix_attention(dtype: torch.dtype) -> Iterator[dict]:
    for scheme in attention_inputs.SCHEMES if dtype != torch.bfloat16 else ():
        given = attention_inputs.make(scheme=scheme, dtype=dtype, lens=(70, 0, 1100), slots=9, tail=None)
        yield {
            "q": given.q[0],
            "pages": given.pages,
            "group_start": torch.tensor([1, 3, 3, 8], dtype=I32),
            "page_table": given.page_table,
            "prefix_lens": given.kv_lens,
        }


def merge_states(dtype: torch.dtype) -> Iterator[dict]:
    work = torch.float64 if dtype == torch.float64 else F32
    for states in (1, 2, 16):
        g = generator(93, states)
        lses = (5 * torch.randn(states, 250, 4, generator=g, dtype=torch.float64)).to(work)
        lses[torch.rand(lses.shape, generator=g) < 0.2] = -torch.inf
        outs = torch.randn(states, 250, 4, 17, generator=g, dtype=torch.float64).to(dtype)
        yield {"outs": list(outs), "lses": list(lses)}


CALLS: dict[str, Callable[[torch.dtype], Iterator[dict]]] = {
    "apply_token_bitmask_": apply_token_bitmask_,
    "commit": commit,
    "kv_append_": kv_append_,
    "kv_dequant": kv_dequant,
    "kv_flush_": kv_flush_,
    "kv_keep_": kv_keep_,
    "kv_report": kv_report,
    "linear": linear,
    "merge_states": merge_states,
    "pack_weight": pack_weight,
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
OPS = [name for name in fastdecode.ops.__all__ if inspect.isfunction(getattr(fastdecode.ops, name))]


def test_every_op_has_an_entry():
    assert sorted(CALLS) == sorted(OPS), "add 1,000 rows of the new op to CALLS"


def outputs(name: str, arguments: dict) -> list[Tensor]:
    """Everything the op returns or changes in place."""
    given = {k: map_tensors(torch.clone, v) for k, v in arguments.items()}
    out = getattr(fastdecode.ops, name)(**given)
    changed = tensors_of(given.values())
    return [*([out] if isinstance(out, Tensor) else out), *changed]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_builds_and_threads_agree(name, dtype):
    levels = fastdecode.cpu_levels()
    for arguments in CALLS[name](dtype):
        torch.set_num_threads(1)
        fastdecode.set_cpu_level(levels[0])
        want = outputs(name, arguments)
        shapes = [tuple(v.shape) for v in tensors_of(arguments.values())]
        for level in levels:
            fastdecode.set_cpu_level(level)
            for threads in (1, 2, 4) if level == levels[-1] else (1,):
                torch.set_num_threads(threads)
                for i, (a, b) in enumerate(zip(want, outputs(name, arguments), strict=True)):
                    assert same_bits(a, b), f"output {i} of {level}, {threads} threads, {shapes}"
