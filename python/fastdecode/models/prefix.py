"""Which rows of a paged cache begin with the same pages (Hydragen, Juravsky et al. 2024, hierarchical sharing).

Rows that share pages form a tree: all of a group's rows share a run of pages, subgroups of it share more. Each level of
the tree is one `ops.prefix_attention` in which a group's keys are read once for all of its queries; what is a row's own
is read by `ops.paged_attention`; `ops.merge_states` joins them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PrefixLevel", "SharedPrefixes", "shared_prefixes"]

MAX_LEVELS = 15  # merge_states joins up to 16, the rows' own part among them


@dataclass(frozen=True, slots=True)
class PrefixLevel:
    """Groups of rows, in the order of `SharedPrefixes.order`: group g is rows starts[g] .. starts[g + 1] - 1.

    Groups cover a range without gaps: rows between two that share pages are a group without pages.
    """

    starts: list[int]
    pages: list[list[int]]


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """The tree of shared pages.

    Attributes:
        order: a permutation of the rows that makes groups adjacent.
        levels: outermost first.
        skipped: pages of each row that levels cover, by row number.
    """

    order: list[int]
    levels: list[PrefixLevel]
    skipped: list[int]


def shared_prefixes(tables: Sequence[Sequence[int]], whole: Sequence[int]) -> SharedPrefixes | None:
    """What rows share of their first `whole[b]` pages; None where they share nothing."""
    own = [tuple(table[:count]) for table, count in zip(tables, whole, strict=True)]
    order = sorted(range(len(own)), key=own.__getitem__)  # equal beginnings become neighbours; stable
    rows = [own[row] for row in order]
    skipped = [0] * len(rows)
    levels: list[PrefixLevel] = []
    groups = [(0, len(rows))] if rows else []
    while groups and len(levels) < MAX_LEVELS:
        found: list[tuple[int, int, int, int]] = []  # first row, last row + 1, first page, last page + 1
        for first, last in groups:
            begin = skipped[first]
            start = first
            while start < last:
                end = start + 1
                while end < last and rows[end][begin : begin + 1] == rows[start][begin : begin + 1] != ():
                    end += 1
                if end - start > 1:
                    found.append((start, end, begin, _agree(rows[start], rows[end - 1], begin)))
                start = end
        for start, end, _, stop in found:
            skipped[start:end] = [stop] * (end - start)
        if found:
            levels.append(_level(found, rows))
        groups = [(start, end) for start, end, _, _ in found]
    if not levels:
        return None
    by_row = [0] * len(rows)
    for row, pages in zip(order, skipped):
        by_row[row] = pages
    return SharedPrefixes(order, levels, by_row)


def _agree(first: tuple[int, ...], last: tuple[int, ...], begin: int) -> int:
    """Where two sorted rows part: all rows between them agree so far too."""
    end = begin
    while end < min(len(first), len(last)) and first[end] == last[end]:
        end += 1
    return end


def _level(found: Sequence[tuple[int, int, int, int]], rows: Sequence[tuple[int, ...]]) -> PrefixLevel:
    starts, pages = [found[0][0]], list[list[int]]()
    for start, end, begin, stop in found:
        if start > starts[-1]:
            starts.append(start)
            pages.append([])
        starts.append(end)
        pages.append(list(rows[start][begin:stop]))
    return PrefixLevel(starts, pages)
