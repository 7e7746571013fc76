"""Hugging Face folders: config.json, generation_config.json and safetensors, whole or sharded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .base import ModelConfig
from .rope import RopeConfig, positive

__all__ = ["ARCHITECTURES", "NativeConfig", "read_configs", "read_tensors"]


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture fixes, and transformers' defaults for what config.json does not say."""

    qkv_bias: bool | None = None  # None: attention_bias of config.json decides
    o_bias: bool | None = None
    mlp_bias: bool | None = False
    qk_norm: bool = False
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_context: int = 32768


ARCHITECTURES: dict[str, _Family] = {
    "LlamaForCausalLM": _Family(mlp_bias=None, max_context=2048),
    "MistralForCausalLM": _Family(qkv_bias=False, o_bias=False, num_kv_heads=8, max_context=131072),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, o_bias=False, num_kv_heads=32),
    "Qwen3ForCausalLM": _Family(qk_norm=True, num_kv_heads=32, head_dim=128),
}


@dataclass(frozen=True, slots=True)
class NativeConfig:
    """Everything the native runner needs to know; `model` is the part that loops see.

    `windows[i]` is the sliding window of block i in tokens, the present one included, or None.
    """

    model: ModelConfig
    architecture: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> NativeConfig:
        """From the contents of config.json and generation_config.json.

        Raises:
            ValueError: an architecture, activation, rope type or feature that the native runner does not have, by name.
        """
        name = _architecture(config)
        family = ARCHITECTURES[name]
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ValueError(f"load_model: hidden_act: expected silu, got {activation!r}")
        if quantization := config.get("quantization_config"):
            got = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
            raise ValueError(f"load_model: quantization_config: expected none, got {got!r}")
        hidden_size, q_heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
        kv_heads = _count(config, "num_key_value_heads", family.num_kv_heads or q_heads)
        if q_heads % kv_heads:
            raise ValueError(
                f"load_model: num_attention_heads: expected a multiple of num_key_value_heads {kv_heads}, got {q_heads}"
            )
        head_dim = _count(config, "head_dim", family.head_dim or hidden_size // q_heads)
        max_context = _count(config, "max_position_embeddings", family.max_context)
        layers = _count(config, "num_hidden_layers")
        attention_bias = bool(config.get("attention_bias", False))
        generation = generation or {}
        eos = _ids("eos_token_id", generation, config)
        bos = _ids("bos_token_id", generation, config)
        model = ModelConfig(
            vocab_size=_count(config, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=layers,
            max_context=max_context,
            causal=True,
            eos_token_ids=eos,
            bos_token_id=bos[0] if bos else None,
        )
        return cls(
            model=model,
            architecture=name,
            num_q_heads=q_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=_count(config, "intermediate_size"),
            norm_eps=positive("config.json: rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            rope=RopeConfig.from_hf(config, head_dim, max_context),
            windows=_windows(name, config, layers),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=attention_bias if family.o_bias is None else family.o_bias,
            mlp_bias=bool(config.get("mlp_bias", False)) if family.mlp_bias is None else family.mlp_bias,
            qk_norm=family.qk_norm,
            tied_head=bool(config.get("tie_word_embeddings", False)),
        )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint."""
        d, f, dim = self.model.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_q_heads * dim, self.num_kv_heads * dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.model.vocab_size, d)}
        for i in range(self.model.num_layers):
            block = f"model.layers.{i}"
            shapes[f"{block}.input_layernorm.weight"] = (d,)
            shapes[f"{block}.post_attention_layernorm.weight"] = (d,)
            if self.qk_norm:
                shapes[f"{block}.self_attn.q_norm.weight"] = (dim,)
                shapes[f"{block}.self_attn.k_norm.weight"] = (dim,)
            linears = (
                ("self_attn.q_proj", q, d, self.qkv_bias),
                ("self_attn.k_proj", kv, d, self.qkv_bias),
                ("self_attn.v_proj", kv, d, self.qkv_bias),
                ("self_attn.o_proj", d, q, self.o_bias),
                ("mlp.gate_proj", f, d, self.mlp_bias),
                ("mlp.up_proj", f, d, self.mlp_bias),
                ("mlp.down_proj", d, f, self.mlp_bias),
            )
            for linear, out, inner, bias in linears:
                shapes[f"{block}.{linear}.weight"] = (out, inner)
                if bias:
                    shapes[f"{block}.{linear}.bias"] = (out,)
        shapes["model.norm.weight"] = (d,)
        if not self.tied_head:
            shapes["lm_head.weight"] = (self.model.vocab_size, d)
        return shapes


def read_configs(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Contents of config.json and of generation_config.json ({} where there is none)."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"load_model: path: expected a folder with config.json, got {str(path)!r}")
    generation = folder / "generation_config.json"
    return _read_json(folder / "config.json"), _read_json(generation) if generation.is_file() else {}


def read_tensors(path: str | os.PathLike[str], wanted: Iterable[str]) -> dict[str, Tensor]:
    """The wanted tensors of a folder, on the CPU, in the dtype of the file; names that are not there are left out.

    Raises:
        ImportError: the safetensors package is missing.
        ValueError: no safetensors in the folder, a damaged file or index, or a tensor that is not wanted and not known
            to be harmless (a bias that the config does not mention would otherwise vanish silently).
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("load_model needs the safetensors package: pip install 'fastdecode[models]'") from error
    folder = Path(path)
    wanted = set(wanted)
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(str(file), framework="pt") as archive:
                for name in archive.keys():  # noqa: SIM118  (not a dict)
                    if name in wanted:
                        tensors[name] = archive.get_tensor(name)
                    elif not _is_harmless(name):
                        raise ValueError(f"load_model: {file.name}: unexpected tensor {name}")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"load_model: {file}: expected a whole safetensors file, got: {error}") from error
    return tensors


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else names or config.get("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"load_model: architectures: expected one of {', '.join(ARCHITECTURES)}, got {name!r}; load others with "
            "transformers and pass the model in place of the folder"
        )
    return name


def _ids(name: str, generation: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, ...]:
    """One id or a list of them; what generation_config.json says comes first."""
    value = generation.get(name)
    value = config.get(name) if value is None else value
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    for item in ids:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise ValueError(f"load_model: {name}: expected ids, integers >= 0, got {item!r}")
    return ids


def _count(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"load_model: config.json: {name}: expected a positive integer, got {value!r}")
    return value


def _windows(name: str, config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    if name == "LlamaForCausalLM":
        return (None,) * layers
    window = None
    windowed = name == "MistralForCausalLM" or config.get("use_sliding_window")
    if windowed and config.get("sliding_window", 4096) is not None:  # the class default of transformers; null is none
        window = _count(config, "sliding_window", 4096)
    if name == "MistralForCausalLM":
        return (window,) * layers
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ValueError(f"load_model: config.json: max_window_layers: expected an integer >= 0, got {first!r}")
        return tuple(window if i >= first else None for i in range(layers))
    if not isinstance(types, list):
        raise ValueError(f"load_model: layer_types: expected a list, got {types!r}")
    known = {"full_attention": None, "sliding_attention": window}
    for kind in types:
        if not isinstance(kind, str) or kind not in known:
            raise ValueError(f"load_model: layer_types: expected one of {', '.join(known)}, got {kind!r}")
    if len(types) != layers:
        raise ValueError(f"load_model: layer_types: expected {layers} entries, got {len(types)}")
    return tuple(known[kind] for kind in types)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"load_model: {file}: expected JSON, got: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"load_model: {file}: expected a JSON object, got {type(content).__name__}")
    return content


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"load_model: {index}: expected weight_map, tensor name to file name")
        files = [folder / shard for shard in sorted(set(shards.values()))]
        for file in files:
            if file.parent != folder or not file.is_file():
                raise ValueError(f"load_model: {index}: expected the shard {file.name} in the folder, got none")
        return files
    if single.is_file():
        return [single]
    raise ValueError(f"load_model: path: expected model.safetensors or its index in {str(folder)!r}, got neither")


def _is_harmless(name: str) -> bool:
    # old Llama files store the inverse frequencies; a tied head is sometimes stored twice
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"
