"""The tabular model: its logits are the logarithm of its table, whatever the calls."""

from __future__ import annotations

import pytest
import torch

from fastdecode.models import Model, TabularLM, Want


def expected_rows(model: TabularLM, ids: list[int]) -> torch.Tensor:
    rows = []
    for i in range(len(ids)):
        history = ([model.pad_token_id] * model.order + ids[: i + 1])[-model.order :] if model.order else []
        rows.append(model.table[tuple(history)].log())
    return torch.stack(rows)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_rows_of_the_table(order):
    model = TabularLM.random(5, order, seed=3)
    assert isinstance(model, Model) and model.dtype == torch.float64 and model.config.vocab_size == 5
    ids = torch.randint(0, 5, (3, 9), generator=torch.Generator().manual_seed(0))
    whole = model.forward(ids, cache=model.new_cache(3, 9)).logits
    for b in range(3):
        assert torch.equal(whole[b], expected_rows(model, ids[b].tolist()))
    assert torch.allclose(whole.exp().sum(-1), torch.ones(3, 9, dtype=torch.float64))
    cache = model.new_cache(3, 0)
    for i in range(9):
        assert torch.equal(model.forward(ids[:, i : i + 1], cache=cache).logits[:, 0], whole[:, i])
        cache.keep(None, [1, 1, 1])


def test_ragged_paths_and_branches():
    model = TabularLM.random(7, 2, seed=1)
    ids = torch.randint(0, 7, (2, 6), generator=torch.Generator().manual_seed(2))
    cache = model.new_cache(2, 2)
    padded = ids.clone()
    padded[1, 2:] = -1
    last = model.forward(padded, cache=cache, num_tokens=[6, 2], want=Want.LAST_LOGITS).logits
    texts = [ids[0].tolist(), ids[1, :2].tolist()]
    assert last.shape == (2, 1, 7)
    for b in range(2):
        assert torch.equal(last[b, 0], expected_rows(model, texts[b])[-1])
    cache.keep(None, [6, 2])
    draft = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
    model.forward(draft, cache=cache)
    branch = cache.fork([1, 1])
    cache.keep(torch.tensor([[0, 2, 3], [0, 3, 0]]), torch.tensor([3, 2]))
    texts = [texts[0] + [1, 3, 4], texts[1] + [4, 1]]
    for text, out in zip(texts, model.forward(torch.tensor([[6], [5]]), cache=cache).logits, strict=True):
        assert torch.equal(out[0], expected_rows(model, [*text, 6 if text is texts[0] else 5])[-1])
    branch.keep(None, [0, 4])
    branch.truncate([1, 5])
    branch.select([1])
    out = model.forward(torch.tensor([[0]]), cache=branch).logits
    assert torch.equal(out[0, 0], expected_rows(model, [*ids[1, :2].tolist(), 4, 3, 2, 0])[-1])


def test_zero_probability_is_minus_infinity():
    model = TabularLM(torch.tensor([[0.0, 1.0], [0.25, 0.75]]))
    logits = model.forward(torch.tensor([[0, 1]]), cache=model.new_cache(1, 2)).logits
    assert logits.tolist() == torch.tensor([[[0.0, 1.0], [0.25, 0.75]]]).log().tolist()
    assert logits[0, 0, 0] == -torch.inf


def test_random_is_reproducible():
    assert torch.equal(TabularLM.random(4, 2, seed=5).table, TabularLM.random(4, 2, seed=5).table)
    assert not torch.equal(TabularLM.random(4, 2, seed=5).table, TabularLM.random(4, 2, seed=6).table)
    assert TabularLM.random(4, 1, 0, torch.float32).dtype == torch.float32


def test_refusals():
    with pytest.raises(ValueError, match=r"TabularLM: table: expected floating \[V\] \* \(order \+ 1\)"):
        TabularLM(torch.ones(2, 3))
    with pytest.raises(ValueError, match="TabularLM: table: expected rows >= 0 that sum to 1"):
        TabularLM(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"TabularLM: pad_token_id: expected 0\.\.1, got 2"):
        TabularLM(torch.tensor([0.5, 0.5]), pad_token_id=2)
    model = TabularLM.random(3)
    with pytest.raises(ValueError, match="want: expected LOGITS or LAST_LOGITS, got HIDDEN"):
        model.forward(torch.tensor([[0]]), cache=model.new_cache(1, 1), want=Want.HIDDEN)
    with pytest.raises(ValueError, match=r"TabularLM.forward: tokens: expected 0\.\.2, got 3"):
        model.forward(torch.tensor([[3]]), cache=model.new_cache(1, 1))
