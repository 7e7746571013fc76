"""What an engine asks of ops on a GPU: its stream, its device, its graph, no wait for the host, no allocation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdecode.ops
import random_calls
from backends import Copies
from fastdecode.ops import KVPages
from random_calls import OPS
from support import map_tensors, tensors_of

Arguments = dict[str, Any]


def dense(arguments: Arguments) -> Arguments:
    """Without rows that share memory, which cannot be filled with new values one by one."""

    def alone(tensor: Tensor) -> Tensor:
        return tensor.contiguous() if 0 in tensor.stride() else tensor

    return {k: map_tensors(alone, v) for k, v in arguments.items()}


def calls(op: str, count: int) -> list[Arguments]:
    """Random calls that launch something."""
    found, seed = [], 500
    while len(found) < count:
        arguments, seed = dense(random_calls.call(op, seed)), seed + 1
        if all(v.numel() for v in tensors_of(v for v in arguments.values() if not isinstance(v, KVPages))):
            found.append(arguments)
    return found


def other_values(arguments: Arguments, step: int) -> Arguments:
    """The same shapes with other values: rolled along the last dimension. Where rows begin stays as it is, and so does
    where in a cache they lie: what is not meant to be read holds NaN."""
    has_pages = "pages" in arguments

    def rolled(tensor: Tensor) -> Tensor:
        stays = has_pages and not tensor.is_floating_point()
        return tensor.roll(step, -1) if tensor.dim() and not stays else tensor

    return {k: v if k in ("row_start", "pages") else map_tensors(rolled, v) for k, v in arguments.items()}


def moved(arguments: Arguments, device: str = "cuda") -> Arguments:
    copies = Copies(device)
    return {k: map_tensors(copies, v) for k, v in arguments.items()}


def fill(there: Arguments, values: Arguments) -> None:
    for tensor, value in zip(tensors_of(there.values()), tensors_of(values.values()), strict=True):
        tensor.copy_(value)


def runner(op: str, there: Arguments) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        out = getattr(fastdecode.ops, op)(**there)
        return [*([out] if isinstance(out, Tensor) else out), *tensors_of(there.values())]

    return run


def assert_expected(op: str, got: list[Tensor], values: Arguments, what: str) -> None:
    want = random_calls.outputs(fastdecode.ops, op, values)
    assert random_calls.agree(op, want, [tensor.cpu() for tensor in got]), f"{op}: {what}"


@pytest.mark.parametrize("op", OPS)
def test_a_captured_graph_replays_on_new_values(op):
    for number, arguments in enumerate(calls(op, 12)):
        there = moved(arguments)
        run = runner(op, there)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # warm, as torch's documentation of graphs asks for
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        for step in range(3):
            values = other_values(arguments, step)
            fill(there, values)
            graph.replay()
            torch.cuda.synchronize()
            assert_expected(op, out, values, f"call {number}, replay {step}")


@pytest.mark.parametrize("op", OPS)
def test_replays_allocate_nothing(op):
    (arguments,) = calls(op, 1)
    there = moved(arguments)
    run = runner(op, there)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    keys = ("allocation.all.allocated", "reserved_bytes.all.current", "allocated_bytes.all.current")
    before = [torch.cuda.memory_stats()[key] for key in keys]
    free = torch.cuda.mem_get_info()[0]
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert [torch.cuda.memory_stats()[key] for key in keys] == before
    assert torch.cuda.mem_get_info()[0] == free  # memory that torch's allocator does not know of


@pytest.mark.parametrize("op", OPS)
def test_nothing_waits_for_the_gpu(op):
    (arguments,) = calls(op, 1)
    run = runner(op, moved(arguments))
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.zeros(1, device="cuda").item()
        torch.cuda._sleep(200_000_000)  # about 0.1 s of work before it
        done = torch.cuda.Event()
        run()
        done.record()
        assert not done.query(), "the call came back after the GPU had finished"
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", OPS)
def test_an_op_runs_on_the_current_stream(op):
    """The values arrive late, on a stream of its own: work on any other stream would read those that were there."""
    for number, arguments in enumerate(calls(op, 3)):
        there = moved(other_values(arguments, 1))
        late = moved(arguments)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            fill(there, late)
            out = runner(op, there)()
        side.synchronize()
        assert_expected(op, out, arguments, f"call {number}")


@pytest.mark.parametrize("op", OPS)
def test_an_op_runs_on_the_device_of_its_tensors(op):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    (arguments,) = calls(op, 1)
    with torch.cuda.device(0):
        out = runner(op, moved(arguments, "cuda:1"))()
        assert torch.cuda.current_device() == 0
    assert all(tensor.device == torch.device("cuda:1") for tensor in out)
    assert_expected(op, out, arguments, "on cuda:1")
