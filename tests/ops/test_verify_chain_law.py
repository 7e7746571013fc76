"""The exact law of verify_chain, recovered through the op, and wrong variants that must not pass for it."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdecode.testing import law
from fastdecode.testing.reference import sample as sample_reference

ROOT = Path(__file__).parents[2]
EXACT, VISIBLE = 1e-12, 1e-3  # error of a right law in float64; what every wrong variant must exceed
UNFILTERED = sample_reference.Filters()


def probs_model(seed: int, vocab_size: int, filters: sample_reference.Filters = UNFILTERED) -> law.Model:
    logits = law.random_model(vocab_size, seed)
    cache: dict[tuple[int, ...], np.ndarray] = {}

    def probs(context: tuple[int, ...]) -> np.ndarray:
        if context not in cache:
            cache[context] = sample_reference.law(logits(context), filters).probs.astype(np.float64)
        return cache[context]

    return probs


def table(model: law.Model, drafts: list[tuple[int, ...]], depth: int) -> torch.Tensor:
    """Rows of the model along each draft: [len(drafts), depth, V]; row i sees the first i drafted tokens."""
    return torch.from_numpy(np.array([[model(x[:i]) for i in range(depth)] for x in drafts]))


def law_of_op(verify: Callable, drafts: list[tuple[int, ...]], **inputs: torch.Tensor | None) -> list[law.Law]:
    """Law of the emitted tokens for each draft; `inputs` have the drafts as dimension 0."""
    tokens = torch.tensor(drafts)

    def outcome(case: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        rows = {k: t[torch.from_numpy(case)] for k, t in inputs.items() if isinstance(t, torch.Tensor)}
        others = {k: t for k, t in inputs.items() if not isinstance(t, torch.Tensor)}
        out = verify(tokens[torch.from_numpy(case)], uniforms=torch.from_numpy(uniforms), **rows, **others)
        assert (out.status & 39 == 0).all(), out.status
        return out.tokens.numpy()

    return law.exact_law(outcome, tokens.shape[1] + 1, len(drafts), grid=5)


def target_inputs(kind: str, seed: int, drafts: list[tuple[int, ...]], depth: int) -> tuple[dict, law.Model]:
    """Target arguments of the op, and the law it has to reproduce."""
    if kind == "probs":
        model = probs_model(seed, 3)
        return {"target_probs": table(model, drafts, depth)}, model
    chosen = {
        "logits": {},
        "temperature": {"temperature": 0.6},
        "top_k": {"top_k": 2},
        "top_p": {"top_p": 0.8},
        "all": {"temperature": 1.3, "top_k": 2, "top_p": 0.9, "min_p": 0.1},
        "greedy": {"temperature": 0.0},
    }[kind]
    rows = table(law.random_model(3, seed), drafts, depth)
    return {"target_logits": rows, **chosen}, probs_model(seed, 3, sample_reference.Filters(**chosen))


TARGETS = ("probs", "logits", "temperature", "top_k", "top_p", "all", "greedy")


def sampled_draft_error(
    verify: Callable,
    kind: str,
    length: int,
    seed: int,
    *,
    lens: Callable | None = None,
    given: Callable[[np.ndarray], np.ndarray] = lambda q: q,
    draw: Callable[[np.ndarray], np.ndarray] = lambda q: q,
) -> float:
    """Error of the joint law of length + 1 tokens when drafts come from draw(q) and the op is told given(q)."""
    drafts = list(itertools.product(range(3), repeat=length))
    target, target_model = target_inputs(kind, seed, drafts, length + 1)
    drafter = probs_model(seed + 1000, 3)
    weights = [float(np.prod([draw(drafter(x[:i]))[x[i]] for i in range(length)])) for x in drafts]
    draft_lens = None if lens is None else torch.tensor([lens(x, drafter) for x in drafts], dtype=torch.int32)
    laws = law_of_op(
        verify,
        drafts,
        **target,
        draft_lens=draft_lens,
        draft_probs=table(lambda context: given(drafter(context)), drafts, length),
    )
    got = law.speculative_law(list(zip(weights, laws)), target_model, length + 1)
    return law.law_error(got, law.sequence_law(target_model, length + 1))


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_ratio_law_with_draft_probs(ops, length, kind):
    assert sampled_draft_error(ops.verify_chain, kind, length, seed=length) < EXACT


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_ratio_law_without_draft_probs(ops, length, kind):
    """A deterministic draft: every single draft must give the target law by itself."""
    drafts = list(itertools.product(range(3), repeat=length))
    target, model = target_inputs(kind, length, drafts, length + 1)
    want = law.sequence_law(model, length + 1)
    for found in law_of_op(ops.verify_chain, drafts, **target):
        assert law.law_error(law.speculative_law([(1.0, found)], model, length + 1), want) < EXACT


@pytest.mark.parametrize("kind", ["logits", "temperature", "top_k", "top_p", "all", "greedy"])
def test_coupled_law(ops, kind):
    drafts = list(itertools.product(range(3), repeat=2))
    target, model = target_inputs(kind, 5, drafts, 3)
    want = law.sequence_law(model, 3)
    for found in law_of_op(ops.verify_chain, drafts, **target, rule="coupled"):
        assert law.law_error(law.speculative_law([(1.0, found)], model, 3), want) < EXACT


@pytest.mark.parametrize("kind", ["probs", "all"])
def test_ratio_law_with_ragged_lengths(ops, kind):
    """Lengths fixed per batch row, and lengths that depend on what was drafted before (in-draft stopping rules)."""
    for fixed in range(3):
        assert sampled_draft_error(ops.verify_chain, kind, 2, seed=7, lens=lambda x, q, n=fixed: n) < EXACT
    stop_after_two = lambda x, q: 1 if x[0] == 2 else 2  # noqa: E731 - the next row's business, not this token's
    assert sampled_draft_error(ops.verify_chain, kind, 2, seed=7, lens=stop_after_two) < EXACT


# Negative oracles: wrong ways to use a right op, which the same machinery must see.


def test_negative_oracle_deterministic_draft_with_q_in_the_ratio(ops):
    def most_likely(q: np.ndarray) -> np.ndarray:
        return np.eye(q.size)[q.argmax()]

    assert sampled_draft_error(ops.verify_chain, "probs", 2, seed=3, draw=most_likely) > VISIBLE
    assert sampled_draft_error(ops.verify_chain, "probs", 2, seed=3, draw=most_likely, given=most_likely) < EXACT


def test_negative_oracle_wrong_draft_probs(ops):
    def tempered(q: np.ndarray) -> np.ndarray:
        return q**1.5 / (q**1.5).sum()

    assert sampled_draft_error(ops.verify_chain, "probs", 2, seed=3, given=lambda q: 1.2 * q) > VISIBLE
    assert sampled_draft_error(ops.verify_chain, "probs", 2, seed=3, given=tempered) > VISIBLE
    assert sampled_draft_error(ops.verify_chain, "probs", 2, seed=3, given=tempered, draw=tempered) < EXACT


def test_negative_oracle_draft_dropped_for_its_own_value(ops):
    def drop_unlikely(x: tuple[int, ...], q: law.Model) -> int:
        kept = [q(x[:i])[x[i]] >= 0.25 for i in range(len(x))]
        return kept.index(False) if False in kept else len(x)

    assert sampled_draft_error(ops.verify_chain, "probs", 2, seed=3, lens=drop_unlikely) > VISIBLE


def mutant_error(namespace: str) -> float:
    """The law test on the op of another torch namespace; run inside the process that loaded the mutant library."""
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
        return max(sampled_draft_error(module.verify_chain, kind, 2, seed=3) for kind in ("probs", "logits"))
    finally:
        module.torch = original


@pytest.mark.slow
@pytest.mark.parametrize("replace", ["target_v - draft_v", "target_v + draft_v"], ids=["unchanged", "p + q"])
def test_one_character_mutation_of_the_kernel_is_found(tmp_path, replace):
    """Builds the library again with one character of the residual changed: the law must be visibly wrong."""
    for name in ("CMakeLists.txt", "cmake", "csrc", "python"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    kernel = tmp_path / "csrc" / "verify" / "verify_chain_cpu.cpp"
    text = kernel.read_text()
    find = "target_v - draft_v"
    assert text.count(find) >= 1, "the residual is written differently now: point this test at it"
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
        f"import test_verify_chain_law as m; print(m.mutant_error({namespace!r}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    error = float(out.stdout.split()[-1])
    assert error < EXACT if find == replace else error > VISIBLE


def pybind_option() -> list[str]:
    try:
        import pybind11
    except ImportError:
        return []
    return [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
