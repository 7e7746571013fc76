"""`generate` and `stream`: a model, prompts and a method in; tokens, text and statistics out."""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .drafters import Drafter
from .loops import Batch, autoregressive, speculative
from .methods import RULES, AcceptanceRule, Method, find_method, own_method
from .models import HuggingFaceModel, KVCacheConfig, Model, NativeModel, load_model
from .models.huggingface import is_transformers_model, is_transformers_tokenizer, wrap_tokenizer
from .models.tokenizer import Tokenizer
from .policies import Policy
from .types import Chunk, Result, Results, SamplingParams, is_int, is_number

__all__ = ["generate", "splitmix64", "stream"]

CHECKPOINTS = Path(__file__).parent / "checkpoints"

ModelLike = Model | nn.Module | str | os.PathLike[str]  # the module: a causal language model of transformers
Prompt = str | Sequence[int] | Tensor | np.ndarray


def generate(
    model: ModelLike | None,
    prompt: Prompt | Sequence[Prompt],
    *,
    method: str | Drafter = "plain",
    rule: str | None = None,
    draft_model: ModelLike | None = None,
    draft_length: int | None = None,
    policy: Policy | None = None,
    max_new_tokens: int | Sequence[int] = 128,
    min_new_tokens: int | Sequence[int] = 0,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int | None] | None = None,
    top_p: float | Sequence[float | None] | None = None,
    min_p: float | Sequence[float | None] | None = None,
    typical_p: float | Sequence[float | None] | None = None,
    bias: Tensor | Mapping[int, float] | None = None,
    ban_ids: Sequence[int] = (),
    repetition_penalty: float | Sequence[float] = 1.0,
    frequency_penalty: float | Sequence[float] = 0.0,
    presence_penalty: float | Sequence[float] = 0.0,
    seed: int | None = None,
    seeds: Sequence[int] | None = None,
    stop: str | Sequence[str] | None = None,
    stop_ids: Sequence[int] | None = None,
    ignore_eos: bool = False,
    logprobs: int | None = None,
    tokenizer: Tokenizer | Any | None = None,
    attention_mask: Tensor | np.ndarray | None = None,
    dtype: torch.dtype | None = None,
    kv_cache: str | KVCacheConfig | None = None,
    **parameters: float,
) -> Result | Results:
    """Generate a continuation of one prompt, or of several as one batch.

    A request's tokens depend on its prompt, parameters and seed: not on what else is in the batch, and for methods
    whose guarantee is "exact" not on the method either (with float64 models; a narrower one may round a near tie
    differently in a longer pass).

    Args:
        model: a Model, a causal language model of transformers (see HuggingFaceModel), a Hugging Face folder, or None
            for the model shipped with the package.
        prompt: text, or ids (ints, an integer tensor [n] or array [n]); a list of either is a batch, and so is a tensor
            or array [B, n]. A Model object with ids needs torch and numpy only; text needs a tokenizer: `tokenizer`, or
            the folder's `tokenizer.json`.
        method: a name from `fastdecode.METHODS`, or a Drafter of your own for the speculative loop.
        rule: how drafts are accepted: "coupled", "ratio" or "block", which keep plain decoding's tokens or law, and
            "typical" or "top_beta", which do not (see `fastdecode.RULES`); None is the first of the method's.
        draft_model: as `model`, with the same vocabulary, where the method has a draft model; None is the shipped one
            if `model` is None too.
        draft_length: most drafts per round; None is the method's default.
        policy: decides the draft length instead of `draft_length`.
        max_new_tokens: most tokens to generate; the model's context may end a request earlier.
        min_new_tokens: end-of-text, stop ids and stop strings cannot end a request before this many tokens.
        temperature: 0 is greedy.
        top_k, top_p, min_p, typical_p: filters, in this order, each on the renormalised result of the one before; None
            is off.
        bias: added to the logits, floating [V] or {id: value}.
        ban_ids: ids that are never produced.
        repetition_penalty: for ids in prompt or output: divides a positive logit, multiplies another one; 1 is off.
        frequency_penalty, presence_penalty: subtracted from an id's logit for each time the output holds it, and once
            if it does; 0 is off. Speculation counts the drafts before each row, so that guarantees hold.
        seed: request i gets the seed splitmix64(seed, i); None is 0.
        seeds: one 64-bit seed per request, used as they are, instead of `seed`.
        stop: string or strings that end the text before them.
        stop_ids: ids that end a request, beside the model's end-of-text ids; they stay in `tokens`.
        ignore_eos: treat the model's end-of-text ids as ordinary tokens.
        logprobs: report log-probabilities, and those of this many likeliest ids (0: of the generated tokens only).
        tokenizer: for text in and out, a Tokenizer or one of transformers; None reads the folder's.
        attention_mask: 1 or True where a prompt tensor or array holds tokens, in its shape; what is 0, left or right of
            them, is padding and not part of the prompt.
        dtype: of the weights of the models that are read from folders; None is the default of `load_model`.
        kv_cache: how the target keeps keys and values: a KVCacheConfig or its name, such as "bf16", "fp8", "int8" or
            "kivi4" (see `KVCacheConfig.parse`), or "contiguous"; None is the method's or else the model's own.
            Guarantees then hold against plain decoding with the same cache. Models of folders and NativeModel only.
            What prompts begin with in common is read once for all where the cache is paged.
        **parameters: the method's own and the rule's, see their entries in `fastdecode.METHODS` and `fastdecode.RULES`.

        max_new_tokens, min_new_tokens, temperature, the filters and the penalties may be lists with one value per
        prompt.

    Returns:
        Result for one prompt; for a list Results, a sequence of Result with the statistics of the batch.
        `text` is None where there is no tokenizer.
    Raises:
        ValueError: an argument that is unknown, out of range or in conflict with another; an empty prompt, one longer
            than the model's context, an id outside the vocabulary.
        ImportError: text without the tokenizers package, a folder without safetensors.
    """
    run = _prepare(locals(), with_text=False)
    results: dict[int, Result] = {}
    for chunks in run.rounds:
        results.update({chunk.index: chunk.result for chunk in chunks if chunk.result is not None})
    if run.single:
        return results[0]
    return Results(tuple(results[index] for index in range(len(results))), run.batch.statistics)


