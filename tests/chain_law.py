"""The exact law of a chain verification under every optional argument, for the op and for the reference alike.

A `Target` is a random model under filters, a `Drafter` a random law over its own vocabulary. `speculative_error` puts
all drafts through a verification as one batch, weighs what it emits with the probability of each draft, and compares
with the target's law; `single_errors` does so for each draft alone, which is what deterministic drafts need.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from fastdecode.testing import Law, exact_law, law_error, random_model, sequence_law, speculative_law
from fastdecode.testing.reference import sample as reference

EXACT, VISIBLE = 1e-12, 1e-3  # error of a right law in float64; what every wrong variant must exceed
Draft = tuple[int, ...]
Verify = Callable[..., object]  # with the arguments of ops.verify_chain


@dataclass(frozen=True)
class Target:
    """A random model of `vocab_size` ids, and the filters that the verification is told."""

    vocab_size: int = 3
    seed: int = 0
    filters: dict = field(default_factory=dict)  # scalars of verify_chain, bias, ban_ids
    masks: tuple[int, ...] | None = None  # one word of allowed ids per depth, or one for all
    as_probs: bool = False

    def logits(self, context: Draft) -> np.ndarray:
        return random_model(self.vocab_size, self.seed)(context)

    def probs(self, context: Draft) -> np.ndarray:
        """The law that must come out after `context`."""
        scalars = {k: v for k, v in self.filters.items() if k not in ("bias", "ban_ids")}
        bias, bans = self.filters.get("bias"), self.filters.get("ban_ids")
        chosen = reference.Filters(
            **scalars,
            bias=None if bias is None else bias.numpy(),
            bans=() if bans is None else tuple(bans.tolist()),
            bitmask=None if self.masks is None else np.array([self._mask(len(context))]),
        )
        return reference.law(self.logits(context), chosen).probs.astype(np.float64)

    def _mask(self, depth: int) -> int:
        assert self.masks is not None
        return self.masks[depth if len(self.masks) > 1 else 0]

    def arguments(self, prefixes: list[list[Draft]]) -> dict:
        """Of verify_chain, per draft; `prefixes[d][i]` is what row i of draft d has seen."""
        rows = self.probs if self.as_probs else self.logits
        table = torch.from_numpy(np.array([[rows(prefix) for prefix in draft] for draft in prefixes]))
        made: dict = {"target_probs" if self.as_probs else "target_logits": table} | self.filters
        for name in ("bias", "ban_ids"):
            if name in made:
                made[name] = made[name].expand(len(prefixes), -1)
        if self.masks is not None:
            words = torch.tensor(self.masks[: table.shape[1]], dtype=torch.int32)[:, None]
            shape = (len(prefixes), 1) if len(self.masks) == 1 else (len(prefixes), *words.shape)
            made["bitmask"] = words.expand(shape)
        return made


@dataclass(frozen=True)
class Drafter:
    """A random law over draft ids; `to_target` is draft_to_target."""

    seed: int = 1000
    to_target: Draft | None = None
    vocab_size: int = 3

    def probs(self, context: Draft) -> np.ndarray:
        weights = np.exp(random_model(self.vocab_size, self.seed)(context))
        return weights / weights.sum()

    def image(self, x: int, target_size: int) -> int:
        if self.to_target is not None:
            x = self.to_target[x]
        return x if 0 <= x < target_size else -1


def law_of(
    verify: Verify,
    drafts: list[Draft],
    *,
    rule: str = "ratio",
    flat: bool = False,
    lens: list[int] | None = None,
    **inputs: object,
) -> list[Law]:
    """Law of the emitted tokens for each draft. Tensors have the drafts as dimension 0, but for draft_to_target.

    flat: the target's rows go as [R, V] with row_start, among rows of NaN that must not be read.
    """
    tokens, longest = torch.tensor(drafts), len(drafts[0])
    shared = {k: v for k, v in inputs.items() if not isinstance(v, torch.Tensor) or k == "draft_to_target"}
    per_draft = {k: v for k, v in inputs.items() if k not in shared}
    used = torch.tensor([longest] * len(drafts) if lens is None else lens, dtype=torch.int32)
    # Block verification decides from the last draft to the first; exact_law wants the uniforms in that order.
    columns = [*reversed(range(longest)), longest] if rule == "block" else [*range(longest + 1)]
    tolerated = 4 if "draft_to_target" in shared else 0

    def outcome(case: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        at = torch.from_numpy(case)
        rows = {k: t[at] for k, t in per_draft.items()}  # type: ignore[index]
        if lens is not None:
            rows["draft_lens"] = used[at]
        if flat:
            rows = as_flat(rows, used[at])
        ordered = np.empty_like(uniforms)
        ordered[:, columns] = uniforms
        out = verify(tokens[at], uniforms=torch.from_numpy(ordered), rule=rule, **rows, **shared)
        status, emitted = (torch.as_tensor(x) for x in (out.status, out.tokens))  # type: ignore[attr-defined]
        assert (status & 39 & ~tolerated == 0).all(), status
        return emitted.numpy()

    return exact_law(outcome, longest + 1, len(drafts), grid=5)


def as_flat(rows: dict, lens: torch.Tensor) -> dict:
    """[B, K + 1, ...] as [R, ...]: lens[b] + 1 rows per request and one of NaN behind them; one more at either end."""
    made, batch = dict(rows), len(lens)
    for name in ("target_logits", "target_probs", "bitmask"):
        if name not in rows:
            continue
        value, fill = rows[name], 0 if name == "bitmask" else float("nan")
        if value.dim() == 2:  # a mask for all rows of a request
            value = value[:, None].expand(-1, int(lens.max()) + 1, -1)
        padded = torch.cat([value, value[:, :1]], 1)
        padded[torch.arange(batch), lens.long() + 1] = fill
        own = padded[torch.arange(padded.shape[1]) <= lens[:, None] + 1]
        guard = torch.full_like(own[:1], fill)
        made[name] = torch.cat([guard, own, guard])
    made["row_start"] = torch.cat([torch.ones(1), 1 + (lens + 2).cumsum(0)]).int()
    return made


def proposals(target: Target, drafter: Drafter, length: int) -> tuple[list[Draft], list[list[Draft]]]:
    """All drafts, and for each the contexts of its rows in the target's ids.

    Rows behind a draft without an image cannot matter: they get the context before it.
    """
    drafts = list(itertools.product(range(drafter.vocab_size), repeat=length))
    prefixes = []
    for draft in drafts:
        image = list(itertools.takewhile(lambda x: x >= 0, (drafter.image(x, target.vocab_size) for x in draft)))
        prefixes.append([tuple(image[:i]) for i in range(length + 1)])
    return drafts, prefixes


def speculative_error(
    verify: Verify,
    target: Target,
    drafter: Drafter = Drafter(),
    *,
    length: int = 2,
    rule: str = "ratio",
    lens: Callable[[Draft], int] | None = None,
    flat: bool = False,
    given: Callable[[np.ndarray], np.ndarray] = lambda q: q,
    draw: Callable[[np.ndarray], np.ndarray] = lambda q: q,
    told: dict | None = None,
) -> float:
    """Error of the joint law of length + 1 tokens when drafts come from draw(q) and the op is told given(q).

    told: arguments that are added or replaced, to tell the op something wrong.
    """
    return _error_and_count(verify, target, drafter, length, rule, lens, flat, given, draw, told or {})[0]


def expected_accepted(verify: Verify, target: Target, drafter: Drafter = Drafter(), **options: object) -> float:
    """Mean number of drafts kept, exactly."""
    defaults = {"length": 2, "rule": "ratio", "lens": None, "flat": False, "given": lambda q: q, "draw": lambda q: q}
    return _error_and_count(verify, target, drafter, **defaults | options, told={})[1]  # type: ignore[arg-type]


def _error_and_count(
    verify: Verify,
    target: Target,
    drafter: Drafter,
    length: int,
    rule: str,
    lens: Callable[[Draft], int] | None,
    flat: bool,
    given: Callable[[np.ndarray], np.ndarray],
    draw: Callable[[np.ndarray], np.ndarray],
    told: dict,
) -> tuple[float, float]:
    drafts, prefixes = proposals(target, drafter, length)
    weights = [float(np.prod([draw(drafter.probs(x[:i]))[x[i]] for i in range(length)])) for x in drafts]
    draft_probs = np.array([[given(drafter.probs(x[:i])) for i in range(length)] for x in drafts])
    laws = law_of(
        verify,
        drafts,
        rule=rule,
        flat=flat,
        lens=None if lens is None else [lens(x) for x in drafts],
        **{"draft_probs": torch.from_numpy(draft_probs)} | target.arguments(prefixes) | mapping(drafter) | told,
    )
    emitted = list(zip(weights, laws))
    count = sum(w * p * (sum(t >= 0 for t in tokens) - 1) for w, law in emitted for tokens, p in law.items())
    got = speculative_law(emitted, target.probs, length + 1)
    return law_error(got, sequence_law(target.probs, length + 1)), count


def single_errors(
    verify: Verify,
    target: Target,
    drafter: Drafter = Drafter(),
    *,
    length: int = 2,
    rule: str = "ratio",
    flat: bool = False,
) -> list[float]:
    """The error of each draft alone, without draft probabilities: any draft must give the target's law."""
    drafts, prefixes = proposals(target, drafter, length)
    laws = law_of(verify, drafts, rule=rule, flat=flat, **target.arguments(prefixes) | mapping(drafter))
    want = sequence_law(target.probs, length + 1)
    return [law_error(speculative_law([(1.0, law)], target.probs, length + 1), want) for law in laws]


def mapping(drafter: Drafter) -> dict:
    return {} if drafter.to_target is None else {"draft_to_target": torch.tensor(drafter.to_target)}
