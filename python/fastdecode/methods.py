"""The published systems this package runs, as compositions of a drafter, an acceptance rule and a policy.

Every method supports greedy decoding, and under sampling the acceptance rules it lists, the first by default:

    coupled   the target draws at every position with the noise plain sampling would use, and a draft is kept while it
              agrees: the output is plain sampling's, token for token, whatever was drafted (guarantee "exact");
    ratio     a draft is kept with probability min(1, target / draft), else redrawn from what is left (Leviathan et al.
              2023, Chen et al. 2023): other tokens than plain sampling's, of the same law (guarantee "in law").
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from .drafters import Drafter, PromptLookup, SmallModel
from .models.base import Model
from .policies import ConfidenceStop, FixedLength, Policy

__all__ = ["METHODS", "Guarantee", "Method", "find_method"]

Guarantee = Literal["exact", "in law"]
Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Method:
    """One published system.

    Attributes:
        name: for `generate(method=...)` and the command line.
        paper: where it is from.
        parts: loop, drafter, policy and ops it is made of.
        parameters: options of its own and their defaults, keyword arguments of `generate`; a default's type is theirs.
        policy_parameters: those of them that a `policy` replaces.
        rules: acceptance rules it offers under sampling, default first; empty for plain decoding.
        needs_draft_model: whether `draft_model` is used.
        drafter, policy: build the parts from the options (and the draft model); None for plain decoding.
    """

    name: str
    paper: str
    parts: tuple[str, ...]
    parameters: Mapping[str, int | float]
    policy_parameters: tuple[str, ...] = ("draft_length",)
    rules: tuple[str, ...] = ()
    needs_draft_model: bool = False
    drafter: Callable[[Options, Model | None], Drafter] | None = None
    policy: Callable[[Options], Policy] | None = None

    def guarantee(self, rule: str | None = None, *, sampled: bool = False) -> Guarantee:
        """What the output has in common with plain decoding: the same tokens, or the same law."""
        rule = rule or next(iter(self.rules), None)
        return "in law" if sampled and rule == "ratio" else "exact"


def _small_model(options: Options, model: Model | None) -> Drafter:
    assert model is not None
    return SmallModel(model)


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
        rules=("coupled", "ratio"),
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
        rules=("coupled", "ratio"),
        needs_draft_model=True,
        drafter=_small_model,
        policy=lambda options: ConfidenceStop(options["draft_length"], options["confidence"]),
    ),
    Method(
        name="prompt-lookup",
        paper="Saxena 2023, prompt lookup decoding; Yang et al. 2023 (arXiv 2304.04487)",
        parts=("speculative", "PromptLookup", "FixedLength", "verify_chain"),
        parameters={"draft_length": 8, "max_ngram": 3, "min_ngram": 1},
        rules=("coupled", "ratio"),
        drafter=lambda options, model: PromptLookup(options["max_ngram"], options["min_ngram"]),
        policy=lambda options: FixedLength(options["draft_length"]),
    ),
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
