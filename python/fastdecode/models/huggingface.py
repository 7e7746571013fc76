"""Any causal language model of `transformers` behind the Model protocol.

The model runs as it is; what this file adds is a cache with a length per row. A row's keys and values stand at the
row's own positions, and a mask of four dimensions says which of them each slot sees: transformers' own caches have one
length for the whole batch, so they can neither take back a different number of drafts per row nor append to them.
This module does not import transformers: whoever has a model of it has it imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .base import HiddenStates, KVCache, ModelConfig, Output, Want, check_cache, check_tokens, check_want
from .cache import RowCache, check_capacity
from .tokenizer import Tokenizer

__all__ = ["HuggingFaceCache", "HuggingFaceModel", "is_transformers_model", "is_transformers_tokenizer"]

_KINDS = ("full_attention", "sliding_attention", "chunked_attention")


class HuggingFaceCache(RowCache):
    """Keys and values of every layer, each [B, heads, capacity, head size] in the layer's own shape and dtype.

    A layer's tensors are made when it first writes: only then are its heads known. Until the first forward an empty
    tensor stands for the batch and the capacity.
    """

    def __init__(self, batch: int, capacity: int, max_context: int, device: torch.device | str = "cpu") -> None:
        check_capacity(batch, capacity, max_context)
        with torch.inference_mode(False):
            empty = torch.empty(batch, 0, capacity, 0, device=device)
        super().__init__([empty], batch_dim=0, token_dim=2, max_context=max_context)
        self._of_layer: dict[int, int] = {}  # place of a layer's keys among the tensors; its values follow

    def _take(self, rows: list[int], *, forked: bool) -> None:
        super()._take(rows, forked=forked)
        self._of_layer = dict(self._of_layer)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have written, by transformers' index."""
        return tuple(self._of_layer)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer that has written; replaced on growth."""
        place = self._of_layer[index]
        return self._stores[place], self._stores[place + 1]

    def open_layer(self, index: int, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, made in the shapes of `like` (each [B, heads, n, head size]) if it is new."""
        if index not in self._of_layer:
            self._of_layer[index] = len(self._stores)
            for tensor in like:
                batch, heads, _, size = tensor.shape
                # zeros: a row reads, and masks, slots that another row of the batch has used and it has not
                self._stores.append(tensor.new_zeros(batch, heads, self.capacity, size))
        return self.layer(index)


