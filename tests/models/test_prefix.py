"""The tree of pages that rows share."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fastdecode.models.prefix import MAX_LEVELS, shared_prefixes


def test_nothing_shared():
    assert shared_prefixes([], []) is None
    assert shared_prefixes([[], []], [0, 0]) is None
    assert shared_prefixes([[1, 2], [3, 4], []], [2, 2, 0]) is None
    assert shared_prefixes([[1, 2], [1, 3]], [0, 1]) is None  # the page is whole in one row only


def test_a_tree():
    tables = [[0, 1, 2, 9], [7], [0, 1, 3, 8], [0, 1, 2, 4], [7, 5], [0, 1, 3, 8, 6]]
    found = shared_prefixes(tables, [4, 1, 4, 4, 2, 5])
    assert found is not None and found.order == [3, 0, 2, 5, 1, 4]
    outer, inner = found.levels
    assert (outer.starts, outer.pages) == ([0, 4, 6], [[0, 1], [7]])
    assert (inner.starts, inner.pages) == ([0, 2, 4], [[2], [3, 8]])
    assert found.skipped == [3, 1, 4, 3, 1, 4]


def test_more_levels_than_can_be_merged():
    tables = [[*range(i), 100 + i] for i in range(40)]
    found = shared_prefixes(tables, [len(table) for table in tables])
    assert found is not None and len(found.levels) == MAX_LEVELS
    check(tables, [len(table) for table in tables])


def check(tables: list[list[int]], whole: list[int]) -> None:
    """Levels and what is left make up each row; a row's part of a level is shared, what is left is not."""
    found = shared_prefixes(tables, whole)
    own = [table[:count] for table, count in zip(tables, whole)]
    firsts = [row[0] for row in own if row]
    if found is None:
        assert len(set(firsts)) == len(firsts)
        return
    assert sorted(found.order) == list(range(len(tables))) and found.levels
    covered: list[list[int]] = [[] for _ in tables]
    for level in found.levels:
        assert all(a < b for a, b in zip(level.starts, level.starts[1:]))
        assert len(level.pages) == len(level.starts) - 1
        for start, end, pages in zip(level.starts, level.starts[1:], level.pages):
            assert not pages or end - start > 1
            for row in found.order[start:end]:
                covered[row] += pages
    for row, pages in enumerate(covered):
        assert own[row][: len(pages)] == pages and found.skipped[row] == len(pages)
    if len(found.levels) < MAX_LEVELS:
        rest = [(tuple(row[: count + 1])) for row, count in zip(own, found.skipped) if len(row) > count]
        assert len(set(rest)) == len(rest)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_random_trees(data):
    tables: list[list[int]] = []
    fresh = iter(range(10**6))
    for _ in range(data.draw(st.integers(0, 8))):
        parent = data.draw(st.sampled_from(tables)) if tables and data.draw(st.booleans()) else []
        shared = parent[: data.draw(st.integers(0, len(parent)))]
        tables.append(shared + [next(fresh) for _ in range(data.draw(st.integers(0, 3)))])
    check(tables, [data.draw(st.integers(0, len(table))) for table in tables])
