"""Reading `tokenizer.json`, and turning a stream of tokens into text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["IncrementalDecoder", "Tokenizer"]

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not UTF-8, so also for the first half of a character


class Tokenizer:
    """A thin wrapper round a `tokenizers.Tokenizer`; build it with `from_folder`."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read `tokenizer.json` of a Hugging Face folder.

        Raises:
            ImportError: the `tokenizers` package is missing.
            ValueError: there is no such file, or it is not a tokenizer.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                "Tokenizer.from_folder needs the tokenizers package: pip install 'fastdecode[models]'"
            ) from error
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"Tokenizer.from_folder: path: expected a folder with tokenizer.json, got {str(path)!r}")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(file)))
        except Exception as error:  # the Rust side raises plain Exception
            raise ValueError(f"Tokenizer.from_folder: {file}: expected a tokenizer, got: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Ids of a text, after the file's post-processor (which adds BOS if the file says so)."""
        return self._backend.encode(text).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of these ids; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, *, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """A decoder for one text that arrives token by token."""
        return IncrementalDecoder(self, skip_special_tokens=skip_special_tokens)


class IncrementalDecoder:
    """Text of a growing list of ids, piece by piece, never half a character.

    Decoders join tokens by context (a leading space is dropped, say), so a token is decoded together with those of the
    piece before it, and the piece is what the text grew by. While the text ends in U+FFFD the last character may be
    incomplete and is held back. All pieces and `finish()` together are `decode(all ids)`.
    """

    __slots__ = ("_begin", "_ids", "_shown", "_skip", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._begin = 0  # first id still decoded, for context
        self._shown = 0  # ids whose text has been returned

    def push(self, *ids: int) -> str:
        """Append ids; the text that is now certain, possibly empty."""
        self._ids.extend(ids)
        before, text = self._texts()
        if len(text) <= len(before) or text.endswith(_REPLACEMENT):
            return ""
        self._begin, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def finish(self) -> str:
        """What is held back, incomplete characters as U+FFFD; after it a new text may begin."""
        before, text = self._texts()
        self._ids, self._begin, self._shown = [], 0, 0
        return text[len(before) :]

    def _texts(self) -> tuple[str, str]:
        before = self._tokenizer.decode(self._ids[self._begin : self._shown], skip_special_tokens=self._skip)
        return before, self._tokenizer.decode(self._ids[self._begin :], skip_special_tokens=self._skip)
