"""The benchmarks: of the installed package, else of this checkout."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from fastdecode.cli.bench import benchmarks
from fastdecode.runtime import thread_settings


@pytest.fixture
def harness() -> ModuleType:
    return benchmarks("harness")


@pytest.fixture
def goals() -> ModuleType:
    return benchmarks("goals")


@pytest.fixture
def machine() -> ModuleType:
    return benchmarks("machine")


@pytest.fixture
def inputs() -> ModuleType:
    return benchmarks("inputs")


@pytest.fixture(autouse=True)
def cpus() -> Iterator[list[int]]:
    with thread_settings() as usable:
        yield usable
