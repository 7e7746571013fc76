"""Models of transformers behind the Model protocol, against transformers itself reading the whole text at once."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastdecode.models import ContiguousKVCache, HuggingFaceModel, KVCache, Model, Want
from fastdecode.models.huggingface import _Masks, _Step

pytest.importorskip("transformers")
import transformers

from transformers_models import ARCHITECTURES, CONTEXT, LAYERS, VOCAB, WINDOW, build, ids, load, whole_text

VARIANTS = [(name, None) for name in ARCHITECTURES] + [("llama", "eager"), ("gpt2", "eager"), ("qwen2", "eager")]


def tolerance(model) -> float:
    """Eager attention computes its softmax in float32, whatever the weights are."""
    return 1e-11 if model.config._attn_implementation == "sdpa" else 1e-4


def prefill(model, text, want=Want.LOGITS, capacity: int = 4, **options):
    cache = model.new_cache(text.shape[0], capacity)
    return cache, model.forward(text, cache=cache, want=want, **options)


def read_in_steps(model, text, prompt, steps, atol=None):
    """Logits per row of `text` after the prompt: the prompt in one ragged pass, then the steps' counts per row."""
    position = list(prompt)
    atol = tolerance(model.model) if atol is None else atol
    padded = text[:, : max(prompt)].masked_fill(torch.arange(max(prompt)) >= torch.tensor(prompt)[:, None], -1)
    cache, _ = prefill(model, padded, Want(0), num_tokens=prompt)
    cache.keep(None, prompt)
    got: list[list[torch.Tensor]] = [[] for _ in text]
    for counts in steps:
        chunk = torch.full((len(text), max(counts)), 10**9)
        for row, count in enumerate(counts):
            chunk[row, :count] = text[row, position[row] : position[row] + count]
        out = model.forward(chunk, cache=cache, num_tokens=counts)
        last = model.forward(chunk, cache=cache, num_tokens=counts, want=Want.LAST_LOGITS).logits
        assert out.hidden is None and out.logits.isfinite().all() and last.shape == (len(text), 1, VOCAB)
        for row, count in enumerate(counts):
            got[row].append(out.logits[row, :count])
            if count:
                assert torch.allclose(last[row, 0], out.logits[row, count - 1], rtol=0, atol=atol)
            position[row] += count
        cache.keep(None, counts)
        assert cache.lens.tolist() == position and cache.lens.dtype == torch.int32
        for layer in cache.layers:  # what is behind a row's tokens must not be read; where rows differ, it is
            for store in cache.layer(layer):
                for row, length in enumerate(position):
                    store[row, :, length:] = torch.nan
    return [torch.cat(pieces) for pieces in got], position


PROMPT, STEPS = (9, 1, 14, 6), [(3, 5, 0, 1), (5, 5, 5, 5), (0, 1, 1, 8), (1, 1, 1, 1)]


def worst(name, attention=None, prompt=PROMPT, steps=STEPS) -> float:
    hf = load(name, attention)
    text = ids(len(prompt), 40)
    got, position = read_in_steps(HuggingFaceModel(hf), text, prompt, steps)
    expected = whole_text(hf, text).logits
    errors = [(rows - expected[row, n : position[row]]) for row, (rows, n) in enumerate(zip(got, prompt))]
    return max(error.abs().max().item() for error in errors)


