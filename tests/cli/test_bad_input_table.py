"""Bad input from end to end, one row each: a clear error, or the documented status. Never a crash, never silence."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fastdecode import generate, load_model, ops
from fastdecode._host import Status
from fastdecode.drafters import Drafter
from fastdecode.models import TabularLM
from fastdecode.policies import FixedLength

V = 13
TEMPERATURE = "generate: temperature: expected a finite number >= 0 (as float32), got "
TEXT_OR_IDS = "generate: prompt: expected text or ids, or a list of either, got "
NO_FOLDER = "load_model: path: expected a folder with config.json, got "
MODEL = TabularLM.random(V, 2, 1)
NAN, INF = float("nan"), float("inf")
IDS = torch.zeros(2, 3, dtype=torch.int64)
LOGITS = torch.zeros(2, 4, V)


class Fixed(Drafter):
    """Always proposes the same thing."""

    def __init__(self, proposal: object) -> None:
        self.proposal = proposal

    def propose(self, context, budget, stop):
        return self.proposal


class Places(NamedTuple):
    """Where the rows find files; `good` is a checkpoint, and `new` copies it to change it."""

    good: Path
    tmp: Path

    def new(self, **config: object) -> Path:
        folder = self.tmp / "copy"
        shutil.copytree(self.good, folder)
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        return folder

    def beginning(self) -> Path:
        """With a tokenizer that puts a begin-of-text id before every text."""
        from tokenizers import Tokenizer, processors

        folder = self.new()
        file = str(folder / "tokenizer.json")
        tokenizer = Tokenizer.from_file(file)
        end = tokenizer.token_to_id("<end>")
        tokenizer.post_processor = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", end)])
        tokenizer.save(file)
        return folder

    def cut(self, size: int) -> Path:
        folder = self.new()
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:size])
        return folder


def run(prompt: object = (1, 2), model: object = MODEL, **options: object):
    return lambda places: generate(model, prompt, **options)


def lookup(**options: object):
    return run(method="prompt-lookup", **options)


# what -> (call, what its ValueError says)
ERRORS = {
    # ops
    "rank": (lambda _: ops.row_stats(torch.tensor(1.0)), "row_stats: logits: expected 2 to 3 dimensions, got []"),
    "shape": (
        lambda _: ops.verify_chain_greedy(IDS, IDS),
        "verify_chain_greedy: target_ids: expected [2, 4], got [2, 3]",
    ),
    "dtype": (
        lambda _: ops.sample(LOGITS[:, 0].int(), seed=1, offset=0),
        "sample: logits: expected float64, float32, ",
    ),
    "device": (
        lambda _: ops.verify_chain_greedy(IDS, torch.zeros(2, 4, dtype=torch.int64, device="meta")),
        "verify_chain_greedy: target_ids: expected cpu, got meta",
    ),
    "uniforms and seed": (
        lambda _: ops.sample(LOGITS[:, 0], seed=1, offset=0, uniforms=torch.full((2,), 0.5, dtype=torch.float64)),
        "sample: uniforms, seed: expected exactly one of them, got both",
    ),
    "rule": (
        lambda _: ops.verify_chain(IDS, target_logits=LOGITS, rule="best", seed=1, offset=0),
        "verify_chain: rule: expected one of ",
    ),
    # folders
    "no folder": (lambda places: load_model(places.tmp / "none"), NO_FOLDER),
    "no checkpoint": (lambda places: generate(places.tmp, [1]), NO_FOLDER),
    "half a file": (lambda places: load_model(places.cut(5000)), "expected a whole safetensors file, got: "),
    "an empty file": (lambda places: load_model(places.cut(0)), "expected a whole safetensors file, got: "),
    "architecture": (
        lambda places: load_model(places.new(architectures=[["a"]])),
        "load_model: architectures: expected one of LlamaForCausalLM, ",
    ),
    "config value": (
        lambda places: load_model(places.new(rms_norm_eps="x")),
        "load_model: config.json: rms_norm_eps: expected a number above 0, got 'x'",
    ),
    # model and method
    "model": (run(model=5), "generate: model: expected a Model, a folder or a model of transformers, got 5"),
    "unknown method": (
        run(method="specultive"),
        "generate: method: expected one of plain, speculative, speculative-confidence, prompt-lookup, hydragen, "
        "kivi4, kivi2, int8-cache, int4-cache, fp8-cache, "
        "got 'specultive'; did you mean 'speculative'?",
    ),
    "method is no name": (
        run(method=5),
        "prompt-lookup, hydragen, kivi4, kivi2, int8-cache, int4-cache, fp8-cache, got 5",
    ),
    "no draft model": (run(method="speculative"), "generate: draft_model: expected a model, which method"),
    "draft vocabulary": (
        run(method="speculative", draft_model=TabularLM.random(7, 2, 1)),
        "generate: draft_model: expected a vocabulary of 13 ids, as the model's, got 7",
    ),
    "tokenizer": (run(tokenizer=5), "generate: tokenizer: expected a Tokenizer or None, got 5"),
    # prompts
    "empty ids": (run([]), "generate: prompt: expected text or ids, at least one, got []"),
    "empty text": (
        lambda places: generate(places.beginning(), ""),
        "generate: prompt: expected at least one token, got ''",
    ),
    "empty among others": (run([[1], []]), "generate: prompt: expected at least one token, got []"),
    "prompt without dimensions": (run(torch.tensor(5)), TEXT_OR_IDS + "tensor(5)"),
    "prompt of floats": (run(torch.zeros(2)), "generate: prompt: expected ids as integers [n], got"),
    "id outside the vocabulary": (run([1, V]), "generate: prompt: expected ids 0..12, got 13"),
    "text without tokenizer": (run("text"), "generate: tokenizer: expected a Tokenizer, because prompt or stop"),
    "prompt past the context": (
        run([1] * 4097),
        "generate: prompt: expected at most 4096 tokens (max_context), got 4097",
    ),
    # sampling
    "temperature": (run(temperature=None), TEMPERATURE + "None"),
    "temperature tensor": (
        run(temperature=torch.tensor(0.5)),
        TEMPERATURE + "tensor(0.5000)",
    ),
    "temperature past float32": (
        run(temperature=1e39),
        TEMPERATURE + "1e+39",
    ),
    "top_k past int32": (
        run(temperature=1, top_k=99999999999),
        "generate: top_k: expected None or an int 0..2147483647 (0 = off), got 99999999999",
    ),
    "top_k float": (run(top_k=1.9), "generate: top_k: expected None or an int 0..2147483647 (0 = off), got 1.9"),
    "top_p": (run(top_p=NAN), "generate: top_p: expected None, or in (0, 1], got nan"),
    "max_new_tokens": (run(max_new_tokens=2.5), "generate: max_new_tokens: expected an int >= 0, got 2.5"),
    "seed": (run(seed=1.5), "generate: seed: expected an int or None, got 1.5"),
    "seeds": (run(seeds=5), "generate: seeds: expected a list of ints, got 5"),
    "stop": (run(stop=5), "generate: stop: expected a string or strings, got 5"),
    "stop list": (run(stop=[5]), "generate: stop: expected a string or strings, got [5]"),
    "stop_ids": (run(stop_ids=5), "generate: stop_ids: expected a list of ints, got 5"),
    "stop_ids float": (run(stop_ids=[5.7]), "generate: stop_ids: expected a list of ints, got 5.7"),
    "bias": (run(bias=[0.5]), "generate: bias: expected floating [13] or {id: value}, got [0.5]"),
    "logprobs": (run(logprobs=1.5), "generate: logprobs: expected None or an int >= 0, got 1.5"),
    "unknown argument": (run(temprature=1.0), "generate: temprature: expected an argument of generate"),
    # parameters of methods
    "max_ngram": (lookup(max_ngram=2.5), "generate: max_ngram: expected an int, got 2.5"),
    "draft_length": (lookup(draft_length=2.5), "generate: draft_length: expected an int, got 2.5"),
    "policy": (lookup(policy=5), "generate: policy: expected a Policy or None, got 5"),
    # conflicts
    "seed and seeds": (run(seed=1, seeds=[1]), "generate: seeds: expected one of seed and seeds, got 'both'"),
    "policy and draft_length": (
        lookup(policy=FixedLength(2), draft_length=3),
        "generate: policy: expected one of policy and draft_length, got 'both'",
    ),
    "policy and confidence": (
        run(method="speculative-confidence", draft_model=MODEL, policy=FixedLength(2), confidence=0.9),
        "generate: policy: expected one of policy and confidence, got 'both'",
    ),
    "draft model of plain": (run(draft_model=MODEL), "generate: draft_model: expected None, method 'plain' uses none"),
    "rule of plain": (run(rule="ratio"), "generate: rule: expected None for method 'plain', got 'ratio'"),
    "dtype of a loaded model": (
        run(dtype=torch.float64),
        "generate: dtype: expected None for a model that is already loaded, got torch.float64",
    ),
    "minimum above maximum": (
        run(min_new_tokens=5, max_new_tokens=4),
        "generate: min_new_tokens: expected 0..4 (max_new_tokens), got 5",
    ),
    # drafters
    "no draft": (run(method=Fixed(None)), "Fixed.propose: expected a Draft, got None"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors(what, checkpoints, tmp_path):
    call, message = ERRORS[what]
    with pytest.raises(ValueError, match=re.escape(message)):
        call(Places(checkpoints / "tiny-code", tmp_path))


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def sample(logits: torch.Tensor, **options: object) -> tuple[list[int], int]:
    drawn = ops.sample(logits, seed=1, offset=0, **options)
    return drawn.tokens.tolist(), int(drawn.status)


def verify(draft: int, probs: torch.Tensor | None, target: torch.Tensor, length: int = 1, u: float = 0.5):
    """One draft against one row and the row behind it; tokens and status."""
    verified = ops.verify_chain(
        torch.tensor([[draft]]),
        None if probs is None else probs.unsqueeze(1),
        torch.tensor([length], dtype=torch.int32),
        target_probs=torch.stack((target, row(0, 0, 1)), 1),
        uniforms=torch.tensor([[u, 0.5]], dtype=torch.float64),
    )
    return verified.tokens[0].tolist(), int(verified.num_emitted), int(verified.status)


HALF = row(0.5, 0.5, 0)
# what -> (call, what it returns)
STATUSES = {
    "NaN": (lambda: sample(row(0, NAN, 1)), ([-1], Status.NAN)),
    "no mass": (lambda: sample(row(-INF, -INF)), ([-1], Status.NO_MASS)),
    "everything banned": (lambda: sample(row(1, 2), ban_ids=torch.tensor([0, 1])), ([-1], Status.NO_MASS)),
    "temperature 0, ties": (lambda: sample(row(1, 2, 2), temperature=0.0), ([1], 0)),
    "filters that are off": (
        lambda: sample(row(1, 2, 3), top_k=99, top_p=1.0, min_p=0.0) == sample(row(1, 2, 3)),
        True,
    ),
    "empty batch": (lambda: ops.row_stats(torch.zeros(0, 5)).argmax.tolist(), []),
    "draft of length 0": (lambda: verify(0, HALF, row(0, 1, 0), length=0), ([1, -1], 1, 0)),
    "draft length above K": (lambda: verify(0, HALF, HALF, length=2), ([-1, -1], 0, Status.BAD_LENGTH)),
    "negative draft length": (lambda: verify(0, HALF, HALF, length=-1), ([-1, -1], 0, Status.BAD_LENGTH)),
    "draft id outside V, its law known": (
        lambda: verify(3, HALF, row(0, 0, 1)),
        ([2, -1], 1, Status.UNMAPPED_DRAFT),
    ),
    "draft id outside V": (lambda: verify(-1, None, row(0, 1, 0)), ([1, -1], 1, Status.UNMAPPED_DRAFT)),
    "draft of probability 0": (lambda: verify(2, HALF, row(0, 0, 1)), ([2, -1], 1, Status.ZERO_DRAFT_PROB)),
    "no residual": (
        lambda: verify(0, row(0.5000001, 0.5, 0), row(0.5, 0.5, 0), u=1 - 2**-53)[1:],
        (1, Status.RESIDUAL_FALLBACK),
    ),
}


@pytest.mark.parametrize("what", STATUSES)
def test_statuses(what):
    call, expected = STATUSES[what]
    assert call() == expected
