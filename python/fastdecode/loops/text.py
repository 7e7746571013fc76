"""Text of a request while its tokens arrive, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence

from ..models.tokenizer import Tokenizer

__all__ = ["TextStream"]


class TextStream:
    """Decodes tokens as they are committed and looks for stop strings.

    With stop strings, tokens are decoded one at a time: the token that completes a stop string, and so the end of the
    request, must not depend on how many tokens a round commits.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._decoder = tokenizer.stream()
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._text = ""
        self._shown = 0

    def push(self, ids: Sequence[int]) -> tuple[int, str | None]:
        """Append ids.

        Returns:
            how many of `ids` belong to the text: all, or up to the one that completes a stop string;
            that stop string, or None. Where one token completes several, it is the one that begins first.
        """
        if not self._stop:
            self._text += self._decoder.push(*ids)
            return len(ids), None
        for count, token in enumerate(ids, start=1):
            self._num_tokens += 1
            old = len(self._text)
            self._text += self._decoder.push(token)
            if self._num_tokens < self._min_tokens:
                continue
            # only what this token completes: an occurrence that lies before it was forbidden to end the request
            found = [
                (at, string)
                for string in self._stop
                if (at := self._text.find(string, max(0, old - len(string) + 1))) >= 0
            ]
            if found:
                at, string = min(found)
                self._text = self._text[:at]
                self._stop = ()
                return count, string
        return len(ids), None

    def finish(self, stopped: bool) -> None:
        """No more ids: text held back for a half character or a stop string becomes certain, unless one came."""
        if not stopped:
            self._text += self._decoder.finish()
        self._stop = ()

    def take(self) -> str:
        """Text that became certain since the last call: nothing that may yet turn out to begin a stop string."""
        end = len(self._text)
        for string in self._stop:
            for size in range(min(len(string) - 1, len(self._text)), 0, -1):
                if self._text.endswith(string[:size]):
                    end = min(end, len(self._text) - size)
                    break
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    @property
    def text(self) -> str:
        """All text so far, cut before the stop string if there was one."""
        return self._text
