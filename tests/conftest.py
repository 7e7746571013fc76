"""Fixtures of the op tests. Seeds are parameters or constants of the tests, so a failure names its own."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import backends
import fastdecode
import support
from backends import Backend

# One backend serves all examples of a test: its fixture has nothing that an example could leave behind.
settings.register_profile("fastdecode", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("fastdecode")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backend",
        action="append",
        default=[],
        choices=backends.NAMES,
        help="fail where this backend of the op tests cannot run, in place of leaving it out",
    )


def pytest_configure(config: pytest.Config) -> None:
    for name in config.getoption("--require-backend"):
        if reason := backends.why_not(name):
            raise pytest.UsageError(f"--require-backend={name}: {reason}")


def pytest_report_header() -> str:
    reasons = {name: backends.why_not(name) for name in backends.NAMES}
    return "backends of the op tests: " + ", ".join(f"{n} ({r})" if r else n for n, r in reasons.items())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of `ops` or `backend` runs on every backend of this machine, or on those its mark `backends` names; one of
    the instruction-set builds is about the CPU."""
    if "backend" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("backends")
    wanted = mark.args if mark else ("cpu",) if "cpu_level" in metafunc.fixturenames else backends.NAMES
    here = [
        pytest.param(name, marks=pytest.mark.gpu if name == "cuda" else ())
        for name in wanted
        if backends.why_not(name) is None
    ]
    metafunc.parametrize("backend", here, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A mark `thin` leaves simt every kind of input once: of the combinations of a test's parameters, those that bring
    in a value that no earlier one had. The others are slow tests."""
    seen: dict[str, set] = {}
    for item in items:
        call = getattr(item, "callspec", None)
        if call is None or call.params.get("backend") != "simt" or item.get_closest_marker("thin") is None:
            continue
        values = {(name, repr(value)) for name, value in call.params.items()}
        known = seen.setdefault(item.nodeid.split("[")[0], set())
        if values <= known:
            item.add_marker(pytest.mark.slow)
        known |= values


@pytest.fixture
def backend(request: pytest.FixtureRequest, _restore_global_state: None) -> Backend:
    torch.set_num_threads(1)  # spinning threads crawl on a busy machine; check_rows_independent covers more of them
    seed = zlib.crc32(request.node.name.encode())
    if request.param == "simt":
        print(f"seed of the executor: {seed}")
    return Backend.make(request.param, seed)


@pytest.fixture
def ops(backend: Backend) -> Any:
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
def check_rows_independent(backend: Backend) -> Callable[..., tuple]:
    """`support.check_rows_independent` with what must change nothing either: threads and builds of the CPU kernels, the
    executor's orders of threads and blocks."""

    def check(call: Callable[..., tuple], tensors: dict[str, torch.Tensor | None]) -> tuple[Any, ...]:
        return support.check_rows_independent(call, tensors, backend.variants())

    return check
