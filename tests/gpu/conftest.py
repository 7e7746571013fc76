"""Every test here needs a GPU and the CUDA kernels, and is skipped without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import backends


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _on_a_gpu() -> Iterator[None]:
    if reason := backends.why_not("cuda"):
        pytest.skip(reason)
    torch.set_num_threads(1)
    yield
    torch.cuda.synchronize()
