"""The trainer's parts, on a folder of made-up files and a model of a few thousand weights."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from fastdecode.models import load_model
from fastdecode.train import checkpoint, corpus, evaluate, prompts, recipes, run, tokenizer
from fastdecode.train.model import Llama, Shape

TINY = Shape(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    vocab_size=320,
    max_position_embeddings=64,
)
TEXT = "def add(a, b):\n    return a + b\n\n\nclass Adder:\n    def __init__(self):\n        self.total = 0\n" * 40


@pytest.fixture
def lists(tmp_path, monkeypatch):
    """A standard library of two files, listed."""
    folder, data = tmp_path / "lib", tmp_path / "data"
    folder.mkdir()
    data.mkdir()
    for split, name in (("train", "a.py"), ("heldout", "b.py")):
        (folder / name).write_text(TEXT)
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (data / f"{split}.sha256").write_text(f"{digest}  {name}\n")
    monkeypatch.setattr(corpus, "DATA", data)
    monkeypatch.setattr(corpus, "stdlib_folder", lambda: folder)
    return folder


def test_files_that_changed_or_are_gone_are_refused(lists):
    assert corpus.load("train") == {"a.py": TEXT}
    (lists / "a.py").write_text(TEXT + "# another version\n")
    with pytest.raises(ValueError, match=r"a\.py: expected the file of CPython 3\.11\.7"):
        corpus.load("train")
    (lists / "b.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.py is missing"):
        corpus.load("heldout")


def test_the_committed_lists_do_not_overlap():
    names = {
        s: [line.split("  ")[1] for line in (corpus.DATA / f"{s}.sha256").read_text().splitlines()]
        for s in ("train", "heldout")
    }
    assert len(names["heldout"]) == corpus.NUM_HELDOUT_FILES
    assert not set(names["heldout"]) & set(names["train"])
    assert {p.file for p in prompts.read()} <= set(names["heldout"])
    assert len(prompts.read()) == prompts.NUM_PROMPTS


def test_an_epoch_shows_every_window_once():
    windows = run.Windows(np.arange(1000, dtype=np.int32), size=10, seed=3)
    epoch = torch.cat([windows.batch(step, 7) for step in range(windows.per_epoch // 7)])
    assert (epoch[:, 1:] - epoch[:, :-1] == 1).all()
    assert len(set(epoch[:, 0].tolist())) == len(epoch)
    assert torch.equal(windows.batch(3, 7), run.Windows(windows.stream, 10, seed=3).batch(3, 7))
    assert not torch.equal(windows.batch(0, 7), windows.batch(windows.per_epoch // 7 + 1, 7))


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path):
    recipe = run.Recipe(
        tokens=1280, tokens_per_step=64, window=16, decay_window=32, warmup_steps=3, decay=0.5, muon_lr=0.02
    )
    stream = (np.arange(4000) % 7).astype(np.int32)

    def model():
        torch.manual_seed(0)
        return Llama(TINY)

    unbroken, broken = model(), model()
    first = recipes.next_token_loss(unbroken, torch.from_numpy(stream[:34].reshape(2, 17).astype(np.int64))).item()
    assert first == pytest.approx(math.log(TINY.vocab_size), rel=0.05)
    summary = run.train(unbroken, stream, lambda w: recipes.next_token_loss(unbroken, w), recipe, tmp_path / "one")
    assert summary["tokens"] == 1280 and summary["loss"] < first
    # half of it, under another total: the rate is constant up to there
    half = replace(recipe, tokens=640, decay=1e-9)
    run.train(broken, stream, lambda w: recipes.next_token_loss(broken, w), half, tmp_path / "two")
    again = model()
    run.train(again, stream, lambda w: recipes.next_token_loss(again, w), recipe, tmp_path / "two")
    for (name, ours), theirs in zip(again.named_parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert (tmp_path / "two" / "loss.png").stat().st_size > 1000


def test_a_saved_model_is_the_one_that_was_trained(lists, tmp_path):
    tok = tokenizer.train([TEXT], TINY.vocab_size)
    torch.manual_seed(1)
    model = Llama(replace(TINY, vocab_size=tok.get_vocab_size()))
    checkpoint.save(model, tok, tmp_path / "saved")
    loaded = checkpoint.load(Llama(model.shape), tmp_path / "saved")
    native = load_model(tmp_path / "saved")
    ids = torch.tensor([tok.encode(TEXT[:60]).ids])
    assert ids[0, 0] == 0  # END_OF_TEXT
    cache = native.new_cache(1, ids.shape[1])
    torch.testing.assert_close(native.forward(ids, cache=cache).logits, loaded(ids), atol=1e-4, rtol=1e-4)
    assert Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json")).decode(ids[0].tolist()) == TEXT[:60]


def test_bits_per_byte_scores_every_token_once(lists):
    tok = tokenizer.train([TEXT], TINY.vocab_size)
    model = Llama(replace(TINY, vocab_size=tok.get_vocab_size(), max_position_embeddings=64))
    for p in model.parameters():
        torch.nn.init.zeros_(p)  # a uniform law: log2 V bits for every token but the first
    tokens = len(tok.encode(TEXT).ids) - 1
    expected = tokens * math.log2(tok.get_vocab_size()) / len(TEXT.encode())
    assert checkpoint.bits_per_byte(model, tok, stride=24) == pytest.approx(expected, rel=1e-5)


def test_distillation_loss_is_zero_at_the_target_only():
    torch.manual_seed(0)
    a, b = Llama(TINY), Llama(TINY)
    windows = torch.randint(0, TINY.vocab_size, (2, 17))
    assert recipes.distillation_loss(a, a, windows).item() == pytest.approx(0, abs=1e-6)
    assert recipes.distillation_loss(a, b, windows).item() > 1e-3


def test_completions_are_cut_at_the_first_dedent():
    prompt = prompts.HeldoutPrompt("x.py", "class A:\n    def f(self):", "    def f(self):")
    text = prompts.function_text(prompt, "\n        return 1\n\n    def g(self):\n")
    assert text == "def f(self):\n    return 1\n\n"
    assert evaluate.parses(text) and not evaluate.parses("def f(self):\n")
    assert prompts.function_text(prompt, " return 2\nx = 1") == "def f(self): return 2\n"
