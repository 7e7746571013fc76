"""The published systems this package runs, as compositions of a drafter, an acceptance rule and a policy.

`METHODS` are the systems, `RULES` the ways in which they accept drafts. A guarantee says what the output has in common
with that of plain decoding: "exact", the same tokens whatever is drafted; "in law", other tokens of the same
distribution; "approximate", neither: such a rule trades the target's law for speed, and is used only when it is named.

A method with a coded cache is "approximate" because the target reads rounded keys and values. What it gives then is
what plain decoding with that cache gives, and speculation with that cache gives it too.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from ._host import Rule
from .drafters import Drafter, PromptLookup, SmallModel
from .models.base import Model
from .models.paged_cache import KVCacheConfig
from .policies import ConfidenceStop, FixedLength, Policy

__all__ = ["METHODS", "RULES", "AcceptanceRule", "Guarantee", "Method", "find_method"]

Guarantee = Literal["exact", "in law", "approximate"]
Options = Mapping[str, Any]

_LARGEST = 3.4028234663852886e38  # float32


@dataclass(frozen=True, slots=True)
class AcceptanceRule:
    """How drafts are accepted once the target has scored them.

    Attributes:
        name: for `generate(rule=...)` and the command line.
        number: for `ops.verify_chain(rule=...)`.
        paper: where it is from.
        about: what it keeps.
        guarantee: under sampling.
        greedy_guarantee: at temperature 0.
        parameters: options of its own and their defaults, keyword arguments of `generate`; a default's type is theirs.
        ranges: smallest and largest value of each.
        samples: False for a rule that takes the likeliest tokens, and so wants temperature 0.
    """

    name: str
    number: Rule
    paper: str
    about: str
    guarantee: Guarantee
    greedy_guarantee: Guarantee = "exact"
    parameters: Mapping[str, int | float] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    samples: bool = True


_RULES = (
    AcceptanceRule(
        name="coupled",
        number=Rule.COUPLED,
        paper="sampling with common random numbers",
        about="the target draws with the noise of plain sampling; a draft is kept while it agrees",
        guarantee="exact",
    ),
    AcceptanceRule(
        name="ratio",
        number=Rule.RATIO,
        paper="Leviathan et al. 2023 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318)",
        about="a draft is kept with probability min(1, target / draft), else redrawn from what is left",
        guarantee="in law",
    ),
    AcceptanceRule(
        name="block",
        number=Rule.BLOCK,
        paper="Sun et al. 2024 (arXiv 2403.10444)",
        about="ratio for whole prefixes of a draft: keeps at least as many tokens on average",
        guarantee="in law",
    ),
    AcceptanceRule(
        name="typical",
        number=Rule.TYPICAL,
        paper="Cai et al. 2024, Medusa (arXiv 2401.10774)",
        about="keeps a draft, and draws the last token, where target > min(eps, delta exp(-entropy)); no law is kept",
        guarantee="approximate",
        parameters={"eps": 0.09, "delta": 0.3},
        ranges={"eps": (0, 1), "delta": (0, _LARGEST)},
    ),
    AcceptanceRule(
        name="top_beta",
        number=Rule.TOP_BETA,
        paper="Xia et al. 2023, SpecDec (arXiv 2203.16487)",
        about="greedy with slack: keeps a draft among the beta likeliest, its logit at most tau below the best",
        guarantee="approximate",
        greedy_guarantee="approximate",
        parameters={"beta": 3, "tau": 1.0},
        ranges={"beta": (1, 2**31 - 1), "tau": (0, _LARGEST)},
        samples=False,
    ),
)

RULES: Mapping[str, AcceptanceRule] = MappingProxyType({rule.name: rule for rule in _RULES})


@dataclass(frozen=True, slots=True)
class Method:
    """One published system.

    Attributes:
        name: for `generate(method=...)` and the command line.
        paper: where it is from.
        parts: loop, drafter, policy and ops it is made of.
        parameters: options of its own and their defaults, keyword arguments of `generate`; a default's type is theirs.
        policy_parameters: those of them that a `policy` replaces.
        rules: acceptance rules it offers that keep the law, default first; empty for plain decoding.
        lossy_rules: those that do not.
        needs_draft_model: whether `draft_model` is used.
        drafter, policy: build the parts from the options (and the draft model); None for plain decoding.
        cache: builds the configuration of the target's cache from the options; None leaves it to model and caller.
        cache_guarantee: what that cache makes of plain decoding.
    """

    name: str
    paper: str
    parts: tuple[str, ...]
    parameters: Mapping[str, int | float]
    policy_parameters: tuple[str, ...] = ("draft_length",)
    rules: tuple[str, ...] = ()
    lossy_rules: tuple[str, ...] = ()
    needs_draft_model: bool = False
    drafter: Callable[[Options, Model | None], Drafter] | None = None
    policy: Callable[[Options], Policy] | None = None
    cache: Callable[[Options], KVCacheConfig] | None = None
    cache_guarantee: Guarantee = "exact"

    def guarantee(self, rule: str | None = None, *, sampled: bool = False) -> Guarantee:
        """What the output has in common with plain decoding: the same tokens, the same law, or neither."""
        rule = rule or next(iter(self.rules), None)
        if rule is None or self.cache_guarantee == "approximate":
            return self.cache_guarantee
        return RULES[rule].guarantee if sampled else RULES[rule].greedy_guarantee


_LOSSLESS = tuple(rule.name for rule in _RULES if rule.guarantee != "approximate")
_LOSSY = tuple(rule.name for rule in _RULES if rule.guarantee == "approximate")


def own_method(drafter: Drafter) -> Method:
    """The speculative loop around a drafter of the caller's."""
    return Method(
        name=type(drafter).__name__,
        paper="your own",
        parts=("speculative", type(drafter).__name__, "FixedLength", "verify_chain"),
        parameters={"draft_length": 4},
        rules=_LOSSLESS,
        lossy_rules=_LOSSY,
        drafter=lambda options, model: drafter,
        policy=lambda options: FixedLength(options["draft_length"]),
    )


