"""The benchmarks of a GPU, without one: what is captured, the order of samples, limits, the table, the exit codes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

from fastdecode.cli.bench import benchmarks

ROOT = Path(__file__).parents[2]
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def gpu():
    return benchmarks("gpu")


@pytest.fixture
def peers():
    return benchmarks("gpu_peers")


class FakeGpu:
    """Runs on the CPU, with a clock of its own: a call takes what it adds to `clock`, a cold one ten times as much."""

    l2_bytes = 1 << 20

    def __init__(self):
        self.clock, self.log, self.order, self.refuses = 0.0, [], [], set()

    def call(self, name, us):
        def one(*arguments):
            self.clock += us
            self.log.append((name, *arguments))

        return one

    def capture(self, calls):
        before = self.clock
        calls[0]()
        if self.log[-1][0] in self.refuses:
            raise RuntimeError("cannot be captured")
        self.clock = before

        def replay():
            for call in calls:
                call()

        return replay

    def time_us(self, run, samples, *, cold=False):
        times = []
        for _ in range(samples):
            before = self.clock
            run()
            times.append((self.clock - before) * (10 if cold else 1))
        self.order.append(self.log[-1][0])
        return times


def test_a_graph_has_all_inputs_equally_often(gpu):
    for count in (1, 3, 64, 100, 300):
        seen = []
        for call in gpu.in_turn(seen.append, [(i,) for i in range(count)]):
            call()
        kept = min(count, gpu.MOST_CALLS)
        assert len(seen) >= gpu.LEAST_CALLS and len(seen) % kept == 0
        assert seen == list(range(kept)) * (len(seen) // kept)


def test_measure(gpu):
    fake = FakeGpu()
    calls = {name: (fake.call(name, us), [(0,), (1,)]) for name, us in (("a", 3.0), ("b", 5.0))}
    found = gpu.measure(fake, calls, seconds=0)
    assert [(entrant.name, entrant.rotated.us, entrant.cold.us) for entrant in found] == [("a", 3, 30), ("b", 5, 50)]
    for entrant in found:
        assert entrant.rotated.samples == entrant.cold.samples == gpu.LEAST_SAMPLES
        assert entrant.rotated.form == "graph" and entrant.error is None
    rounds = ["aabb", "bbaa", "aabb", "bbaa", "aabb"]  # each in turn and cold, forth and back
    assert "".join(fake.order) == "".join(rounds) and len(rounds) == gpu.LEAST_SAMPLES


def test_what_cannot_be_captured_is_timed_as_it_is(gpu):
    fake = FakeGpu()
    fake.refuses.add("b")
    (a, b) = gpu.measure(fake, {name: (fake.call(name, 4.0), [()]) for name in "ab"}, seconds=0)
    assert (a.rotated.form, b.rotated.form) == ("graph", "stream")
    assert a.rotated.us == b.rotated.us == 4


def test_what_cannot_run_says_why(gpu):
    def broken():
        raise ValueError("of another version")

    fake = FakeGpu()
    (ours, peer) = gpu.measure(fake, {"ours": (fake.call("ours", 1.0), [()]), "peer": (broken, [()])}, seconds=0)
    assert ours.rotated.us == 1
    assert peer.rotated is None and peer.error == "ValueError: of another version"


def test_limits_and_rows(gpu, harness):
    class Clock(FakeGpu):
        def time_us(self, run, samples, *, cold=False):
            return [2048.0 + cold] * samples

    limit = gpu.limits(Clock(), lambda: None, 0, copy_bytes=1000, size=10)
    each = 2048 / gpu.LEAST_CALLS
    assert (limit.floor_us, limit.cold_floor_us) == (each, 2049)
    assert limit.copy_gb_per_s == pytest.approx(2 * 1000 / each * 1e-3)  # bytes read and written
    assert limit.matmul_tflops == pytest.approx(2 * 10**3 / each * 1e-6)

    limit = gpu.Limits(copy_gb_per_s=4000.0, floor_us=2.0, cold_floor_us=5.0, l2_bytes=1, matmul_tflops=500.0)
    assert limit.us(40_000_000, 10**10) == pytest.approx(20.0)
    assert limit.us(4) == 2.0  # no call is faster than an empty kernel
    assert limit.us(40_000_000) == pytest.approx(10.0)
    case = harness.Case("B=1", torch.bfloat16, 20_000_000, 40_000_000, [()], print, {})
    timing = partial(gpu.Timing, p25_us=1, p75_us=1, samples=5, form="graph")
    entrants = [
        gpu.Entrant("ours", "", timing(12.5), timing(20.0)),
        gpu.Entrant("peer", "", timing(25.0), timing(30.0)),
        gpu.Entrant("other", "", error="ImportError: no"),
    ]
    row = gpu.row_of("op", case, entrants, limit)
    assert row.of_limit == pytest.approx(0.8) and row.gb_per_s == pytest.approx(3200)
    assert row.ratios == [2.0, None]
    report = gpu.Report({"device": "a GPU"}, limit, [row], ["op: B=2"])
    text = gpu.table(report)
    assert text.startswith("a GPU: copy 4000 GB/s (read + written), empty kernel 2.00 us in a graph of many, 5.00 us")
    assert [line.split()[-1] for line in text.splitlines()[2:4]] == ["0.80", "2.00"]
    assert "ImportError: no" in text and "left out for want of time: op: B=2" in text
    assert not gpu.failures(report)
    broken = gpu.Report({}, limit, [gpu.row_of("op", case, entrants[::-1], limit)])
    assert gpu.failures(broken) and "ImportError: no" in gpu.table(broken)
    json.dumps(asdict(report))


def test_a_whole_run(gpu, peers, inputs, monkeypatch):
    """On the CPU in place of a GPU, of ops that have no peers in Triton."""
    monkeypatch.setattr(gpu, "limits", lambda *_: gpu.Limits(10.0, 1.0, 2.0, 1, 3.0))
    monkeypatch.setattr(inputs, "MOST_BYTES", 0)
    monkeypatch.setattr(peers, "compiled", lambda peer: peer)
    fake, seen = FakeGpu(), []
    fake.capture = lambda calls: lambda: [call() for call in calls[:1]]
    fake.time_us = lambda run, samples, cold=False: (run(), [5.0] * samples)[1]
    names = ["commit", "verify_chain_greedy"]
    saved = []
    report = gpu.run(fake, names, device={}, quick=True, seconds=0, progress=seen.append, save=saved.append)
    assert saved == [report, report] and not gpu.failures(report)
    assert [row.op for row in report.rows] == ["commit", "commit", "verify_chain_greedy", "verify_chain_greedy"]
    assert len(seen) == 4 and not report.left_out
    assert [entrant.name for entrant in report.rows[2].entrants] == [
        "fastdecode",
        "torch cumprod",
        "torch cumprod, compiled",
    ]
    late = gpu.run(fake, names, device={}, quick=True, seconds=0, limit_seconds=-1)
    assert not late.rows and late.left_out == seen


@pytest.mark.parametrize("op", benchmarks("report").ops())
def test_inputs_are_made_where_the_default_device_is(op):
    """Calls too: a tensor made on the CPU would be copied in every call, and no graph could hold it."""
    if op == "apply_token_bitmask":
        pytest.skip("counts what a call moves, which a meta tensor cannot tell")
    with torch.device("meta"):
        for case in benchmarks(f"ops.bench_{op}").cases(True):
            assert {argument.device.type for arguments in case.inputs for argument in arguments} == {"meta"}
            for call in (case.ours, *case.peers.values()):
                call(*case.inputs[0])


def test_shapes_on_a_gpu(inputs, monkeypatch):
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
    shapes = list(inputs.logits_shapes(False))
    assert {shape.batch for shape in shapes} == {1, 8, 64, 256} and all(shape.large for shape in shapes)
    assert [str(shape) for shape in inputs.logits_shapes(True)] == ["B=1 V=4096", "B=8 V=4096"]


def test_parts_of_a_row(peers):
    for rows in (1, 3, 8, 64, 256, 4000):
        for vocab_size in (1, 4096, 32003, 128256):
            parts = peers.parts_of(rows, vocab_size)
            assert parts & (parts - 1) == 0 and (parts == 1 or (parts // 2) * peers.BLOCK < vocab_size)


@needs_no_gpu
def test_without_a_gpu_there_is_a_sentence(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--json", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (ran.returncode, ran.stderr) == (2, "bench.gpu: there is no GPU that torch can use\n")
    assert not list(tmp_path.iterdir())


@needs_no_gpu
@pytest.mark.parametrize("stage", ["", "bench"])
def test_the_check_needs_a_gpu(stage):
    command = ["bash", str(ROOT / "bench" / "gpu_check.sh"), *stage.split()]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert (ran.returncode, ran.stderr) == (4, "gpu_check: there is no GPU that torch can use\n")


def test_the_sanitized_tests_exist():
    listed = re.search(r"small_tests=\(\n(.*?)\)", (ROOT / "bench" / "gpu_check.sh").read_text(), re.DOTALL)
    assert listed is not None
    for name in listed[1].split():
        path, _, test = name.partition("::")
        assert (f"def {test}(" if test else "def test_") in (ROOT / path).read_text(), name


def test_the_check_names_its_stages():
    ran = subprocess.run(["bash", str(ROOT / "bench" / "gpu_check.sh"), "all"], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (64, "gpu_check: stage: expected test, bench or sanitize, got all\n")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_kernels_by_its_interpreter():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    ran = subprocess.run(
        [sys.executable, "-c", code + "import triton_peers"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert ran.returncode == 0, ran.stderr
