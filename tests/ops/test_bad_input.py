"""Every argument of every op with a wrong rank, shape, dtype, device or neighbour: ValueError that names it."""

from __future__ import annotations

import pytest
import torch

from fastdecode.ops import KVPages
from kv_inputs import make_pages
from support import raises

B, K, V = 3, 2, 40
W, V_DRAFT = 2, 9  # words of a mask; ids of a draft vocabulary
I32, F32, F64 = torch.int32, torch.float32, torch.float64

LOGITS = torch.zeros(B, V)
SEEDS = {"seed": torch.zeros(B, dtype=torch.int64), "offset": torch.zeros(B, dtype=torch.int64)}
PAGES, CODED = (make_pages(scheme, batch=B) for scheme in ("int4", "kivi4"))
KEYS, ZEROS, TABLE_OF_PAGES = torch.zeros(B, 2, 16), torch.zeros(B, dtype=I32), torch.zeros(B, 2, dtype=I32)
GOOD: dict[str, dict] = {
    "row_stats": {"logits": LOGITS},
    "topk_logits": {"logits": LOGITS, "k": 2},
    "target_probs": {"logits": LOGITS},
    "sample": {"logits": LOGITS, **SEEDS},
    "token_logprobs": {"logits": LOGITS, "tokens": torch.zeros(B, dtype=torch.int64), "filtered": True},
    "verify_chain_greedy": {
        "draft_tokens": torch.zeros(B, K, dtype=torch.int64),
        "target_ids": torch.zeros(B, K + 1, dtype=torch.int64),
    },
    "verify_chain": {
        "draft_tokens": torch.zeros(B, K, dtype=torch.int64),
        "target_logits": torch.zeros(B, K + 1, V),
        **SEEDS,
    },
    "kv_append_": {"k": KEYS, "v": KEYS, "slots": torch.zeros(B, dtype=torch.int64), "pages": PAGES, "q": KEYS}
    | {"rope": torch.zeros(4, 2, 8), "positions": torch.zeros(B, dtype=torch.int64)},
    "kv_flush_": {"pages": CODED, "page_table": TABLE_OF_PAGES, "begin": ZEROS, "end": ZEROS},
    "kv_keep_": {"pages": PAGES, "path": TABLE_OF_PAGES, "num_keep": ZEROS, "base_lens": ZEROS}
    | {"page_table": TABLE_OF_PAGES},
    "kv_report": {"k": KEYS[:, None], "v": KEYS[:, None], "pages": PAGES, "page_table": TABLE_OF_PAGES}
    | {"kv_lens": ZEROS},
    "paged_attention": {
        "q": torch.zeros(B, K, 4, 16),
        "pages": KVPages.allocate(5, 8, 2, 16, scheme="kivi4", group=8, batch=B, tail_size=9),
        "page_table": torch.zeros(B, 2, dtype=I32),
        "kv_lens": torch.full((B,), 4, dtype=I32),
        "tail_lens": torch.full((B,), 4, dtype=I32),
    },
    "prefix_attention": {
        "q": torch.zeros(9, 4, 16),
        "pages": KVPages.allocate(5, 8, 2, 16),
        "group_start": torch.zeros(B + 1, dtype=I32),
        "page_table": torch.zeros(B, 2, dtype=I32),
        "prefix_lens": torch.full((B,), 4, dtype=I32),
    },
    "tree_check": {"parents": torch.zeros(B, K, dtype=I32)},
    "tree_mask": {"parents": torch.zeros(B, K, dtype=I32)},
    "commit": {
        "tokens": torch.zeros(B, K + 1, dtype=torch.int64),
        "num_emitted": torch.zeros(B, dtype=I32),
        "lengths": torch.zeros(B, dtype=I32),
        "finished": torch.zeros(B, dtype=torch.bool),
    },
}


def wrong_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    """The right tensor with one thing wrong at a time."""
    right = torch.zeros(shape, dtype=dtype)
    other = torch.int16 if dtype != torch.int16 else torch.int32
    wrong = [
        ("dtype", right.to(other)),
        ("rank", right[..., None]),
        ("first size", torch.zeros(shape[0] + 1, *shape[1:], dtype=dtype)),
    ]
    if torch.cuda.is_available():  # a meta tensor would not do: it makes the whole call a fake one
        wrong.append(("device", right.to("cuda")))
    if len(shape) > 1:
        wrong.append(("last size", torch.zeros(*shape[:-1], shape[-1] + 1, dtype=dtype)))
        wrong.append(("last stride", torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]))
    return wrong


