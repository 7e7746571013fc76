"""The tensors of a paged key-value cache (csrc/core/kv.h), as one argument of the ops on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .._host import KVScheme
from ._arguments import number_of

__all__ = ["KVPages"]

_BITS = {KVScheme.PLAIN: 0, KVScheme.INT4: 4, KVScheme.KIVI4: 4, KVScheme.KIVI2: 2}  # the others: 8
_KIVI = (KVScheme.KIVI4, KVScheme.KIVI2)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FP8 = (KVScheme.FP8_E4M3, KVScheme.FP8_E5M2)


_ALIASES = {"fp8": "fp8_e4m3"}


def parse_scheme(where: str, scheme: str | KVScheme) -> KVScheme:
    """A scheme by name or number."""
    if isinstance(scheme, KVScheme):
        return scheme
    name = _ALIASES.get(scheme, scheme) if isinstance(scheme, str) else scheme
    number = number_of(where, "scheme", name, KVScheme)
    if number not in [int(kind) for kind in KVScheme]:
        raise ValueError(f"{where}: scheme: expected 0..{max(KVScheme)}, got {number}")
    return KVScheme(number)


def default_group(scheme: KVScheme, head_dim: int, page_size: int) -> int:
    """Channels, for keys of kivi tokens, per scale where nobody says otherwise."""
    if scheme not in _KIVI:
        return head_dim
    least = 8 // _BITS[scheme]
    common = math.gcd(head_dim, page_size)
    return max((n for n in range(least, 33, least) if common % n == 0), default=min(32, head_dim))


@dataclass(frozen=True, slots=True)
class KVPages:
    """Pages of keys and values of one layer, as views in this logical order whatever the order in memory.

    P pages, H kv heads, D head_dim, b bits of a code. All tensors are changed in place by the ops that write.

    Attributes:
        k: keys. plain [P, page_size, H, D] in a float dtype; fp8 and int8 uint8 [P, page_size, H, D]; int4 uint8
            [P, page_size, H, D / 2]; kivi uint8 [P, H, D, page_size * b / 8].
        v: values, as k; kivi uint8 [P, page_size, H, D * b / 8].
        k_scale: None for plain; fp8 float32 [P, page_size, H, D / group] (largest value / 448 or 57344), or [H] given
            scales that no op changes; int8, int4 float16 [P, page_size, H, D / group, 2], step and offset; kivi float16
            [P, H, page_size / group, 2, D].
        v_scale: as k_scale; kivi float16 [P, page_size, H, D / group, 2].
        k_tail: kivi only: rings [B, tail_size, H, D] in a float dtype, token at position p in slot p % tail_size.
        v_tail: as k_tail.
        scheme: a KVScheme or its name in lower case.
        group: channels that share a scale; for keys of kivi tokens that do. Divides D, for kivi page_size too. 0: read
            off the tensors.
        head_dim: D. 0: read off the tensors.
    Raises:
        ValueError: an unknown scheme, a head_dim that is not that of plain tensors. Everything else is checked by the
            ops.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    k_tail: Tensor | None = None
    v_tail: Tensor | None = None
    scheme: KVScheme = KVScheme.PLAIN
    group: int = 0
    head_dim: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheme", parse_scheme("KVPages", self.scheme))
        if self.v.dim() != 4 or self.k.dim() != 4:
            return  # the ops say so
        width = self.v.shape[-1] * 8 // _BITS.get(self.scheme, 8) if self.scheme != KVScheme.PLAIN else self.v.shape[-1]
        if not self.head_dim:
            object.__setattr__(self, "head_dim", width)
        if self.head_dim != width:
            raise ValueError(f"KVPages: head_dim: expected {width}, as v has, got {self.head_dim}")
        if not self.group:
            groups = 1
            if self.v_scale is not None and self.v_scale.dim() > 1:
                groups = self.v_scale.shape[3] if self.v_scale.dim() > 3 else 1
            object.__setattr__(self, "group", width // max(groups, 1))

    @classmethod
    def allocate(
        cls,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        scheme: str | KVScheme = "plain",
        group: int | None = None,
        dtype: torch.dtype = torch.float32,
        layout: Literal["HND", "NHD"] = "HND",
        static_scales: bool = False,
        batch: int = 0,
        tail_size: int = 0,
        device: torch.device | str = "cpu",
    ) -> KVPages:
        """Pages full of zeros.

        Args:
            num_pages, page_size, num_kv_heads, head_dim: P, tokens per page, H, D.
            scheme: a KVScheme or its name in lower case.
            group: channels per scale; None: head_dim, for kivi the largest divisor of it and of page_size up to 32.
            dtype: of plain pages, or of the rings of kivi.
            layout: order in memory of tokens and heads inside a page: "HND" or "NHD" (keys of kivi are always by head).
            static_scales: fp8 with one given scale per head, 1 at first, instead of one per token and group.
            batch, tail_size: kivi only, the shape of the rings.
        Raises:
            ValueError: sizes that the scheme does not allow, an unknown scheme or layout.
        """
        where = "KVPages.allocate"
        kind = parse_scheme(where, scheme)
        kivi, bits = kind in _KIVI, _BITS.get(kind, 8)
        if group is None:
            group = default_group(kind, head_dim, page_size)
        if layout not in ("HND", "NHD"):
            raise ValueError(f"{where}: layout: expected 'HND' or 'NHD', got {layout!r}")
        sizes = {"page_size": page_size, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "group": group}
        for name, size in sizes.items():
            if size <= 0:
                raise ValueError(f"{where}: {name}: expected at least 1, got {size}")
        for name, size in (("num_pages", num_pages), ("batch", batch), ("tail_size", tail_size)):
            if size < 0:
                raise ValueError(f"{where}: {name}: expected at least 0, got {size}")
        if dtype not in _DTYPES:
            raise ValueError(f"{where}: dtype: expected one of {', '.join(map(str, _DTYPES))}, got {dtype}")
        if head_dim % group:
            raise ValueError(f"{where}: group: expected a divisor of head_dim {head_dim}, got {group}")
        if bits and head_dim * bits % 8:
            raise ValueError(f"{where}: head_dim: expected a multiple of {8 // bits} for {kind.name}, got {head_dim}")
        if kivi and (page_size % group or group * bits % 8):
            raise ValueError(
                f"{where}: page_size: expected a multiple of the token group {group}, itself a multiple of "
                f"{8 // bits}, got {page_size}"
            )
        if static_scales and kind not in _FP8:
            raise ValueError(f"{where}: static_scales: expected False for {kind.name}, got True")
        if not kivi and (batch or tail_size):
            name, size = ("batch", batch) if batch else ("tail_size", tail_size)
            raise ValueError(f"{where}: {name}: expected 0 for {kind.name}, which has no rings, got {size}")

        def by_token(*last: int, dtype: torch.dtype) -> Tensor:
            if layout == "NHD":
                return torch.zeros(num_pages, page_size, num_kv_heads, *last, dtype=dtype, device=device)
            return torch.zeros(num_pages, num_kv_heads, page_size, *last, dtype=dtype, device=device).transpose(1, 2)

        if kind == KVScheme.PLAIN:
            k, v = (by_token(head_dim, dtype=dtype) for _ in range(2))
            return cls(k, v, scheme=kind, group=head_dim, head_dim=head_dim)
        width, groups = head_dim * bits // 8, head_dim // group
        k, v = (by_token(width, dtype=torch.uint8) for _ in range(2))
        k_scale: Tensor
        v_scale: Tensor
        k_tail = v_tail = None
        if static_scales:
            k_scale, v_scale = (torch.ones(num_kv_heads, dtype=torch.float32, device=device) for _ in range(2))
        elif kind in _FP8:
            k_scale, v_scale = (by_token(groups, dtype=torch.float32) for _ in range(2))
        else:
            k_scale, v_scale = (by_token(groups, 2, dtype=torch.float16) for _ in range(2))
        if kivi:
            heads = (num_pages, num_kv_heads)
            k = torch.zeros(*heads, head_dim, page_size * bits // 8, dtype=torch.uint8, device=device)
            k_scale = torch.zeros(*heads, page_size // group, 2, head_dim, dtype=torch.float16, device=device)
            ring = (batch, num_kv_heads, tail_size, head_dim)
            k_tail, v_tail = (torch.zeros(ring, dtype=dtype, device=device).transpose(1, 2) for _ in range(2))
        return cls(k, v, k_scale, v_scale, k_tail, v_tail, kind, group, head_dim)

    @property
    def num_pages(self) -> int:
        """P."""
        return self.v.shape[0]

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.v.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """H."""
        return self.v.shape[2]

    @property
    def has_ring(self) -> bool:
        """Whether new tokens lie in a ring until they are flushed (kivi)."""
        return self.k_tail is not None

    @property
    def bits_per_value(self) -> float:
        """Bits that a cached number takes in the pages, its share of the scales included; counted from the tensors."""
        tensors = (self.k, self.v, self.k_scale, self.v_scale)
        pages = [t for t in tensors if t is not None and t.dim() > 1]
        bits = sum(8 * math.prod(t.shape[1:]) * t.element_size() for t in pages)  # of one page
        return bits / (2 * self.page_size * self.num_kv_heads * self.head_dim)

    def tensors(self) -> tuple[Tensor | int | None, ...]:
        """The arguments of the ops, in the order of their schemas."""
        return (
            self.k,
            self.v,
            self.k_scale,
            self.v_scale,
            self.k_tail,
            self.v_tail,
            int(self.scheme),
            self.group,
        )
