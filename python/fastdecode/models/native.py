"""Native runner for Llama-family checkpoints, made for few tokens per pass.

At batch 1 the weights of a small model are read in a few hundred microseconds, so the number of torch calls per block
counts as much as the products do. Hence three rearrangements when the weights are loaded:

* q, k and v are one matrix, gate and up another.
* Each head's dimensions are interleaved (i next to i + head_dim / 2), so the rotary embedding is one complex product.
  Scores do not change when q and k are permuted alike; cached keys are in this order.
* Query heads stand as [group][kv head] instead of [kv head][group], so that queries of one kv head over all slots are
  one strided view for attention, and its result is a view again; the columns of o_proj are permuted to match.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import HiddenStates, KVCache, Output, Want, check_cache, check_tokens, check_want
from .cache import ContiguousKVCache
from .checkpoint import NativeConfig, read_configs, read_tensors
from .linear import Linear
from .masks import ChainMask
from .rope import RopeTable

__all__ = ["NativeModel", "load_model"]


class _Block:
    """Weights of one block, rearranged."""

    __slots__ = ("attention_norm", "down", "gate_up", "mlp_norm", "o", "qk_norm", "qkv", "window")

    def __init__(self, config: NativeConfig, weights: Mapping[str, Tensor], index: int, prepack: bool) -> None:
        name = f"model.layers.{index}."
        q_heads, kv_heads, dim = config.num_q_heads, config.num_kv_heads, config.head_dim
        group = q_heads // kv_heads

        def interleave(rows: Tensor, heads: int) -> Tensor:
            # [heads, 2, dim / 2, ...] -> [heads, dim / 2, 2, ...]
            return rows.view(heads, 2, dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(heads, dim, *rows.shape[1:])

        def queries(rows: Tensor) -> Tensor:
            rows = interleave(rows, q_heads)
            return rows.unflatten(0, (kv_heads, group)).transpose(0, 1).flatten(0, 2)

        def fused(kind: str) -> Tensor:
            q, k, v = (weights[f"{name}self_attn.{part}_proj.{kind}"] for part in "qkv")
            return torch.cat((queries(q), interleave(k, kv_heads).flatten(0, 1), v))

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
        o = weights[name + "self_attn.o_proj.weight"].unflatten(1, (kv_heads, group, dim)).transpose(1, 2).flatten(1)
        self.o = Linear(o, weights[name + "self_attn.o_proj.bias"] if config.o_bias else None, prepack=prepack)
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
    Raises:
        ValueError: another dtype; a missing, unexpected or mis-shaped tensor, by name.
    """

    def __init__(
        self,
        config: NativeConfig,
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prepack: bool = True,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(f"NativeModel: dtype: expected float32, bfloat16 or float64, got {dtype}")
        self.native_config = config
        self.config = config.model
        self.dtype = dtype
        self.device = torch.device(device)
        wide = torch.promote_types(dtype, torch.float32)
        self._epsilon = torch.tensor(config.norm_eps, dtype=wide, device=self.device)
        with torch.no_grad():
            checked = _check_weights(config, weights, dtype, self.device)
            self._embedding = checked["model.embed_tokens.weight"]
            self._blocks = [_Block(config, checked, i, prepack) for i in range(self.config.num_layers)]
            self._norm = checked["model.norm.weight"]
            head = self._embedding if config.tied_head else checked["lm_head.weight"]
            self._head = Linear(head, prepack=prepack)
        self._rope = RopeTable(config.rope, self.config.max_context, dtype, self.device)
        self._masks: dict[int | None, ChainMask] = {
            window: ChainMask(window, config.num_q_heads // config.num_kv_heads, dtype, self.device)
            for window in config.windows
        }

    def new_cache(self, batch: int, capacity: int) -> ContiguousKVCache:
        """An empty cache for `batch` rows of `capacity` tokens, in the model's dtype."""
        config = self.native_config
        return ContiguousKVCache(
            num_layers=self.config.num_layers,
            batch=batch,
            num_kv_heads=config.num_kv_heads,
            capacity=capacity,
            head_dim=config.head_dim,
            max_context=self.config.max_context,
            dtype=self.dtype,
            device=self.device,
        )

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: KVCache,
        positions: Tensor | None = None,
        num_tokens: Tensor | Sequence[int] | None = None,
        want: Want = Want.LOGITS,
    ) -> Output:
        """Score tokens int64 [B, n] behind the committed ones; see Model.forward.

        Returns:
            Output with logits [B, n, V] (or [B, 1, V]) and hidden states [B, n, d] in the model's dtype, as asked for.
            Nothing is recorded for autograd; hidden states are inference tensors (clone one to change it in place).
        """
        check_want("NativeModel.forward", want)
        cache = check_cache("NativeModel.forward", cache, ContiguousKVCache)
        tokens, counts = check_tokens("NativeModel.forward", tokens, cache.batch, self.config.vocab_size, num_tokens)
        batch, n = tokens.shape
        shape = (batch, n, self.config.hidden_size)
        cache.stage(n, counts)
        with torch.inference_mode():  # 5 to 10 % less time per forward than no_grad
            states = self._run_blocks(tokens, _Step(self, cache, n, positions, counts))
            x = states[-1]
            hidden = None
            if want & Want.HIDDEN:
                x = self._rms_norm(x, self._norm)
                hidden = HiddenStates([state.view(shape) for state in states], x.view(shape))
            if want & Want.LAST_LOGITS:
                x = _last_rows(x.view(shape), counts)
            if not want & (Want.LOGITS | Want.LAST_LOGITS):
                return Output(None, hidden)
            x = x if want & Want.HIDDEN else self._rms_norm(x, self._norm)
        # outside, so that logits are ordinary tensors: processors change them in place
        logits = self._head(x).view(batch, 1 if want & Want.LAST_LOGITS else n, self.config.vocab_size)
        return Output(logits, hidden)

    def _run_blocks(self, tokens: Tensor, step: _Step) -> list[Tensor]:
        """Embeddings and the residual stream after every block, each [B * n, d]."""
        x = F.embedding(tokens.reshape(-1), self._embedding)
        states = [x]
        for index, block in enumerate(self._blocks):
            qkv = block.qkv(self._rms_norm(x, block.attention_norm))
            x = block.o(step.attend(index, block, qkv), x)
            gate, up = block.gate_up(self._rms_norm(x, block.mlp_norm)).chunk(2, -1)
            x = block.down(F.silu(gate).mul_(up), x)
            states.append(x)
        return states

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """x / rms(x) * weight over the last dimension; sums in float32 or wider."""
        # five small calls where F.rms_norm makes eight; epsilon is a tensor because a Python scalar costs a conversion
        epsilon = self._epsilon
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=epsilon.dtype)
        scale = torch.addcmul(epsilon, norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
        if x.dtype == epsilon.dtype:
            return torch.mul(x, scale).mul_(weight)
        return torch.mul(x, scale).to(x.dtype).mul_(weight)


class _Step:
    """What all blocks of one forward share: views of the cache, rotation factors, masks.

    With equal lengths in all rows (always at batch 1) writes are slices and masks come from a table. Otherwise keys are
    scattered to per-row positions, and shorter rows are masked, their unused slots cleared (0 * NaN would not be 0).
    """

    __slots__ = (
        "batch",
        "cache_dtype",
        "calls",
        "factors",
        "factors_k",
        "k",
        "k_new",
        "model",
        "n",
        "slots",
        "v",
        "v_new",
    )

    def __init__(
        self,
        model: NativeModel,
        cache: ContiguousKVCache,
        n: int,
        positions: Tensor | None,
        counts: list[int] | None,
    ) -> None:
        lens = cache.host_lens
        self.model, self.batch, self.n = model, len(lens), n
        self.cache_dtype = cache.k.dtype
        before = max(lens, default=0)
        total = before + n
        self.k = cache.k.narrow(3, 0, total).unbind(0)
        self.v = cache.v.narrow(3, 0, total).unbind(0)
        equal = self.batch == 1 or all(length == before for length in lens)
        if equal:
            self.slots = None
            new = cache.k.unflatten(-1, (-1, 2)).narrow(3, before, n)
            self.k_new = (new if self.cache_dtype == torch.bfloat16 else torch.view_as_complex(new)).unbind(0)
            self.v_new = cache.v.narrow(3, before, n).unbind(0)
            self.calls = {window: mask.calls(before, n) for window, mask in model._masks.items()}
        else:
            self.k_new = self.v_new = ()
            own = torch.tensor(lens, device=model.device).unsqueeze(1)
            slots = own + torch.arange(n, device=model.device)
            self.slots = (torch.arange(self.batch, device=model.device).unsqueeze(1), slots)
            for row, length in enumerate(lens):
                if length + n < total:
                    cache.k[:, row, :, length + n : total].zero_()
                    cache.v[:, row, :, length + n : total].zero_()
            self.calls = {window: mask.ragged(slots, total) for window, mask in model._masks.items()}
        self.factors = self._rotation(positions, counts, before, equal)
        self.factors_k = self.factors.transpose(1, 2)

    def _rotation(self, positions: Tensor | None, counts: list[int] | None, before: int, equal: bool) -> Tensor:
        """Complex [1 or B, n, 1, head_dim / 2]."""
        model, n = self.model, self.n
        if positions is None and equal:
            return model._rope.upto(before + n)[before : before + n].view(1, n, 1, -1)
        if positions is None:
            assert self.slots is not None
            return model._rope.upto(before + n)[self.slots[1]].unsqueeze(2)
        where = "NativeModel.forward"
        if positions.dtype not in (torch.int64, torch.int32) or positions.shape not in ((self.batch, n), (n,)):
            raise ValueError(
                f"{where}: positions: expected int64 [{self.batch}, {n}], got {positions.dtype} {list(positions.shape)}"
            )
        positions = positions.expand(self.batch, n)
        if counts is not None:
            limit = torch.tensor(counts, device=positions.device).unsqueeze(1)
            positions = positions.masked_fill(torch.arange(n, device=positions.device) >= limit, 0)
        low, high = (int(bound) for bound in torch.aminmax(positions)) if positions.numel() else (0, 0)
        if low < 0 or high >= model.config.max_context:
            bad = low if low < 0 else high
            raise ValueError(f"{where}: positions: expected 0..{model.config.max_context - 1}, got {bad}")
        return model._rope.upto(high + 1)[positions.long()].unsqueeze(2)

    def attend(self, index: int, block: _Block, qkv: Tensor) -> Tensor:
        """Store keys and values of a block; attention [B * n, num_q_heads * head_dim], heads as [group][kv head].

        `qkv` is fresh and contiguous, so strided views are taken directly: one call each instead of three.
        """
        config = self.model.native_config
        batch, n, dim = self.batch, self.n, config.head_dim
        q_heads, kv_heads = config.num_q_heads, config.num_kv_heads
        half, rotated = dim // 2, (q_heads + kv_heads) * dim
        row = rotated + kv_heads * dim
        v = qkv.as_strided((batch, kv_heads, n, dim), (n * row, dim, row, 1), rotated)
        qk = qkv
        if block.qk_norm is not None:
            heads = qkv.as_strided((batch * n, q_heads + kv_heads, dim), (row, dim, 1), 0)
            qk, row = self.model._rms_norm(heads, block.qk_norm), rotated
        if qk.dtype == torch.bfloat16:  # there are no bfloat16 complex numbers
            qk, row = qk.as_strided((batch * n, rotated), (row, 1), 0).float(), rotated
        pairs = torch.view_as_complex(qk.view(batch * n, row // 2, 2))
        row //= 2
        q = torch.mul(pairs.as_strided((batch, n, q_heads, half), (n * row, row, half, 1), 0), self.factors)
        if self.slots is None:
            k = pairs.as_strided((batch, kv_heads, n, half), (n * row, half, row, 1), q_heads * half)
            if self.cache_dtype == torch.bfloat16:
                self.k_new[index].copy_(torch.view_as_real(k * self.factors_k))
            else:
                torch.mul(k, self.factors_k, out=self.k_new[index])
            self.v_new[index].copy_(v)
        else:
            k = pairs.as_strided((batch, n, kv_heads, half), (n * row, row, half, 1), q_heads * half)
            rows, slots = self.slots
            self.k[index][rows, :, slots] = torch.view_as_real(k * self.factors).flatten(-2).to(self.cache_dtype)
            self.v[index][rows, :, slots] = v.transpose(1, 2)
        group = q_heads // kv_heads
        queries = torch.view_as_real(q).to(self.cache_dtype)
        queries = queries.as_strided((batch, kv_heads, n * group, dim), (n * q_heads * dim, dim, kv_heads * dim, 1), 0)
        calls = self.calls[block.window]
        keys, values = self.k[index], self.v[index]
        if len(calls) == 1:
            _, _, begin, _, mask = calls[0]
            if begin:
                keys, values = keys[:, :, begin:], values[:, :, begin:]
            out = F.scaled_dot_product_attention(queries, keys, values, mask).transpose(1, 2)
        else:
            parts = [
                F.scaled_dot_product_attention(
                    queries[:, :, first * group : last * group], keys[:, :, begin:end], values[:, :, begin:end], mask
                ).transpose(1, 2)
                for first, last, begin, end, mask in calls
            ]
            out = torch.cat(parts, 1)
        return out.reshape(batch * n, q_heads * dim)


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
) -> NativeModel:
    """Load a Hugging Face folder (config.json, safetensors) into the native runner.

    Args:
        path: folder of a LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM checkpoint.
        dtype: compute dtype: float32, bfloat16 or float64; weights are converted to it.
        device: where the model runs.
        prepack: see NativeModel.
    Raises:
        ValueError: the folder is no checkpoint, a file is damaged, a tensor is missing, unexpected or mis-shaped, or
            the config asks for something the runner does not have (architecture, activation, rope type, ...), by name.
        ImportError: the safetensors package is missing.
    """
    config = NativeConfig.from_hf(*read_configs(path))
    weights = read_tensors(path, config.tensor_shapes())
    return NativeModel(config, weights, dtype=dtype, device=device, prepack=prepack)
