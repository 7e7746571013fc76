"""Shared pieces of the op tests: hostile inputs, bit comparisons, error bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdecode.ops import KVPages
from fastdecode.testing.reference import sample as reference

# One past each vector width, tile border (2048) and block of the kernels; primes; the smallest.
SIZES = (1, 2, 3, 7, 16, 17, 64, 65, 255, 256, 257, 2047, 2048, 2049, 4096, 5000)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))


ROW_KINDS = ("normal", "ties", "flat", "one_finite", "masked", "spread", "near_tie")


def rows(kind: str, batch: int, vocab_size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Logits [batch, vocab_size] that break a different shortcut per kind."""
    g = generator(ROW_KINDS.index(kind), batch, vocab_size, seed)
    noise = torch.randn(batch, vocab_size, generator=g, dtype=torch.float64)
    if kind == "normal":
        out = 3 * noise
    elif kind == "ties":
        out = noise.mul(2).round()
    elif kind == "flat":
        out = noise[:, :1].expand(batch, vocab_size)
    elif kind == "one_finite":
        at = torch.randint(vocab_size, (batch, 1), generator=g)
        out = torch.full_like(noise, -torch.inf).scatter(1, at, noise[:, :1])
    elif kind == "masked":
        out = noise.masked_fill(torch.rand(noise.shape, generator=g) < 0.7, -torch.inf)
        out[:, int(torch.randint(vocab_size, (1,), generator=g))] = 0.5
    elif kind == "spread":
        out = 3000 * noise
    else:  # near_tie: the largest logits differ in the last bits of a half
        out = 8 + noise.abs().clamp(max=2) * 2.0**-8
    return out.to(dtype).contiguous()


def hostile(num_rows: int, vocab_size: int, dtype: torch.dtype, *, seed: int = 81, broken: bool = True) -> Tensor:
    """Logits with ties, -inf, subnormals, zeros of both signs, wide spreads and values next to each other; of more than
    20 rows, three are in error where `broken`."""
    g = generator(seed, num_rows, vocab_size)
    out = 3 * torch.randn(num_rows, vocab_size, generator=g, dtype=torch.float64)
    kinds = torch.arange(num_rows) % 8
    tiny = torch.finfo(dtype).smallest_normal
    out[kinds == 1] = out[kinds == 1].round()
    out[kinds == 2] = out[kinds == 2].masked_fill(torch.rand(out[kinds == 2].shape, generator=g) < 0.7, -torch.inf)
    out[kinds == 3] = out[kinds == 3].round() * tiny / 8
    out[kinds == 4] *= 300
    out[kinds == 5] = 8 + out[kinds == 5] * 2.0**-8
    out[kinds == 6] = torch.where(out[kinds == 6] < 0, -0.0, 0.0).double()
    out[torch.isneginf(out).all(1), 0] = 0.5
    if num_rows > 20 and broken:
        out[11, -1], out[12, 0], out[13] = torch.nan, torch.inf, -torch.inf
    return out.to(dtype)


