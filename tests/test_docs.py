"""The pages of docs/ stay true: their Python runs, their golden vectors are those of tests/golden, their links lead on.

A block tagged `python` runs, with those before it on its page. Blocks with another tag do not: `cpp` and `py` are whole
files that begin with their path, which the slow test writes, builds and tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))


def blocks(page: str) -> Iterator[tuple[int, str, str]]:
    """(first line, tag, text) of every fenced block."""
    lines = (DOCS / page).read_text().splitlines()
    fences = [i for i, line in enumerate(lines) if line.startswith("```")]
    assert len(fences) % 2 == 0, "a fence is left open"
    for begin, end in zip(fences[::2], fences[1::2], strict=True):
        assert lines[end] == "```"
        yield begin + 1, lines[begin].removeprefix("```"), "\n".join(lines[begin + 1 : end]) + "\n"


def files(page: str) -> dict[str, str]:
    """The blocks that are whole files: path -> text."""
    found = {}
    for _, tag, text in blocks(page):
        if tag in ("cpp", "py"):
            path = re.match(r"(?://|#) ([\w/.]+\.(?:h|cpp|cu|py))\n", text)
            assert path, f"{page}: expected the file's path in the first line, got {text.splitlines()[0]!r}"
            found[path[1]] = text
    return found


NEW = {path for page in PAGES for path in files(page)}


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page):
    torch.set_num_threads(1)
    namespace: dict[str, object] = {"__name__": "docs"}
    for line, tag, text in blocks(page):
        assert tag in ("python", "py", "cpp", "bash", "text", "diff"), f"{page}:{line}: {tag!r}"
        if tag == "python":
            exec(compile("\n" * line + text, str(DOCS / page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page):
    text = (DOCS / page).read_text()
    assert max(map(len, text.splitlines())) <= 120
    for _, _, code in blocks(page):
        text = text.replace(code, "")
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("https://") or (DOCS / link).exists(), link
    for path in re.findall(r"`((?:csrc|python|tests|bench|docs|cmake|examples)/[\w./]*)`", text):
        assert (ROOT / path).exists() or path in NEW, path
    for test in re.findall(r"`(test_\w+)`", text):
        assert any(f"def {test}(" in path.read_text() for path in ROOT.glob("tests/**/test_*.py")), test


def test_every_page_is_listed():
    listed = re.findall(r"\]\((\S+?\.md)\)", (DOCS / "README.md").read_text())
    assert sorted([*listed, "README.md"]) == PAGES
    assert "(docs/README.md)" in (ROOT / "README.md").read_text()


def table(page: str, first: str) -> list[dict[str, str]]:
    """The rows of the table whose first column is called so."""
    lines = (DOCS / page).read_text().splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    cells = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def filters(text: str) -> dict[str, float]:
    return {} if text == "none" else {name: float(value) for name, value in (f.split() for f in text.split(", "))}


def pinned(name: str) -> list[dict]:
    return json.loads((ROOT / "tests" / "golden" / f"{name}.json").read_text())["cases"]


def test_golden_vectors_of_sample():
    rows = table("random-numbers.md", "V")
    assert len({row["stream"] for row in rows}) >= 4
    for row in rows:
        numbers = {name: int(row[name]) for name in ("row", "seed", "offset", "stream", "node", "token")}
        assert {"vocab_size": int(row["V"]), **numbers, "filters": filters(row["filters"])} in pinned("sample")


def test_golden_vectors_of_verify_chain():
    rows = table("random-numbers.md", "number")
    assert {row["rule"] for row in rows} == {"ratio", "block", "coupled"}
    for row in rows:
        case = {
            "rule": row["rule"],
            "number": int(row["number"]),
            "vocab_size": int(row["V"]),
            "length": int(row["K"]),
            "draft_len": int(row["length"]),
            "drawn": row["drawn"] == "yes",
            "seed": int(row["seed"]),
            "offset": int(row["offset"]),
            "filters": filters(row["filters"]),
            "tokens": [int(token) for token in row["tokens"].split()],
            "num_accepted": int(row["kept"]),
        }
        assert case in pinned("verify_chain")


@pytest.mark.slow
def test_the_op_of_the_page_builds_and_passes(tmp_path):
    """The files of add-an-op.md in a copy of the repository: built, tested and measured as the page says."""
    pybind11 = pytest.importorskip("pybind11")
    written = files("add-an-op.md")
    assert len(written) == 8
    for name in ("CMakeLists.txt", "cmake", "csrc", "python", "tests", "bench", "pyproject.toml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    for path, text in written.items():
        assert not (tmp_path / path).exists(), f"{path} is there already"
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    with (tmp_path / "python" / "fastdecode" / "ops" / "__init__.py").open("a") as module:
        module.write("\nfrom .count import count_finite  # noqa\n")
    configure = ["cmake", "-S", tmp_path, "-B", tmp_path / "b", "-DCMAKE_BUILD_TYPE=Release"]
    found = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    subprocess.run([*configure, *found, "-DFASTDECODE_SIMT=ON"], check=True)
    subprocess.run(["cmake", "--build", tmp_path / "b", "--parallel", "2"], check=True)
    for library in (tmp_path / "b").glob("*.so"):
        shutil.copy(library, tmp_path / "python" / "fastdecode")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "python"), "OMP_NUM_THREADS": "1"}
    for command in (
        ["pytest", "-q", "tests/ops/test_count_finite.py", "tests/bench/test_cases.py"],
        ["bench.ops.bench_count_finite", "--quick"],
    ):
        ran = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "count_finite" in ran.stdout or " passed" in ran.stdout, ran.stdout
