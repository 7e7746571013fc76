"""What else runs on a GPU: torch.compile, plain fused kernels in Triton, FlashInfer where it is installed.

Nothing here is imported before it is used: all of it is optional on a machine without a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fastdecode import KVScheme

from .harness import Call, Case


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def has_flashinfer() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def versions() -> dict[str, str | None]:
    """Of the peers; None where one is not installed."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in ("triton", "flashinfer-python", "xgrammar")}


def smi(query: str) -> str | None:
    """What nvidia-smi says of the current device; None where it says nothing."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"]
    ran = subprocess.run(command, capture_output=True, text=True)
    return ran.stdout.strip() or None if ran.returncode == 0 else None


def compiled(peer: Call) -> Call:
    """The peer by torch.compile."""
    torch._dynamo.config.recompile_limit = 256  # shapes and filters all count
    function, bound = (peer.func, peer.keywords) if isinstance(peer, partial) else (peer, {})
    fast: Call = torch.compile(function, fullgraph=True)
    return partial(fast, **bound) if bound else fast


def of(op: str, case: Case) -> dict[str, Call]:
    """Peers of a case that run on nothing but a GPU."""
    filters = {name: value for name, value in _bound(case.ours).items() if isinstance(value, Tensor)}
    peers: dict[str, Call] = {}
    if op == "sample":
        plain = not filters.keys() & {"top_k", "top_p"}
        if plain:
            peers["triton exponential race"] = partial(triton_race, temperature=filters["temperature"])
        if has_flashinfer():
            peers["flashinfer"] = partial(flashinfer_sample, **{k: filters[k] for k in _FILTERS if k in filters})
    elif op == "row_stats":
        peers["triton, without second"] = triton_row_stats
    elif op == "apply_token_bitmask":
        peers["triton"] = triton_bitmask
    elif op == "paged_attention":
        plain_rows = _bound(case.ours).get("scheme") == KVScheme.PLAIN and case.inputs[0][0].shape[1] == 1
        if plain_rows and case.dtype != torch.float32 and has_flashinfer():
            peers["flashinfer"] = flashinfer_decode
    return peers


_FILTERS = ("temperature", "top_k", "top_p")


def _bound(call: Call) -> dict[str, Any]:
    return dict(call.keywords) if isinstance(call, partial) else {}


def flashinfer_sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None
) -> Tensor:
    """As its users call it: softmax with temperature, then the sampler of the filters that are on."""
    from flashinfer import sampling

    probs = sampling.softmax(logits.float(), temperature=temperature)
    if top_k is not None:
        return sampling.top_k_top_p_sampling_from_probs(probs, top_k, 1.0 if top_p is None else top_p)  # type: ignore[no-any-return]
    if top_p is not None:
        return sampling.top_p_sampling_from_probs(probs, top_p)  # type: ignore[no-any-return]
    return sampling.sampling_from_probs(probs)  # type: ignore[no-any-return]


def flashinfer_decode(q: Tensor, table: Tensor, lens: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    """Attention of one query per request to paged keys. Planned at the first call with a table, which is not timed: it
    waits for the GPU, and a model plans once for all its layers."""
    key = table.data_ptr(), table.shape, q.shape
    if key not in _planned:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        batch, pages = table.shape
        wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(256 << 20, dtype=torch.uint8), "HND")
        starts = torch.arange(batch + 1, dtype=torch.int32) * pages
        last = (lens - 1) % k.shape[2] + 1
        sizes = (q.shape[2], k.shape[1], q.shape[3], k.shape[2])
        wrapper.plan(starts, table.flatten(), last, *sizes, q_data_type=q.dtype, kv_data_type=k.dtype)
        _planned.clear()  # of the case before
        _planned[key] = wrapper
    return _planned[key].run(q[:, 0], (k, v))  # type: ignore[no-any-return]


_planned: dict[tuple[Any, ...], Any] = {}


def nothing() -> None:
    """Launches an empty kernel."""
    _kernels().nothing[(1,)]()


# --- Triton -----------------------------------------------------------------------------------------------------------

BLOCK = 2048


def parts_of(rows: int, vocab_size: int) -> int:
    """Programs per row: some hundred in all, a power of two, none of them without a block."""
    parts = 1
    while parts * rows < 512 and parts * BLOCK < vocab_size and parts < 64:
        parts *= 2
    return parts


def triton_race(logits: Tensor, temperature: Tensor) -> Tensor:
    """One draw per row from softmax(logits / temperature): the argmax of logits / temperature plus Gumbel noise."""
    rows, vocab_size = logits.shape
    parts = parts_of(rows, vocab_size)
    keys, ids = torch.empty(rows, parts), torch.empty(rows, parts, dtype=torch.int64)
    tokens = torch.empty(rows, dtype=torch.int64)
    kernels = _kernels()
    kernels.race[(rows, parts)](logits, temperature, keys, ids, 7, vocab_size, parts, BLOCK)
    kernels.race_end[(rows,)](keys, ids, tokens, parts)
    return tokens


def triton_row_stats(logits: Tensor) -> tuple[Tensor, ...]:
    """max, argmax, logsumexp and entropy in one read."""
    rows, vocab_size = logits.shape
    parts = parts_of(rows, vocab_size)
    partial_stats, ids = torch.empty(rows, parts, 3), torch.empty(rows, parts, dtype=torch.int64)
    out, argmax = torch.empty(rows, 3), torch.empty(rows, dtype=torch.int64)
    kernels = _kernels()
    kernels.stats[(rows, parts)](logits, partial_stats, ids, vocab_size, parts, BLOCK)
    kernels.stats_end[(rows,)](partial_stats, ids, out, argmax, parts)
    return out[:, 0], argmax, out[:, 1], out[:, 2]


def triton_bitmask(logits: Tensor, bitmask: Tensor) -> None:
    """-inf where the bit is 0, in place."""
    rows, vocab_size = logits.shape
    blocks = -(-vocab_size // BLOCK)
    _kernels().bitmask[(rows, blocks)](logits, bitmask, vocab_size, bitmask.shape[1], BLOCK)


@cache
def _kernels() -> Any:
    from . import gpu_triton

    return gpu_triton
