"""`fastdecode kv report` on tiny random checkpoints, and on the shipped one."""

from __future__ import annotations

import json

import pytest
import torch

from fastdecode import kv_report, load_model
from fastdecode.generation import CHECKPOINTS
from fastdecode.models.paged_cache import KVCacheConfig
from support import raises

TEXT = "".join(chr(97 + i * i % 23) + " " * (i % 3) for i in range(400))
KEYS = (
    "scheme",
    "bits_per_value",
    "bytes_per_token",
    "key_error",
    "value_error",
    "largest_key_error",
    "largest_value_error",
    "perplexity",
    "change",
    "tokens",
)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_json(cli, shipped, text):
    ran = cli("kv", "report", "--text", text, "--tokens", 200, "--context", 80, "--json")
    lines = json.loads(ran.out)
    assert ran.code == 0 and all(tuple(line) == KEYS for line in lines)
    assert [line["scheme"] for line in lines] == ["float32", *kv_report.SCHEMES]
    by_name = {line["scheme"]: line for line in lines}
    plain = by_name["float32"]
    assert plain["change"] == plain["key_error"] == plain["value_error"] == 0 and plain["bits_per_value"] == 32
    assert all(line["tokens"] == 80 + 80 + 40 - 3 for line in lines)
    assert by_name["int8"]["bits_per_value"] == 8 + 2 * 16 / 16, "head size 16, a step and an offset per head"
    assert by_name["bf16"]["bits_per_value"] == 16
    for better, worse in (("bf16", "int8"), ("int8", "int4"), ("fp8_e4m3", "fp8_e5m2")):
        for error in ("key_error", "value_error", "largest_key_error"):
            assert 0 < by_name[better][error] < by_name[worse][error], (better, worse, error)


def test_errors_are_those_of_the_codes():
    """Against the definition, from the keys of a contiguous cache."""
    torch.manual_seed(0)
    model = load_model(CHECKPOINTS / "tiny-code", dtype=torch.float64)
    ids = torch.randint(4, 4000, (1, 300)).tolist()
    config = KVCacheConfig(scheme="int4", group=16)
    (plain, coded) = kv_report.report(model, ids, [config])
    cache = model.with_kv_cache("contiguous").new_cache(1, 300)
    model.forward(torch.tensor(ids), cache=cache)
    for stored, error, largest in ((cache.k, coded.key_error, coded.largest_key_error),):
        x = stored[:, 0, :, :300].reshape(-1, 16)
        low, high = x.min(1, keepdim=True).values, x.max(1, keepdim=True).values
        step = (high - low) / 15
        nearest = low + step * ((x - low) / step).round()
        assert error == pytest.approx(((nearest - x).norm() / x.norm()).item(), rel=0.02)
        assert largest == pytest.approx((nearest - x).abs().max().item(), rel=0.05)
    assert coded.bits_per_value == 6 and plain.bits_per_value == 64


def test_table_and_picture(cli, shipped, text, tmp_path):
    picture = tmp_path / "kv.png"
    ran = cli("kv", "report", "--text", text, "--tokens", 90, "--scheme", "int8", "kivi2", "--plot", picture)
    assert ran.code == 0 and picture.read_bytes()[:4] == b"\x89PNG"
    assert [line.split()[0] for line in ran.out.splitlines()[2:5]] == ["float32", "int8", "kivi2"]


def test_the_text_by_default_is_held_out(cli, shipped):
    ran = cli("kv", "report", "--tokens", 100, "--context", 50, "--scheme", "int4", "--json")
    assert ran.code == 0 and json.loads(ran.out)[0]["tokens"] == 98


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--scheme", "int5"], "kv_cache: expected one of "),
        (["--tokens", "1"], "--tokens: expected at least 2, got 1"),
        (["--context", "97"], "--context: expected 2..96, got 97"),
        (["--plot", "/nowhere/at/all.png"], "--plot: no folder for "),
        (["--text", "/nowhere"], "cannot read '/nowhere'"),
    ],
)
def test_mistakes(cli, shipped, arguments, message):
    ran = cli("kv", "report", *arguments)
    assert ran.code == 2 and message in ran.err and not ran.out


def test_bad_texts():
    model = load_model(CHECKPOINTS / "tiny-code")
    with raises(r"^kv_report: texts: expected at least one, got none"):
        kv_report.report(model, [])
    with raises(r"^kv_report: texts: expected 2..1024 tokens, got 1"):
        kv_report.report(model, [[3]])


@pytest.mark.slow
def test_the_shipped_model_keeps_its_perplexity(cli):
    """The bounds that the README states."""
    ran = cli("kv", "report", "--tokens", 40000, "--json")
    change = {line["scheme"]: abs(line["change"]) for line in json.loads(ran.out)}
    assert max(change[name] for name in ("bf16", "int8", "fp8_e4m3")) < 0.005
    assert change["int4"] < 0.03 and change["kivi4"] < 0.02
