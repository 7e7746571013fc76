"""Where the op tests run: cpu, simt (the CUDA kernels, run on the host by csrc/simt) and cuda.

A test calls the functions of fastdecode.ops with CPU tensors. On the other backends the call is caught where the
wrapper calls its op, below all that is Python and above all that is compiled, and sent on from there.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fastdecode
import fastdecode.ops
from fastdecode import _lib
from support import same_bits

NAMES = ("cpu", "simt", "cuda")
Send = Callable[..., Any]  # (op, *its arguments) -> what the op returns


def why_not(name: str) -> str | None:
    """Why this backend cannot run here."""
    if name == "simt" and _lib.simt_library() is None:
        return "_C_simt is not built: install with --config-settings=cmake.define.FASTDECODE_SIMT=ON"
    if name == "cuda":
        if not torch.cuda.is_available():
            return "there is no GPU"
        if not _lib.cuda_is_loaded():
            return _lib.NO_CUDA
    return None


class Redirect(TorchDispatchMode):
    """Hands the calls of fastdecode's ops to `send`; one with a tensor that is not on the CPU goes on as it is."""

    def __init__(self, send: Send) -> None:
        super().__init__()
        self.send = send

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if func.namespace == "fastdecode" and devices == {"cpu"}:
            assert not kwargs
            return self.send(func, *args)
        return func(*args, **(kwargs or {}))


class Ops:
    """fastdecode.ops, its calls handed to `send`."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def __getattr__(self, name: str) -> Any:
        function = getattr(fastdecode.ops, name)
        if not inspect.isfunction(function):
            return function

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with Redirect(self._send):
                return function(*args, **kwargs)

        return call


class Copies:
    """Copies of tensors on a device, alike in everything: offsets, strides, what lies between rows, shared memory."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.storages: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # bytes of the original and of the copy

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), storage.nbytes()
        if key not in self.storages:
            data = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.storages[key] = data, data.to(self.device, copy=True)
        copy = self.storages[key][1].untyped_storage()
        empty = torch.empty(0, dtype=tensor.dtype, device=self.device)
        return empty.set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())

    def differ(self) -> bool:
        return any(not torch.equal(original, copy.cpu()) for original, copy in self.storages.values())

    def write_back(self) -> None:
        """Inputs too, so that a test sees a kernel that writes where it must not."""
        for original, copy in self.storages.values():
            original.copy_(copy)


def to_gpu(op: Any, *args: Any) -> Any:
    copies = Copies("cuda")
    out = op(*tree_map_only(Tensor, copies, args))
    copies.write_back()
    return tree_map_only(Tensor, lambda tensor: tensor.cpu(), out)


class Simt:
    """The host executor. Every REPEAT-th call is made twice, with another order of threads and another pattern in
    fresh shared memory, and must give the same bits."""

    REPEAT = 4

    def __init__(self, seed: int) -> None:
        _lib.load_simt()
        self.library = ctypes.CDLL(str(_lib.simt_library()))
        self.seed, self.calls, self.live_blocks = seed, 0, 3

    def configure(self, seed: int, poison: int) -> None:
        configure = self.library.fastdecode_simt_configure
        configure(ctypes.c_uint64(seed), ctypes.c_int(poison), ctypes.c_int(self.live_blocks))

    def once(self, op: Any, *args: Any) -> Any:
        """As `configure` says."""
        return getattr(torch.ops.fastdecode_simt, op._opname).default(*args)

    def __call__(self, op: Any, *args: Any) -> Any:
        self.calls += 1
        seed = self.seed + 2 * self.calls
        if self.calls % self.REPEAT:
            self.configure(seed, self.calls % 2)
            return self.once(op, *args)
        copies = Copies("cpu")
        others = tree_map_only(Tensor, copies, args)
        self.configure(seed, 0)
        out = self.once(op, *args)
        self.configure(seed + 1, 1)
        again = self.once(op, *others)
        pairs = zip(tree_leaves(out), tree_leaves(again), strict=True)
        same = all(same_bits(*pair) for pair in pairs if pair != (None, None))  # None: the op works in place
        assert same and not copies.differ(), (
            f"{op}: seeds {seed} and {seed + 1} differ: it depends on the order of threads, or on fresh shared memory"
        )
        return out


@dataclass(frozen=True)
class Backend:
    """Where an op test runs: it calls `ops` as it would fastdecode.ops, with CPU tensors."""

    name: str
    ops: Any
    send: Send | None = None

    @classmethod
    def make(cls, name: str, seed: int = 0) -> Backend:
        if name == "cpu":
            return cls(name, fastdecode.ops)
        send = to_gpu if name == "cuda" else Simt(seed)
        return cls(name, Ops(send), send)

    def variants(self) -> Iterator[str]:
        """Sets up, one after the other, what must change no bit of any result, and names it."""
        if self.name == "cpu":
            for level in fastdecode.cpu_levels():
                with fastdecode.set_cpu_level(level):
                    for threads in (1, 2, 3):
                        torch.set_num_threads(threads)
                        yield f"{level}, {threads} threads"
            torch.set_num_threads(1)
        elif isinstance(self.send, Simt):
            for live_blocks in (1, 2, 5):
                self.send.live_blocks = live_blocks
                yield f"{live_blocks} live blocks"
            self.send.live_blocks = 3
        else:
            yield "once more"
