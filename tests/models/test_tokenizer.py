"""The tokenizer wrapper and its incremental decoder."""

from __future__ import annotations

import sys

import pytest

from fastdecode.models import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
TEXT = "def f(x):\n    return 'grüße, 世界 👩\u200d🚀' + x  # naïve\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Byte-level BPE with few merges: most non-ASCII characters are split over tokens. BOS by post-processor."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(path / "tokenizer.json"))
    return path


def test_round_trip_with_bos(folder):
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode(TEXT)
    assert ids[0] == 0  # <s>
    assert tokenizer.decode(ids) == TEXT and tokenizer.decode(ids, skip_special_tokens=False) == "<s>" + TEXT


def test_stream_never_emits_half_a_character(folder):
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode(TEXT)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == TEXT and stream.finish() == ""
    assert not any("\ufffd" in piece for piece in pieces) and "" in pieces[1:]
    several = tokenizer.stream()
    assert several.push(*ids[:9]) + several.push(*ids[9:]) == TEXT


def test_stream_that_ends_inside_a_character(folder):
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode("ab世")[:-1]
    stream = tokenizer.stream()
    text = "".join(stream.push(token) for token in ids)
    assert text == "ab"
    assert text + stream.finish() == tokenizer.decode(ids)
    assert stream.push(*tokenizer.encode("new")) == "new"


def test_stream_passes_invalid_bytes_once_they_cannot_become_valid(folder):
    tokenizer = Tokenizer.from_folder(folder)
    broken = tokenizer.encode("世")[1:2] * 3 + tokenizer.encode("ok")[1:]
    stream = tokenizer.stream()
    text = "".join(stream.push(token) for token in broken) + stream.finish()
    assert text == tokenizer.decode(broken) and text.endswith("ok")


def test_word_level_spaces_survive(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"\u2581a": 0, "\u2581b": 1, "c": 2}, []))
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    stream = Tokenizer.from_folder(tmp_path).stream()
    assert [stream.push(token) for token in (0, 1, 2, 1)] == ["a", " b", "c", " b"]


def test_refusals(tmp_path, folder, monkeypatch):
    with pytest.raises(ValueError, match=r"Tokenizer.from_folder: path: expected a folder with tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a tokenizer, got"):
        Tokenizer.from_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdecode\[models\]'"):
        Tokenizer.from_folder(folder)
