"""The native runner against transformers, and against itself under every way of cutting the same work."""

from __future__ import annotations

import copy

import pytest
import torch

from fastdecode.models import ContiguousKVCache, NativeConfig, NativeModel, PagedKVCache, Want, load_model

pytest.importorskip("transformers")
from tiny_checkpoints import CHECKPOINTS

V, D, LAYERS = 97, 32, 3


def tokens(batch: int, n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, V, (batch, n), generator=torch.Generator().manual_seed(seed))


def prefill(model, ids, want=Want.LOGITS, **options):
    cache = model.new_cache(ids.shape[0], 64)
    return cache, model.forward(ids, cache=cache, want=want, **options)


def reference(hf, ids, dtype=torch.float64, rounded=None):
    """transformers in `dtype`; with weights rounded to `rounded` first, so that only arithmetic differs."""
    model = copy.deepcopy(hf)
    model = model.to(rounded) if rounded is not None else model
    with torch.no_grad():
        return model.to(dtype)(ids, output_hidden_states=True)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_agrees_with_transformers_in_float64(checkpoint, name):
    folder, hf = checkpoint(name)
    model = load_model(folder, dtype=torch.float64)
    ids = tokens(2, 40)
    _, out = prefill(model, ids, Want.LOGITS | Want.HIDDEN)
    expected = reference(hf, ids)
    # its norms, softmax and rotary embedding run in float32 even here
    scale = expected.logits.abs().max()
    assert (out.logits - expected.logits).abs().max() < 1e-5 * scale
    assert len(out.hidden) == LAYERS + 1 == len(expected.hidden_states)
    for ours, theirs in zip(list(out.hidden)[:-1], expected.hidden_states[:-1], strict=True):
        assert ours.shape == (2, 40, D)
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (out.hidden["final"] - expected.hidden_states[-1]).abs().max() < 1e-5 * expected.hidden_states[
        -1
    ].abs().max()
    assert not torch.equal(out.hidden[LAYERS], out.hidden["final"])


