"""The protocol: interleaving, thread counts, the gate against noise, ceilings, what a row says."""

from __future__ import annotations

import subprocess
import time
from functools import partial
from itertools import pairwise

import pytest
import torch

from fastdecode import ops


def timing(harness, *, us=100.0, threads=1, cores=None, waited=0.0):
    cores = float(threads) if cores is None else cores
    return harness.Timing(threads, us, us, us, us, us, cores, waited, 8)


def case(harness, ours, peers=None, goals=()):
    return harness.Case("shape", torch.float32, 1000, 4000, [()], ours, peers or {}, goals)


def doze():
    """A call that scales over threads and needs no processor: its time does not depend on the machine's load."""
    time.sleep(0.004 / torch.get_num_threads())


def spin(seconds=0.001):
    """A call of one thread, however many there are."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_thread_counts(harness):
    assert [harness.thread_counts(most) for most in (1, 2, 3, 8, 12)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4, 8],
        [1, 2, 4, 8, 12],
    ]


def test_samples_go_forth_and_back_over_calls_and_threads(harness, cpus):
    seen = []

    def call(name, given):
        seen.append((name, torch.get_num_threads()))
        time.sleep(0.025)  # too long to be repeated, or warmed up in every sample

    counts = [1, 2][: len(cpus)]
    timings = harness.measure([(partial(call, name), [(0,)]) for name in "ab"], counts, cpus, seconds=1e-3)
    pairs = [(name, count) for count in counts for name in "ab"]
    rounds = seen[2 * len(pairs) :]  # after two looks at each
    assert rounds == (pairs + pairs[::-1]) * (harness.LEAST_SAMPLES // 2)
    assert [[one.threads for one in each] for each in timings] == [counts] * 2
    for one in (one for each in timings for one in each):
        assert one.samples == harness.LEAST_SAMPLES
        assert 25e3 <= one.p10_us <= one.p25_us <= one.us <= one.p75_us <= one.p90_us


def test_a_very_slow_call_has_two_samples(harness, cpus, monkeypatch):
    monkeypatch.setattr(harness, "VERY_SLOW_SECONDS", 0.02)
    calls = []
    ((one,),) = harness.measure([(lambda: (time.sleep(0.025), calls.append(1)), [()])], [1], cpus, seconds=1e-3)
    assert one.samples == 2 and len(calls) == 3


def test_inputs_are_used_in_turn(harness, cpus):
    seen = []
    harness.measure([(seen.append, [(i,) for i in range(7)])], [1], cpus, seconds=1e-3)
    assert len(seen) > 50
    assert all((after - before) % 7 == 1 for before, after in pairwise(seen))


def test_a_hopeless_number_of_threads_is_given_up(harness, cpus):
    if len(cpus) < 2:
        pytest.skip("one processor")
    (timings,) = harness.measure([(lambda: time.sleep(0.01 * torch.get_num_threads() ** 3), [()])], [1, 2], cpus, 1e-3)
    assert [one.threads for one in timings] == [1]


def test_the_gate(harness):
    assert timing(harness, threads=2, cores=1.85).parallel
    # a single-threaded call does not pass for one of two threads, though nothing disturbed it
    alone = timing(harness, threads=2, cores=1.0)
    assert alone.undisturbed and not alone.parallel
    # serial parts are no noise, waiting in a queue is
    assert timing(harness, threads=2, cores=1.4).undisturbed
    assert not timing(harness, threads=2, cores=1.4, waited=0.6).undisturbed
    assert not timing(harness, threads=1, cores=0.8).undisturbed
    assert timing(harness, threads=1, cores=0.97, waited=0.02).undisturbed
    # a thread of an earlier sample that still spins does not make up for waiting
    assert not timing(harness, threads=1, cores=1.14, waited=1.3).undisturbed
    # where the kernel does not count waiting
    assert timing(harness, threads=2, cores=1.4, waited=None).undisturbed


def test_ours_claims_threads_only_where_they_win(harness):
    one, level, faster = timing(harness, us=100), timing(harness, us=97, threads=2), timing(harness, us=60, threads=4)
    assert harness.best_of_ours([one, level]) is one
    assert harness.best_of_ours([one, level, faster]) is faster
    peer = harness._entrant("peer", spin, [one, level], ours=False)
    assert peer.best is level and peer.kept
    ours = harness._entrant("ours", spin, [one, timing(harness, us=60, threads=2, cores=1.0)], ours=True)
    assert ours.best.threads == 2 and not ours.kept


def test_a_row_that_claims_threads_and_does_not_use_them_is_not_kept(harness, goals, cpus):
    counts = [1, 2][: len(cpus)]
    limits = [harness.Ceiling(count, 10.0, 1.0, True) for count in counts]
    attempts = []

    def ours():
        attempts.append(torch.get_num_threads())
        doze()

    row = harness.measure_case(case(harness, ours, goals=[goals.within(reads=1e9, ns=1e9)]), limits, cpus, 1e-3)
    assert row.ours.best.threads == counts[-1]
    assert not row.ours.best.parallel
    assert not row.kept and not row.ours.kept
    assert row.goals[0].met is None  # it is far below its limit, and still not judged
    assert attempts.count(1) > 2 * harness.LEAST_SAMPLES  # it was tried again


def test_a_row(harness, goals, cpus):
    limits = [harness.Ceiling(1, 8.0, 1.0, True)]
    wanted = [goals.within(reads=1e6, ns=0), goals.times_faster(2, "slow"), goals.times_faster(50, "slow")]
    slow = {"slow": partial(spin, 0.004)}
    row = harness.measure_case(case(harness, partial(spin, 0.001), slow, wanted), limits, cpus, 0.05)
    assert row.ratios[0] == pytest.approx(row.peers[0].best.us / row.ours.best.us)
    assert row.ours.best.us >= 1000 and row.peers[0].best.us >= 4000
    assert row.reads == pytest.approx(row.ours.best.us / 0.5)  # 4000 bytes at 8 GB/s
    assert row.ns_per_element == pytest.approx(row.ours.best.us)
    assert row.gb_per_s == pytest.approx(4.0 / row.ours.best.us)
    if row.kept:  # not on a busy machine
        assert [verdict.met for verdict in row.goals] == [True, True, False]


def test_limits_of_goals(goals):
    measured = goals.Measured(read_us=100.0, elements=1_000_000, peers_us={"a": 600.0})
    limits = {
        goals.within(reads=1.3, ns=0.1): 130.0,
        goals.within(reads=1.3, ns=0.18): 180.0,
        goals.times_faster(3, "a"): 200.0,
        goals.at_most_times(1.3, "a"): 780.0,
        goals.beyond_us(60, "a"): 660.0,
        goals.beyond_ns(0.6, 100_000, "a"): 660.0,
    }
    for goal, limit in limits.items():
        assert goal.limit_us(measured) == pytest.approx(limit)
        assert goals.judge(goal, 0.999 * limit, measured, kept=True).met is True
        assert goals.judge(goal, 1.001 * limit, measured, kept=True).met is False
        assert goals.judge(goal, 0.999 * limit, measured, kept=False).met is None
    assert [goal.peer for goal in limits] == [None, None, "a", "a", "a", "a"]


def test_a_goal_names_a_peer_of_its_case(harness, goals):
    with pytest.raises(ValueError, match=r"shape: goals: expected one of \['b'\], got 'a'"):
        case(harness, doze, {"b": doze}, [goals.times_faster(3, "a")])


def test_a_disturbed_peer_leaves_goals_without_it(harness, goals):
    quiet, noisy = timing(harness, us=50), timing(harness, us=500, cores=0.5)
    rows = case(harness, doze, {"a": doze}, [goals.times_faster(3, "a"), goals.within(reads=1, ns=1e3)])
    entrants = [
        harness.Entrant("ours", "", quiet, True, [quiet]),
        harness.Entrant("a", "", noisy, noisy.undisturbed, [noisy]),
    ]
    row = harness._row(rows, entrants, [harness.Ceiling(1, 10.0, 1.0, True)])
    assert [verdict.met for verdict in row.goals] == [None, True]
    assert row.ours.kept and not row.peers[0].kept and not row.kept


def test_ceilings(harness, cpus):
    limits = harness.ceilings([1], cpus, seconds=0.01)
    assert [limit.threads for limit in limits] == [1]
    assert 0.1 < limits[0].read_gb_per_s < 5000
    assert 1e-3 < limits[0].exp_ns < 1000


def test_expressions(harness):
    temperatures = torch.full((8,), 0.5)
    text = harness.expression(partial(ops.sample, temperature=temperatures, seed=torch.arange(8), node=3))
    assert text == "fastdecode.ops.sample(*inputs, temperature=0.5 as float32[8], seed=int64[8], node=3)"
    assert harness.source(ops.sample) == ("sample", "")
    assert harness.expression(partial(spin, seconds=0.5)) == "spin(*inputs, seconds=0.5)"
    name, code = harness.source(partial(spin, seconds=0.5))
    assert name == "spin" and code.startswith("def spin(seconds=0.001):\n") and code.endswith("    pass")


def test_copies_do_not_fit_into_the_cache(inputs, machine, monkeypatch, cpus):
    cold = machine.cold_bytes(cpus)
    assert cold >= 3 * (machine.l3_bytes(cpus) or 1)
    x, y = torch.randn(1000, 251), torch.arange(7)
    made = inputs.copies(x, y)
    assert sum(a.nbytes + b.nbytes for a, b in made) >= cold
    assert len({a.data_ptr() for a, _ in made}) == len(made)
    assert all(torch.equal(a, x) and torch.equal(b, y) for a, b in made[:3])
    assert len(inputs.copies(torch.empty(cold + 1, dtype=torch.uint8))) == 2
    few = inputs.copies(x, used_bytes=x.nbytes // 2)
    assert len(few) == pytest.approx(2 * cold / x.nbytes, abs=1)
    monkeypatch.setattr(inputs, "MOST_BYTES", 10 * x.nbytes)
    assert len(inputs.copies(x, used_bytes=1)) == 10


def test_l3_counts_each_cache_once(machine, tmp_path):
    for cpu, (shared, size) in {0: ("0-1", "32768K"), 1: ("0-1", "32768K"), 2: ("2", "16M")}.items():
        for index, (level, cached) in enumerate((("2", "1024K"), ("3", size))):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("size", cached), ("shared_cpu_list", shared)):
                (folder / name).write_text(text + "\n")
    assert machine.l3_bytes([0, 1], tmp_path) == 32 << 20
    assert machine.l3_bytes([0, 1, 2], tmp_path) == 48 << 20


def test_the_commit_is_that_of_the_checkout_a_file_is_part_of(machine, tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    for name in ("bench", "python", "csrc"):
        (tmp_path / name).mkdir()
    tracked, stray = tmp_path / "bench" / "a.py", tmp_path / "python" / "b.py"
    tracked.write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert machine.commit(tracked) == {"commit": head, "modified": False}
    stray.write_text("2\n")
    assert machine.commit(tracked) == {"commit": head, "modified": True}
    assert machine.commit(stray) == {"commit": None, "modified": None}
