"""Native runner for Llama-family checkpoints, made for few tokens per pass.

At batch 1 the weights of a small model are read in a few hundred microseconds, so the number of torch calls per block
counts as much as the products do. Hence two rearrangements when the weights are loaded:

* q, k and v are one matrix, gate and up another.
* Each head's dimensions are interleaved (i next to i + head_dim / 2), so the rotary embedding is one complex product.
  Scores do not change when q and k are permuted alike; cached keys are in this order.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .._host import TreeError
from .attention import ContiguousPass, PagedPass, check_positions
from .base import HiddenStates, KVCache, Output, Want, check_tokens, check_want
from .cache import ContiguousKVCache
from .checkpoint import NativeConfig, read_configs, read_tensors
from .linear import Linear
from .masks import ChainMask
from .paged_cache import KVCacheConfig, PagedKVCache
from .rope import RopeTable

__all__ = ["NativeModel", "load_model"]


class Block:
    """Weights of one block, rearranged."""

    __slots__ = ("attention_norm", "down", "gate_up", "mlp_norm", "o", "qk_norm", "qkv", "window")

    def __init__(self, config: NativeConfig, weights: Mapping[str, Tensor], index: int, prepack: bool) -> None:
        name = f"model.layers.{index}."
        q_heads, kv_heads, dim = config.num_q_heads, config.num_kv_heads, config.head_dim

        def interleave(rows: Tensor, heads: int) -> Tensor:
            # [heads, 2, dim / 2, ...] -> [heads, dim / 2, 2, ...]
            return rows.view(heads, 2, dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(heads, dim, *rows.shape[1:])

        def fused(kind: str) -> Tensor:
            q, k, v = (weights[f"{name}self_attn.{part}_proj.{kind}"] for part in "qkv")
            return torch.cat((interleave(q, q_heads).flatten(0, 1), interleave(k, kv_heads).flatten(0, 1), v))

        def gate_up(kind: str) -> Tensor:
            return torch.cat((weights[f"{name}mlp.gate_proj.{kind}"], weights[f"{name}mlp.up_proj.{kind}"]))

        self.window = config.windows[index]
        self.attention_norm = weights[name + "input_layernorm.weight"]
        self.mlp_norm = weights[name + "post_attention_layernorm.weight"]
        self.qkv = Linear(fused("weight"), fused("bias") if config.qkv_bias else None, prepack=prepack)
        self.qk_norm: Tensor | None = None
        if config.qk_norm:
            q_norm, k_norm = (interleave(weights[f"{name}self_attn.{part}_norm.weight"], 1) for part in "qk")
            self.qk_norm = torch.cat((q_norm.expand(q_heads, dim), k_norm.expand(kv_heads, dim)))
        o_bias = weights[name + "self_attn.o_proj.bias"] if config.o_bias else None
        self.o = Linear(weights[name + "self_attn.o_proj.weight"], o_bias, prepack=prepack)
        self.gate_up = Linear(gate_up("weight"), gate_up("bias") if config.mlp_bias else None, prepack=prepack)
        down_bias = weights[name + "mlp.down_proj.bias"] if config.mlp_bias else None
        self.down = Linear(weights[name + "mlp.down_proj.weight"], down_bias, prepack=prepack)


class NativeModel:
    """A Llama, Mistral, Qwen2 or Qwen3 model; follows the Model protocol.

    Args:
        config: see NativeConfig; `NativeConfig.from_hf` reads a config.json.
        weights: tensors under their Hugging Face names, as `config.tensor_shapes()` lists them, in any
            floating dtype; not changed.
        dtype: float32, bfloat16 or float64. Norms, rotary embedding and softmax sums are float32 or wider in any case.
        device: where the weights and caches live.
        prepack: on the CPU, keep weights in the packed layout of `ops.linear` (float32, float64) or of oneDNN
            (bfloat16).
        kv_cache: what `new_cache` makes: a KVCacheConfig or its name (see `KVCacheConfig.parse`), or "contiguous". None
            is "plain" on the CPU where paged attention has a kernel (head_dim a multiple of 16 up to 256), where it is
            as fast or faster, and "contiguous" elsewhere.
    Raises:
        ValueError: another dtype; a missing, unexpected or mis-shaped tensor, by name; a cache that this head_dim does
            not allow.
    """

    def __init__(
        self,
        config: NativeConfig,
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prepack: bool = True,
        kv_cache: str | KVCacheConfig | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(f"NativeModel: dtype: expected float32, bfloat16 or float64, got {dtype}")
        self.native_config = config
        self.config = config.model
        self.dtype = dtype
        self.device = torch.device(device)
        if kv_cache is None:
            kv_cache = "plain" if self.device.type == "cpu" and _has_pages(config) else "contiguous"
        self.kv_cache = _kv_cache(kv_cache, config)
        wide = torch.promote_types(dtype, torch.float32)
        self._epsilon = torch.tensor(config.norm_eps, dtype=wide, device=self.device)
        with torch.no_grad():
            checked = _check_weights(config, weights, dtype, self.device)
            self._embedding = checked["model.embed_tokens.weight"]
            self._blocks = [Block(config, checked, i, prepack) for i in range(self.config.num_layers)]
            self._norm = checked["model.norm.weight"]
            head = self._embedding if config.tied_head else checked["lm_head.weight"]
            self._head = Linear(head, prepack=prepack)
        self.rope = RopeTable(config.rope, self.config.max_context, dtype, self.device)
        self.masks: dict[int | None, ChainMask] = {
            window: ChainMask(window, config.num_q_heads // config.num_kv_heads, dtype, self.device)
            for window in config.windows
        }

    def with_kv_cache(self, kv_cache: str | KVCacheConfig) -> NativeModel:
        """The same model, weights shared, with another `kv_cache`."""
        other = copy.copy(self)
        other.kv_cache = _kv_cache(kv_cache, self.native_config)
        return other

    def new_cache(self, batch: int, capacity: int) -> ContiguousKVCache | PagedKVCache:
        """An empty cache for `batch` rows of `capacity` tokens, as `kv_cache` says."""
        if self.kv_cache is None:
            return ContiguousKVCache(**self._sizes(batch, capacity))
        return PagedKVCache(**self._sizes(batch, capacity), config=self.kv_cache)

    def _sizes(self, batch: int, capacity: int) -> dict[str, Any]:
        config = self.native_config
        return {
            "num_layers": self.config.num_layers,
            "batch": batch,
            "num_kv_heads": config.num_kv_heads,
            "capacity": capacity,
            "head_dim": config.head_dim,
            "max_context": self.config.max_context,
            "dtype": self.dtype,
            "device": self.device,
        }

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: KVCache,
        positions: Tensor | None = None,
        num_tokens: Tensor | Sequence[int] | None = None,
        tree: Tensor | None = None,
        want: Want = Want.LOGITS,
    ) -> Output:
        """Score tokens int64 [B, n] behind the committed ones; see Model.forward.

        Args:
            tree: parents int32 [B, n] of draft trees, -1 for slot 0: a slot then sees the committed tokens, its
                ancestors and itself, and stands at `lens` + its depth. Paged caches only.
        Returns:
            Output with logits [B, n, V] (or [B, 1, V]) and hidden states [B, n, d] in the model's dtype, as asked for.
            Nothing is recorded for autograd; hidden states are inference tensors (clone one to change it in place).
        """
        check_want("NativeModel.forward", want)
        if not isinstance(cache, (ContiguousKVCache, PagedKVCache)):
            got = type(cache).__name__
            raise ValueError(f"NativeModel.forward: cache: expected a cache from new_cache, got {got}")
        tokens, counts = check_tokens("NativeModel.forward", tokens, cache.batch, self.config.vocab_size, num_tokens)
        batch, n = tokens.shape
        shape = (batch, n, self.config.hidden_size)
        places = None  # checked before the cache is told of the forward: one that is refused changes nothing
        if positions is not None:
            places = check_positions(positions, batch, n, counts, self.config.max_context)
        with torch.inference_mode():  # 5 to 10 % less time per forward than no_grad
            if isinstance(cache, PagedKVCache):
                states = self._over_pages(tokens, cache, places, counts, tree, want)
            else:
                if tree is not None:
                    raise ValueError("NativeModel.forward: tree: expected None for a contiguous cache, got a tree")
                cache.stage(n, counts)
                states = self._run_blocks(tokens, ContiguousPass(self, cache, n, places))
            x = states[-1]
            hidden = None
            if want & Want.HIDDEN:
                x = self.rms_norm(x, self._norm)
                hidden = HiddenStates([state.view(shape) for state in states], x.view(shape))
            if want & Want.LAST_LOGITS:
                x = _last_rows(x.view(shape), counts)
            if not want & (Want.LOGITS | Want.LAST_LOGITS):
                return Output(None, hidden)
            x = x if want & Want.HIDDEN else self.rms_norm(x, self._norm)
        # outside, so that logits are ordinary tensors: processors change them in place
        logits = self._head(x).view(batch, 1 if want & Want.LAST_LOGITS else n, self.config.vocab_size)
        return Output(logits, hidden)

    def _over_pages(
        self,
        tokens: Tensor,
        cache: PagedKVCache,
        places: tuple[Tensor, int] | None,
        counts: list[int] | None,
        tree: Tensor | None,
        want: Want,
    ) -> list[Tensor]:
        """`_run_blocks` over a paged cache, in chunks where the cache wants them."""
        batch, n = tokens.shape
        mask = None
        if tree is not None:
            mask, depths = self._tree(tree, batch, n, counts)
            deepest = depths.amax(1).tolist() if n else [0] * batch
            cache.stage_tree(n, counts, deepest)
            if places is None:
                places = check_positions(cache.lens.unsqueeze(1) + depths, batch, n, counts, self.config.max_context)
        else:
            cache.stage(n, counts)
        plain = None
        if cache.config.prefill == "exact" and not all(cache.host_lens):
            plain = PagedKVCache(**self._sizes(batch, min(n, self.config.max_context)))
            valid = [n] * batch if counts is None else counts
            plain.stage(n, [0 if length else count for length, count in zip(cache.host_lens, valid)])
        size = n if tree is not None or cache.chunk is None else cache.chunk
        parts = []
        for first in range(0, n, size):
            last = min(first + size, n)
            own = None if places is None else (places[0][:, first:last], places[1])
            step = PagedPass(self, cache, first, last, positions=own, tree_mask=mask, plain=plain)
            parts.append(self._run_blocks(tokens[:, first:last], step))
            cache.note(step.statuses)
        if len(parts) == 1:
            return parts[0]
        if not want & Want.HIDDEN:
            parts = [states[-1:] for states in parts]
        chunks = ([state.view(batch, -1, state.shape[-1]) for state in layer] for layer in zip(*parts))
        return [torch.cat(chunk, 1).flatten(0, 1) for chunk in chunks]

    def _tree(self, parents: Tensor, batch: int, n: int, counts: list[int] | None) -> tuple[Tensor, Tensor]:
        """Ancestor masks and depths (0 in padded slots)."""
        where = "NativeModel.forward: tree"
        if parents.dtype != torch.int32 or parents.shape != (batch, n):
            raise ValueError(f"{where}: expected int32 [{batch}, {n}], got {parents.dtype} {list(parents.shape)}")
        num_nodes = None if counts is None else torch.tensor(counts, dtype=torch.int32, device=parents.device)
        for row, code in enumerate(ops.tree_check(parents, num_nodes).tolist()):
            if code:
                raise ValueError(
                    f"{where}: expected parents before their children, got {TreeError(code)!r} in row {row}"
                )
        mask, depths = ops.tree_mask(parents, num_nodes)
        return mask, depths.clamp(min=0)

    def _run_blocks(self, tokens: Tensor, step: ContiguousPass | PagedPass) -> list[Tensor]:
        """Embeddings and the residual stream after every block, each [B * n, d]."""
        x = F.embedding(tokens.reshape(-1), self._embedding)
        states = [x]
        for index, block in enumerate(self._blocks):
            qkv = block.qkv(self.rms_norm(x, block.attention_norm))
            x = block.o(step.attend(index, block, qkv), x)
            gate, up = block.gate_up(self.rms_norm(x, block.mlp_norm)).chunk(2, -1)
            x = block.down(F.silu(gate).mul_(up), x)
            states.append(x)
        return states

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """x / rms(x) * weight over the last dimension; sums in float32 or wider."""
        # five small calls where F.rms_norm makes eight; epsilon is a tensor because a Python scalar costs a conversion
        epsilon = self._epsilon
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=epsilon.dtype)
        scale = torch.addcmul(epsilon, norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
        if x.dtype == epsilon.dtype:
            return torch.mul(x, scale).mul_(weight)
        return torch.mul(x, scale).to(x.dtype).mul_(weight)


def _has_pages(config: NativeConfig) -> bool:
    """Whether `ops.paged_attention` takes heads of this size."""
    return config.head_dim % 16 == 0 and config.head_dim <= 256


def _kv_cache(kv_cache: str | KVCacheConfig, config: NativeConfig) -> KVCacheConfig | None:
    """The configuration of paged caches, checked against the model; None for contiguous ones."""
    if kv_cache == "contiguous":
        return None
    asked = KVCacheConfig.parse(kv_cache)
    if not _has_pages(config):
        got = f"head_dim {config.head_dim}"
        raise ValueError(
            f"NativeModel: kv_cache: expected 'contiguous', paged ones need multiples of 16 up to 256, got {got}"
        )
    PagedKVCache(  # an empty one, for its checks
        num_layers=1, batch=0, num_kv_heads=1, capacity=0, head_dim=config.head_dim, max_context=0, config=asked
    )
    return asked


def _last_rows(x: Tensor, counts: list[int] | None) -> Tensor:
    """[B, n, d] -> [B, d], each row's last valid slot (slot 0 where there is none)."""
    if counts is None:
        return x[:, -1]
    last = torch.tensor([max(0, count - 1) for count in counts], device=x.device)
    return x[torch.arange(x.shape[0], device=x.device), last]