def stream(model: ModelLike | None, prompt: Prompt | Sequence[Prompt], **options: Any) -> Iterator[Chunk]:
    """`generate`, round by round: yields a Chunk for every request that a round advanced.

    Takes the arguments of `generate` and checks them before it returns. A request's last chunk carries its Result.
    """
    arguments = inspect.signature(generate).bind(model, prompt, **options)
    arguments.apply_defaults()
    run = _prepare(arguments.arguments, with_text=True)
    return (chunk for chunks in run.rounds for chunk in chunks)


def splitmix64(seed: int, index: int) -> int:
    """Output number `index` (0, 1, ...) of SplitMix64 started at `seed`, in 0..2^64 - 1 (Steele et al. 2014).

    z = seed + (index + 1) * 0x9E3779B97F4A7C15, then z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9,
    z = (z ^ z >> 27) * 0x94D049BB133111EB, z ^ z >> 31, all mod 2^64.
    """
    mask = 2**64 - 1
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    return z ^ z >> 31


# --- from arguments to a running batch --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Run:
    batch: Batch
    rounds: Iterator[list[Chunk]]
    single: bool


def _prepare(given: Mapping[str, Any], *, with_text: bool) -> _Run:
    """Check the arguments of `generate`, load what they name, and set the loop up; nothing has been decoded yet."""
    method = _method(given["method"])
    rule = _rule(method, given["rule"])
    parameters = _parameters(method, rule, given)
    prompt, mask = given["prompt"], given["attention_mask"]
    prompts, single = _split(prompt if mask is None else _unpad(prompt, mask))
    stop = _stop(given["stop"])
    tokenizer = given["tokenizer"]
    if is_transformers_tokenizer(tokenizer):
        tokenizer = wrap_tokenizer(tokenizer)
    elif not isinstance(tokenizer, Tokenizer | None):
        raise _fail("tokenizer", "a Tokenizer or None", tokenizer)
    loaded = [_is_loaded(given[name]) for name in ("model", "draft_model")]
    if given["dtype"] is not None and loaded[0] and (loaded[1] or not method.needs_draft_model):
        raise _fail("dtype", "None for a model that is already loaded", given["dtype"])
    model, folder = _model("model", given["model"], CHECKPOINTS / "tiny-code", given["dtype"])
    model = _with_cache(model, method, parameters, given["kv_cache"])
    needs_text = any(isinstance(item, str) for item in prompts) or bool(stop)
    tokenizer = _tokenizer(folder, needed=needs_text) if tokenizer is None else tokenizer
    ids = [_ids(item, tokenizer, model) for item in prompts]
    params = _sampling({**given, "stop": stop}, len(ids), model.config.vocab_size)
    if rule is None or method.drafter is None or method.policy is None:
        batch = Batch(model.config, ids, params, tokenizer=tokenizer, with_text=with_text)
        return _Run(batch, autoregressive(model, batch), single)
    for asked in params:
        if asked.temperature > 0 and not rule.samples:
            raise _fail("temperature", f"0 with rule {rule.name!r}, which takes the likeliest", asked.temperature)
    drafter = method.drafter(parameters, _draft_model(given, model) if method.needs_draft_model else None)
    policy = given["policy"] or method.policy(parameters)
    batch = Batch(
        model.config,
        ids,
        params,
        rule=rule.number,
        rule_parameters={name: parameters[name] for name in rule.parameters},
        tokenizer=tokenizer,
        with_text=with_text,
    )
    return _Run(batch, speculative(model, batch, drafter, policy), single)


