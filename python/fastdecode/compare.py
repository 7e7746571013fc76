"""Plain decoding, the methods and a peer on the same checkpoint and prompts, measured in one process."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from .generation import CHECKPOINTS, generate, splitmix64
from .methods import METHODS, Method, find_method
from .models import HuggingFaceModel, KVCacheConfig, Model, NativeConfig, load_model
from .models.checkpoint import read_configs
from .runtime import fastest_threads, pin_threads, thread_settings, tune_threads
from .types import Results

__all__ = ["Row", "compare", "distinct_ngrams", "tune_method"]

PEER = "transformers"
Ids = Sequence[int]
Source = str | os.PathLike[str] | nn.Module  # a Hugging Face folder, or a loaded model of transformers


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the comparison; its fields are the keys of the command line's JSON.

    Attributes:
        method: name, with the acceptance rule where temperature > 0.
        guarantee: "exact", "in law", "approximate", or "peer" for what is not ours.
        same_as_plain: whether float64 models gave the tokens of plain decoding, for every prompt; None where equal
            tokens are not promised (rule ratio under sampling, coded caches) and for peers.
        tokens_per_pass: tokens a request gained per target pass.
        passes: target passes after the prompts, over all prompts.
        tokens_per_s: generated tokens over wall time, prompts included, all prompts together, each with the median time
            of its runs.
        spread: 10th and 90th percentile of the single runs' tokens per second.
        distinct_4gram: different 4-grams over all 4-grams of the generated tokens, mean over prompts.
    """

    method: str
    guarantee: str
    same_as_plain: bool | None
    tokens_per_pass: float
    passes: int
    tokens_per_s: float
    spread: tuple[float, float]
    distinct_4gram: float


@dataclass(frozen=True, slots=True)
class _Work:
    """What every row does: the prompts in groups that are decoded together, and how."""

    groups: list[list[list[int]]]
    seeds: list[list[int]]
    max_new_tokens: int
    temperature: float
    draft_length: int | None
    kv_cache: str | KVCacheConfig | None


@dataclass(frozen=True, slots=True)
class _Run:
    """Tokens of one group, and what they cost."""

    tokens: list[list[int]]
    passes: int
    request_passes: int


@dataclass(slots=True)
class _Entrant:
    """A row in the making: `run(group, max_new_tokens)` at `threads` threads."""

    name: str
    guarantee: str
    run: Callable[[int, int], _Run]
    threads: int
    timings: dict[int, list[tuple[int, float]]] = field(default_factory=dict)  # group -> tokens, seconds
    runs: list[_Run] = field(default_factory=list)


