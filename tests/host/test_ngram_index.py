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
    ("tokens", "got"),
    [
        (np.zeros(3, np.int32), "int32 with 1 dimensions"),
        (np.zeros(3, np.uint64), "uint64 with 1 dimensions"),
        (np.zeros(3), "float64 with 1 dimensions"),
        (np.zeros(3, np.dtype(np.int64).newbyteorder()), ">i8 with 1 dimensions"),
        (np.zeros((2, 2), np.int64), "int64 with 2 dimensions"),
        (np.zeros(6, np.int64)[::2], "a stride of 16 bytes"),
        (np.zeros(6, np.int64)[::-1], "a stride of -8 bytes"),
    ],
    ids=["int32", "uint64", "float64", "byte order", "two dimensions", "strided", "reversed"],
)
def test_arrays_are_not_converted(tokens, got):
    with pytest.raises(ValueError, match=f"expected a contiguous int64 array \\[n\\], got {got}$"):
        NgramIndex().extend(tokens)


@pytest.mark.parametrize("kind", [np.int64, np.longlong, np.intp])
def test_every_name_of_int64_is_int64(kind):
    index = NgramIndex()
    index.extend(np.array([1, 2, 1], dtype=kind))
    assert index.propose(2).tolist() == [2, 1]


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