def views(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values behind other strides and storage offsets; the last dimension stays dense. Gaps hold NaN or 77."""
    fill = float("nan") if tensor.is_floating_point() else 77 if tensor.dtype != torch.bool else True
    yield "contiguous", tensor
    *lead, last = tensor.shape
    padded = torch.full((*lead, last + 5), fill, dtype=tensor.dtype)
    padded[..., 3 : 3 + last] = tensor
    yield "offset rows", padded[..., 3 : 3 + last]
    if tensor.dim() >= 2:
        wide = torch.full((tensor.shape[0] * 2 + 1, *tensor.shape[1:]), fill, dtype=tensor.dtype)
        wide[1::2] = tensor
        yield "every other row", wide[1::2]
    if tensor.dim() == 3:
        yield "first two dims swapped", tensor.transpose(0, 1).contiguous().transpose(0, 1)


def same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    as_int = INT_OF_SIZE[left.element_size()]
    return torch.equal(left.contiguous().view(as_int), right.contiguous().view(as_int))


def assert_same(left: tuple, right: tuple, what: str = "") -> None:
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        assert same_bits(a, b), f"{what}: output {i} differs: {a} != {b}"


def check_rows_independent(
    call: Callable[..., tuple], tensors: dict[str, Tensor | None], variants: Iterable[str] = ()
) -> tuple:
    """Order of the batch, other rows and repetition change no bit of any row; nor does anything that `variants` changes
    before it yields its name.

    Every tensor has the batch as dimension 0. Returns the outputs.
    """
    given = {k: t for k, t in tensors.items() if t is not None}
    batch = next(iter(given.values())).shape[0]
    out = tuple(call(**given))
    assert_same(out, tuple(call(**given)), "second run")
    order = torch.randperm(batch, generator=generator(batch))
    shuffled = call(**{k: t[order] for k, t in given.items()})
    assert_same(tuple(o[order] for o in out), tuple(shuffled), "shuffled batch")
    for b in range(min(batch, 6)):
        alone = call(**{k: t[b : b + 1] for k, t in given.items()})
        assert_same(tuple(o[b : b + 1] for o in out), tuple(alone), f"row {b} alone")
    for name in variants:
        assert_same(out, tuple(call(**given)), name)
    return out


def assert_as_good_as_torch(got: Tensor, exact: np.ndarray, plain: Tensor, what: str = "") -> None:
    """Error against the reference at most twice that of the plain torch expression, plus one rounding."""
    assert got.dtype == plain.dtype and got.shape == plain.shape, f"{what}: {got.dtype} {tuple(got.shape)}"
    ours, theirs = (t.double().numpy().astype(np.longdouble) for t in (got, plain))
    special = ~np.isfinite(exact)
    assert (np.where(special, exact, 0) == np.where(special, ours, 0)).all(), f"{what}: inf in other places"
    broken = exact[~np.isfinite(ours) & ~special]
    assert broken.size == 0, f"{what}: not finite where {broken} expected"
    exact, ours, theirs = exact[~special], ours[~special], theirs[~special]
    if exact.size == 0:
        return
    with np.errstate(invalid="ignore"):
        their_error = np.abs(theirs - exact)
    finfo = torch.finfo(got.dtype)
    bound = 2 * np.nanmax(their_error) + finfo.eps * np.abs(exact) + finfo.smallest_normal
    error = np.abs(ours - exact)
    worst = int(np.argmax(error - bound))
    assert (error <= bound).all(), (
        f"{what}: error {error[worst]:.3g} over bound {bound[worst]:.3g} (torch {np.nanmax(their_error):.3g}) "
        f"at value {exact[worst]:.17g}"
    )


# A filter decision closer than this to flipping may go either way by the rounding of float32 sums.
NEAR_TIE = {torch.float64: 1e-12, torch.float32: 1e-6}


def check_target_probs(
    ops: ModuleType, logits: Tensor, what: str, near_tie: dict[torch.dtype, float] = NEAR_TIE, **filters: Any
) -> int:
    """Compares a whole batch with the reference; returns how many rows were too close to a tie to compare."""
    probs, status = ops.target_probs(logits, **filters)
    want, want_status, margin = reference.target_probs(logits, **filters)
    work = compute_dtype(logits.dtype)
    assert probs.dtype == work and probs.shape == logits.shape and status.shape == logits.shape[:-1]
    np.testing.assert_array_equal(status.numpy(), want_status, err_msg=what)
    clear = margin > (1e-12 if what.startswith("flat") else near_tie[work])  # equal weights sum exactly everywhere
    if (clear & (want_status == 0)).any():
        kept = torch.from_numpy((want > 0)[clear])
        got = probs[torch.from_numpy(clear)]
        tiny = torch.from_numpy((want < 1e-30)[clear])  # float32 may flush what long double still holds
        assert torch.equal((got > 0) & ~tiny, kept & ~tiny), f"{what}: other ids kept"
        plain = torch.softmax(scaled(logits, **filters).masked_fill(torch.from_numpy(want <= 0), -torch.inf), -1)
        assert_as_good_as_torch(got, want[clear], plain[torch.from_numpy(clear)].nan_to_num(), what)
    return int((~clear).sum())


def scaled(logits: Tensor, *, temperature: Tensor | None = None, bias: Tensor | None = None, **_: Any) -> Tensor:
    """(logits + bias) / temperature as plain torch would write it; greedy rows are one-hot under the mask anyway."""
    work = logits.to(compute_dtype(logits.dtype))
    if bias is not None:
        work = work + (bias if bias.dim() == 1 or logits.dim() == 2 else bias[:, None])
    if temperature is not None:
        work = work / torch.where(temperature > 0, temperature, 1).view(-1, *[1] * (logits.dim() - 1))
    return work


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """An argument of an op with `function` applied to its tensors: a tensor, a list of them, or pages of a cache."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list):
        return [map_tensors(function, each) for each in value]
    if not isinstance(value, KVPages):
        return value
    named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dataclasses.replace(value, **{k: function(t) for k, t in named.items() if isinstance(t, Tensor)})


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    """All tensors among the arguments of an op."""
    found: list[Tensor] = []
    for value in values:
        map_tensors(lambda tensor: found.append(tensor) or tensor, value)  # type: ignore[func-returns-value]
    return found


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("fastdecode"):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def check_op(call: Callable[[], Any], *, inductor: bool = False) -> None:
    """opcheck of every library op that `call` makes, and torch.compile(fullgraph=True) of `call` against eager.

    The schema arguments are recorded under the wrapper, so its argument handling is what gets checked. aot_eager
    traces with the fake kernels and functionalises mutations as inductor does, without compiling C++.
    """
    with _Recorder() as recorder:
        call()
    assert recorder.calls, "no fastdecode op was called"
    for func, args, kwargs in recorder.calls:
        torch.library.opcheck(func, args, kwargs)
    on_gpu = any(isinstance(arg, Tensor) and arg.is_cuda for _, args, _ in recorder.calls for arg in args)
    for made in [_on_copies(func, args) for func, args, _ in recorder.calls] if on_gpu else [call]:
        torch._dynamo.reset()
        compiled = torch.compile(made, fullgraph=True, backend="inductor" if inductor else "aot_eager")
        assert_same(tuple(made()), tuple(compiled()), "compiled")


def _on_copies(func: Any, args: tuple) -> Callable[[], tuple]:
    """A call as it came to the GPU: how its tensors got there is no part of what is compiled."""

    def call() -> tuple:
        copies = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        out = func(*copies)
        out = () if out is None else (out,) if isinstance(out, Tensor) else tuple(out)
        return (*out, *(arg for arg in copies if isinstance(arg, Tensor)))

    return call


def raises(message: str) -> Any:
    return pytest.raises(ValueError, match=message)
