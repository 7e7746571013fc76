"""NgramIndex against a search of the whole text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdecode._host import NgramIndex


def brute_force(text: list[int], k: int, max_ngram: int, min_ngram: int) -> list[int]:
    for n in range(min(max_ngram, len(text) - 1), min_ngram - 1, -1):
        for start in range(len(text) - n - 1, -1, -1):  # most recent first
            if text[start : start + n] == text[-n:]:
                copy = list(text)
                for i in range(k):
                    copy.append(copy[start + n + i])
                return copy[len(text) :]
    return []


def ids(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@given(
    pieces=st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=8),
    k=st.integers(0, 9),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)).map(sorted),
)
@settings(max_examples=300, deadline=None)
def test_equals_brute_force_after_every_piece(pieces, k, sizes):
    index, text = NgramIndex(max_ngram=sizes[1], min_ngram=sizes[0]), []
    for piece in pieces:
        index.extend(ids(piece))
        text += piece
        assert len(index) == len(text)
        proposed = index.propose(k)
        assert proposed.dtype == np.int64
        assert proposed.tolist() == brute_force(text, k, sizes[1], sizes[0])


def test_longest_suffix_before_most_recent():
    index = NgramIndex(3, 1)
    index.extend(ids([1, 2, 3, 9, 8, 3, 7, 1, 2, 3]))
    assert index.propose(3).tolist() == [9, 8, 3]  # after 1 2 3, though 3 7 is more recent
    short = NgramIndex(1, 1)
    short.extend(ids([1, 2, 3, 9, 8, 3, 7, 1, 2, 3]))
    assert short.propose(3).tolist() == [7, 1, 2]


def test_min_ngram_forbids_shorter_matches():
    index = NgramIndex(4, 2)
    index.extend(ids([5, 1, 6, 1]))
    assert index.propose(4).tolist() == []


def test_a_copy_goes_on_through_itself():
    index = NgramIndex()
    index.extend(ids([1, 2, 1, 2]))
    assert index.propose(5).tolist() == [1, 2, 1, 2, 1]


def test_any_int64_is_a_token():
    tokens = [-1, 2**63 - 1, -(2**63), 0]
    index = NgramIndex()
    index.extend(ids(tokens + tokens[:2]))
    assert index.propose(2).tolist() == tokens[2:]


def test_empty():
    index = NgramIndex()
    index.extend(ids([]))
    assert len(index) == 0 and index.propose(3).tolist() == []
    index.extend(ids([1]))
    assert index.propose(3).tolist() == [] and index.propose(0).tolist() == []


@pytest.mark.parametrize("sizes", [(0, 1), (2, 3), (65, 1), (3, 0), (-1, -1)])
def test_sizes(sizes):
    with pytest.raises(ValueError, match=r"NgramIndex: m.._ngram: expected 1"):
        NgramIndex(*sizes)


@pytest.mark.parametrize(
    "tokens",
    [np.zeros(3, np.int32), np.zeros(3), np.zeros((2, 2), np.int64), np.zeros(6, np.int64)[::2]],
    ids=["int32", "float64", "two dimensions", "strided"],
)
def test_arrays_are_not_converted(tokens):
    with pytest.raises(ValueError, match="expected a contiguous int64 array"):
        NgramIndex().extend(tokens)


def test_negative_k():
    with pytest.raises(ValueError, match="k: expected >= 0, got -1"):
        NgramIndex().propose(-1)


def test_cost_per_token_does_not_grow_with_the_text():
    """A text of one repeated token has the most matches; 200,000 of them take long only if each is searched."""
    index = NgramIndex()
    for _ in range(200):
        index.extend(np.zeros(1000, np.int64))
        index.propose(8)
    assert index.propose(4).tolist() == [0, 0, 0, 0]
