"""What the wrappers share: scalars broadcast to one value per request, names to the numbers of csrc/core/enums.h."""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from .._host import Bonus, KVScheme, Order, Rule

FILTER_DOC = """
        temperature: float32 [B]; <= 0 or NaN is greedy, ties to the lowest id. None means 1.
        top_k: int32 [B]; keeps the k most likely ids, ties at the threshold by lowest id; <= 0 or >= V is off.
        top_p: float32 [B]; keeps the most likely ids up to and with the one that crosses top_p; >= 1 is off.
        min_p: float32 [B]; keeps ids with probability >= min_p times the largest, all ties; <= 0 is off.
        typical_p: float32 [B]; keeps the ids whose -log p is nearest the entropy, up to and with the one that crosses
            typical_p (Meister et al. 2022), ties by lowest id; >= 1 is off.
        bias: float32 [B, V] or [V], added to the logits first; -inf forbids an id.
        ban_ids: int64 [B, S] or [S], padded with -1: ids that are forbidden.
        min_lengths: int64 [B, S] or [S]: ban_ids[b, s] is forbidden only at absolute positions below this.
        bitmask: int32 [B, W] or [W], W = ceil(V / 32); with more rows per request also [B, n, W], with flat rows
            [R, W]. Bit v & 31 of word v >> 5 says whether id v is allowed.
        order: "k_then_p": top-p sees the renormalised law that top-k left; "joint": both are taken from the same law.
            Or a `fastdecode.Order`."""


def per_request(
    op: str, name: str, value: Tensor | float | int | None, like: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """A scalar becomes [B] on the device of `like`, whose first dimension is B; a strided [B] is copied; None passes.

    Integers are taken modulo 2^64, so that a seed may be given as signed or unsigned.
    Raises:
        ValueError: a value that is no number of this dtype.
    """
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.contiguous() if value.dim() == 1 else value
    if like.dim() == 0:
        raise ValueError(f"{op}: expected requests along the first dimension, got a tensor without dimensions")
    if dtype == torch.int64:
        value = (int(value) + 2**63) % 2**64 - 2**63
    try:
        return torch.full((like.shape[0],), value, dtype=dtype, device=like.device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{op}: {name}: expected a {dtype} number or tensor, got {value!r}") from error


def per_request_rows(op: str, name: str, value: Tensor | None, like: Tensor) -> Tensor | None:
    """A row shared by all requests becomes [B, S], without a copy."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: {name}: expected a tensor, got {value!r}")
    return value.unsqueeze(0).expand(like.shape[0], -1) if value.dim() == 1 and like.dim() else value


def check_devices(op: str, *arguments: object) -> None:
    """For the fakes, given all arguments in the schema's order: what the adapters of a real device check themselves."""
    schema, like = getattr(torch.ops.fastdecode, op).default._schema, arguments[0]
    assert isinstance(like, Tensor)
    for argument, value in zip(schema.arguments, arguments, strict=True):
        if isinstance(value, Tensor) and value.device != like.device:
            raise ValueError(f"{op}: {argument.name}: expected {like.device}, got {value.device}")


def filters(
    op: str,
    logits: Tensor,
    temperature: Tensor | float | None,
    top_k: Tensor | int | None,
    top_p: Tensor | float | None,
    min_p: Tensor | float | None,
    typical_p: Tensor | float | None,
    bias: Tensor | None,
    ban_ids: Tensor | None,
    min_lengths: Tensor | None,
    bitmask: Tensor | None,
    order: str | int,
) -> tuple[Tensor | int | None, ...]:
    """The filter arguments in the order of the schemas; dimension 0 of `logits` counts the requests."""
    return (
        per_request(op, "temperature", temperature, logits, torch.float32),
        per_request(op, "top_k", top_k, logits, torch.int32),
        per_request(op, "top_p", top_p, logits, torch.float32),
        per_request(op, "min_p", min_p, logits, torch.float32),
        per_request(op, "typical_p", typical_p, logits, torch.float32),
        per_request_rows(op, "bias", bias, logits),
        per_request_rows(op, "ban_ids", ban_ids, logits),
        per_request_rows(op, "min_lengths", min_lengths, logits),
        per_request_rows(op, "bitmask", bitmask, logits),
        number_of(op, "order", order, Order),
    )


_NUMBERS: dict[type[enum.IntEnum], dict[str, int]] = {
    kind: {member.name.lower(): int(member) for member in kind} for kind in (Bonus, KVScheme, Order, Rule)
}


def number_of(op: str, name: str, value: str | int, kind: type[enum.IntEnum]) -> int:
    """A member of an enum of csrc/core/enums.h by its lower-case name or number; numbers are checked by the op."""
    if isinstance(value, str):
        names = _NUMBERS[kind]  # made before any compiler traces this
        if value not in names:
            raise ValueError(f"{op}: {name}: expected one of {sorted(names)}, got {value!r}")
        return names[value]
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{op}: {name}: expected a name or a {kind.__name__}, got {value!r}")
    return int(value)


def requests_of(op: str, logits: Tensor, row_start: Tensor | None) -> Tensor:
    """A tensor whose dimension 0 counts the requests: the logits, or one view per request of flat rows."""
    if row_start is None:
        return logits
    if not isinstance(row_start, Tensor) or row_start.dim() != 1 or row_start.shape[0] == 0:
        got = list(row_start.shape) if isinstance(row_start, Tensor) else repr(row_start)
        raise ValueError(f"{op}: row_start: expected int32 [B + 1], got {got}")
    return row_start[1:]


def value_dtype(logits: Tensor) -> torch.dtype:
    """dtype of the float outputs of an op on these logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def with_filter_doc(function):  # type: ignore[no-untyped-def]
    """Put the description of the filters where the docstring says {filters}."""
    if function.__doc__:  # absent under python -OO
        function.__doc__ = function.__doc__.replace("\n        {filters}", FILTER_DOC)
    return function
