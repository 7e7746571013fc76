"""The machinery that sends op tests to other backends; it must neither lose nor mend anything on the way."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import backends
import fastdecode
from support import same_bits, views


@pytest.mark.parametrize("name", backends.NAMES)
def test_the_backend_runs_here(name):
    """Skipped where it does not, with the reason: the op tests leave it out silently."""
    if reason := backends.why_not(name):
        pytest.skip(reason)
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    out = backends.Backend.make(name).ops.row_stats(logits)
    assert isinstance(out, fastdecode.ops.RowStats)
    assert all(map(same_bits, out, fastdecode.ops.row_stats(logits)))


def test_calls_arrive_with_all_that_they_have():
    sent = []

    def send(op, *args):
        sent.append((op, args))
        return op(*args)

    ops, logits = backends.Ops(send), torch.arange(6.0).view(2, 3)
    mask = torch.tensor([[5], [3]], dtype=torch.int32)
    assert ops.apply_token_bitmask_(logits, mask) is logits
    assert logits.tolist() == [[0, -torch.inf, 2], [3, 4, -torch.inf]]
    ((op, args),) = sent
    assert op is torch.ops.fastdecode.apply_token_bitmask_.default
    assert args[0] is logits and args[1] is mask and args[2:] == (None, None)
    drawn = ops.sample(logits, top_k=1, seed=[3, 4][0], offset=0)
    assert drawn.tokens.tolist() == [2, 1] and len(sent) == 2
    assert ops.pack_weight(torch.ones(2, 2)).shape == (1, 2, 64) and len(sent) == 2  # no op of the library
    fastdecode.ops.row_stats(logits)
    assert len(sent) == 2
    with pytest.raises(ValueError, match="expected cpu, got meta"):
        ops.token_logprobs(logits, torch.zeros(2, dtype=torch.int64, device="meta"))
    assert len(sent) == 2
    with pytest.raises(AttributeError):
        ops.no_such_op  # noqa: B018


def test_copies_are_alike_and_apart():
    whole = torch.randn(6, 10)
    for name, view in views(whole):
        copy = backends.Copies("cpu")(view)
        assert copy.stride() == view.stride() and copy.storage_offset() == view.storage_offset(), name
        assert torch.equal(copy, view)
        assert copy.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
    copies = backends.Copies("cpu")
    row, rest, empty = copies(whole[:1].expand(4, -1)), copies(whole[1:]), copies(torch.empty(0, 3))
    assert row.stride() == (0, 1) and empty.shape == (0, 3)
    assert row.untyped_storage().data_ptr() == rest.untyped_storage().data_ptr()
    assert not copies.differ()
    rest[4, 9] = 7.0
    assert copies.differ() and whole[5, 9] != 7.0
    copies.write_back()
    assert whole[5, 9] == 7.0 and not copies.differ()


@pytest.mark.parametrize("name", [name for name in backends.NAMES if backends.why_not(name)])
def test_a_backend_that_is_required_must_be_there(name):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", __file__]
    ran = subprocess.run(
        [*command, "--require-backend=cpu", f"--require-backend={name}"], capture_output=True, text=True
    )
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"--require-backend={name}: {backends.why_not(name)}" in ran.stderr