def _small_model(options: Options, model: Model | None) -> Drafter:
    assert model is not None
    return SmallModel(model)


def _coded_cache(name: str, scheme: str, paper: str, **parameters: int) -> Method:
    """Plain decoding over a coded cache."""

    def cache(options: Options) -> KVCacheConfig:
        return KVCacheConfig(scheme=scheme, **{name: options[name] for name in parameters})

    parts = ("autoregressive", "PagedKVCache", "kv_append_", *(["kv_flush_"] if parameters else ()), "paged_attention")
    return Method(
        name=name, paper=paper, parts=parts, parameters=parameters, cache=cache, cache_guarantee="approximate"
    )


_KIVI = "Liu et al. 2024, KIVI (arXiv 2402.02750)"

_TABLE = (
    Method(
        name="plain",
        paper="autoregressive decoding",
        parts=("autoregressive", "sample"),
        parameters={},
    ),
    Method(
        name="speculative",
        paper="Leviathan et al. 2023 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318)",
        parts=("speculative", "SmallModel", "FixedLength", "verify_chain"),
        parameters={"draft_length": 4},
        rules=_LOSSLESS,
        lossy_rules=_LOSSY,
        needs_draft_model=True,
        drafter=_small_model,
        policy=lambda options: FixedLength(options["draft_length"]),
    ),
    Method(
        name="speculative-confidence",
        paper="drafting while the draft model is sure: assistant_confidence_threshold of Hugging Face transformers",
        parts=("speculative", "SmallModel", "ConfidenceStop", "verify_chain"),
        parameters={"draft_length": 8, "confidence": 0.4},
        policy_parameters=("draft_length", "confidence"),
        rules=_LOSSLESS,
        lossy_rules=_LOSSY,
        needs_draft_model=True,
        drafter=_small_model,
        policy=lambda options: ConfidenceStop(options["draft_length"], options["confidence"]),
    ),
    Method(
        name="prompt-lookup",
        paper="Saxena 2023, prompt lookup decoding; Yang et al. 2023 (arXiv 2304.04487)",
        parts=("speculative", "PromptLookup", "FixedLength", "verify_chain"),
        parameters={"draft_length": 8, "max_ngram": 3, "min_ngram": 1},
        rules=_LOSSLESS,
        lossy_rules=_LOSSY,
        drafter=lambda options, model: PromptLookup(options["max_ngram"], options["min_ngram"]),
        policy=lambda options: FixedLength(options["draft_length"]),
    ),
    Method(
        name="hydragen",
        paper="Juravsky et al. 2024, Hydragen (arXiv 2402.05099)",
        parts=("autoregressive", "PagedKVCache", "prefix_attention", "paged_attention", "merge_states"),
        parameters={},
        cache=lambda options: KVCacheConfig(prefix_attention=True),
    ),
    _coded_cache("kivi4", "kivi4", _KIVI, flush_block=128),
    _coded_cache("kivi2", "kivi2", _KIVI, flush_block=128),
    _coded_cache("int8-cache", "int8", "int8 by token and head, as in LMDeploy"),
    _coded_cache("int4-cache", "int4", "int4 by token and head, as in LMDeploy"),
    _coded_cache("fp8-cache", "fp8_e4m3", "FP8 E4M3 by token and head, as in vLLM"),
)

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _TABLE})


def find_method(name: str) -> Method:
    """The method of this name; ValueError that lists the names and the nearest one."""
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"generate: method: expected one of {', '.join(METHODS)}, got {name!r}{hint}")
    return method