FILTER_TENSORS = {
    "temperature": ((B,), F32),
    "top_k": ((B,), I32),
    "top_p": ((B,), F32),
    "min_p": ((B,), F32),
    "typical_p": ((B,), F32),
    "bias": ((B, V), F32),
    "bitmask": ((B, W), I32),
}
ACTIVE = {"active": ((B,), torch.bool)}
TENSORS: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {
    "row_stats": ACTIVE,
    "topk_logits": ACTIVE,
    "target_probs": FILTER_TENSORS | ACTIVE,
    "sample": FILTER_TENSORS | ACTIVE | {"seed": ((B,), torch.int64), "offset": ((B,), torch.int64)},
    "token_logprobs": FILTER_TENSORS | ACTIVE | {"tokens": ((B,), torch.int64)},
    "verify_chain_greedy": ACTIVE | {"target_ids": ((B, K + 1), torch.int64), "draft_lens": ((B,), I32)},
    "verify_chain": FILTER_TENSORS
    | ACTIVE
    | {
        "target_logits": ((B, K + 1, V), F32),
        "draft_probs": ((B, K, V), F32),
        "draft_lens": ((B,), I32),
        "seed": ((B,), torch.int64),
        "offset": ((B,), torch.int64),
    },
    "kv_append_": {"v": ((B, 2, 16), F32), "slots": ((B,), torch.int64), "positions": ((B,), torch.int64)},
    "kv_flush_": {"end": ((B,), I32)},
    "kv_keep_": {"num_keep": ((B,), I32)},
    "kv_report": {"v": ((B, 1, 2, 16), F32)},
    "paged_attention": {
        "page_table": ((B, 2), I32),
        "kv_lens": ((B,), I32),
        "num_queries": ((B,), I32),
        "tail_lens": ((B,), I32),
        "coded_lens": ((B, K), I32),
        "tree_mask": ((B, K, 1), I32),
    },
    "prefix_attention": {"page_table": ((B, 2), I32), "prefix_lens": ((B,), I32)},
    "tree_check": {"num_nodes": ((B,), I32)},
    "tree_mask": {"num_nodes": ((B,), I32)},
    "commit": {
        "num_emitted": ((B,), I32),
        "lengths": ((B,), I32),
        "finished": ((B,), torch.bool),
        "max_lengths": ((B,), I32),
    },
}
TABLE = [
    (op, argument, what, value)
    for op, arguments in TENSORS.items()
    for argument, (shape, dtype) in arguments.items()
    for what, value in wrong_tensors(shape, dtype)
    # The vocabulary's size is read off the target: a wider one is another vocabulary, not an error.
    if not (op == "verify_chain" and argument == "target_logits" and what == "last size")
    # A wider table is one of longer requests.
    if not (argument == "page_table" and what == "last size")
]


@pytest.mark.parametrize("op, argument, what, value", TABLE, ids=[f"{o}-{a}-{w}" for o, a, w, _ in TABLE])
def test_wrong_tensor_is_named(ops, op, argument, what, value):
    with raises(f"^{op}: {argument}: expected .*got "):
        getattr(ops, op)(**{**GOOD[op], argument: value})


FLAT = {  # flat rows: R of them for B requests
    "target_probs": {"logits": torch.zeros(7, V), "row_start": torch.zeros(B + 1, dtype=I32)},
    "token_logprobs": {
        "logits": torch.zeros(7, V),
        "tokens": torch.zeros(7, dtype=torch.int64),
        "row_start": torch.zeros(B + 1, dtype=I32),
        "filtered": True,
    },
    "verify_chain": {
        "draft_tokens": torch.zeros(B, K, dtype=torch.int64),
        "target_logits": torch.zeros(7, V),
        "row_start": torch.zeros(B + 1, dtype=I32),
        **SEEDS,
    },
}
FLAT_TENSORS = FILTER_TENSORS | ACTIVE | {"row_start": ((B + 1,), I32), "bitmask": ((7, W), I32)}
FLAT_TABLE = [
    (op, argument, what, value)
    for op in FLAT
    for argument, (shape, dtype) in FLAT_TENSORS.items()
    for what, value in wrong_tensors(shape, dtype)
    # The number of requests is read off row_start: of another size, it is the others that are wrong.
    if not (argument == "row_start" and what == "first size" and op != "verify_chain")
]


@pytest.mark.parametrize("op, argument, what, value", FLAT_TABLE, ids=[f"{o}-{a}-{w}" for o, a, w, _ in FLAT_TABLE])
def test_wrong_tensor_beside_flat_rows_is_named(ops, op, argument, what, value):
    with raises(f"^{op}: {argument}: expected .*got "):
        getattr(ops, op)(**{**FLAT[op], argument: value})


