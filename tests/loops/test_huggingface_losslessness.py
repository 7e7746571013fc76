"""On models of transformers, every lossless method gives plain decoding's tokens, and plain decoding transformers'."""

from __future__ import annotations

import functools

import pytest
import torch

from fastdecode.compare import compare
from fastdecode.generation import CHECKPOINTS, generate, stream
from fastdecode.methods import METHODS
from fastdecode.models import HuggingFaceModel
from fastdecode.models.huggingface import _Masks

pytest.importorskip("transformers")
import transformers

from transformers_models import ARCHITECTURES, CONTEXT, disturbed, ids, load

PROMPTS = [ids(1, n, seed=n)[0].tolist() for n in (5, 11, 1, 8)]
PROMPTS[3] = PROMPTS[3][:4] * 2
NEW = [14, 18, 7, 21]
METHODS = {name: method for name, method in METHODS.items() if method.cache is None}  # the others bring their own
LOSSLESS = [name for name, method in METHODS.items() if method.guarantee() == "exact"]


def padded(side: str, prompts=PROMPTS) -> dict[str, torch.Tensor]:
    """int64 prompts [4, 11] and their mask; the padding is a real id, which would change the text if it were read."""
    width = max(map(len, prompts))
    text, mask = torch.full((len(prompts), width), 42), torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
        text[row, place], mask[row, place] = torch.tensor(prompt), 1
    return {"prompt": text, "attention_mask": mask}


def draft_model(method: str, name: str) -> dict[str, object]:
    return {"draft_model": disturbed(name)} if METHODS[method].needs_draft_model else {}


@functools.cache
def plain(name: str, **options) -> list[list[int]]:
    """Every request on its own, so that batching is compared too."""
    model = HuggingFaceModel(load(name))
    return [
        generate(model, prompt, max_new_tokens=new, seeds=[seed], **options).tokens
        for seed, (prompt, new) in enumerate(zip(PROMPTS, NEW))
    ]


@pytest.mark.parametrize("method", LOSSLESS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_tokens_as_plain(name, method):
    expected = plain(name)
    for form in ({"prompt": PROMPTS}, padded("left"), padded("right")):
        results = generate(load(name), method=method, max_new_tokens=NEW, **form, **draft_model(method, name))
        assert [result.prompt_tokens for result in results] == PROMPTS
        assert [result.tokens for result in results] == expected
    if method.startswith("speculative"):  # neither side of the verification is left out
        statistics = results.statistics
        assert 0 < statistics.accepted < statistics.drafted


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plain_equals_generate_of_transformers(name):
    hf, left = load(name), padded("left")
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=24, pad_token_id=0)
    results = generate(hf, **left, max_new_tokens=24)
    assert max(len(set(result.tokens)) for result in results) > 3  # not one token over and over
    batches = [torch.tensor([prompt]) for prompt in PROMPTS]
    if hf.config._attn_implementation == "sdpa":  # in float64, eager attention turns padding into NaN
        batches.append(left["prompt"])
    for batch in batches:
        mask = left["attention_mask"] if len(batch) > 1 else torch.ones_like(batch)
        tokens = hf.generate(batch, attention_mask=mask, generation_config=config)[:, batch.shape[1] :].tolist()
        rows = [PROMPTS.index(batch[0].tolist())] if len(batch) == 1 else range(4)
        assert tokens == [results[row].tokens for row in rows]


@pytest.mark.parametrize("method", LOSSLESS)
def test_ends_and_leavers(method):
    """Requests that end at different times leave the batch, and its caches."""
    name = "gemma2"
    ends = [tokens[6] for tokens in plain(name)[:2]]
    expected = plain(name, stop_ids=tuple(ends))
    assert len({len(tokens) for tokens in expected}) > 2
    options = {"method": method, "max_new_tokens": NEW, "stop_ids": ends, **draft_model(method, name)}
    results = generate(load(name), **padded("left"), **options)
    assert [result.tokens for result in results] == expected
    pieces: dict[int, list[int]] = {row: [] for row in range(4)}
    for chunk in stream(load(name), **padded("right"), **options):
        pieces[chunk.index] += chunk.tokens
    assert list(pieces.values()) == expected


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_up_to_the_end_of_the_context(name):
    prompts = [ids(1, n, seed=n)[0].tolist() for n in (CONTEXT, CONTEXT - 1, CONTEXT - 7, 40)]
    for method in LOSSLESS:
        results = generate(load(name), prompts, method=method, max_new_tokens=99, **draft_model(method, name))
        assert [len(result.tokens) for result in results] == [0, 1, 7, 24]
        expected = [generate(load(name), prompt, max_new_tokens=99).tokens for prompt in prompts]
        assert [result.tokens for result in results] == expected