def _fail(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"generate: {name}: expected {expected}, got {got!r}")


def _method(method: str | Drafter) -> Method:
    return own_method(method) if isinstance(method, Drafter) else find_method(method)


def _parameters(method: Method, rule: AcceptanceRule | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of method and rule with the caller's values; ValueError for what they do not take."""
    defaults = {**method.parameters, **(rule.parameters if rule is not None else {})}
    own = {**given["parameters"]}
    if given["draft_length"] is not None:
        own["draft_length"] = given["draft_length"]
    for name, value in own.items():
        if name not in defaults:
            takes = ", ".join(defaults) or "no parameters of its own"
            raise _fail(name, f"an argument of generate, or of method {method.name!r} ({takes})", value)
        kind, ok = ("an int", is_int) if isinstance(defaults[name], int) else ("a number", is_number)
        if not ok(value):
            raise _fail(name, kind, value)
        if rule is not None and name in rule.ranges:
            low, high = rule.ranges[name]
            if not low <= value <= high:
                raise _fail(name, f"{low}..{high}", value)
    if given["draft_model"] is not None and not method.needs_draft_model:
        raise _fail("draft_model", f"None, method {method.name!r} uses none", given["draft_model"])
    if given["policy"] is not None:
        if method.policy is None:
            raise _fail("policy", f"None, method {method.name!r} drafts nothing", given["policy"])
        if not isinstance(given["policy"], Policy):
            raise _fail("policy", "a Policy or None", given["policy"])
        for name in method.policy_parameters:
            if name in own:
                raise _fail("policy", f"one of policy and {name}", "both")
    return {**defaults, **own}


def _rule(method: Method, rule: str | None) -> AcceptanceRule | None:
    offered = method.rules + method.lossy_rules
    if rule is None:
        return RULES[offered[0]] if offered else None
    if rule not in offered:
        expected = f"None or one of {', '.join(offered)}" if offered else f"None for method {method.name!r}"
        raise _fail("rule", expected, rule)
    return RULES[rule]


def _is_loaded(model: object) -> bool:
    return isinstance(model, Model) or is_transformers_model(model)


def _model(name: str, model: ModelLike | None, shipped: Path, dtype: torch.dtype | None) -> tuple[Model, Path | None]:
    """The model, and the folder it was read from if it was."""
    if model is None and not shipped.is_dir():
        raise _fail(name, f"a model; the shipped model is not installed at {shipped}", None)
    if model is None or isinstance(model, (str, os.PathLike)):
        folder = shipped if model is None else Path(model)
        return (load_model(folder) if dtype is None else load_model(folder, dtype=dtype)), folder
    if isinstance(model, nn.Module) and is_transformers_model(model):
        return HuggingFaceModel(model), None
    if not isinstance(model, Model):
        raise _fail(name, "a Model, a folder or a model of transformers", model)
    return model, None


def _with_cache(
    model: Model, method: Method, parameters: Mapping[str, Any], kv_cache: str | KVCacheConfig | None
) -> Model:
    """The model with the cache that the caller or the method names."""
    if method.cache is not None:
        if kv_cache is not None:
            raise _fail("kv_cache", f"None, method {method.name!r} brings its own", kv_cache)
        kv_cache = method.cache(parameters)
    if kv_cache is None:
        return model
    if not isinstance(model, NativeModel):
        raise _fail("kv_cache", f"None for a {type(model).__name__}, which has a cache of its own", kv_cache)
    return model.with_kv_cache(kv_cache)


def _draft_model(given: Mapping[str, Any], target: Model) -> Model:
    if given["draft_model"] is None and given["model"] is not None:
        raise _fail("draft_model", f"a model, which method {given['method']!r} drafts with", None)
    draft, _ = _model("draft_model", given["draft_model"], CHECKPOINTS / "tiny-code-draft", given["dtype"])
    if draft.config.vocab_size != target.config.vocab_size:
        expected = f"a vocabulary of {target.config.vocab_size} ids, as the model's"
        raise _fail("draft_model", expected, draft.config.vocab_size)
    return draft


def _tokenizer(folder: Path | None, *, needed: bool) -> Tokenizer | None:
    """The folder's tokenizer. Where no text was asked for, one that cannot be read is no error."""
    if folder is None:
        if needed:
            raise _fail("tokenizer", "a Tokenizer, because prompt or stop is text and model is not a folder", None)
        return None
    if needed or ((folder / "tokenizer.json").is_file() and importlib.util.find_spec("tokenizers") is not None):
        return Tokenizer.from_folder(folder)
    return None


def _split(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts, and whether there was just one that was not in a list."""
    if isinstance(prompt, str) or (isinstance(prompt, (Tensor, np.ndarray)) and prompt.ndim == 1):
        return [prompt], True
    several = isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray))
    if not several and not (isinstance(prompt, (Tensor, np.ndarray)) and prompt.ndim > 1):
        raise _fail("prompt", "text or ids, or a list of either", prompt)
    prompts: list[Any] = list(prompt)
    if not prompts:
        raise _fail("prompt", "text or ids, at least one", prompt)
    if all(is_int(item) for item in prompts):
        return [prompts], True
    return prompts, False


def _unpad(prompt: object, mask: object) -> Prompt | list[Prompt]:
    """The prompt [n] or prompts [B, n] without what the mask says is padding."""
    arrays = (Tensor, np.ndarray)
    if not isinstance(prompt, arrays) or prompt.ndim not in (1, 2):
        raise _fail("attention_mask", "None for a prompt that is not a tensor or array [n] or [B, n]", mask)
    shape, expected = list(prompt.shape), f"integers or bools {list(prompt.shape)}, as the prompt"
    if not isinstance(mask, arrays):
        raise _fail("attention_mask", expected, mask)
    if list(mask.shape) != shape or not any(kind in str(mask.dtype) for kind in ("int", "bool")):
        raise _fail("attention_mask", expected, f"{mask.dtype} {list(mask.shape)}")
    rows: list[Prompt] = []
    pairs = zip(prompt, mask.tolist()) if prompt.ndim == 2 else [(prompt, mask.tolist())]
    for row, flags in pairs:
        tokens = [place for place, flag in enumerate(flags) if flag]
        first, after = (tokens[0], tokens[-1] + 1) if tokens else (0, 0)
        if len(tokens) != after - first or any(flag not in (0, 1) for flag in flags):
            raise _fail("attention_mask", "one run of ones, with zeros left or right of it", flags)
        rows.append(row[first:after])
    return rows if prompt.ndim == 2 else rows[0]


def _ids(prompt: Prompt, tokenizer: Tokenizer | None, model: Model) -> list[int]:
    if isinstance(prompt, str):
        assert tokenizer is not None
        # checked before encoding, which may add a begin-of-text token
        ids = tokenizer.encode(prompt) if prompt else []
    elif isinstance(prompt, (Tensor, np.ndarray)):
        if prompt.ndim != 1 or "int" not in str(prompt.dtype):
            raise _fail("prompt", "ids as integers [n]", f"{prompt.dtype} {list(prompt.shape)}")
        ids = prompt.tolist()
    else:
        if not isinstance(prompt, Sequence) or not all(is_int(item) for item in prompt):
            raise _fail("prompt", "text or ids", prompt)
        ids = [int(item) for item in prompt]
    vocab_size, limit = model.config.vocab_size, model.config.max_context
    if not ids:
        raise _fail("prompt", "at least one token", prompt)
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise _fail("prompt", f"ids 0..{vocab_size - 1}", next(item for item in ids if not 0 <= item < vocab_size))
    if len(ids) > limit:
        raise _fail("prompt", f"at most {limit} tokens (max_context)", len(ids))
    return ids


_PER_REQUEST = (
    *("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("repetition_penalty", "frequency_penalty", "presence_penalty"),
)


def _sampling(given: Mapping[str, Any], batch: int, vocab_size: int) -> list[SamplingParams]:
    """One SamplingParams per request."""
    columns = {}
    for name in _PER_REQUEST:
        value = given[name]
        if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 1:
            value = value.tolist()
        if not isinstance(value, Sequence) or isinstance(value, str):
            value = [value] * batch
        if len(value) != batch:
            raise _fail(name, f"one value or {batch}, one per prompt", value)
        columns[name] = value
    common = {
        "bias": _bias(given["bias"], vocab_size),
        "ban_ids": _vocabulary_ids("ban_ids", given["ban_ids"], vocab_size),
        "stop": given["stop"],
        "stop_ids": _vocabulary_ids("stop_ids", () if given["stop_ids"] is None else given["stop_ids"], vocab_size),
        "ignore_eos": given["ignore_eos"],
        "logprobs": given["logprobs"],
    }
    if is_int(common["logprobs"]) and common["logprobs"] > vocab_size:
        raise _fail("logprobs", f"at most {vocab_size} (the vocabulary)", common["logprobs"])
    if given["seed"] is not None and not is_int(given["seed"]):
        raise _fail("seed", "an int or None", given["seed"])
    if given["seeds"] is None:
        seeds = [splitmix64(int(given["seed"] or 0), index) for index in range(batch)]
    elif given["seed"] is not None:
        raise _fail("seeds", "one of seed and seeds", "both")
    else:
        seeds = _ints("seeds", given["seeds"])
        if len(seeds) != batch:
            raise _fail("seeds", f"{batch} seeds, one per prompt", seeds)
    return [
        SamplingParams(seed=seeds[row], **{name: columns[name][row] for name in _PER_REQUEST}, **common)
        for row in range(batch)
    ]


def _stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    if stop is None or isinstance(stop, str):
        return () if stop is None else (stop,)
    if not isinstance(stop, Sequence) or not all(isinstance(string, str) for string in stop):
        raise _fail("stop", "a string or strings", stop)
    return tuple(stop)


def _bias(bias: Tensor | Mapping[int, float] | None, vocab_size: int) -> Tensor | Mapping[int, float] | None:
    if isinstance(bias, Tensor):
        if list(bias.shape) != [vocab_size] or not bias.is_floating_point():
            raise _fail("bias", f"floating [{vocab_size}]", f"{bias.dtype} {list(bias.shape)}")
    elif bias is not None:
        if not isinstance(bias, Mapping):
            raise _fail("bias", f"floating [{vocab_size}] or {{id: value}}", bias)
        _vocabulary_ids("bias", tuple(bias), vocab_size)
        for value in bias.values():
            if not is_number(value) or math.isnan(value):
                raise _fail("bias", "{id: value} with numbers", value)
    return bias


def _vocabulary_ids(name: str, values: Collection[int] | Tensor | np.ndarray, vocab_size: int) -> tuple[int, ...]:
    ids = _ints(name, values)
    for item in ids:
        if not 0 <= item < vocab_size:
            raise _fail(name, f"ids 0..{vocab_size - 1}", item)
    return tuple(ids)


def _ints(name: str, values: Collection[int] | Tensor | np.ndarray) -> list[int]:
    """`values` as Python ints."""
    given: object = values
    if isinstance(values, (Tensor, np.ndarray)) and values.ndim == 1:
        given = values.tolist()
    if not isinstance(given, Collection) or isinstance(given, (str, bytes, Tensor, np.ndarray)):
        raise _fail(name, "a list of ints", values)
    for item in given:
        if not is_int(item):
            raise _fail(name, "a list of ints", item)
    return [int(item) for item in given]