@pytest.mark.parametrize("prepack", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "llama-mha-biases", "yarn-attention-factor", "qwen2-window", "qwen3-biases"])
def test_error_at_low_precision(checkpoint, name, dtype, prepack):
    folder, hf = checkpoint(name)
    ids = tokens(1, 24)
    exact = reference(hf, ids, rounded=dtype).logits
    theirs = reference(hf, ids, dtype).logits.double()
    model = load_model(folder, dtype=dtype, prepack=prepack)
    rounding = torch.finfo(dtype).eps * exact.norm()
    limit = 2 * (theirs - exact).norm() + rounding
    cache, out = prefill(model, ids)
    assert out.logits.dtype == dtype
    assert (out.logits.double() - exact).norm() <= limit
    cache = model.new_cache(1, 24)  # one token at a time takes the other product
    rows = []
    for i in range(24):
        rows.append(model.forward(ids[:, i : i + 1], cache=cache).logits)
        cache.keep(None, [1])
    assert (torch.cat(rows, 1).double() - exact).norm() <= limit


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-window", "qwen3"])
def test_chunks_equal_one_shot(checkpoint, name):
    model = load_model(checkpoint(name)[0], dtype=torch.float64)
    ids = tokens(2, 40)
    _, whole = prefill(model, ids)
    for sizes in ([1] * 40, [7, 1, 13, 2, 17], [39, 1], [1, 39]):
        cache = model.new_cache(2, 4)  # grows
        parts = []
        for size in sizes:
            start = int(cache.lens[0])
            parts.append(model.forward(ids[:, start : start + size], cache=cache).logits)
            cache.keep(None, torch.tensor([size, size]))
        assert torch.allclose(torch.cat(parts, 1), whole.logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("window", [None, 7, 300])
def test_long_prefill_is_chunked_inside(window):
    config = tiny_config(max_position_embeddings=1024, sliding_window=window)
    model = NativeModel(config, random_weights(config), dtype=torch.float64)
    ids = tokens(1, 700)
    cache = model.new_cache(1, 700)
    whole = model.forward(ids, cache=cache).logits
    cache.keep(None, [650])
    assert torch.allclose(model.forward(ids[:, 650:], cache=cache).logits, whole[:, 650:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-window", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ragged_rows_equal_single_rows(checkpoint, name, dtype):
    model = load_model(checkpoint(name)[0], dtype=dtype, kv_cache="contiguous")
    ids = tokens(4, 60)
    prompt, counts = torch.tensor([9, 1, 14, 6]), torch.tensor([3, 5, 0, 1])
    padded = ids[:, :14].masked_fill(torch.arange(14) >= prompt[:, None], -1)
    cache, _ = prefill(model, padded, num_tokens=prompt)
    cache.keep(None, prompt)
    cache.k[:, 1, :, 1:] = torch.nan  # slots that must not be read
    cache.v[:, 1, :, 1:] = torch.nan
    steps = [counts, torch.tensor([5, 5, 5, 5]), torch.tensor([1, 1, 1, 1])]
    position = prompt.clone()
    got = [[] for _ in range(4)]
    for step in steps:
        n = int(step.max())
        chunk = torch.full((4, n), 10**9)
        for b in range(4):
            chunk[b, : step[b]] = ids[b, position[b] : position[b] + step[b]]
        out = model.forward(chunk, cache=cache, num_tokens=step, want=Want.LOGITS | Want.HIDDEN)
        last = model.forward(chunk, cache=cache, num_tokens=step, want=Want.LAST_LOGITS).logits
        assert last.shape == (4, 1, V) and out.logits.isfinite().all()
        for b in range(4):
            got[b].append(out.logits[b, : step[b]])
            if step[b]:
                assert torch.allclose(last[b, 0].double(), out.logits[b, step[b] - 1].double(), atol=0.1, rtol=0.1)
        cache.keep(None, step)
        position += step
    assert cache.lens.tolist() == position.tolist() and cache.lens.dtype == torch.int32
    for b in range(4):
        alone = torch.cat(got[b]).double()
        _, whole = prefill(model, ids[b : b + 1, : position[b]])
        expected = whole.logits[0, prompt[b] :].double()
        atol = 1e-11 if dtype == torch.float64 else 0.05 * expected.abs().max()
        assert torch.allclose(alone, expected, rtol=0, atol=float(atol))


def test_num_tokens_with_equal_lengths(checkpoint):
    model = load_model(checkpoint("qwen3")[0], dtype=torch.float64)
    ids = tokens(2, 12)
    padded = ids.clone()
    padded[1, 5:] = -1
    cache, out = prefill(model, padded, Want.LAST_LOGITS | Want.HIDDEN, num_tokens=[12, 5])
    for b, count in enumerate((12, 5)):
        _, alone = prefill(model, ids[b : b + 1, :count])
        assert torch.allclose(out.logits[b, 0], alone.logits[0, -1], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"KVCache.keep: num_keep: expected 0\.\.5, got 7"):
        cache.keep(None, [12, 7])


@pytest.mark.parametrize("lens", [(20, 20), (20, 11)])
def test_keep_of_a_path_equals_a_fresh_prefill(lens):
    """One block: keys depend on token and position only, so a path through a chain is what a tree step would leave."""
    config = tiny_config(num_hidden_layers=1)
    model = NativeModel(config, random_weights(config), dtype=torch.float64)
    ids, draft = tokens(2, 20), tokens(2, 6, seed=2)
    cache, _ = prefill(model, ids, num_tokens=lens)
    cache.keep(None, torch.tensor(lens))
    depths = torch.tensor([[0, 1, 1, 2, 2, 3], [0, 1, 2, 2, 3, 4]])
    model.forward(draft, cache=cache, positions=cache.lens.long()[:, None] + depths)
    cache.keep(torch.tensor([[0, 2, 4, 5], [0, 1, 3, 9]]), torch.tensor([4, 3]))
    last = tokens(2, 1, seed=3)
    got = model.forward(last, cache=cache).logits
    for b, path in enumerate(([0, 2, 4, 5], [0, 1, 3])):
        text = torch.cat((ids[b, : lens[b]], draft[b, path], last[b]))
        assert cache.lens[b] == len(text) - 1
        _, fresh = prefill(model, text.unsqueeze(0))
        assert torch.allclose(got[b, 0], fresh.logits[0, -1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("lens", [(10, 10, 10), (10, 4, 7)])
def test_truncate_fork_select(checkpoint, lens):
    model = load_model(checkpoint("llama")[0], dtype=torch.float64)
    ids = tokens(3, 10)
    cache, _ = prefill(model, ids, num_tokens=lens)
    cache.keep(None, torch.tensor(lens))
    step = tokens(3, 2, seed=5)
    expected = model.forward(step, cache=cache).logits
    forked = cache.fork(torch.tensor([2, 0, 2]))
    assert torch.allclose(model.forward(step[[2, 0, 2]], cache=forked).logits, expected[[2, 0, 2]], rtol=0, atol=1e-12)
    forked.keep(None, [2, 2, 2])
    forked.truncate([lens[2], 3, 0])
    fresh, _ = prefill(model, ids[:1, :3])
    fresh.keep(None, [3])
    got = model.forward(step[[2, 0, 2]], cache=forked).logits
    assert torch.allclose(got[0], expected[2], rtol=0, atol=1e-12)
    assert torch.allclose(got[1:2], model.forward(step[:1], cache=fresh).logits, rtol=0, atol=1e-12)
    assert torch.allclose(got[2:], prefill(model, step[2:])[1].logits, rtol=0, atol=1e-12)
    cache.select([2, 1])  # the fork changed nothing here
    assert torch.allclose(model.forward(step[[2, 1]], cache=cache).logits, expected[[2, 1]], rtol=0, atol=1e-12)


def test_positions(checkpoint):
    model = load_model(checkpoint("llama3")[0], dtype=torch.float64)
    ids = tokens(2, 8)
    _, default = prefill(model, ids)
    for positions in (torch.arange(8), torch.arange(8).expand(2, 8)):
        assert torch.equal(prefill(model, ids, positions=positions)[1].logits, default.logits)
    shifted = prefill(model, ids, positions=torch.arange(8) + 5)[1].logits  # relative, so only rounding differs
    assert torch.allclose(shifted, default.logits, rtol=0, atol=1e-10)
    assert not torch.allclose(prefill(model, ids, positions=torch.arange(8) * 2)[1].logits, default.logits, atol=1e-3)


def test_sharded_and_old_config_keys(checkpoint, tmp_path):
    import json

    for name in ("llama3", "yarn", "linear"):
        folder, hf = checkpoint(name)
        _, expected = prefill(load_model(folder), tokens(1, 20))
        sharded = tmp_path / name
        hf.save_pretrained(sharded, max_shard_size="10KB")
        assert (sharded / "model.safetensors.index.json").is_file()
        for type_key in ("type", "rope_type"):
            config = json.loads((folder / "config.json").read_text())
            rope = config.pop("rope_parameters")
            config["rope_theta"] = rope.pop("rope_theta")
            rope[type_key] = rope.pop("rope_type")
            config["rope_scaling"] = rope
            (sharded / "config.json").write_text(json.dumps(config))
            assert torch.equal(prefill(load_model(sharded), tokens(1, 20))[1].logits, expected.logits)


def test_config_and_eos(checkpoint, tmp_path):
    import json
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(checkpoint("qwen3")[0], folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 5, "bos_token_id": 3}))
    model = load_model(folder)
    assert (model.config.eos_token_ids, model.config.bos_token_id) == ((5,), 3)
    assert (model.config.vocab_size, model.config.hidden_size, model.config.num_layers) == (V, D, LAYERS)
    assert (model.config.max_context, model.config.causal, model.config.mask_token_id) == (128, True, None)
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert load_model(folder).config.eos_token_ids == (7, 8)


def test_wanted_outputs_only(checkpoint):
    model = load_model(checkpoint("llama")[0])
    _, out = prefill(model, tokens(2, 3))
    assert out.hidden is None and out.logits.shape == (2, 3, V)
    _, out = prefill(model, tokens(2, 3), Want.HIDDEN)
    assert out.logits is None and out.hidden["final"].shape == (2, 3, D) and len(out.hidden[1:]) == LAYERS
    with pytest.raises(ValueError, match=r"Output.hidden: expected an index below 4"):
        out.hidden["last"]
    with pytest.raises(ValueError, match=r"NativeModel.forward: want: expected LOGITS or LAST_LOGITS, got both"):
        prefill(model, tokens(1, 1), Want.LOGITS | Want.LAST_LOGITS)


def test_empty_batch_and_two_runs_are_equal(checkpoint):
    model = load_model(checkpoint("llama")[0])
    assert prefill(model, tokens(0, 3))[1].logits.shape == (0, 3, V)
    assert torch.equal(prefill(model, tokens(3, 9))[1].logits, prefill(model, tokens(3, 9))[1].logits)


@pytest.mark.parametrize("inside", [True, False])
def test_inference_mode_leaks_nothing(checkpoint, inside):
    """A cache made, grown or forked in inference mode works outside it, and logits can be changed in place."""
    model = load_model(checkpoint("llama")[0])
    with torch.inference_mode(inside):
        cache = model.new_cache(2, 2)
        out = model.forward(tokens(2, 5), cache=cache)
        forked = cache.fork([1, 0])
        forked.select([1])
    for each, batch in ((cache, 2), (forked, 1)):
        each.keep(torch.tensor([[0, 2]] * batch), [2] * batch)
        each.reserve(50)
        logits = model.forward(tokens(batch, 3), cache=each).logits
        logits[:, :, 0] = -torch.inf
    assert not out.logits.requires_grad


def test_bad_arguments_of_forward(checkpoint):
    model = load_model(checkpoint("llama")[0])
    cache = model.new_cache(2, 8)
    bad = [
        (tokens(3, 2), {}, r"tokens: expected \[2, n\] with n >= 1, got \[3, 2\]"),
        (tokens(2, 0), {}, r"tokens: expected \[2, n\] with n >= 1, got \[2, 0\]"),
        (tokens(2, 2).int(), {}, "tokens: expected torch.int64, got torch.int32"),
        (tokens(2, 2) * 0 + V, {}, r"tokens: expected 0\.\.96, got 97"),
        (tokens(2, 2) * 0 - 1, {}, r"tokens: expected 0\.\.96, got -1"),
        (tokens(2, 2), {"num_tokens": [1, 3]}, r"num_tokens: expected 0\.\.2, got 3"),
        (tokens(2, 2), {"num_tokens": torch.tensor([1])}, r"num_tokens: expected \[2\], got \[1\]"),
        (tokens(2, 2), {"num_tokens": torch.ones(2)}, "num_tokens: expected an integer dtype, got torch.float32"),
        (tokens(2, 2), {"positions": torch.zeros(3, dtype=torch.int64)}, r"positions: expected int64 \[2, 2\]"),
        (tokens(2, 2), {"positions": torch.tensor([0, 128])}, r"positions: expected 0\.\.127, got 128"),
        (tokens(2, 129), {}, r"tokens: expected at most 128 after 0 cached ones \(max_context 128\), got 129"),
    ]
    for ids, options, message in bad:
        with pytest.raises(ValueError, match=message):
            model.forward(ids, cache=cache, **options)
    with pytest.raises(ValueError, match=r"new_cache: capacity: expected 0\.\.128 \(max_context\), got 129"):
        model.new_cache(1, 129)


def tiny_config(**options) -> NativeConfig:
    base = {
        "architectures": ["MistralForCausalLM"],
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "sliding_window": None,
    }
    return NativeConfig.from_hf({**base, **options})


def random_weights(config: NativeConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 if len(shape) == 2 else torch.ones(shape)
        for name, shape in config.tensor_shapes().items()
    }


def test_the_default_cache(checkpoint):
    """Pages where paged attention takes the heads; either kind by name."""
    wide, narrow = (checkpoint(name)[0] for name in ("llama-mqa-wide-heads", "llama"))
    kinds = [type(load_model(folder).new_cache(1, 1)) for folder in (wide, narrow)]
    assert kinds == [PagedKVCache, ContiguousKVCache]
    assert type(load_model(wide, kv_cache="contiguous").new_cache(1, 1)) is ContiguousKVCache
    with pytest.raises(ValueError, match=r"kv_cache: expected 'contiguous', paged ones need .*, got head_dim 8"):
        load_model(narrow, kv_cache="plain")