class HuggingFaceModel:
    """A causal language model of `transformers`, following the Model protocol.

    Works for models whose attention takes keys and values from the cache, positions from `position_ids`, and a mask
    of four dimensions (attention implementation "eager" or "sdpa"): full, sliding-window or chunked attention, with
    rotary or learned positions. The model is not changed; its device and dtype stay. Its `generation_config` is read
    for `eos_token_id` and `bos_token_id` only.

    With transformers 4 a few architectures (GPT-J, GPT-NeoX, StableLM) take no cache but its own, and say
    so.

    Args:
        model: for example what `AutoModelForCausalLM.from_pretrained` returns.
        max_context: most tokens per row; None is the config's `max_position_embeddings`.
    Raises:
        ValueError: something that cannot be decoded this way, by the name of its class: no language model head, an
            encoder, a recurrent state, attention by position bias, another attention implementation, layers on
            several devices.

    Note that "eager" attention computes its softmax in float32 also in a float64 model: logits of one text, read in
    passes of different lengths, then agree to about 1e-7 only.
    """

    def __init__(self, model: nn.Module, *, max_context: int | None = None) -> None:
        self.model = model
        self._name = type(model).__name__
        parameters = _check_model(self._name, model)
        text: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
        self._masks = _Masks(self._name, text)
        self._takes_rows = "logits_to_keep" in parameters
        limit = getattr(text, "max_position_embeddings", None) if max_context is None else max_context
        if not isinstance(limit, int) or limit < 1:
            raise ValueError(
                f"HuggingFaceModel: max_context: expected a positive int, because the config of {self._name} has no "
                f"max_position_embeddings, got {limit!r}"
            )
        generation = getattr(model, "generation_config", None)
        bos = _ids(self._name, "bos_token_id", generation, text)
        self.config = ModelConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            max_context=limit,
            eos_token_ids=_ids(self._name, "eos_token_id", generation, text),
            bos_token_id=bos[0] if bos else None,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Where the weights are, and caches go."""
        return self.model.device  # type: ignore[return-value]

    def new_cache(self, batch: int, capacity: int) -> HuggingFaceCache:
        """An empty cache for `batch` rows of `capacity` tokens."""
        return HuggingFaceCache(batch, capacity, self.config.max_context, self.device)

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

        `positions` change what `position_ids` says, not which tokens a slot sees. Reads `tokens` on the host.

        Returns:
            logits [B, n, V] (for LAST_LOGITS [B, 1, V]) and hidden states [B, n, d], as asked for, in the dtype that
            the model gives them, on the device of `tokens`. Hidden states are transformers' `hidden_states`: what
            enters the first block, the output of every block, and, as "final", the last of them after the norm.
        Raises:
            ValueError: see Model.forward; a model in training mode.
        """
        where = "HuggingFaceModel.forward"
        check_want(where, want)
        cache = check_cache(where, cache, HuggingFaceCache)
        if self.model.training:
            raise ValueError(f"{where}: model: expected {self._name} in eval mode (call .eval()), got training mode")
        tokens, counts = check_tokens(where, tokens, cache.batch, self.config.vocab_size, num_tokens)
        n = tokens.shape[1]
        positions = self._positions(cache.host_lens, n, positions, counts)
        last = None if counts is None else [max(0, count - 1) for count in counts]
        cache.stage(n, counts)
        if cache.batch == 0:
            return self._nothing(tokens, want)
        # neither autograd nor inference mode: what a model keeps between calls must stay usable for training
        with torch.inference_mode(False), torch.no_grad(), self._last_block(want) as block:
            step = _Step(cache, n)
            arguments: dict[str, Any] = {
                "input_ids": tokens.to(self.device),
                "attention_mask": self._masks.build(cache.host_lens, n, self.dtype, self.device),
                "position_ids": positions.to(self.device),
                "past_key_values": step,
                "use_cache": True,
            }
            rows: list[int] | None = None  # the slots whose logits are computed; None: all
            if self._takes_rows and not want & Want.LOGITS:
                # nothing wanted is still one row: there is no calling a model without its head
                rows = [n - 1] if last is None or not want & Want.LAST_LOGITS else sorted(set(last))
                arguments["logits_to_keep"] = 1 if rows == [n - 1] else torch.tensor(rows, device=self.device)
            if want & Want.HIDDEN:
                arguments["output_hidden_states"] = True
            output = self.model(**arguments)
            step.check(self._name)
            logits = None
            if want & (Want.LOGITS | Want.LAST_LOGITS):
                logits = self._logits(output.logits, n if rows is None else len(rows))
                if want & Want.LAST_LOGITS:
                    logits = _last_rows(logits, last, rows)
                logits = logits.to(tokens.device)
            hidden = self._hidden(output.hidden_states, block, tokens) if want & Want.HIDDEN else None
        return Output(logits, hidden)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _positions(self, lens: Sequence[int], n: int, positions: Tensor | None, counts: Sequence[int] | None) -> Tensor:
        """int64 [B, n]; padded slots hold a position that the model has, too."""
        where, high = "HuggingFaceModel.forward", self.config.max_context - 1
        if positions is None:
            return (torch.tensor(lens, dtype=torch.int64).unsqueeze(1) + torch.arange(n)).clamp_(max=high)
        batch = len(lens)
        if positions.dtype not in (torch.int64, torch.int32) or positions.shape not in ((batch, n), (n,)):
            raise ValueError(
                f"{where}: positions: expected int64 [{batch}, {n}], got {positions.dtype} {list(positions.shape)}"
            )
        positions = positions.expand(batch, n).long()
        if counts is not None:
            limit = torch.tensor(counts, device=positions.device).unsqueeze(1)
            positions = positions.masked_fill(torch.arange(n, device=positions.device) >= limit, 0)
        bad = positions[(positions < 0) | (positions > high)].tolist()
        if bad:
            raise ValueError(f"{where}: positions: expected 0..{high}, got {bad[0]}")
        return positions

    def _nothing(self, tokens: Tensor, want: Want) -> Output:
        """Outputs of a batch without rows, which models need not know how to handle."""

        def empty(slots: int, size: int) -> Tensor:
            return torch.empty(0, slots, size, dtype=self.dtype, device=tokens.device)

        n, config = tokens.shape[1], self.config
        logits = hidden = None
        if want & (Want.LOGITS | Want.LAST_LOGITS):
            logits = empty(1 if want & Want.LAST_LOGITS else n, config.vocab_size)
        if want & Want.HIDDEN:
            states = [empty(n, config.hidden_size) for _ in range(config.num_layers + 2)]
            hidden = HiddenStates(states[:-1], states[-1])
        return Output(logits, hidden)

    def _logits(self, logits: Tensor, slots: int) -> Tensor:
        if list(logits.shape[1:]) != [slots, self.config.vocab_size]:
            raise ValueError(
                f"HuggingFaceModel.forward: {self._name}: expected logits [{logits.shape[0]}, {slots}, "
                f"{self.config.vocab_size}], got {list(logits.shape)}"
            )
        return logits

    @contextmanager
    def _last_block(self, want: Want) -> Iterator[list[Tensor]]:
        """While it is open, the output of the last block is put into the list (if hidden states are wanted).

        transformers gives the last block's output after the norm only.
        """
        caught: list[Tensor] = []
        if not want & Want.HIDDEN:
            yield caught
            return
        layers = self.config.num_layers
        stacks = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
        if not stacks:
            raise ValueError(f"HuggingFaceModel.forward: want: {self._name} has no list of {layers} blocks for HIDDEN")

        def catch(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            caught.append(output[0] if isinstance(output, tuple) else output)

        handle = stacks[0][-1].register_forward_hook(catch)  # outer modules come first
        try:
            yield caught
        finally:
            handle.remove()

    def _hidden(self, states: Sequence[Tensor] | None, block: Sequence[Tensor], tokens: Tensor) -> HiddenStates:
        layers = self.config.num_layers
        if states is None or len(states) != layers + 1 or len(block) != 1:
            got = f"{0 if states is None else len(states)} and {len(block)} outputs of the last block"
            raise ValueError(f"HuggingFaceModel.forward: {self._name}: expected {layers + 1} hidden states, got {got}")
        found = [state.to(tokens.device) for state in (*states[:-1], block[0], states[-1])]
        return HiddenStates(found[:-1], found[-1])


class _Step:
    """What a model sees as its cache during one forward: transformers' `Cache`, as far as decoders use it.

    With equal lengths in all rows (always at batch 1) a layer's keys are written as one slice; otherwise each row
    writes at its own positions, and the slots that shorter rows do not use are cleared (0 * NaN would not be 0).
    """

    is_compileable = False

    def __init__(self, cache: HuggingFaceCache, n: int) -> None:
        lens = cache.host_lens
        self._cache, self._n = cache, n
        self._before = max(lens)
        self._written: set[int] = set()
        self._slots: tuple[Tensor, Tensor] | None = None
        if min(lens) < self._before:
            own = torch.tensor(lens, device=cache.device).unsqueeze(1)
            slots = own + torch.arange(n, device=cache.device)
            self._slots = (torch.arange(len(lens), device=cache.device).unsqueeze(1), slots)
            self._first_unused = min(lens) + n
            columns = torch.arange(self._first_unused, self._before + n, device=cache.device)
            self._unused = (columns >= own + n)[:, None, :, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *arguments: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Store this step's keys and values [B, heads, n, head size]; all of the rows' so far."""
        if key_states.shape[2] != self._n or layer_idx in self._written:
            raise ValueError(
                f"HuggingFaceModel.forward: expected {self._n} keys per row, once from every layer, "
                f"got {key_states.shape[2]} from layer {layer_idx}"
            )
        self._written.add(layer_idx)
        total = self._before + self._n
        stores = self._cache.open_layer(layer_idx, (key_states, value_states))
        for store, new in zip(stores, (key_states, value_states), strict=True):
            if self._slots is None:
                store[:, :, self._before : total] = new
            else:
                rows, slots = self._slots
                store[:, :, self._first_unused : total].masked_fill_(self._unused, 0)
                store[rows, :, slots] = new.transpose(1, 2).to(store.dtype)
        return stores[0][:, :, :total], stores[1][:, :, :total]

    def check(self, name: str) -> None:
        """ValueError unless every layer that has keys from before has written: a model that ignores the cache."""
        if not self._written or self._written != set(self._cache.layers):
            got = f"{len(self._written)} of {len(self._cache.layers)}"
            raise ValueError(f"HuggingFaceModel.forward: {name}: expected all layers to use the cache, got {got}")

    def __getattr__(self, name: str) -> Any:
        # AttributeError, so that a model may also ask whether there is such a thing
        raise AttributeError(
            f"HuggingFaceModel: the model asks its cache for {name!r}, which the adapter does not have"
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache, of the longest row."""
        return self._before

    # what transformers asks when it is given no mask

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Column of the first slot."""
        return self._before

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Columns of a mask, and the first one's position."""
        return self._before + self._n, 0


class _Masks:
    """Which cached tokens each slot sees, in the form that transformers itself would pass."""

    def __init__(self, name: str, config: Any) -> None:
        self._attention = config._attn_implementation
        if self._attention not in ("eager", "sdpa"):
            raise ValueError(
                f"HuggingFaceModel: {name}: expected attn_implementation 'eager' or 'sdpa', got {self._attention!r}"
            )
        kinds = getattr(config, "layer_types", None)
        self._by_kind = kinds is not None
        sizes = {
            "full_attention": None,
            "sliding_attention": getattr(config, "sliding_window", None),
            "chunked_attention": getattr(config, "attention_chunk_size", None),
        }
        if kinds is None:
            kinds = [kind for kind in _KINDS[1:] if sizes[kind] is not None][:1] or _KINDS[:1]
        for kind in kinds:
            if kind not in _KINDS:
                raise ValueError(f"HuggingFaceModel: {name}: expected layers of {', '.join(_KINDS)}, got {kind!r}")
            if kind != "full_attention" and not isinstance(sizes[kind], int):
                raise ValueError(f"HuggingFaceModel: {name}: expected a window for {kind}, got {sizes[kind]!r}")
        self._sizes: dict[str, int] = {kind: sizes[kind] or 0 for kind in dict.fromkeys(kinds)}  # 0: no window

    def build(self, lens: Sequence[int], n: int, dtype: torch.dtype, device: torch.device) -> Any:
        """One mask [B, 1, n, columns], or one for each kind of layer; None where nothing but later slots is hidden."""
        total, equal, sizes = max(lens) + n, min(lens) == max(lens), self._sizes.values()
        if self._attention == "sdpa" and equal and n in (1, total) and all(not size or total <= size for size in sizes):
            return dict.fromkeys(self._sizes) if self._by_kind else None  # faster: no mask to read, and GQA as it is
        rows = lens[:1] if equal else lens
        slots = torch.tensor(rows, device=device)[:, None, None] + torch.arange(n, device=device)[:, None]
        tokens = torch.arange(total, device=device)
        masks = {}
        for kind, size in self._sizes.items():
            seen = tokens <= slots
            if kind == "sliding_attention":
                seen &= tokens > slots - size
            elif kind == "chunked_attention":
                seen &= tokens // size == slots // size
            if self._attention == "eager":
                mask = torch.zeros(seen.shape, dtype=dtype, device=device)
                masks[kind] = mask.masked_fill_(~seen, torch.finfo(dtype).min)
            else:
                masks[kind] = seen
            masks[kind] = masks[kind].unsqueeze(1).expand(len(lens), -1, -1, -1)
        return masks if self._by_kind else next(iter(masks.values()))


def _check_model(name: str, model: nn.Module) -> frozenset[str]:
    """The parameters of the model's forward; ValueError for a model that cannot be run slot by slot."""
    if not is_transformers_model(model):
        raise ValueError(f"HuggingFaceModel: model: expected a model of transformers, got {name}")
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"HuggingFaceModel: model: expected a decoder, got the encoder-decoder {name}")
    if getattr(model, "_is_stateful", False):
        raise ValueError(f"HuggingFaceModel: model: expected attention only, got {name} with a recurrent state")
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        raise ValueError(f"HuggingFaceModel: model: expected {name} on one device, got {', '.join(sorted(devices))}")
    if model.get_output_embeddings() is None or not model.can_generate():  # type: ignore[operator]
        raise ValueError(f"HuggingFaceModel: model: expected a causal language model, got {name}")
    # encoders with a language model head, unless they were configured as decoders
    for module in model.modules():
        if getattr(module, "is_causal", None) is False or getattr(module, "is_decoder", None) is False:
            raise ValueError(f"HuggingFaceModel: model: expected causal attention, got {name} without")
    parameters = inspect.signature(model.forward).parameters
    for needed in ("position_ids", "past_key_values", "attention_mask"):
        if needed not in parameters:  # **kwargs would swallow it
            raise ValueError(f"HuggingFaceModel: model: expected a forward with {needed}, got {name}")
    return frozenset(parameters)


def _ids(name: str, field: str, *configs: Any) -> tuple[int, ...]:
    """One id or several; the first config that says something decides."""
    for config in configs:
        value = getattr(config, field, None)
        if value is None:
            continue
        ids = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if all(isinstance(item, int) and item >= 0 for item in ids):
            return ids
        raise ValueError(f"HuggingFaceModel: {name}: {field}: expected ids, integers >= 0, got {value!r}")
    return ()


def _last_rows(logits: Tensor, last: Sequence[int] | None, slots: Sequence[int] | None) -> Tensor:
    """[B, 1, V], the logits of slot last[b] of each row, from those of `slots` (None: all)."""
    if last is None:
        return logits[:, -1:]
    places = [slot if slots is None else slots.index(slot) for slot in last]
    return logits[torch.arange(len(last), device=logits.device), torch.tensor(places, device=logits.device)][:, None]


# --- telling objects of transformers ----------------------------------------------------------------------------------


def is_transformers_model(value: object) -> bool:
    """Whether this is a `transformers.PreTrainedModel`; does not import transformers."""
    return _inherits(value, "PreTrainedModel")


def is_transformers_tokenizer(value: object) -> bool:
    """Whether this is a tokenizer of transformers; does not import transformers."""
    return _inherits(value, "PreTrainedTokenizerBase")


def _inherits(value: object, name: str) -> bool:
    return any(
        base.__name__ == name and base.__module__.partition(".")[0] == "transformers" for base in type(value).__mro__
    )


class _Backend:
    """A tokenizer of transformers with the two methods that Tokenizer asks of its backend."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> Any:
        return SimpleNamespace(ids=self._tokenizer.encode(text))

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        return self._tokenizer.decode(ids, **options)


def wrap_tokenizer(tokenizer: Any) -> Tokenizer:
    """A tokenizer of transformers as ours. Spaces are not cleaned up: streamed pieces must add up to the text."""
    return Tokenizer(_Backend(tokenizer))