def compare(
    model: Source | None,
    prompts: Sequence[Ids],
    *,
    draft_model: Source | None = None,
    methods: Sequence[str] | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    draft_length: int | None = None,
    batch: int = 1,
    repeats: int = 1,
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    kv_cache: str | KVCacheConfig | None = None,
    peers: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Measure plain decoding, every method, and greedy `generate` of transformers.

    Timed runs are interleaved: for every repeat and group of prompts the rows run in A, B, ..., B, A order, each with
    its own fastest number of threads, each thread on a processor of its own. One short run of every row before that is
    not counted. The caller's thread settings are restored.

    Args:
        model: a Hugging Face folder, a causal language model of transformers, or None for the shipped model.
        prompts: ids, at least one prompt.
        draft_model: as `model`, for methods that draft with one; None is the shipped one if `model` is None too.
        methods: names; None is all of `fastdecode.METHODS` that bring no cache of their own, those with a draft model
            only if there is one.
            "plain" is always measured.
        temperature: 0 is greedy; above it methods have one row per acceptance rule, and there is no peer.
        draft_length: of the methods that have such a parameter; None is each one's default.
        batch: prompts decoded together; the peer has a row only at 1.
        repeats: passes over the prompts.
        dtype: of all weights; a loaded model that has another is copied.
        threads: of every row but the peer's; None is each row's fastest number.
        kv_cache: of every method that does not bring its own, plain decoding included; see `generate`.
        peers: False leaves the peer out; it is left out too where transformers is not installed.
        progress: is told what happens next.
    Raises:
        ValueError: an unknown method, an argument out of range, a model that cannot be read or run.
    """
    for name, value in (("batch", batch), ("repeats", repeats), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"compare: {name}: expected at least 1, got {value}")
    if not prompts:
        raise ValueError("compare: prompts: expected at least one, got none")
    source: Source = CHECKPOINTS / "tiny-code" if model is None else model
    drafter = CHECKPOINTS / "tiny-code-draft" if model is None and draft_model is None else draft_model
    chosen = _choose(methods, has_draft=drafter is not None)
    if isinstance(source, nn.Module):
        limit = HuggingFaceModel(source).config.max_context
    else:
        limit = NativeConfig.from_hf(*read_configs(source)).model.max_context
    if (longest := max(map(len, prompts))) >= limit:
        raise ValueError(f"compare: prompts: expected fewer than {limit} tokens (max_context), got {longest}")
    seeds = [splitmix64(0, index) for index in range(len(prompts))]
    work = _Work(
        groups=[[list(ids) for ids in prompts[i : i + batch]] for i in range(0, len(prompts), batch)],
        seeds=[seeds[i : i + batch] for i in range(0, len(prompts), batch)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        draft_length=draft_length,
        kv_cache=kv_cache,
    )
    draft_source = drafter if any(method.needs_draft_model for method in chosen) else None
    with thread_settings() as cpus:
        if threads is not None:
            pin_threads(threads, cpus=cpus)  # refuses a number that cannot be had
        progress("comparing the tokens in float64")
        same = _same_as_plain(work, chosen, source, draft_source, cpus)
        progress("choosing threads")
        target, draft = _load(source, draft_source, dtype)
        entrants = _entrants(work, chosen, target, draft, threads, cpus)
        if peers and temperature == 0 and batch == 1 and importlib.util.find_spec(PEER) is not None:
            entrants.append(_peer(work, source, dtype, target, cpus))
        for entrant in entrants:  # warm-up
            pin_threads(entrant.threads, cpus=cpus)
            entrant.run(0, min(8, max_new_tokens))
        for repeat in range(repeats):
            for group in range(len(work.groups)):
                progress(f"timing prompts {group * batch + 1} of {len(prompts)}, repeat {repeat + 1} of {repeats}")
                _time(entrants, group, max_new_tokens, first=repeat == 0, cpus=cpus)
    return [_row(entrant, same.get(entrant.name)) for entrant in entrants]


def tune_method(
    method: Method, model: Model, draft_model: Model | None, draft_length: int | None, cpus: Sequence[int]
) -> int:
    """`runtime.tune_threads` for a round of this method."""
    default = int(method.parameters.get("draft_length", 0))
    return tune_threads(
        model,
        draft_model=draft_model if method.needs_draft_model else None,
        num_drafts=default if draft_length is None or not default else draft_length,
        cpus=cpus,
    )


def distinct_ngrams(tokens: Ids, n: int = 4) -> float:
    """Different n-grams over all n-grams; 1 for texts shorter than n."""
    grams = list(zip(*(tokens[i:] for i in range(n))))
    return len(set(grams)) / len(grams) if grams else 1.0


# --- the rows ---------------------------------------------------------------------------------------------------------


def _choose(names: Sequence[str] | None, *, has_draft: bool) -> list[Method]:
    """Plain decoding, then the methods asked for, each once."""
    if names is None:
        names = [
            name
            for name, method in METHODS.items()
            if (has_draft or not method.needs_draft_model) and method.cache is None
        ]
    chosen = {name: find_method(name) for name in ("plain", *names)}
    for method in chosen.values():
        if method.needs_draft_model and not has_draft:
            raise ValueError(f"compare: draft_model: expected a folder, which method {method.name!r} drafts with")
    return list(chosen.values())


def _variants(work: _Work, chosen: Sequence[Method]) -> Iterator[tuple[str, str, Method, str | None]]:
    """Name, guarantee, method and rule of every row of ours."""
    for method in chosen:
        if work.temperature == 0 or not method.rules:
            yield method.name, method.guarantee(), method, None
        else:
            for rule in method.rules:
                yield f"{method.name} ({rule})", method.guarantee(rule, sampled=True), method, rule


def _load(source: Source, draft_source: Source | None, dtype: torch.dtype) -> tuple[Model, Model | None]:
    return _read(source, dtype), None if draft_source is None else _read(draft_source, dtype)


def _read(source: Source, dtype: torch.dtype) -> Model:
    if isinstance(source, nn.Module):
        return HuggingFaceModel(_in_dtype(source, dtype))
    return load_model(source, dtype=dtype)


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The caller's model itself, or a copy: `to` would change it."""
    return model if model.dtype == dtype else copy.deepcopy(model).to(dtype)


def _decode(
    work: _Work, method: Method, rule: str | None, model: Model, draft: Model | None
) -> Callable[[int, int], _Run]:
    options: dict[str, Any] = {"method": method.name, "rule": rule, "temperature": work.temperature}
    if method.needs_draft_model:
        options["draft_model"] = draft
    if "draft_length" in method.parameters:
        options["draft_length"] = work.draft_length
    if method.cache is None:
        options["kv_cache"] = work.kv_cache

    def run(group: int, max_new_tokens: int) -> _Run:
        seeds = work.seeds[group]
        results = generate(model, work.groups[group], seeds=seeds, max_new_tokens=max_new_tokens, **options)
        assert isinstance(results, Results)
        statistics = results.statistics
        return _Run([result.tokens for result in results], statistics.target_passes, statistics.request_passes)

    return run


def _same_as_plain(
    work: _Work, chosen: Sequence[Method], source: Source, draft_source: Source | None, cpus: Sequence[int]
) -> dict[str, bool | None]:
    """For every row of ours: whether its tokens are those of plain decoding, by float64 models."""
    target, draft = _load(source, draft_source, torch.float64)
    tune_threads(target, cpus=cpus)
    plain: list[list[list[int]]] = []
    same: dict[str, bool | None] = {}
    for name, guarantee, method, rule in _variants(work, chosen):
        if guarantee != "exact":
            same[name] = None
            continue
        run = _decode(work, method, rule, target, draft)
        tokens = [run(group, work.max_new_tokens).tokens for group in range(len(work.groups))]
        plain = plain or tokens  # the first row is plain decoding
        same[name] = tokens == plain
    return same


def _entrants(
    work: _Work,
    chosen: Sequence[Method],
    target: Model,
    draft: Model | None,
    threads: int | None,
    cpus: Sequence[int],
) -> list[_Entrant]:
    counts: dict[str, int] = {}
    for method in chosen:
        counts[method.name] = threads if threads else tune_method(method, target, draft, work.draft_length, cpus)
    return [
        _Entrant(name, guarantee, _decode(work, method, rule, target, draft), counts[method.name])
        for name, guarantee, method, rule in _variants(work, chosen)
    ]


def _peer(work: _Work, source: Source, dtype: torch.dtype, target: Model, cpus: Sequence[int]) -> _Entrant:
    """Greedy `generate` of transformers, with the number of threads that is best for it."""
    import transformers

    if isinstance(source, nn.Module):
        model: Any = _in_dtype(source, dtype)
    else:
        with _quiet(transformers):
            model = transformers.AutoModelForCausalLM.from_pretrained(source)
        model = model.to(dtype).eval()
    limit, eos = target.config.max_context, list(target.config.eos_token_ids)

    @torch.inference_mode()
    def run(group: int, max_new_tokens: int) -> _Run:
        ids = torch.tensor(work.groups[group])
        config = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=min(max_new_tokens, limit - ids.shape[1]),
            eos_token_id=eos or None,
            pad_token_id=eos[0] if eos else 0,
        )
        with _quiet(transformers):
            output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        tokens = output[0, ids.shape[1] :].tolist()
        return _Run([tokens], len(tokens), len(tokens))  # its prompt pass yields the first token

    threads = fastest_threads(lambda: run(0, 8), cpus=cpus)
    return _Entrant(PEER, "peer", run, threads)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the warnings and bars of transformers."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


