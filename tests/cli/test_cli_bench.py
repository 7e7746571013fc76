"""`fastdecode bench ops`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdecode.cli.bench import benchmarks

QUICK = ("--quick", "--seconds", "0.01", "--threads", "1")
TIMING = {"threads", "us", "p10_us", "p25_us", "p75_us", "p90_us", "cores", "waited", "samples"}


def test_table_and_json(cli, tmp_path):
    folder = tmp_path / "new" / "results"
    ran = cli("bench", "ops", "--op", "row_stats", *QUICK, "--json", folder, "--verbose")
    assert ran.code == 0 and ran.err == ""
    assert ran.out.startswith("row_stats (1 thread: read ")
    for text in ("B=1 V=4096 float32", "B=8 V=4096 bfloat16", "torch argmax alone", "return logits.argmax(-1)"):
        assert text in ran.out

    assert os.listdir(folder) == ["row_stats.json"]
    report = json.loads((folder / "row_stats.json").read_text())
    assert (report["op"], report["threads"], report["quick"]) == ("row_stats", [1], True)
    assert {"device", "cpu_flags", "clock_mhz", "l3_bytes", "versions", "commit", "date", "load_average"} <= set(
        report["machine"]
    )
    assert list(report["sources"]) == ["topk_softmax_lse", "argmax_alone"]
    assert report["sources"]["argmax_alone"].endswith("return logits.argmax(-1)")
    assert [limit["threads"] for limit in report["ceilings"]] == [1]
    assert all(limit["read_gb_per_s"] > 0 and limit["exp_ns"] > 0 for limit in report["ceilings"])
    assert [row["shape"] for row in report["rows"]] == ["B=1 V=4096", "B=8 V=4096"]
    for row in report["rows"]:
        assert set(row) == {
            "shape",
            "dtype",
            "elements",
            "bytes_moved",
            "ours",
            "ns_per_element",
            "gb_per_s",
            "reads",
            "peers",
            "ratios",
            "goals",
            "kept",
        }
        assert row["ours"]["expression"] == "fastdecode.ops.row_stats(*inputs)"
        assert [peer["name"] for peer in row["peers"]] == ["torch topk+log_softmax", "torch argmax alone"]
        assert row["peers"][1]["expression"] == "argmax_alone(*inputs)"
        for entrant in (row["ours"], *row["peers"]):
            assert set(entrant["best"]) == TIMING and entrant["timings"] == [entrant["best"]]
            assert 0 < entrant["best"]["p25_us"] <= entrant["best"]["us"] <= entrant["best"]["p75_us"]
        assert row["ratios"][0] == pytest.approx(row["peers"][0]["best"]["us"] / row["ours"]["best"]["us"], rel=1e-2)


def test_check_fails_on_a_goal_that_is_not_met(cli, monkeypatch):
    module, goals = benchmarks("ops.bench_commit"), benchmarks("goals")
    harness, report = benchmarks("harness"), benchmarks("report")
    # the gate is tested elsewhere; here the machine's load must not decide
    monkeypatch.setattr(harness, "GATE", -1.0)
    limit, original = 0.0, module.cases

    def cases(quick):
        for case in original(quick):
            yield harness.Case(**{**vars(case), "goals": [goals.Goal("< limit", lambda measured: limit)]})

    monkeypatch.setattr(module, "cases", cases)
    monkeypatch.setattr(report, "ceilings", lambda *_: [harness.Ceiling(1, 10.0, 1.0, True)])
    command = ("bench", "ops", "--op", "commit", *QUICK)
    missed = cli(*command, "--check")
    assert missed.code == 1 and "missed: B=1 K+1=5 int64: < limit:" in missed.out
    assert cli(*command).code == 0  # only --check makes it an error
    limit = 1e9
    met = cli(*command, "--check")
    assert met.code == 0 and " met " in met.out and "missed" not in met.out
    monkeypatch.setattr(harness, "GATE", 1e9)
    unknown = cli(*command, "--check")
    assert unknown.code == 1 and "not judged: B=1 K+1=5" in unknown.out and "disturbed by other programs" in unknown.out


def test_every_op_has_a_benchmark():
    import fastdecode.ops

    functions = {name for name in fastdecode.ops.__all__ if name[0].islower()}
    assert {name.rstrip("_") for name in functions} - {"pack_weight"} == set(benchmarks("report").ops())


def test_mistakes(cli, tmp_path):
    assert cli("bench", "ops", "--op", "nothing").err.endswith("got 'nothing'\n")
    assert "row_stats, sample" in cli("bench", "ops", "--op", "nothing").err
    assert cli("bench", "ops", "--seconds", "0").err == (
        "fastdecode: error: bench: --seconds: expected more than 0, got 0\n"
    )
    assert "num_threads: expected 1.." in cli("bench", "ops", "--threads", "10000").err
    assert "arguments are required: WHAT" in cli("bench").err
    (tmp_path / "file").touch()
    assert cli("bench", "ops", "--json", tmp_path / "file").code == 2


def test_one_file_as_a_module():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "bench.ops.bench_commit", *QUICK]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("commit (1 thread: read ") and "torch masks" in ran.stdout