RULES = {
    "typical": {"eps": ((B,), F32), "delta": ((B,), F32)},
    "top_beta": {"beta": ((B,), I32), "tau": ((B,), F32)},
}
RULE_TABLE = [
    (rule, argument, what, value)
    for rule, arguments in RULES.items()
    for argument, (shape, dtype) in arguments.items()
    for what, value in wrong_tensors(shape, dtype)
]


@pytest.mark.parametrize("rule, argument, what, value", RULE_TABLE, ids=[f"{a}-{w}" for _, a, w, _ in RULE_TABLE])
def test_wrong_parameter_of_a_rule_is_named(ops, rule, argument, what, value):
    good = {k: v for k, v in GOOD["verify_chain"].items() if k not in SEEDS} | {"rule": rule}
    ops.verify_chain(**good)
    with raises(f"^verify_chain: {argument}: expected .*got "):
        ops.verify_chain(**good, **{argument: value})


@pytest.mark.parametrize("op", ["row_stats", "topk_logits", "target_probs", "sample", "token_logprobs"])
@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(V),
        torch.zeros(1, 2, 3, 4),
        torch.zeros(B, V, dtype=torch.int64),
        torch.zeros(B, 2 * V)[:, ::2],
        torch.zeros(B, 0),
    ],
    ids=["1-D", "4-D", "int64", "strided", "no vocabulary"],
)
def test_wrong_logits(ops, op, logits):
    with raises(f"^{op}: logits: expected .*got "):
        getattr(ops, op)(**{**GOOD[op], "logits": logits})


