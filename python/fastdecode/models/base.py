"""The model protocol: what every loop may ask of a model and of its cache.

Slot 0 of every step is the *root*: the last committed token, whose keys and values are not cached yet. So between
rounds `cache.lens` is the number of committed tokens minus one, and a step of a chain draft of K tokens is `tokens[B, K
+ 1]`. `Model.forward` writes the keys and values of all its slots behind the committed ones as *pending* rows and never
changes `lens`; `KVCache.keep` makes some of them permanent, and the next `forward` overwrites whatever was not kept.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, overload, runtime_checkable

import torch
from torch import Tensor

__all__ = ["HiddenStates", "KVCache", "Model", "ModelConfig", "Output", "Want"]

CacheT = TypeVar("CacheT")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a loop needs to know about a model.

    Attributes:
        vocab_size: V, width of a row of logits.
        hidden_size: d, width of a hidden state (0 for a model that has none).
        num_layers: number of blocks; `Output.hidden` has one entry more.
        max_context: the most tokens one row may hold, committed and pending together.
        causal: False for masked-diffusion models.
        mask_token_id: the mask token of a diffusion model, else None.
        eos_token_ids: every id that ends a text; may be empty.
        bos_token_id: the id that begins a text, or None.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_context: int
    causal: bool = True
    mask_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None


class Want(enum.IntFlag):
    """What `Model.forward` shall return; flags combine, but LOGITS and LAST_LOGITS exclude each other.

    LOGITS: logits of every slot, [B, n, V].
    HIDDEN: embeddings, the residual stream after every block, and "final".
    LAST_LOGITS: logits of each row's last valid slot only, [B, 1, V]; what a prefill needs.
    """

    LOGITS = 1
    HIDDEN = 2
    LAST_LOGITS = 4


class HiddenStates:
    """Hidden states of one forward: `h[0]` the embeddings, `h[i]` the residual stream after block i, `h["final"]` after
    the last norm (what the LM head reads, and what transformers calls `hidden_states[-1]`). Each is [B, n, d] in the
    model's dtype. `len(h)` is the number of blocks plus one; "final" is not counted.
    """

    __slots__ = ("_states", "final")

    def __init__(self, states: Sequence[Tensor], final: Tensor) -> None:
        self._states = tuple(states)
        self.final = final

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._states)

    @overload
    def __getitem__(self, index: int | Literal["final"]) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Tensor, ...]: ...
    def __getitem__(self, index: int | slice | Literal["final"]) -> Tensor | tuple[Tensor, ...]:
        if isinstance(index, str):
            if index == "final":
                return self.final
            raise ValueError(f'Output.hidden: expected an index below {len(self)} or "final", got {index!r}')
        return self._states[index]


@dataclass(frozen=True, slots=True)
class Output:
    """Result of one forward; fields that were not asked for are None.

    Attributes:
        logits: [B, n, V] in the model's dtype, row i predicts the token after token i; [B, 1, V] for Want.LAST_LOGITS.
        hidden: see HiddenStates.
    """

    logits: Tensor | None = None
    hidden: HiddenStates | None = None


@runtime_checkable
class KVCache(Protocol):
    """Committed and pending keys and values of a batch of rows."""

    @property
    def lens(self) -> Tensor:
        """Committed lengths, int32 [B]. Read only: use `keep` and `truncate`."""
        ...

    def keep(self, path: Tensor | None, num_keep: Tensor | Sequence[int]) -> None:
        """Make pending rows permanent and compact them; the other pending rows are gone.

        Args:
            path: integer [B, K']; `path[b, :num_keep[b]]` are slot numbers of the last forward, increasing, slot 0
                first. The rest of a row is not read. None is the chain: slots 0, 1, ..., nothing is copied.
            num_keep: integer [B]; `lens` grows by it. 0 for a row that is finished.
        Raises:
            ValueError: a count above the valid pending slots, or a path that is not increasing or leaves them.
        """
        ...

    def truncate(self, lens: Tensor | Sequence[int]) -> None:
        """Shorten rows to `lens` ([B], 0 to the present length) and drop pending rows; ValueError to lengthen."""
        ...

    def fork(self, rows: Tensor | Sequence[int]) -> KVCache:
        """A new, independent cache with copies of these rows, pending ones included; a row may be named repeatedly."""
        ...

    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Keep only these rows, in this order, in place (a batch that shrinks or is reordered)."""
        ...

    def reserve(self, n: int) -> None:
        """Make room for n more tokens in every row; ValueError if a row would pass the model's max_context."""
        ...


@runtime_checkable
class Model(Protocol):
    """A language model that scores several tokens per row in one pass, against a cache."""

    config: ModelConfig

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` rows with room for `capacity` tokens each; it grows when needed."""
        ...

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: KVCache,
        positions: Tensor | None = None,
        num_tokens: Tensor | Sequence[int] | None = None,
        want: Want = Want.LOGITS,
    ) -> Output:
        """Score tokens [B, n] behind the committed ones; slot i of a row sees the committed tokens and slots 0..i.

        Args:
            tokens: int64 [B, n], right-padded. Padded slots may hold any id, also -1.
            cache: from `new_cache` of this model, B rows. All n slots become pending; `lens` does not change.
            positions: int64 [B, n] or [n]; default `cache.lens + arange(n)`.
            num_tokens: integer [B], true counts, 0..n; None means n. Results of padded slots are undefined but finite.
            want: which outputs to compute.
        Raises:
            ValueError: wrong shape or dtype, a token outside 0..V-1, a row past max_context.
        """
        ...


def int_list(where: str, name: str, values: Tensor | Iterable[int], length: int | None = None) -> list[int]:
    """`values` as a list of Python ints; ValueError unless it is one-dimensional, integer and of this length."""
    if isinstance(values, Tensor):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"{where}: {name}: expected an integer dtype, got {values.dtype}")
        if values.dim() != 1 or (length is not None and values.shape[0] != length):
            expected = "[rows]" if length is None else f"[{length}]"
            raise ValueError(f"{where}: {name}: expected {expected}, got {list(values.shape)}")
        return values.tolist()
    result = [int(value) for value in values]
    if length is not None and len(result) != length:
        raise ValueError(f"{where}: {name}: expected [{length}], got [{len(result)}]")
    return result


def check_cache(where: str, cache: KVCache, kind: type[CacheT]) -> CacheT:
    """The cache, if it is of the kind that the model's `new_cache` makes."""
    if not isinstance(cache, kind):
        raise ValueError(f"{where}: cache: expected a {kind.__name__}, from new_cache, got {type(cache).__name__}")
    return cache


def check_want(where: str, want: Want) -> None:
    """ValueError for the one combination of flags that has no meaning."""
    if want & Want.LOGITS and want & Want.LAST_LOGITS:
        raise ValueError(f"{where}: want: expected LOGITS or LAST_LOGITS, got both")


def check_tokens(
    where: str, tokens: Tensor, batch: int, vocab_size: int, num_tokens: Tensor | Sequence[int] | None
) -> tuple[Tensor, list[int] | None]:
    """Tokens with every padded slot set to 0, and the counts (None when every slot is valid).

    Reads the smallest and the largest id on the host: an id outside the vocabulary must be an error, not a crash.
    """
    if tokens.dim() != 2 or tokens.shape[0] != batch or tokens.shape[1] == 0:
        raise ValueError(f"{where}: tokens: expected [{batch}, n] with n >= 1, got {list(tokens.shape)}")
    if tokens.dtype != torch.int64:
        raise ValueError(f"{where}: tokens: expected torch.int64, got {tokens.dtype}")
    n = tokens.shape[1]
    counts = None
    if num_tokens is not None:
        counts = int_list(where, "num_tokens", num_tokens, batch)
        for count in counts:
            if not 0 <= count <= n:
                raise ValueError(f"{where}: num_tokens: expected 0..{n}, got {count}")
        if all(count == n for count in counts):
            counts = None
        else:
            limit = torch.tensor(counts, device=tokens.device).unsqueeze(1)
            tokens = tokens.masked_fill(torch.arange(n, device=tokens.device) >= limit, 0)
    if batch == 1 and tokens.device.type == "cpu":
        ids = tokens[0].tolist()
        low, high = min(ids), max(ids)
    elif batch:
        low, high = (int(bound) for bound in torch.aminmax(tokens))
    else:
        return tokens, counts
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{where}: tokens: expected 0..{vocab_size - 1}, got {low if low < 0 else high}")
    return tokens, counts
