"""`fastdecode methods`, `fastdecode doctor`, and the choice of threads behind the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastdecode import _lib, ops, runtime
from fastdecode.methods import METHODS, RULES
from fastdecode.models import load_model


def test_methods_in_a_process_of_its_own():
    command = [sys.executable, "-m", "fastdecode", "methods", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    rows = json.loads(ran.stdout)
    assert all(list(row) == ["name", "paper", "parts", "guarantee"] for row in rows)
    assert [row["name"] for row in rows] == list(METHODS)
    assert [row["guarantee"] for row in rows] == ["exact"] + [
        "exact (coupled), in law (ratio, block), approximate (typical, top_beta)"
    ] * 3 + ["exact"] + ["approximate"] * 5
    assert rows[1]["parts"] == list(METHODS["speculative"].parts)


def test_the_table_of_methods_has_the_parameters(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    ran = cli("methods")
    assert ran.code == 0
    for method in METHODS.values():
        assert method.name in ran.out
        assert all(f"{name} = {value}" in ran.out for name, value in method.parameters.items())
    for rule in RULES.values():
        assert rule.name in ran.out and rule.guarantee in ran.out
        assert all(f"{name} = {value}" in ran.out for name, value in rule.parameters.items())


def test_doctor(cli, shipped, monkeypatch, tmp_path):
    monkeypatch.setattr("fastdecode.cli.doctor._read_bandwidth", lambda cpus: 12.345)
    ran = cli("doctor", "--json")
    report = json.loads(ran.out)
    assert ran.code == 0 and report["problems"] == []
    assert set(report) == {
        "versions",
        "libraries",
        "cpu",
        "threads",
        "read_bandwidth",
        "checkpoints",
        "cuda",
        "problems",
        "advice",
    }
    assert report["versions"]["torch"] == torch.__version__
    assert report["cpu"]["level"] == report["cpu"]["levels"][-1]
    assert report["cpu"]["level_from"] == "this machine"
    assert report["cpu"]["usable"] == len(os.sched_getaffinity(0))
    assert report["read_bandwidth"] == {"gb_per_s": 12.3}
    assert report["checkpoints"] == {"tiny-code": True, "tiny-code-draft": True}
    assert report["cuda"] == {
        "kernels": "built" if _lib.cuda_library() else "not built",
        "torch": torch.version.cuda or "none",
        "gpus": report["cuda"]["gpus"],
        "host_simulation": "built" if _lib.simt_library() else "not built",
    }
    assert len(report["cuda"]["gpus"]) == torch.cuda.device_count()

    monkeypatch.setattr("fastdecode.cli.doctor.CHECKPOINTS", tmp_path)
    text = cli("doctor")
    assert text.code == 1 and "BROKEN" in text.out and "tiny-code-draft is missing" in text.out

    monkeypatch.setattr("fastdecode.cli.doctor._version", lambda package: None)
    text = cli("doctor")
    assert text.code == 1 and "rich is not installed: pip install 'fastdecode[cli]'" in text.out


@pytest.mark.parametrize(
    "drawn, problem",
    [
        (0, "sample gives 0 on cuda:0 and "),
        (
            RuntimeError("sample: CUDA: no kernel image is available\nmore"),
            "cuda:0: sample: CUDA: no kernel image is av",
        ),
        (None, None),
    ],
    ids=["wrong", "not built for this GPU", "right"],
)
def test_doctor_tries_the_gpu(monkeypatch, drawn, problem):
    """On a machine that says it has one: the tensors stay on the CPU, and what the GPU gives is made up."""
    from fastdecode.cli import doctor

    class Cuda:
        is_available, device_count = (lambda: True), (lambda: 1)
        get_device_capability, get_device_name = (lambda index: (9, 0)), (lambda index: "NVIDIA H200")

    asked = []
    original = ops.sample

    def sample(logits, **options):
        asked.append(logits.device)
        if logits.device.type == "meta":
            if isinstance(drawn, Exception):
                raise drawn
            right = original(torch.linspace(-3, 3, 5000).sin()[None], **options)
            return right if drawn is None else right._replace(tokens=torch.tensor([drawn]))
        return original(logits, **options)

    monkeypatch.setattr(torch, "cuda", Cuda)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: torch.empty_like(tensor, device="meta"))
    monkeypatch.setattr(doctor.ops, "sample", sample)
    monkeypatch.setattr(_lib, "cuda_library", lambda: Path("_C_cuda.so"))
    monkeypatch.setattr(_lib, "cuda_is_loaded", lambda: True)
    problems, advice = [], []
    report = doctor._cuda(problems, advice)
    assert report["gpus"] == ["NVIDIA H200 (sm_90)"] and report["kernels"] == "built"
    assert torch.device("meta") in asked
    assert problems == [] if problem is None else problem in problems[0] and len(problems) == 1


def test_doctor_tells_who_chose_the_level(cli, shipped, monkeypatch):
    monkeypatch.setattr("fastdecode.cli.doctor._read_bandwidth", lambda cpus: 1.0)
    monkeypatch.setenv("FASTDECODE_CPU_LEVEL", "x86-64")
    best = runtime.cpu_levels()[-1]
    with runtime.set_cpu_level("x86-64"):
        report = json.loads(cli("doctor", "--json").out)
    assert report["cpu"]["level"] == "x86-64" and report["cpu"]["level_from"] == "FASTDECODE_CPU_LEVEL"
    advice = f"FASTDECODE_CPU_LEVEL=x86-64 is set: unset it, and the kernels use {best}"
    assert (advice in report["advice"]) == (best != "x86-64")


def test_bandwidth_is_measured():
    from fastdecode.cli.doctor import _read_bandwidth

    with runtime.thread_settings() as cpus:
        assert 0.1 < _read_bandwidth(cpus) < 5000


def test_the_fastest_number_of_threads_is_found_and_pinned():
    cpus = sorted(os.sched_getaffinity(0))
    with runtime.thread_settings() as usable:
        assert usable == cpus
        # sleeps stand for work, so that the answer does not depend on the machine's load
        fewer = runtime.fastest_threads(lambda: time.sleep(0.002 * torch.get_num_threads()), cpus=usable, seconds=0.01)
        assert fewer == torch.get_num_threads() == 1
        assert os.sched_getaffinity(0) == {cpus[0]}
        more = runtime.fastest_threads(lambda: time.sleep(0.02 / torch.get_num_threads()), cpus=usable, seconds=0.01)
        assert more == torch.get_num_threads() == len(cpus)
    assert os.sched_getaffinity(0) == set(cpus)
    assert all(os.sched_getaffinity(int(task)) == set(cpus) for task in os.listdir("/proc/self/task"))


def test_threads_are_tuned_for_a_model(checkpoints):
    model, draft = (load_model(checkpoints / name) for name in ("tiny-code", "tiny-code-draft"))
    with runtime.thread_settings() as cpus:
        assert 1 <= runtime.tune_threads(model, draft_model=draft, num_drafts=4, cpus=cpus) <= len(cpus)
        # a round longer than the model's context is cut
        assert 1 <= runtime.tune_threads(model, num_drafts=500, cpus=cpus) <= len(cpus)


def test_the_level_in_use_is_told():
    for level in runtime.cpu_levels():
        with runtime.set_cpu_level(level):
            assert runtime.cpu_level() == level


@pytest.mark.parametrize("command", ["generate", "compare", "methods", "doctor"])
def test_help(cli, capsys, command):
    with pytest.raises(SystemExit) as ended:
        cli(command, "--help")
    assert ended.value.code == 0 and "--json" in capsys.readouterr().out