BANS = torch.zeros(B, 2, dtype=torch.int64)
OTHERS = [
    ("sample", {"logits": torch.zeros(B, 2, V)}, "logits"),
    ("sample", {"stream": -1}, "stream"),
    ("sample", {"stream": 256}, "stream"),
    ("sample", {"node": -1}, "node"),
    ("sample", {"node": 1 << 24}, "node"),
    ("sample", {"seed": None, "offset": None, "uniforms": torch.zeros(B)}, "uniforms"),
    ("sample", {"seed": None, "offset": None, "uniforms": torch.zeros(B + 1, dtype=F64)}, "uniforms"),
    ("sample", {"seed": None, "uniforms": torch.zeros(B, dtype=F64)}, "offset"),
    ("sample", {"offset": None}, "offset"),
    ("sample", {"ban_ids": torch.zeros(B, 2, 2, dtype=torch.int64)}, "ban_ids"),
    ("sample", {"ban_ids": BANS.int()}, "ban_ids"),
    ("sample", {"min_lengths": BANS}, "min_lengths"),
    ("sample", {"ban_ids": BANS, "min_lengths": BANS[:, :1]}, "min_lengths"),
    ("target_probs", {"ban_ids": BANS, "min_lengths": BANS}, "min_lengths|offset"),
    ("target_probs", {"offset": SEEDS["offset"]}, "offset"),
    ("token_logprobs", {"top": -1}, "top"),
    ("token_logprobs", {"filtered": False, "temperature": torch.ones(B)}, "temperature|filtered|.*"),
    ("token_logprobs", {"logits": torch.zeros(B, 2, V)}, "tokens"),
    ("verify_chain_greedy", {"draft_tokens": torch.zeros(B, dtype=torch.int64)}, "draft_tokens"),
    ("verify_chain_greedy", {"draft_tokens": torch.zeros(B, K)}, "draft_tokens"),
    ("verify_chain", {"draft_tokens": torch.zeros(B, K, dtype=I32)}, "draft_tokens"),
    ("verify_chain", {"target_logits": None}, "target_.*"),
    ("verify_chain", {"target_probs": torch.zeros(B, K + 1, V)}, "target_.*"),
    ("verify_chain", {"seed": None, "offset": None, "uniforms": torch.zeros(B, K, dtype=F64)}, "uniforms"),
    ("verify_chain", {"rule": 7}, "rule"),
    ("verify_chain", {"rule": "lucky"}, "rule"),
    ("verify_chain", {"rule": "coupled", "draft_probs": torch.zeros(B, K, V)}, "draft_probs"),
    ("topk_logits", {"k": 0}, "k"),
    ("topk_logits", {"k": V + 1}, "k"),
    ("sample", {"order": "p_then_k"}, "order"),
    ("sample", {"order": 2}, "order"),
    ("sample", {"order": 0.0}, "order"),
    ("sample", {"bitmask": torch.zeros(B, 1, W, dtype=I32)}, "bitmask"),
    ("target_probs", {"bitmask": torch.zeros(B, 1, W, dtype=I32)}, "bitmask"),
    ("target_probs", {"logits": torch.zeros(B, 2, V), "bitmask": torch.zeros(B, 3, W, dtype=I32)}, "bitmask"),
    ("target_probs", {"logits": torch.zeros(B, 2, V), "row_start": torch.zeros(B + 1, dtype=I32)}, "logits"),
    ("token_logprobs", {"filtered": False, "bitmask": torch.zeros(B, W, dtype=I32)}, "bitmask|filtered"),
    ("token_logprobs", {"filtered": False, "typical_p": 0.5}, "typical_p|filtered"),
    ("token_logprobs", {"filtered": False, "order": "joint"}, "order|filtered"),
    ("token_logprobs", {"row_start": torch.zeros(2, dtype=I32), "tokens": BANS[:, 0][:2]}, "tokens"),
    ("verify_chain", {"bitmask": torch.zeros(B, K, W, dtype=I32)}, "bitmask"),
    ("verify_chain", {"row_start": torch.zeros(B + 1, dtype=I32)}, "target_logits"),
    ("verify_chain", {"target_logits": torch.zeros(7, V)}, "target_logits"),
    ("verify_chain", {"draft_to_target": torch.zeros(V_DRAFT, dtype=I32)}, "draft_to_target"),
    ("verify_chain", {"draft_to_target": torch.zeros(1, V_DRAFT, dtype=torch.int64)}, "draft_to_target"),
    (
        "verify_chain",
        {"draft_to_target": torch.zeros(V_DRAFT, dtype=torch.int64), "draft_probs": torch.zeros(B, K, V)},
        "draft_probs|draft_to_target",
    ),
    ("verify_chain", {"eps": 0.1}, "eps"),
    ("verify_chain", {"delta": 0.1}, "delta"),
    ("verify_chain", {"bonus": "sample"}, "bonus"),
    ("verify_chain", {"bonus": "both"}, "bonus"),
    ("verify_chain", {"beta": 2}, "beta"),
    ("verify_chain", {"tau": 0.1}, "tau"),
    ("verify_chain", {"rule": "typical"}, "seed"),
    ("verify_chain", {"rule": "typical", "seed": None, "offset": None, "bonus": "sample"}, "uniforms, seed"),
    ("verify_chain", {"rule": "typical", "bonus": "sample", "draft_probs": torch.zeros(B, K, V)}, "draft_probs"),
    ("verify_chain", {"rule": "top_beta"}, "seed"),
    ("verify_chain", {"rule": "top_beta", "seed": None, "offset": None, "temperature": 0.5}, ".*temperature"),
    ("verify_chain", {"rule": "top_beta", "seed": None, "offset": None, "typical_p": 0.5}, ".*typical_p"),
    ("verify_chain", {"rule": "top_beta", "seed": None, "offset": None, "order": "joint"}, ".*order"),
    (
        "verify_chain",
        {
            "rule": "top_beta",
            "seed": None,
            "offset": None,
            "target_logits": None,
            "target_probs": torch.zeros(B, K + 1, V),
        },
        "target_.*",
    ),
    ("verify_chain", {"target_logits": None, "target_probs": torch.zeros(B, K + 1, V), "typical_p": 0.5}, "target_.*"),
    (
        "verify_chain",
        {"target_logits": None, "target_probs": torch.zeros(B, K + 1, V), "bitmask": torch.zeros(B, W, dtype=I32)},
        "target_.*",
    ),
    ("commit", {"tokens": torch.zeros(B, dtype=torch.int64)}, "tokens"),
    ("commit", {"tokens": torch.zeros(B, K + 1, dtype=I32)}, "tokens"),
    ("commit", {"stop_ids": torch.zeros(B + 1, 1, dtype=torch.int64)}, "stop_ids"),
    ("commit", {"stop_ids": torch.zeros(B, 1, dtype=I32)}, "stop_ids"),
]


@pytest.mark.parametrize("op, change, argument", OTHERS, ids=[f"{o}-{'-'.join(c)}" for o, c, _ in OTHERS])
def test_wrong_combination_is_named(ops, op, change, argument):
    with raises(f"^{op}: ({argument}).*: expected .*"):
        getattr(ops, op)(**{**GOOD[op], **change})


def test_the_good_calls_are_good(ops):
    for op, arguments in [*GOOD.items(), *FLAT.items()]:
        getattr(ops, op)(**arguments)


def test_message_is_complete(ops):
    """One in full: op, argument, expected, got."""
    with raises(r"^verify_chain_greedy: target_ids: expected \[3, 3\], got \[3, 4\]$"):
        ops.verify_chain_greedy(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64))
