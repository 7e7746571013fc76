"""Instruction-set builds and thread placement."""

import os
import subprocess
import sys

import pytest
import torch

import fastdecode
from fastdecode import runtime


def test_levels_are_forced_and_restored():
    logits = torch.randn(3, 4097, generator=torch.Generator().manual_seed(0))
    expected = fastdecode.ops.row_stats(logits)
    before = torch.ops.fastdecode.set_cpu_level(1)
    torch.ops.fastdecode.set_cpu_level(before)
    for level in fastdecode.cpu_levels():
        with fastdecode.set_cpu_level(level):
            assert all(map(torch.equal, fastdecode.ops.row_stats(logits), expected))
    assert torch.ops.fastdecode.set_cpu_level(before) == before


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match=r"set_cpu_level: name: expected one of \['x86-64'"):
        fastdecode.set_cpu_level("sse")
    with pytest.raises(ValueError, match="set_cpu_level: level: expected 1, 3 or 4, got 2"):
        torch.ops.fastdecode.set_cpu_level(2)


def imported_with(level: str, program: str) -> subprocess.CompletedProcess:
    """`program` in a new process, after an import of fastdecode with FASTDECODE_CPU_LEVEL=level."""
    return subprocess.run(
        [sys.executable, "-c", f"import fastdecode; from fastdecode import runtime; {program}"],
        env={**os.environ, "FASTDECODE_CPU_LEVEL": level},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3", "x86-64-v4", ""])
def test_the_environment_names_the_level(level):
    levels = fastdecode.cpu_levels()
    if level and level not in levels:
        pytest.skip(f"this CPU cannot run {level}")
    program = """print(runtime.cpu_level())
with fastdecode.set_cpu_level("x86-64"): print(runtime.cpu_level())
fastdecode.set_cpu_level("x86-64"); fastdecode.set_cpu_level(None); print(runtime.cpu_level())"""
    expected = level or levels[-1]
    assert imported_with(level, program).stdout.split() == [expected, "x86-64", expected]


@pytest.mark.parametrize("level", ["3", "x86-64-v2", "X86-64", "x86-64-v5"])
def test_an_unknown_level_in_the_environment_stops_the_import(level):
    ran = imported_with(level, "print('imported')")
    last = ran.stderr.splitlines()[-1]
    assert ran.returncode == 1 and ran.stdout == ""
    expected = fastdecode.cpu_levels()
    assert last == f"ValueError: FASTDECODE_CPU_LEVEL: expected one of {expected} on this machine, got {level!r}"


def test_thread_counts_are_checked():
    most = len(runtime.usable_cpus())
    for count in (0, most + 1):
        with pytest.raises(ValueError, match=f"pin_threads: num_threads: expected 1..{most}, got {count}"):
            runtime.pin_threads(count)
    with pytest.raises(ValueError, match=r"pin_threads: cpus: expected 0\.\.1023, got -1"):
        torch.ops.fastdecode.pin_threads([-1] * 64)


def test_every_thread_gets_a_processor_of_its_own():
    # In a process of its own: the binding of the calling thread outlives the call.
    program = """
import os, fastdecode
from fastdecode import runtime
cpus = runtime.usable_cpus()
assert runtime.pin_threads() == len(cpus)
assert os.sched_getaffinity(0) == {cpus[0]}
bound = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
assert all({cpu} in bound for cpu in cpus), bound
"""
    subprocess.run([sys.executable, "-c", program], check=True)