@pytest.mark.parametrize(("name", "attention"), VARIANTS)
def test_whole_texts_and_hidden_states(name, attention):
    hf = load(name, attention)
    model = HuggingFaceModel(hf)
    assert isinstance(model, Model) and model.dtype == torch.float64 and model.device == torch.device("cpu")
    text = ids(3, 30)
    cache, out = prefill(model, text, Want.LOGITS | Want.HIDDEN)
    assert isinstance(cache, KVCache)
    caught = []
    blocks = hf.transformer.h if name == "gpt2" else hf.model.layers
    handles = [block.register_forward_hook(lambda module, inputs, state: caught.append(state)) for block in blocks]
    expected = whole_text(hf, text, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    scale = tolerance(hf) * expected.logits.abs().max()
    assert (out.logits - expected.logits).abs().max() < scale
    assert len(out.hidden) == LAYERS + 1 == len(expected.hidden_states)
    residual = [state[0] if isinstance(state, tuple) else state for state in caught]
    for ours, theirs in zip(out.hidden, [expected.hidden_states[0], *residual], strict=True):
        assert ours.shape == (3, 30, 32) and (ours - theirs).abs().max() < scale
    assert (out.hidden["final"] - expected.hidden_states[-1]).abs().max() < scale
    assert not torch.allclose(out.hidden[LAYERS], out.hidden["final"], atol=0.1)
    head = hf.get_output_embeddings()(out.hidden["final"])
    if name == "gemma2":
        head = 30 * (head / 30).tanh()
    assert torch.allclose(head, out.logits, rtol=0, atol=1e-10)
    hooks = len(blocks[-1]._forward_hooks)
    prefill(model, text, Want.HIDDEN)
    assert len(blocks[-1]._forward_hooks) == hooks


@pytest.mark.parametrize(("name", "attention"), VARIANTS)
def test_rows_of_different_lengths_in_steps(name, attention):
    assert worst(name, attention) < 100 * tolerance(load(name, attention))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_of_equal_lengths_in_steps(name):
    prompt, steps = (7, 7, 7), [(3, 3, 3), (1, 1, 1), (9, 9, 9)]
    assert worst(name, prompt=prompt, steps=steps) < 100 * tolerance(load(name))


# --- the tests above can fail -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_position_off_by_one_is_noticed(name, monkeypatch):
    real = HuggingFaceModel._positions
    shift = torch.tensor([[0], [0], [1], [0]])
    monkeypatch.setattr(HuggingFaceModel, "_positions", lambda *given: real(*given) + shift)
    if name == "gpt2":
        assert worst(name) > 0.1
    else:  # rotary angles are relative: a row that is moved as a whole gives the same logits
        assert worst(name) < 1e-3
    step = torch.tensor([[0], [1], [0], [0]])
    monkeypatch.setattr(
        HuggingFaceModel,
        "_positions",
        lambda self, lens, n, *given: real(self, lens, n, *given) + (step if max(lens) else 0),
    )
    assert worst(name) > 0.1


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("wrong", ["one too many", "one too few", "another row's", "the unused"])
def test_a_mask_off_by_one_is_noticed(name, wrong, monkeypatch):
    real = _Masks.build

    def build(self, lens, n, dtype, device):
        if wrong == "another row's":
            lens = lens[1:] + lens[:1]
        elif wrong == "the unused":
            lens = [max(lens)] * len(lens)
        masks = real(self, lens, n, dtype, device)
        shift = {"one too many": 1, "one too few": -1}.get(wrong, 0)

        def moved(mask):
            return mask.roll(shift, -1) if mask is not None and mask.shape[-1] > n else mask

        return {kind: moved(mask) for kind, mask in masks.items()} if isinstance(masks, dict) else moved(masks)

    monkeypatch.setattr(_Masks, "build", build)
    error = worst(name)
    assert error > 0.1 or error != error  # what is behind a row's tokens is NaN there


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gemma2"])
@pytest.mark.parametrize("window", [None, WINDOW - 1, WINDOW + 1])
def test_a_wrong_window_is_noticed(name, window, monkeypatch):
    real = _Masks.__init__

    def init(self, *given):
        real(self, *given)
        self._sizes["sliding_attention"] = CONTEXT if window is None else window

    monkeypatch.setattr(_Masks, "__init__", init)
    assert worst(name) > 0.1


def test_stale_slots_are_cleared(monkeypatch):
    real = _Step.__init__

    def init(self, cache, n):
        real(self, cache, n)
        self._unused = torch.zeros(1, dtype=torch.bool)

    monkeypatch.setattr(_Step, "__init__", init)
    with pytest.raises(AssertionError):
        worst("llama")


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gemma2", "phi3"])
def test_windows_shorter_and_longer_than_the_text(name):
    text = ids(2, 24)
    full = None
    for window in (CONTEXT, 24, 23, WINDOW, 1):
        hf = build(name, sliding_window=window)
        model = HuggingFaceModel(hf)
        got, position = read_in_steps(model, text, (5, 11), [(4, 2), (3, 3), (8, 8)])
        expected = whole_text(hf, text).logits
        full = expected if full is None else full
        for row, (rows, n) in enumerate(zip(got, (5, 11))):
            assert (rows - expected[row, n : position[row]]).abs().max() < 100 * tolerance(hf)
        same = torch.allclose(expected, full, rtol=0, atol=1e-6)
        assert same == (window >= 24)


def test_chunked_attention():
    options = {"attention_chunk_size": 5, "intermediate_size_mlp": 32, "num_local_experts": 2, "head_dim": 8}
    sizes = {**ARCHITECTURES["llama"][1], **options, "layer_types": ["chunked_attention", "full_attention"]}
    torch.manual_seed(0)
    hf = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes)).double().eval()
    text = ids(2, 24)
    got, position = read_in_steps(HuggingFaceModel(hf), text, (5, 11), [(4, 2), (3, 3), (8, 8)])
    expected = whole_text(hf, text).logits
    for row, (rows, n) in enumerate(zip(got, (5, 11))):
        assert (rows - expected[row, n : position[row]]).abs().max() < 1e-5 * expected.abs().max()


