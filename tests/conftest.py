"""Fixtures of the op tests. Seeds are parameters or constants of the tests, so a failure names its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

import fastdecode
import fastdecode.ops
import support


@dataclass(frozen=True)
class Backend:
    """Where the op runs; tests move their inputs with `device` and call `ops`."""

    name: str
    device: str
    ops: ModuleType


@pytest.fixture(params=["cpu"])
def backend(request: pytest.FixtureRequest, _restore_global_state: None) -> Backend:
    torch.set_num_threads(1)  # spinning threads crawl on a busy machine; check_rows_independent covers more of them
    return Backend(request.param, request.param, fastdecode.ops)


@pytest.fixture
def ops(backend: Backend) -> ModuleType:
    return backend.ops


@pytest.fixture(autouse=True)
def _restore_global_state() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    fastdecode.set_cpu_level(None)


@pytest.fixture(params=["x86-64", "x86-64-v3", "x86-64-v4"])
def cpu_level(request: pytest.FixtureRequest) -> str:
    """Runs the test once per instruction-set build that this machine can execute."""
    if request.param not in fastdecode.cpu_levels():
        pytest.skip(f"this CPU cannot run {request.param}")
    fastdecode.set_cpu_level(request.param)
    return request.param


@pytest.fixture
def check_rows_independent() -> Callable[..., tuple]:
    def check(call: Callable[..., tuple], tensors: dict[str, torch.Tensor | None]) -> tuple[Any, ...]:
        return support.check_rows_independent(call, tensors, tuple(fastdecode.cpu_levels()), fastdecode.set_cpu_level)

    return check
