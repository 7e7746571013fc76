"""Rotary position embedding: inverse frequencies of the scaling types that checkpoints use, and a lazily grown table.

Source: Su et al. 2021 (RoPE); Chen et al. 2023 ("linear"); Peng et al. 2023, section 3 ("yarn"); Llama 3.1 reference
code ("llama3"). Formulas and defaults as in transformers, so that the same config.json means the same model.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["RopeConfig", "RopeTable"]

_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
ROPE_TYPES = tuple(_NEEDED)


def positive(name: str, value: object) -> float:
    """`value` as a float; ValueError unless it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"load_model: {name}: expected a number above 0, got {value!r}")
    return float(value)


def _first(*values: object) -> object:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of one model: `type` is one of ROPE_TYPES, `parameters` the numbers that type needs."""

    head_dim: int
    theta: float = 10000.0
    type: str = "default"
    parameters: Mapping[str, Any] | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], head_dim: int, max_context: int) -> RopeConfig:
        """Read `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` with "rope_type" or "type".

        Raises:
            ValueError: an unknown type, a missing or impossible parameter, a partial rotary embedding.
        """
        # transformers lets rope_scaling win where a config holds both; a null in either means "not there"
        source = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(source, Mapping):
            raise ValueError(f"load_model: rope_parameters: expected an object, got {source!r}")
        parameters = dict(source)
        rope_type = parameters.get("rope_type", parameters.get("type", "default"))
        if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
            raise ValueError(f"load_model: rope_type: expected one of {', '.join(ROPE_TYPES)}, got {rope_type!r}")
        partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise ValueError(f"load_model: partial_rotary_factor: expected 1, got {partial!r}")
        if head_dim % 2:
            raise ValueError(f"load_model: head_dim: expected an even number, got {head_dim}")
        theta = positive("rope_theta", _first(parameters.get("rope_theta"), config.get("rope_theta"), 10000.0))
        where = f"{rope_type} rope: "
        if rope_type in ("llama3", "yarn"):
            name = "original_max_position_embeddings"
            original = positive(where + name, _first(config.get(name), parameters.get(name), max_context))
            parameters[name] = original
            if rope_type == "yarn" and parameters.get("factor") is None and "factor" in parameters:
                parameters["factor"] = max_context / original
        for name in _NEEDED[rope_type]:
            positive(where + name, parameters.get(name))
        if rope_type == "yarn":
            for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
                # transformers takes a 0 for "not there", except as attention_factor
                if parameters.get(name) is not None and (parameters[name] != 0 or name == "attention_factor"):
                    positive(where + name, parameters[name])
            if theta <= 1:
                raise ValueError(f"load_model: {where}rope_theta: expected more than 1, got {theta}")
        if rope_type == "llama3" and parameters["low_freq_factor"] >= parameters["high_freq_factor"]:
            low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
            raise ValueError(
                f"load_model: {where}high_freq_factor: expected more than low_freq_factor {low}, got {high}"
            )
        return cls(head_dim=head_dim, theta=theta, type=rope_type, parameters=parameters)

    def inverse_frequencies(self, dtype: torch.dtype) -> tuple[Tensor, float]:
        """Radians per position, [head_dim / 2], and the factor on cos and sin (1 except for yarn)."""
        values = self.parameters or {}
        exponents = torch.arange(0, self.head_dim, 2, dtype=dtype) / self.head_dim
        inverse = 1.0 / self.theta**exponents
        if self.type == "linear":
            return inverse / values["factor"], 1.0
        if self.type == "llama3":
            return _llama3(inverse, values), 1.0
        if self.type == "yarn":
            return _yarn(inverse, values, self.head_dim, self.theta)
        return inverse, 1.0


def _llama3(inverse: Tensor, values: Mapping[str, Any]) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    original, factor = values["original_max_position_embeddings"], values["factor"]
    low, high = values["low_freq_factor"], values["high_freq_factor"]
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inverse / factor + smooth * inverse
    result = torch.where(wavelength > original / low, inverse / factor, between)
    return torch.where(wavelength < original / high, inverse, result)


def _yarn(inverse: Tensor, values: Mapping[str, Any], head_dim: int, theta: float) -> tuple[Tensor, float]:
    """A ramp over dimensions between stretched and kept frequencies (Peng et al. 2023, eq. 17-22)."""
    original, factor = values["original_max_position_embeddings"], values["factor"]
    attention_factor = values.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = values.get("mscale"), values.get("mscale_all_dim")
        if mscale and mscale_all:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
        else:
            attention_factor = _yarn_mscale(factor, 1.0)

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(values.get("beta_fast") or 32), dimension(values.get("beta_slow") or 1)
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as in the reference code: no division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=inverse.dtype) - low) / (high - low)).clamp(0, 1)
    return inverse / factor * ramp + inverse * (1 - ramp), float(attention_factor)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class RopeTable:
    """cos + i sin of every position, complex [positions, head_dim / 2]; grows to what was asked for.

    Angles are computed in float32 for models of 32 bits or fewer, because checkpoints were trained that way, and in
    float64 for float64 models.
    """

    __slots__ = ("_config", "_device", "_dtype", "_halves", "_table", "limit")

    def __init__(self, config: RopeConfig, limit: int, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._device = device
        self.limit = limit
        self._table = self._build(0)
        self._halves: Tensor | None = None

    def upto(self, count: int) -> Tensor:
        """The table with at least `count` positions."""
        if count > self._table.shape[0]:
            self._table = self._build(max(count, min(self.limit, 2 * count), 64))
            self._halves = None
        return self._table

    def halves(self, count: int) -> Tensor:
        """The same as [positions, 2, head_dim / 2], cosines before sines: what `ops.kv_append_` takes."""
        table = self.upto(count)
        if self._halves is None:
            self._halves = torch.stack((table.real, table.imag), 1)
        return self._halves

    def _build(self, count: int) -> Tensor:
        inverse, scale = self._config.inverse_frequencies(self._dtype)
        angles = torch.arange(count, dtype=self._dtype).unsqueeze(1) * inverse
        return torch.complex(angles.cos() * scale, angles.sin() * scale).to(self._device)