MLA = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}
MLA = {**MLA, "v_head_dim": 6}  # keys and values of different sizes
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
OTHERS = {
    "Cohere2": WINDOWED,
    "DeepseekV3": {**MLA, **EXPERTS, **GROUPS},
    "Ernie4_5": {},
    "Exaone4": WINDOWED,
    "Gemma3Text": WINDOWED,
    "Glm4": {"head_dim": 8},
    "GPTBigCode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "rotary_dim": 4},
    "GPTNeoX": {},
    "GptOss": {**EXPERTS, **WINDOWED},
    "Granite": {},
    "MiniCPM3": MLA,
    "Mixtral": {**EXPERTS, "sliding_window": WINDOW},
    "Nemotron": {},
    "Olmo2": {},
    "Olmo3": WINDOWED,
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Phi": {"num_key_value_heads": 4},
    "Qwen3Moe": {**EXPERTS, "head_dim": 8},
    "SmolLM3": {},
    "StableLm": {},
    "Starcoder2": {"sliding_window": WINDOW},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_other_architectures(family):
    """In float32, which all experts can run. Sizes that a config does not have are its defaults' business."""
    kind = getattr(transformers, f"{family}Config", None)
    old = transformers.__version__.startswith("4.")
    if kind is None or (old and family in ("GPTJ", "GPTNeoX", "StableLm")):  # these say what kind of cache they want
        pytest.skip(f"transformers {transformers.__version__} cannot")
    sizes = ARCHITECTURES["llama"][1]
    if "n_embd" in OTHERS[family]:
        sizes = {name: value for name, value in sizes.items() if name.endswith("_id") or name == "vocab_size"}
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(kind(**{**sizes, **OTHERS[family]})).float().eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    model = HuggingFaceModel(hf)
    text = ids(3, 24)
    got, position = read_in_steps(model, text, (5, 11, 1), [(4, 2, 0), (3, 3, 7), (8, 8, 8)], atol=1e-4)
    expected = whole_text(hf, text, output_hidden_states=True)
    scale = expected.logits.std()
    for row, (rows, n) in enumerate(zip(got, (5, 11, 1))):
        assert (rows - expected.logits[row, n : position[row]]).abs().max() < 1e-4 * scale
    _, out = prefill(model, text, Want.HIDDEN)
    for ours, theirs in zip([*out.hidden[:-1], out.hidden["final"]], expected.hidden_states, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-4 * float(theirs.std()))


# --- the contract of the cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("lens", [(10, 10, 10), (10, 4, 7)])
def test_truncate_fork_select(name, lens):
    model = HuggingFaceModel(load(name))
    text, step = ids(3, 10), ids(3, 2, seed=5)
    atol = 100 * tolerance(model.model)
    cache, _ = prefill(model, text, num_tokens=lens)
    cache.keep(None, lens)
    expected = model.forward(step, cache=cache).logits

    def close(a, b):
        return torch.allclose(a, b, rtol=0, atol=atol)

    forked = cache.fork([2, 0, 2])
    assert close(model.forward(step[[2, 0, 2]], cache=forked).logits, expected[[2, 0, 2]])
    forked.keep(None, [2, 2, 2])
    forked.truncate([lens[2], 3, 0])
    fresh, _ = prefill(model, text[:1, :3])
    fresh.keep(None, [3])
    got = model.forward(step[[2, 0, 2]], cache=forked).logits
    assert close(got[0], expected[2])
    assert close(got[1:2], model.forward(step[:1], cache=fresh).logits)
    assert close(got[2:], prefill(model, step[2:])[1].logits)
    cache.select([2, 1])  # the fork changed nothing here
    assert close(model.forward(step[[2, 1]], cache=cache).logits, expected[[2, 1]])
    cache.reserve(CONTEXT - max(cache.host_lens))
    assert cache.capacity == CONTEXT and close(model.forward(step[[2, 1]], cache=cache).logits, expected[[2, 1]])


def test_a_cache_is_forked_and_selected_before_it_is_written():
    model = HuggingFaceModel(load("llama"))
    cache = model.new_cache(3, 5)
    forked = cache.fork([0, 1])
    cache.select([2])
    text = ids(2, 4)
    expected = prefill(model, text)[1].logits
    assert torch.equal(model.forward(text[:1], cache=cache).logits, expected[:1])
    assert torch.equal(model.forward(text, cache=forked).logits, expected)
    assert (cache.batch, forked.batch) == (1, 2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("lens", [(20, 20), (20, 11)])
def test_keep_of_a_path_equals_a_fresh_prefill(name, lens):
    """One block: keys depend on token and position only, so a path through a chain is what a tree step would leave."""
    layers = "n_layer" if name == "gpt2" else "num_hidden_layers"
    model = HuggingFaceModel(build(name, **{layers: 1}))
    text, draft = ids(2, 20), ids(2, 6, seed=2)
    cache, _ = prefill(model, text, num_tokens=lens)
    cache.keep(None, lens)
    depths = torch.tensor([[0, 1, 1, 2, 2, 3], [0, 1, 2, 2, 3, 4]])
    model.forward(draft, cache=cache, positions=cache.lens.long()[:, None] + depths)
    cache.keep(torch.tensor([[0, 2, 4, 5], [0, 1, 3, 9]]), torch.tensor([4, 3]))
    last = ids(2, 1, seed=3)
    got = model.forward(last, cache=cache).logits
    for row, path in enumerate(([0, 2, 4, 5], [0, 1, 3])):
        whole = torch.cat((text[row, : lens[row]], draft[row, path], last[row]))
        assert cache.lens[row] == len(whole) - 1
        _, fresh = prefill(model, whole.unsqueeze(0))
        assert torch.allclose(got[row, 0], fresh.logits[0, -1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_end_of_the_context(name):
    """Padded slots may reach past it: a row at the end beside one that has room."""
    hf = load(name)
    model = HuggingFaceModel(hf)
    text = ids(2, CONTEXT)
    got, position = read_in_steps(model, text, (CONTEXT - 2, 3), [(1, 6), (1, 20)])
    assert position[0] == CONTEXT
    expected = whole_text(hf, text).logits
    for row, n in enumerate((CONTEXT - 2, 3)):
        assert (got[row] - expected[row, n : position[row]]).abs().max() < 100 * tolerance(hf)
    with pytest.raises(ValueError, match=r"tokens: expected at most 64 after 0 cached ones \(max_context 64\), got 65"):
        prefill(model, ids(1, CONTEXT + 1))


def test_positions():
    hf = load("gpt2")
    model = HuggingFaceModel(hf)
    text = ids(2, 8)
    _, default = prefill(model, text)
    for positions in (torch.arange(8), torch.arange(8, dtype=torch.int32).expand(2, 8)):
        assert torch.equal(prefill(model, text, positions=positions)[1].logits, default.logits)
    moved = torch.tensor([[3], [50]]) + torch.arange(8)
    expected = whole_text(hf, text, position_ids=moved, attention_mask=torch.ones_like(text)).logits
    assert torch.allclose(prefill(model, text, positions=moved)[1].logits, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(expected, default.logits, atol=0.1)
    padded = moved.masked_fill(torch.arange(8) >= torch.tensor([[8], [5]]), -7)
    got = prefill(model, text, positions=padded, num_tokens=[8, 5])[1].logits
    assert torch.allclose(got[1, :5], expected[1, :5], rtol=0, atol=1e-10)


def test_wanted_outputs_only():
    model = HuggingFaceModel(load("llama"))
    calls = []
    head = model.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape[1]))
    text = ids(3, 9)
    _, out = prefill(model, text, Want(0))
    assert out.logits is None and out.hidden is None
    _, out = prefill(model, text, Want.LAST_LOGITS)
    assert out.logits.shape == (3, 1, VOCAB)
    _, ragged = prefill(model, text, Want.LAST_LOGITS | Want.HIDDEN, num_tokens=[2, 9, 2])
    _, all_rows = prefill(model, text, Want.LOGITS)
    handle.remove()
    assert calls == [1, 1, 2, 9]  # the head reads no more slots than it must
    assert torch.allclose(ragged.logits[:, 0], all_rows.logits[[0, 1, 2], [1, 8, 1]], rtol=0, atol=1e-12)
    assert ragged.hidden["final"].shape == (3, 9, 32)


def test_empty_batch_and_two_runs_are_equal():
    model = HuggingFaceModel(load("gemma2"))
    _, out = prefill(model, ids(0, 3), Want.LAST_LOGITS | Want.HIDDEN)
    assert out.logits.shape == (0, 1, VOCAB) and len(out.hidden) == LAYERS + 1
    assert torch.equal(prefill(model, ids(3, 9))[1].logits, prefill(model, ids(3, 9))[1].logits)


@pytest.mark.parametrize("inside", [True, False])
def test_inference_mode_leaks_nothing(inside):
    """A cache made in inference mode works outside it, logits can be changed, and the model can still be trained."""
    hf = build("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    model = HuggingFaceModel(hf, max_context=90)
    with torch.inference_mode(inside):
        cache, out = prefill(model, ids(2, 80), capacity=2)  # past 64: dynamic rotary angles are kept in the model
        forked = cache.fork([1, 0])
    forked.keep(torch.tensor([[0, 2], [0, 2]]), [2, 2])
    model.forward(ids(2, 3), cache=forked).logits[:, :, 0] = -torch.inf
    assert not out.logits.requires_grad
    hf(ids(2, 10), labels=ids(2, 10)).loss.backward()


def test_config():
    hf = build("qwen3")
    hf.generation_config.eos_token_id = [7, 8]
    hf.generation_config.bos_token_id = 3
    config = HuggingFaceModel(hf).config
    assert (config.eos_token_ids, config.bos_token_id) == ((7, 8), 3)
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (VOCAB, 32, LAYERS)
    assert (config.max_context, config.causal, config.mask_token_id) == (CONTEXT, True, None)
    hf.generation_config.eos_token_id = None
    hf.config.eos_token_id = 5
    assert HuggingFaceModel(hf, max_context=20).config.eos_token_ids == (5,)
    assert HuggingFaceModel(hf, max_context=20).config.max_context == 20
    assert HuggingFaceModel(load("gpt2")).config.max_context == CONTEXT
    hf.generation_config.eos_token_id = -1
    with pytest.raises(ValueError, match="Qwen3ForCausalLM: eos_token_id: expected ids, integers >= 0, got -1"):
        HuggingFaceModel(hf)


# --- what cannot work -------------------------------------------------------------------------------------------------


def refused(name: str):
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if name == "t5":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        )
    if name == "mamba":
        return transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
        )
    if name == "bloom":
        return transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)
        )
    if name == "no head":
        return build("llama").model
    if name == "module":
        return torch.nn.Linear(2, 2)
    if name == "flash":
        model = build("llama")
        model.config._attn_implementation = "flash_attention_2"
        return model
    if name == "split":
        model = build("llama")
        model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}  # what accelerate leaves there
        return model
    return transformers.BertLMHeadModel(transformers.BertConfig(**small, intermediate_size=16))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t5", "expected a decoder, got the encoder-decoder T5ForConditionalGeneration"),
        ("mamba", "expected attention only, got MambaForCausalLM with a recurrent state"),
        ("bert", "expected causal attention, got BertLMHeadModel without"),
        ("bloom", "expected a forward with position_ids, got BloomForCausalLM"),
        ("no head", "expected a causal language model, got LlamaModel"),
        ("module", "expected a model of transformers, got Linear"),
        ("split", "expected LlamaForCausalLM on one device, got 0, cpu"),
        ("flash", "LlamaForCausalLM: expected attn_implementation 'eager' or 'sdpa', got 'flash_attention_2'"),
    ],
)
def test_refused_by_name(name, message):
    with pytest.raises(ValueError, match="HuggingFaceModel: .*" + message):
        HuggingFaceModel(refused(name).eval())


