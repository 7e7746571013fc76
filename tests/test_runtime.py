"""Instruction-set builds and thread placement."""

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