# --- measuring --------------------------------------------------------------------------------------------------------


def _time(entrants: Sequence[_Entrant], group: int, max_new_tokens: int, *, first: bool, cpus: Sequence[int]) -> None:
    """Run every row twice on this group, A, B, ..., B, A."""
    for visit, order in enumerate((entrants, entrants[::-1])):
        for entrant in order:
            pin_threads(entrant.threads, cpus=cpus)
            start = perf_counter()
            run = entrant.run(group, max_new_tokens)
            seconds = perf_counter() - start
            entrant.timings.setdefault(group, []).append((sum(map(len, run.tokens)), seconds))
            if first and visit == 0:
                entrant.runs.append(run)


def _row(entrant: _Entrant, same_as_plain: bool | None) -> Row:
    texts = [tokens for run in entrant.runs for tokens in run.tokens]
    passes = sum(run.request_passes for run in entrant.runs)
    rates = [tokens / seconds for visits in entrant.timings.values() for tokens, seconds in visits]
    low, high = np.percentile(rates, [10, 90]).tolist()
    medians = [np.median(visits, axis=0) for visits in entrant.timings.values()]
    tokens, seconds = np.sum(medians, axis=0).tolist()
    return Row(
        method=entrant.name,
        guarantee=entrant.guarantee,
        same_as_plain=same_as_plain,
        tokens_per_pass=sum(map(len, texts)) / max(1, passes),
        passes=sum(run.passes for run in entrant.runs),
        tokens_per_s=tokens / seconds,
        spread=(low, high),
        distinct_4gram=sum(map(distinct_ngrams, texts)) / len(texts),
    )