def test_training_mode_is_refused():
    hf = build("gpt2")  # it has dropout
    model = HuggingFaceModel(hf)
    hf.train()
    with pytest.raises(ValueError, match=r"forward: model: expected GPT2LMHeadModel in eval mode \(call .eval\(\)\)"):
        prefill(model, ids(1, 2))


def test_a_model_that_ignores_its_cache_is_noticed():
    hf = build("llama")
    model = HuggingFaceModel(hf)
    real = hf.model.forward
    hf.model.forward = lambda *given, **options: real(*given, **{**options, "past_key_values": None})
    with pytest.raises(ValueError, match="LlamaForCausalLM: expected all layers to use the cache, got 0 of 0"):
        prefill(model, ids(1, 2))
    hf.model.forward = real
    cache, _ = prefill(model, ids(1, 2))
    attention = hf.model.layers[1].self_attn
    layer = attention.forward
    attention.forward = lambda *given, **options: layer(*given, **{**options, "past_key_values": None})
    with pytest.raises(ValueError, match="LlamaForCausalLM: expected all layers to use the cache, got 1 of 2"):
        model.forward(ids(1, 2), cache=cache)


def test_bad_arguments_of_forward():
    model = HuggingFaceModel(load("llama"))
    cache = model.new_cache(2, 8)
    bad = [
        (ids(3, 2), {}, r"tokens: expected \[2, n\] with n >= 1, got \[3, 2\]"),
        (ids(2, 2).int(), {}, "tokens: expected torch.int64, got torch.int32"),
        (ids(2, 2) * 0 + VOCAB, {}, r"tokens: expected 0\.\.96, got 97"),
        (ids(2, 2), {"num_tokens": [1, 3]}, r"num_tokens: expected 0\.\.2, got 3"),
        (ids(2, 2), {"positions": torch.zeros(3, dtype=torch.int64)}, r"positions: expected int64 \[2, 2\]"),
        (ids(2, 2), {"positions": torch.zeros(2)}, r"positions: expected int64 \[2, 2\], got torch.float32"),
        (ids(2, 2), {"positions": torch.tensor([0, 64])}, r"positions: expected 0\.\.63, got 64"),
        (ids(2, 2), {"positions": torch.tensor([-1, 0])}, r"positions: expected 0\.\.63, got -1"),
        (ids(2, 2), {"want": Want.LOGITS | Want.LAST_LOGITS}, "want: expected LOGITS or LAST_LOGITS, got both"),
        (ids(2, 2), {"cache": _other_cache()}, "cache: expected a HuggingFaceCache, from new_cache"),
    ]
    for text, options, message in bad:
        with pytest.raises(ValueError, match="HuggingFaceModel.forward: " + message):
            model.forward(text, **{"cache": cache, **options})
    with pytest.raises(ValueError, match=r"new_cache: capacity: expected 0\.\.64 \(max_context\), got 65"):
        model.new_cache(1, 65)


def _other_cache() -> ContiguousKVCache:
    return ContiguousKVCache(num_layers=1, batch=2, num_kv_heads=1, capacity=8, head_dim=4, max_context=8)


def test_importing_fastdecode_imports_no_transformers():
    code = "import sys, fastdecode; assert not {'transformers', 'tokenizers', 'safetensors'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
