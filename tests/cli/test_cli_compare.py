"""`fastdecode compare` and the module behind it."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from fastdecode import methods
from fastdecode.compare import compare, distinct_ngrams
from fastdecode.drafters import PromptLookup
from fastdecode.methods import METHODS, Method
from fastdecode.policies import FixedLength

FIELDS = [
    "method",
    "guarantee",
    "same_as_plain",
    "tokens_per_pass",
    "passes",
    "tokens_per_s",
    "spread",
    "distinct_4gram",
]
SHORT = ("--num-prompts", "2", "--max-new-tokens", "12", "--threads", "1", "--no-peers")
HAS_PEER = importlib.util.find_spec("transformers") is not None


@pytest.fixture(autouse=True)
def prompts(tmp_path, monkeypatch):
    """A file of the committed prompts' shape, short enough for the tiny context, as the default."""
    file = tmp_path / "prompts.json"
    texts = ["def f(x):\n    return", "import os\nimport os\n", "for i in range(9):"]
    file.write_text(json.dumps([{"file": "a.py", "prompt": text, "header": text} for text in texts]))
    monkeypatch.setattr("fastdecode.cli.compare.PROMPTS", file)
    return file


def test_json_rows(cli, shipped, tmp_path):
    ran = cli("compare", *SHORT, "--json", "--out", tmp_path / "out.json")
    assert ran.code == 0 and ran.err == ""
    rows = json.loads(ran.out)
    assert json.loads((tmp_path / "out.json").read_text()) == rows
    assert [row["method"] for row in rows] == [name for name, method in METHODS.items() if method.cache is None]
    for row in rows:
        assert list(row) == FIELDS
        assert row["guarantee"] == "exact" and row["same_as_plain"] is True
        low, high = row["spread"]
        assert 0 < low <= row["tokens_per_s"] <= high
        assert row["tokens_per_pass"] == pytest.approx(24 / row["passes"])
        assert 0 < row["distinct_4gram"] <= 1
    assert (rows[0]["passes"], rows[0]["tokens_per_pass"]) == (24, 1.0)
    assert rows[1]["passes"] < 24


@pytest.mark.skipif(not HAS_PEER, reason="transformers is not installed")
def test_the_peer_decodes_the_same_text(cli, shipped):
    rows = json.loads(cli("compare", *SHORT[:-1], "--methods", "plain", "--dtype", "float64", "--json").out)
    assert [row["method"] for row in rows] == ["plain", "transformers"]
    plain, peer = rows
    assert (peer["guarantee"], peer["same_as_plain"]) == ("peer", None)
    for name in ("passes", "tokens_per_pass", "distinct_4gram"):
        assert peer[name] == plain[name]


def test_sampling_has_a_row_per_rule_and_no_peer(cli, shipped):
    ran = cli("compare", *SHORT[:-1], "--temperature", "1", "--methods", "speculative,prompt-lookup", "--json")
    assert [(row["method"], row["guarantee"], row["same_as_plain"]) for row in json.loads(ran.out)] == [
        ("plain", "exact", True),
        ("speculative (coupled)", "exact", True),
        ("speculative (ratio)", "in law", None),
        ("speculative (block)", "in law", None),
        ("prompt-lookup (coupled)", "exact", True),
        ("prompt-lookup (ratio)", "in law", None),
        ("prompt-lookup (block)", "in law", None),
    ]


def test_batches_repeats_and_lengths(checkpoints):
    prompts = [[1, 2, 3], [4, 5], [6]]
    options = {"draft_model": checkpoints / "tiny-code-draft", "max_new_tokens": 6, "threads": 1, "peers": False}
    told: list[str] = []
    rows = compare(
        checkpoints / "tiny-code", prompts, methods=["speculative"], batch=2, repeats=2, progress=told.append, **options
    )
    assert [row.method for row in rows] == ["plain", "speculative"] and all(row.same_as_plain for row in rows)
    assert rows[0].passes == 12 and rows[0].tokens_per_pass == 1.0  # two groups of six passes, three requests
    assert told[-1] == "timing prompts 3 of 3, repeat 2 of 2"
    none = compare(checkpoints / "tiny-code", prompts, methods=["speculative"], draft_length=0, **options)
    assert none[1].tokens_per_pass == 1.0


class Liar(PromptLookup):
    """Changes what was verified before it is booked."""

    def commit(self, result):
        result.tokens[:, 0] = (result.tokens[:, 0] + 1) % 257


def test_a_method_that_is_not_lossless_is_found(cli, shipped, monkeypatch):
    liar = Method(
        name="liar",
        paper="none",
        parts=("speculative", "Liar"),
        parameters={"draft_length": 4},
        rules=("coupled", "ratio"),
        drafter=lambda options, model: Liar(),
        policy=lambda options: FixedLength(options["draft_length"]),
    )
    monkeypatch.setattr(methods, "METHODS", {**METHODS, "liar": liar})
    for options in ((), ("--temperature", "1")):
        rows = json.loads(cli("compare", *SHORT, "--methods", "liar,prompt-lookup", *options, "--json").out)
        same = {row["method"].removesuffix(" (coupled)"): row["same_as_plain"] for row in rows}
        assert (same["plain"], same["liar"], same["prompt-lookup"]) == (True, False, True)


def test_the_table_and_a_text_file(cli, shipped, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("import os\n\nclass A:\n")
    ran = cli("compare", "--prompts", file, *SHORT[2:], "--methods", "prompt-lookup")
    assert ran.code == 0 and "prompts: 2" in ran.out and "x plain" in ran.out
    (plain,) = (line.split() for line in ran.out.splitlines() if line.startswith("plain "))
    assert plain[:5] == ["plain", "exact", "yes", "1.00", "24"] and plain[7] == "1.00"


def test_the_committed_prompts_have_this_shape():
    from fastdecode.cli.compare import _prompts
    from fastdecode.train.prompts import FILE

    assert len(_prompts(str(FILE), None)) >= 10


def test_distinct_ngrams():
    assert distinct_ngrams([1, 2, 3]) == 1.0
    assert distinct_ngrams([7] * 9) == pytest.approx(1 / 6)
    assert distinct_ngrams(list(range(9))) == 1.0


def test_compare_checks_its_arguments(checkpoints):
    with pytest.raises(ValueError, match="prompts: expected at least one, got none"):
        compare(checkpoints / "tiny-code", [])
    with pytest.raises(ValueError, match="repeats: expected at least 1, got 0"):
        compare(checkpoints / "tiny-code", [[1]], repeats=0)
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match=r"prompts: expected fewer than 96 tokens \(max_context\), got 96"):
        compare(checkpoints / "tiny-code", [[1] * 96], methods=["plain"], peers=False)
    assert torch.get_num_threads() == threads


def test_kv_cache(cli, shipped):
    ran = cli("compare", *SHORT, "--methods", "prompt-lookup", "--kv-cache", "kivi2", "--json")
    assert ran.code == 0
    assert [(row["method"], row["same_as_plain"]) for row in json.loads(ran.out)] == [
        ("plain", True),
        ("prompt-lookup", True),
    ]
    ran = cli("compare", *SHORT, "--methods", "int8-cache,hydragen", "--json")
    rows = [(row["method"], row["guarantee"], row["same_as_plain"]) for row in json.loads(ran.out)]
    assert rows == [("plain", "exact", True), ("int8-cache", "approximate", None), ("hydragen", "exact", True)]
