"""What a row should reach. Every goal is an upper limit on our time, computed from what the same run measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """What limits are computed from."""

    read_us: float  # one read of the row's bytes, at the read ceiling of the number of threads that we ran with
    elements: int
    peers_us: Mapping[str, float]


@dataclass(frozen=True)
class Goal:
    """`text` reads after our time; `peer` is the one that the limit depends on."""

    text: str
    limit_us: Callable[[Measured], float]
    peer: str | None = None


@dataclass(frozen=True)
class Verdict:
    """`met` is None where a measurement it needs was disturbed."""

    goal: str
    limit_us: float
    met: bool | None


def within(*, reads: float, ns: float) -> Goal:
    """The larger of so many reads of the input and so many nanoseconds per element (the arithmetic is a limit too)."""
    return Goal(
        f"<= max({reads:g} reads, {ns:g} ns per element)",
        lambda m: max(reads * m.read_us, ns * 1e-3 * m.elements),
    )


def times_faster(factor: float, peer: str) -> Goal:
    return Goal(f"{factor:g}x as fast as {peer}", lambda m: m.peers_us[peer] / factor, peer)


def at_most_times(factor: float, peer: str) -> Goal:
    return Goal(f"<= {factor:g}x the time of {peer}", lambda m: factor * m.peers_us[peer], peer)


def beyond_us(us: float, peer: str) -> Goal:
    return Goal(f"<= {us:g} us beyond {peer}", lambda m: us + m.peers_us[peer], peer)


def beyond_ns(ns: float, elements: int, peer: str) -> Goal:
    """So many nanoseconds for each of `elements` more than a peer."""
    return Goal(f"<= {ns:g} ns x {elements} beyond {peer}", lambda m: ns * 1e-3 * elements + m.peers_us[peer], peer)


def judge(goal: Goal, us: float, measured: Measured, *, kept: bool) -> Verdict:
    limit = goal.limit_us(measured)
    return Verdict(goal.text, limit, us <= limit if kept else None)