@pytest.mark.parametrize("wrong", ["mask", "position"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_wrong_adapter_is_noticed(name, wrong, monkeypatch):
    """The negative control of this file: one slot seen too many, or a position too far, where rows differ."""
    expected = plain(name)
    if wrong == "mask":
        real = _Masks.build
        monkeypatch.setattr(_Masks, "build", lambda self, lens, *rest: real(self, [max(lens)] * len(lens), *rest))
    else:
        place = HuggingFaceModel._positions
        monkeypatch.setattr(
            HuggingFaceModel,
            "_positions",
            lambda self, lens, *rest: place(self, [max(lens)] * len(lens), *rest),
        )
    for method in LOSSLESS:
        results = generate(load(name), PROMPTS, method=method, max_new_tokens=NEW, **draft_model(method, name))
        assert [result.tokens for result in results] != expected


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in LOSSLESS if METHODS[name].rules])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("length", [1, 3, 8])
@pytest.mark.parametrize("sampled", [None, 0.7])
def test_every_length_greedy_and_coupled(name, method, length, sampled):
    options = {} if sampled is None else {"temperature": sampled, "top_p": 0.95}
    results = generate(
        load(name),
        PROMPTS,
        method=method,
        draft_length=length,
        max_new_tokens=NEW,
        seeds=range(4),
        **options,
        **draft_model(method, name),
    )
    assert [result.tokens for result in results] == plain(name, **options)


# --- what generate takes ----------------------------------------------------------------------------------------------


def test_a_folder_of_another_architecture_names_the_way_out(tmp_path):
    load("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got 'GPT2LMHeadModel'; load others with transformers and pass the model"):
        generate(tmp_path, [1])
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert generate(hf, PROMPTS[0], max_new_tokens=14).tokens == plain("gpt2")[0]


def test_models_are_checked_as_arguments():
    hf = load("llama")
    with pytest.raises(ValueError, match="dtype: expected None for a model that is already loaded"):
        generate(hf, [1], dtype=torch.float32)
    with pytest.raises(ValueError, match="tokenizer: expected a Tokenizer, because prompt or stop is text and model"):
        generate(hf, "text")
    with pytest.raises(ValueError, match="draft_model: expected a vocabulary of 97 ids, as the model's, got 13"):
        generate(hf, [1], method="speculative", draft_model=load("llama", vocab_size=13))
    with pytest.raises(ValueError, match="model: expected a Model, a folder or a model of transformers, got Linear"):
        generate(torch.nn.Linear(1, 1), [1])


def test_tokenizers_of_transformers():
    """The shipped folder, read by transformers: text in and out as with our own reader."""
    folder = CHECKPOINTS / "tiny-code"
    if not folder.is_dir():
        pytest.skip("the shipped model is not installed")
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    prompts = ["def quicksort(items):", "import os\n", "x = 'é"]
    options = {"max_new_tokens": 20, "stop": ["return", "\n\n"]}
    expected = generate(folder, prompts, dtype=torch.float64, **options)
    results = generate(hf, prompts, tokenizer=tokenizer, method="prompt-lookup", **options)
    for ours, theirs in zip(expected, results, strict=True):
        assert (ours.prompt_tokens, ours.tokens, ours.text) == (theirs.prompt_tokens, theirs.tokens, theirs.text)
        assert (ours.finish_reason, ours.stop) == (theirs.finish_reason, theirs.stop)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    padded = generate(hf, batch["input_ids"], attention_mask=batch["attention_mask"], tokenizer=tokenizer, **options)
    assert [result.text for result in padded] == [result.text for result in expected]


def test_compare_takes_loaded_models():
    hf, draft = load("gpt2"), disturbed("gpt2")
    with pytest.raises(ValueError, match=r"compare: prompts: expected fewer than 64 tokens \(max_context\), got 64"):
        compare(hf, [[1] * CONTEXT])
    rows = compare(hf, PROMPTS[:2], draft_model=draft, max_new_tokens=12, threads=1)
    assert [row.method for row in rows] == [*METHODS, "transformers"]
    assert [row.same_as_plain for row in rows] == [True] * len(METHODS) + [None]
    assert rows[0].passes == rows[-1].passes == 24
    assert min(row.passes for row in rows) < 24
    assert hf.dtype == draft.dtype == torch.float64  # the float32 rows ran on copies
