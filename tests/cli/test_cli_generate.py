"""`fastdecode generate`: text, JSON, defaults and errors."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
import torch

import fastdecode

STATISTICS = {
    "tokens",
    "target_passes",
    "tokens_per_pass",
    "drafted",
    "accepted",
    "acceptance_by_position",
    "accepted_histogram",
    "tokens_per_s",
    "seconds",
    "cache_bytes",
    "cache_bits_per_value",
}
RESULT = {"prompt", "text", "prompt_tokens", "tokens", "finish_reason", "stop", "seed", "statistics"}
SHORT = ("--threads", "1", "--max-new-tokens", "24", "--ignore-eos")


def test_json_is_one_object_with_fixed_keys(cli, shipped):
    ran = cli("generate", "def f", *SHORT, "--json")
    assert ran.code == 0 and ran.err == ""
    value = json.loads(ran.out)
    assert set(value) == {"method", "rule", "guarantee", "dtype", "kv_cache", "threads", "results", "statistics"}
    assert (value["method"], value["rule"], value["guarantee"]) == ("speculative", "coupled", "exact")
    assert (value["dtype"], value["threads"]) == ("float32", 1)
    (result,) = value["results"]
    assert set(result) == RESULT and set(result["statistics"]) == set(value["statistics"]) == STATISTICS
    assert result["prompt"] == "def f" and len(result["tokens"]) == 24 and result["finish_reason"] == "length"
    assert 0 < value["statistics"]["accepted"] < value["statistics"]["drafted"]
    direct = fastdecode.generate(shipped / "tiny-code", "def f", max_new_tokens=24)
    assert result["tokens"] == direct.tokens and result["text"] == direct.text


@pytest.mark.parametrize(
    "options",
    [(), ("--temperature", "0.9", "--top-k", "40", "--seed", "5"), ("--stop", "\ufffd", "--min-new-tokens", "6")],
    ids=["greedy", "sampled", "stop"],
)
@pytest.mark.parametrize("method", ["plain", "speculative", "prompt-lookup"])
def test_the_streamed_text_is_that_of_json(cli, shipped, method, options):
    common = ("generate", "x = [1, 2]", "--method", method, *SHORT, "--dtype", "float64", *options)
    ran = cli(*common)
    value = json.loads(cli(*common, "--json").out)
    assert ran.code == 0 and ran.out == value["results"][0]["text"] + "\n"
    assert method in ran.err and "tokens/s" in ran.err and "per pass" in ran.err  # the panel is not on stdout


def test_several_prompts_are_one_batch(cli, shipped, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from stdin"))
    file = tmp_path / "prompt.txt"
    file.write_text("from a file\n")
    ran = cli("generate", "given", "-", "--prompt-file", file, *SHORT, "--json")
    value = json.loads(ran.out)
    assert [result["prompt"] for result in value["results"]] == ["given", "from stdin", "from a file\n"]
    assert value["statistics"]["tokens"] == 72
    assert value["statistics"]["target_passes"] < sum(r["statistics"]["target_passes"] for r in value["results"])
    assert [result["seed"] for result in value["results"]] == [fastdecode.splitmix64(0, i) for i in range(3)]
    text = cli("generate", "given", "other", *SHORT).out
    assert text.startswith("--- 1: length, 24 tokens\ngiven") and "--- 2: length, 24 tokens\nother" in text


def test_default_method_and_prompt(cli, shipped):
    def method(*options):
        value = json.loads(cli("generate", *SHORT, *options, "--json").out)
        assert value["results"][0]["prompt"] == "def quicksort(items):"
        return value["method"]

    target, draft = ("--model", shipped / "tiny-code"), ("--draft-model", shipped / "tiny-code-draft")
    assert method() == method(*draft) == method(*target, *draft) == "speculative"
    assert method(*target) == "prompt-lookup"


def test_rules_and_their_guarantee(cli, shipped):
    def tokens(*options):
        value = json.loads(cli("generate", *SHORT, "--dtype", "float64", "--temperature", "1", *options, "--json").out)
        return value["guarantee"], value["results"][0]["tokens"]

    plain = tokens("--method", "plain")
    assert plain[0] == "exact"
    assert tokens() == tokens("--rule", "coupled") == tokens("--method", "prompt-lookup") == plain
    for rule, expected in (("ratio", "in law"), ("block", "in law"), ("typical", "approximate")):
        guarantee, other = tokens("--rule", rule)
        assert guarantee == expected and other != plain[1]
    assert tokens("--rule", "typical") == tokens("--rule", "typical", "--set", "eps=0.09", "--set", "delta=0.3")
    assert tokens("--rule", "typical") != tokens("--rule", "typical", "--set", "eps=0.5", "--set", "delta=2")
    # the last --temperature counts
    assert tokens("--temperature", "0", "--rule", "typical")[0] == "exact"
    assert tokens("--temperature", "0", "--rule", "top_beta")[0] == "approximate"
    assert tokens("--seed", "1") != plain


def test_penalties(cli, shipped):
    def tokens(*options):
        value = json.loads(cli("generate", *SHORT, "--dtype", "float64", *options, "--json").out)
        return value["results"][0]["tokens"]

    free = tokens()
    for flag, value in (("repetition", 1.5), ("frequency", 0.7), ("presence", 2.0)):
        found = tokens(f"--{flag}-penalty", value)
        assert found == tokens(f"--{flag}-penalty", value, "--method", "plain") != free
        direct = fastdecode.generate(
            shipped / "tiny-code",
            "def quicksort(items):",
            max_new_tokens=24,
            ignore_eos=True,
            dtype=torch.float64,
            **{f"{flag}_penalty": value},
        )
        assert found == direct.tokens


def test_logprobs(cli, shipped):
    result = json.loads(cli("generate", *SHORT, "--logprobs", "2", "--json").out)["results"][0]
    assert set(result) == RESULT | {"logprobs", "top_logprobs"}
    for token, logprob, top in zip(result["tokens"], result["logprobs"], result["top_logprobs"], strict=True):
        assert len(top) == 2 and top[0] == [token, logprob] and top[0][1] >= top[1][1]
    result = json.loads(cli("generate", *SHORT, "--logprobs", "0", "--json").out)["results"][0]
    assert set(result) == RESULT | {"logprobs"}


def test_stop_ids_and_end_of_text(cli, shipped):
    free = json.loads(cli("generate", *SHORT, "--json").out)["results"][0]["tokens"]
    ran = cli("generate", *SHORT, "--stop-id", free[9], "--json")
    result = json.loads(ran.out)["results"][0]
    assert result["tokens"] == free[: free.index(free[9]) + 1]
    assert (result["finish_reason"], result["stop"]) == ("stop", free[9])


def test_threads_are_chosen_and_put_back(cli, shipped):
    before = torch.get_num_threads(), os.sched_getaffinity(0)
    value = json.loads(cli("generate", "--max-new-tokens", "2", "--json").out)
    assert 1 <= value["threads"] <= len(before[1])
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == before


def test_control_characters_do_not_reach_a_terminal(monkeypatch):
    from fastdecode.cli import generate

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    generate._write("a\x1b[2J\tb\n\x9b")
    assert sys.stdout.getvalue() == "a\ufffd[2J\tb\n\ufffd"


ERRORS = [
    (("generate", "--model", "nowhere"), "--model: no folder 'nowhere'"),
    (("generate", "--model", "{here}"), "expected a folder with config.json"),
    (("generate", "--draft-model", "nowhere"), "--draft-model: no folder 'nowhere'"),
    (("generate", "--draft-model", "{checkpoints}/wide"), "draft_model: expected a vocabulary of 257 ids"),
    (("generate", "--model", "{checkpoints}/wide", "--method", "speculative"), "--draft-model: method 'speculative'"),
    (("generate", "--method", "plain", "--draft-model", "x"), "--draft-model: method 'plain' uses none"),
    (("generate", "--method", "specultive"), "did you mean 'speculative'?"),
    (("generate", "--method", "plain", "--rule", "ratio"), "rule: expected None for method 'plain'"),
    (("generate", "--rule", "best"), "argument --rule: invalid choice: 'best'"),
    (("generate", "--rule", "top_beta", "--temperature", "1"), "temperature: expected 0 with rule 'top_beta'"),
    (("generate", "--set", "eps=0.1"), "--set: expected a parameter of the method or the rule, got 'eps'"),
    (("generate", "--set", "eps"), "argument --set: expected NAME=VALUE with a number, got 'eps'"),
    (("generate", "--rule", "typical", "--set", "eps=2"), "eps: expected 0..1, got 2"),
    (("generate", "--method", "plain", "--draft-length", "2"), "draft_length"),
    (("generate", "--draft-length", "-1"), "length: expected an int >= 0, got -1"),
    (("generate", "a" * 97), "prompt: expected at most 96 tokens (max_context), got 97"),
    (("generate", ""), "prompt: expected at least one token"),
    (("generate", "-", "-"), "stdin (-) can be read only once"),
    (("generate", "--prompt-file", "nowhere"), "cannot read 'nowhere': No such file or directory"),
    (("generate", "--temperature", "-1"), "temperature: expected a finite number >= 0"),
    (("generate", "--temperature", "hot"), "argument --temperature: invalid float value: 'hot'"),
    (("generate", "--temperature", "1e39"), "temperature: expected a finite number >= 0 (as float32), got 1e+39"),
    (("generate", "--repetition-penalty", "0"), "repetition_penalty: expected a finite float32 > 0, got 0.0"),
    (("generate", "--top-k", "99999999999"), "top_k: expected None or an int 0..2147483647"),
    (("generate", "--top-p", "0"), "top_p"),
    (("generate", "--stop-id", "999"), "stop_ids: expected ids 0..256, got 999"),
    (("generate", "--logprobs", "1"), "--logprobs: needs --json"),
    (("generate", "--threads", "0"), "num_threads: expected 1.."),
    (("generate", "--max-tokens", "3"), "unrecognized arguments: --max-tokens"),
    (("compare", "--methods", "plain,lookup"), "method: expected one of"),
    (("compare", "--methods", "speculative", "--model", "{checkpoints}/wide"), "draft_model: expected a folder"),
    (("compare", "--prompts", "nowhere.json"), "cannot read 'nowhere.json'"),
    (("compare", "--prompts", "{here}/text.json"), "is no JSON"),
    (("compare", "--prompts", "{here}/empty.json"), "expected texts in"),
    (("compare", "--num-prompts", "0"), "--num-prompts: expected at least 1, got 0"),
    (("compare", "--batch", "0"), "batch: expected at least 1, got 0"),
    (("compare", "--prompts", "{here}/long.txt"), "prompts: expected fewer than 96 tokens (max_context), got 99"),
    (("compare", "--prompts", "{here}/short.txt", "--threads", "0"), "num_threads: expected 1.."),
    (("compare", "--out", "{here}/nowhere/x.json"), "--out: no folder"),
    (("encode",), "invalid choice: 'encode'"),
    ((), "the following arguments are required: COMMAND"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[" ".join(e[0])[:40] for e in ERRORS])
def test_a_mistake_is_told_in_one_line(cli, shipped, tmp_path, arguments, message):
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "short.txt").write_text("import os")
    (tmp_path / "long.txt").write_text("a" * 99)
    (tmp_path / "empty.json").write_text('["a", ""]')
    ran = cli(*(argument.format(here=tmp_path, checkpoints=shipped) for argument in arguments))
    assert ran.code == 2 and ran.out == ""
    assert ran.err.startswith("fastdecode: error: ") and ran.err.count("\n") == 1 and message in ran.err


def test_a_missing_package_is_named(cli, shipped, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for arguments in (("generate",), ("generate", "--json"), ("compare",), ("methods",)):
        ran = cli(*arguments)
        assert ran.code == 2 and ran.err.count("\n") == 1 and "pip install 'fastdecode[cli]'" in ran.err


def test_a_broken_model_gives_exit_code_1(cli, shipped, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in (shipped / "tiny-code").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = safetensors.load_file(str(folder / "model.safetensors"))
    weights["model.norm.weight"].fill_(float("nan"))
    safetensors.save_file(weights, str(folder / "model.safetensors"))
    ran = cli("generate", "--model", folder, *SHORT)
    assert ran.code == 1 and "finish" in ran.err and "error" in ran.err


def test_ctrl_c_is_quiet(cli, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdecode.cli.generate.run", interrupted)
    assert cli("generate") == (130, "", "")


def test_a_closed_pipe_is_quiet(shipped):
    command = [sys.executable, "-m", "fastdecode", "generate", "--model", shipped / "tiny-code", *SHORT]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


def test_kv_cache(cli, shipped):
    common = ("generate", "def f", *SHORT, "--dtype", "float64", "--json", "--method")
    for name, bits in (("contiguous", 64), ("plain", 64), ("bf16", 16), ("int8", 10), ("kivi2", 4)):
        plain, ours = (
            json.loads(cli(*common, method, "--kv-cache", name).out) for method in ("plain", "prompt-lookup")
        )
        assert ours["results"][0]["tokens"] == plain["results"][0]["tokens"] and ours["kv_cache"] == name
        assert ours["statistics"]["cache_bits_per_value"] == bits and ours["statistics"]["cache_bytes"] > 0
    ran = cli("generate", "def f", *SHORT, "--kv-cache", "int9")
    assert ran.code != 0 and "kv_cache: expected one of plain" in ran.err
    ran = cli("generate", "def f", *SHORT, "--kv-cache", "int8")
    assert "KiB, 10 bits per value" in ran.err
    assert "exact, as plain decoding over the cache int8" in ran.err
