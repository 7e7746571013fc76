"""The exact law of verify_chain, recovered through the op, and wrong variants that must not pass for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import chain_law
from backends import Backend
from chain_law import EXACT, VISIBLE, Drafter, Target
from fastdecode.testing import law_error, sequence_law, speculative_law
from fastdecode.testing.reference import logits as penalty_reference

ROOT = Path(__file__).parents[2]
RULES = ("ratio", "block")
BIAS = torch.tensor([0.5, -1.0, 0.25])
TARGETS = {
    "probs": Target(as_probs=True, seed=3),
    "logits": Target(seed=3),
    "temperature": Target(seed=4, filters={"temperature": 0.6}),
    "top_k": Target(seed=5, filters={"top_k": 2}),
    "top_p": Target(seed=6, filters={"top_p": 0.8}),
    "min_p": Target(seed=7, filters={"min_p": 0.25}),
    "typical": Target(seed=8, filters={"typical_p": 0.6}),
    "bias": Target(seed=9, filters={"bias": BIAS}),
    "bans": Target(seed=10, filters={"ban_ids": torch.tensor([1, -1])}),
    "bitmask": Target(seed=11, masks=(0b101,)),
    "bitmask per row": Target(seed=12, masks=(0b101, 0b011, 0b111, 0b110)),
    "joint": Target(4, seed=14, filters={"top_k": 2, "top_p": 0.6, "order": "joint"}),
    "all": Target(
        4,
        seed=14,
        filters={"temperature": 1.3, "top_k": 3, "top_p": 0.95, "min_p": 0.05, "typical_p": 0.9},
        masks=(0b1111, 0b0111, 0b1110, 0b1011),
    ),
    "all, joint": Target(
        4,
        seed=15,
        filters={
            "temperature": 1.5,
            "top_k": 2,
            "top_p": 0.6,
            "min_p": 0.02,
            "typical_p": 0.95,
            "order": "joint",
            "bias": torch.tensor([0.5, -1.0, 0.25, 0.0]),
            "ban_ids": torch.tensor([-1, 2]),
        },
    ),
    "greedy": Target(seed=16, filters={"temperature": 0.0}),
}
FILTERED = [name for name in TARGETS if name != "probs"]


def drafter_for(target: Target, seed: int) -> Drafter:
    return Drafter(seed=1000 + seed, vocab_size=target.vocab_size)


def shortest(backend: Backend) -> int:
    """The number of drafts: the host executor takes milliseconds for a row under several filters."""
    return 1 if backend.name == "simt" else 2


@pytest.mark.thin
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_law_with_draft_probs(ops, rule, length, name):
    target = TARGETS[name]
    if length == 3 and target.vocab_size > 3:
        target = Target(3, target.seed, {k: v[:3] if k == "bias" else v for k, v in target.filters.items()})
    drafter = drafter_for(target, length)
    assert chain_law.speculative_error(ops.verify_chain, target, drafter, length=length, rule=rule) < EXACT


@pytest.mark.thin
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_law_without_draft_probs(backend, rule, length, name):
    """A deterministic draft: every single draft must give the target law by itself."""
    target, ops = TARGETS[name], backend.ops
    if length == 3 and backend.name == "simt":
        pytest.skip("10,000 rows, where lengths 1 and 2 show the same")
    if length == 3 and target.vocab_size > 3:
        pytest.skip("256 laws that lengths 1 and 2 have shown")
    drafter = drafter_for(target, length)
    assert max(chain_law.single_errors(ops.verify_chain, target, drafter, length=length, rule=rule)) < EXACT


@pytest.mark.parametrize("name", FILTERED)
def test_coupled_law(backend, name):
    target, length = TARGETS[name], shortest(backend)
    drafter = drafter_for(target, 2)
    errors = chain_law.single_errors(backend.ops.verify_chain, target, drafter, length=length, rule="coupled")
    assert max(errors) < EXACT


DRAFTERS = {
    "permuted": Drafter(to_target=(2, 0, 1)),
    "smaller": Drafter(to_target=(2, 0), vocab_size=2),
    "one id": Drafter(to_target=(1,), vocab_size=1),
    "ids without image": Drafter(to_target=(2, -1, 0)),
    "ids beyond the target": Drafter(to_target=(0, 7, -9)),
    "no image at all": Drafter(to_target=(-1, -1), vocab_size=2),
    "two ids of one image": Drafter(to_target=(1, 1, 0)),
    "larger": Drafter(to_target=(2, 0, -1, 1, 0), vocab_size=5),
}


@pytest.mark.thin
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("kind", ["probs", "logits", "all, joint"])
@pytest.mark.parametrize("rule", [*RULES, "coupled"])
def test_law_with_a_draft_vocabulary(backend, rule, kind, name):
    """A draft without an image proposes nothing, but its mass counts: to skip it silently would bias the law."""
    target, drafter = TARGETS[kind], DRAFTERS[name]
    verify, options = backend.ops.verify_chain, {"rule": rule, "length": shortest(backend)}
    if rule == "coupled" and kind == "probs":
        pytest.skip("coupled draws from logits")
    if rule != "coupled":
        assert chain_law.speculative_error(verify, target, drafter, **options) < EXACT
    assert max(chain_law.single_errors(verify, target, drafter, **options)) < EXACT


@pytest.mark.thin
@pytest.mark.parametrize("kind", ["probs", "logits", "bitmask", "bitmask per row", "all", "all, joint"])
@pytest.mark.parametrize("rule", RULES)
def test_law_of_flat_rows(backend, rule, kind):
    target, ops = TARGETS[kind], backend.ops
    drafter = drafter_for(target, 2)
    lens = lambda x: 1 if x[0] == 2 else 2  # noqa: E731
    whole = {"rule": rule, "flat": True, "length": shortest(backend)}
    assert chain_law.speculative_error(ops.verify_chain, target, drafter, **whole) < EXACT
    if backend.name == "simt" and kind.startswith("all"):
        return  # what follows has two drafts, and all filters for each
    assert chain_law.speculative_error(ops.verify_chain, target, drafter, rule=rule, flat=True, lens=lens) < EXACT
    mapped = DRAFTERS["ids without image"]
    assert chain_law.speculative_error(ops.verify_chain, target, mapped, rule=rule, flat=True) < EXACT


@pytest.mark.thin
@pytest.mark.parametrize("kind", ["probs", "all"])
@pytest.mark.parametrize("rule", RULES)
def test_law_with_ragged_lengths(ops, rule, kind):
    """Lengths fixed per batch row, and lengths that depend on what was drafted before (in-draft stopping rules)."""
    target = TARGETS[kind]
    drafter = drafter_for(target, 7)
    for fixed in range(3):
        assert chain_law.speculative_error(ops.verify_chain, target, drafter, rule=rule, lens=lambda x, n=fixed: n) < (
            EXACT
        )
    stop_after_two = lambda x: 1 if x[0] == 2 else 2  # noqa: E731 - the next row's business, not this token's
    assert chain_law.speculative_error(ops.verify_chain, target, drafter, rule=rule, lens=stop_after_two) < EXACT


class Penalized(Target):
    """A target whose rows are penalised for the text so far: what was said before, and the drafts before the row."""

    said, prompt_length = (1, 0, 1, 2), 2
    penalties: ClassVar = {"repetition": 1.5, "presence": 0.5, "frequency": 0.25}

    def logits(self, context: tuple[int, ...]) -> np.ndarray:
        prompt, output = self.said[: self.prompt_length], self.said[self.prompt_length :]
        row = super().logits(context)
        return penalty_reference.penalize_row(row, list(prompt), [*output, *context], **self.penalties)


@pytest.mark.thin
@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_law_of_penalized_rows(backend, rule, length):
    """Through `penalize`, over raw logits."""
    ops = backend.ops
    if length == 3 and backend.name == "simt":
        pytest.skip("a minute, where lengths 1 and 2 show the same")
    target, drafter = Penalized(seed=17, filters={"temperature": 0.9, "top_p": 0.95}), Drafter(seed=1017)
    drafts, prefixes = chain_law.proposals(target, drafter, length)

    def penalized(draft_tokens: torch.Tensor | None) -> dict:
        raw = Target(seed=17).arguments(prefixes)["target_logits"]
        text = torch.tensor([target.said]).expand(len(drafts), -1)
        lengths = torch.full((len(drafts),), len(target.said), dtype=torch.int32)
        options = {"prompt_lengths": target.prompt_length, "draft_tokens": draft_tokens, **target.penalties}
        return {"target_logits": ops.penalize(raw, text, lengths, **options).logits}

    chosen = {"length": length, "rule": rule}
    right, wrong = penalized(torch.tensor(drafts)), penalized(None)
    assert chain_law.speculative_error(ops.verify_chain, target, drafter, **chosen, told=right) < EXACT
    assert chain_law.speculative_error(ops.verify_chain, target, drafter, **chosen, told=wrong) > VISIBLE


@pytest.mark.parametrize("seed", range(3))
def test_block_keeps_at_least_as_many_drafts_as_ratio(backend, seed):
    """In expectation, and strictly more where it may look ahead; with one draft the two are one rule."""
    for length in (1, 2) if backend.name == "simt" else (1, 2, 3):
        pair = (backend.ops.verify_chain, Target(seed=seed), Drafter(seed=50 + seed))
        ratio = chain_law.expected_accepted(*pair, length=length)
        block = chain_law.expected_accepted(*pair, length=length, rule="block")
        assert block > ratio + 1e-4 if length > 1 else abs(block - ratio) < EXACT


def test_block_example_of_the_paper(ops):
    """Sun et al. 2024, section 2: target (1/3, 2/3), drafter (2/3, 1/3), two drafts: 10/9 and 11/9 are kept."""
    drafts = [(a, b) for a in range(2) for b in range(2)]
    target, drafter = (torch.tensor(law, dtype=torch.float64) for law in ((1 / 3, 2 / 3), (2 / 3, 1 / 3)))
    for rule, mean in (("ratio", 10 / 9), ("block", 11 / 9)):
        rows = {"draft_probs": drafter.expand(4, 2, 2), "target_probs": target.expand(4, 3, 2)}
        laws = chain_law.law_of(ops.verify_chain, drafts, rule=rule, **rows)
        kept = sum(
            float(drafter[a] * drafter[b]) * p * (sum(t >= 0 for t in tokens) - 1)
            for (a, b), law in zip(drafts, laws)
            for tokens, p in law.items()
        )
        assert kept == pytest.approx(mean, abs=EXACT)


# Negative oracles: wrong ways to use a right op, which the same machinery must see. It is the machinery that they try,
# for which one kind of right op is enough.


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("rule", RULES)
def test_negative_oracle_deterministic_draft_with_q_in_the_ratio(ops, rule):
    def most_likely(q: np.ndarray) -> np.ndarray:
        return np.eye(q.size)[q.argmax()]

    target = TARGETS["probs"]
    assert chain_law.speculative_error(ops.verify_chain, target, rule=rule, draw=most_likely) > VISIBLE
    right = {"draw": most_likely, "given": most_likely}
    assert chain_law.speculative_error(ops.verify_chain, target, rule=rule, **right) < EXACT


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("rule", RULES)
def test_negative_oracle_wrong_draft_probs(ops, rule):
    def tempered(q: np.ndarray) -> np.ndarray:
        return q**1.5 / (q**1.5).sum()

    target = TARGETS["probs"]
    assert chain_law.speculative_error(ops.verify_chain, target, rule=rule, given=lambda q: 1.2 * q) > VISIBLE
    assert chain_law.speculative_error(ops.verify_chain, target, rule=rule, given=tempered) > VISIBLE
    right = {"draw": tempered, "given": tempered}
    assert chain_law.speculative_error(ops.verify_chain, target, rule=rule, **right) < EXACT


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("rule", RULES)
def test_negative_oracle_wrong_target(ops, rule):
    """The verification is told another temperature, order or mask than the law it is compared with."""
    for name, told in (
        ("temperature", {"temperature": 0.65}),
        ("typical", {"typical_p": 1.0}),
        ("joint", {"order": "k_then_p"}),
        ("bitmask", {"bitmask": None}),
    ):
        target = TARGETS[name]
        drafter = drafter_for(target, 2)
        assert chain_law.speculative_error(ops.verify_chain, target, drafter, rule=rule, told=told) > VISIBLE, name


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("rule", RULES)
def test_negative_oracle_draft_dropped_for_its_own_value(ops, rule):
    drafter = Drafter(seed=1003)

    def drop_unlikely(x: tuple[int, ...]) -> int:
        kept = [drafter.probs(x[:i])[x[i]] >= 0.25 for i in range(len(x))]
        return kept.index(False) if False in kept else len(x)

    error = chain_law.speculative_error(ops.verify_chain, TARGETS["probs"], drafter, rule=rule, lens=drop_unlikely)
    assert error > VISIBLE


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("rule", RULES)
def test_negative_oracle_unmapped_drafts_skipped(ops, rule):
    """A drafter that draws again where an id has no image, but reports its law as it was."""

    def drawn(q: np.ndarray) -> np.ndarray:
        mapped = q * np.array([1, 0, 1])
        return mapped / mapped.sum()

    drafter = DRAFTERS["ids without image"]
    assert chain_law.speculative_error(ops.verify_chain, TARGETS["probs"], drafter, rule=rule, draw=drawn) > VISIBLE
    right = {"draw": drawn, "given": drawn}
    assert chain_law.speculative_error(ops.verify_chain, TARGETS["probs"], drafter, rule=rule, **right) < EXACT


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("rule", ["typical", "top_beta"])
def test_negative_control_lossy_rules_are_lossy(ops, rule):
    """The machinery that passes ratio and block rejects the rules that say they change the law."""
    options = {"bonus": "sample"} if rule == "typical" else {"beta": 2, "tau": 1.0}
    target = TARGETS["logits"]
    drafts, prefixes = chain_law.proposals(target, Drafter(), 2)
    rows = target.arguments(prefixes)
    if rule == "typical":
        laws = chain_law.law_of(ops.verify_chain, drafts, rule=rule, **rows, **options)
    else:  # draws nothing
        tokens = ops.verify_chain(torch.tensor(drafts), rule=rule, **rows, **options).tokens
        laws = [{tuple(row.tolist()): 1.0} for row in tokens]
    want = sequence_law(target.probs, 3)
    for law in laws:
        emitted = speculative_law([(1.0, law)], target.probs, 3)
        assert law_error(emitted, want) > VISIBLE


def mutant_errors(namespace: str) -> list[float]:
    """Per rule: the law test on the op of another torch namespace, run in the process that loaded the mutant."""
    from fastdecode.ops import verify as module

    class Redirected:
        def __getattr__(self, name: str):
            return getattr(torch.ops, namespace if name == "fastdecode" else name)

    class Torch:
        ops = Redirected()

        def __getattr__(self, name: str):
            return getattr(torch, name)

    original, module.torch = module.torch, Torch()
    try:
        return [
            max(
                chain_law.speculative_error(module.verify_chain, TARGETS[name], Drafter(seed=1003), rule=rule)
                for name in ("probs", "logits")
            )
            for rule in RULES
        ]
    finally:
        module.torch = original


@pytest.mark.slow
@pytest.mark.parametrize(
    "find, replace, broken",
    [
        ("target_v - draft_v", "target_v + draft_v", ["ratio", "block"]),
        ("left + (1 - weight)", "left + (1 + weight)", ["block"]),
    ],
    ids=["p + q", "1 + w"],
)
def test_one_character_mutation_of_the_kernel_is_found(tmp_path, find, replace, broken):
    """Builds the library again with one character changed: the law of the rules it concerns must be visibly wrong, and
    that of the others as exact as ever."""
    for name in ("CMakeLists.txt", "cmake", "csrc", "python"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    kernel = tmp_path / "csrc" / "verify" / "verify_chain_cpu.cpp"
    text = kernel.read_text()
    assert text.count(find) >= 1, "the rule is written differently now: point this test at it"
    kernel.write_text(text.replace(find, replace))
    namespace = "fastdecode_mutant"
    subprocess.run(
        [
            "cmake",
            "-S",
            tmp_path,
            "-B",
            tmp_path / "b",
            f"-DFASTDECODE_NAMESPACE={namespace}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DCMAKE_BUILD_TYPE=Release",
            *pybind_option(),
        ],
        check=True,
    )
    subprocess.run(["cmake", "--build", tmp_path / "b", "--target", "_C_cpu", "-j", "2"], check=True)
    library = next((tmp_path / "b").rglob("_C_cpu*.so"))
    code = (
        f"import sys, torch; sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(ROOT / 'tests' / 'ops')!r}]\n"
        f"import fastdecode; torch.ops.load_library({str(library)!r})\n"
        f"import test_verify_chain_law as m; print(*m.mutant_errors({namespace!r}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for rule, error in zip(RULES, map(float, out.stdout.split()[-len(RULES) :])):
        assert error > VISIBLE if rule in broken else error < EXACT, rule


def pybind_option() -> list[str]:
    try:
        import pybind11
    except ImportError:
        return []
    return [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