def _check_weights(
    config: NativeConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """The tensors of `config.tensor_shapes()` in the compute dtype; ValueError for one that is not as it must be."""
    checked = {}
    for name, shape in config.tensor_shapes().items():
        tensor = weights.get(name)
        if tensor is None:
            raise ValueError(f"NativeModel: weights: expected {name} {list(shape)}, got no such tensor")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"NativeModel: {name}: expected {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"NativeModel: {name}: expected a floating dtype of 16 bits or more, got {tensor.dtype}")
        checked[name] = tensor.detach().to(device=device, dtype=dtype)
    return checked


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prepack: bool = True,
    kv_cache: str | KVCacheConfig | None = None,
) -> NativeModel:
    """Load a Hugging Face folder (config.json, safetensors) into the native runner.

    Args:
        path: folder of a LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM checkpoint.
        dtype: compute dtype: float32, bfloat16 or float64; weights are converted to it.
        device: where the model runs.
        prepack, kv_cache: see NativeModel.
    Raises:
        ValueError: the folder is no checkpoint, a file is damaged, a tensor is missing, unexpected or mis-shaped, or
            the config asks for something the runner does not have (architecture, activation, rope type, ...), by name.
        ImportError: the safetensors package is missing.
    """
    config = NativeConfig.from_hf(*read_configs(path))
    weights = read_tensors(path, config.tensor_shapes())
    return NativeModel(config, weights, dtype=dtype, device=device, prepack=prepack, kv_cache=kv_cache)
