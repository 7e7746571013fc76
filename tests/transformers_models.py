"""Tiny random causal language models of transformers, saved to a folder and read back as a user would."""

from __future__ import annotations

import copy
import functools
import tempfile

import torch
import transformers

VOCAB = 97
LAYERS = 2
CONTEXT = 64
WINDOW = 6
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT}
_NO_IDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
# name -> class of the model, options of its config; gemma2 has one windowed and one full layer
ARCHITECTURES = {
    "llama": ("Llama", _SIZES),
    "qwen2": ("Qwen2", {**_SIZES, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {**_SIZES, "head_dim": 16}),
    "mistral": ("Mistral", {**_SIZES, "sliding_window": WINDOW}),
    "gemma2": ("Gemma2", {**_SIZES, "head_dim": 8, "sliding_window": WINDOW}),
    "gpt2": ("GPT2", {**_GPT2, **_NO_IDS}),
    "phi3": ("Phi3", {**_SIZES, "sliding_window": None}),
}


def build(name: str, **options: object) -> transformers.PreTrainedModel:
    """A model in float64 and eval mode, not saved; weights so large that attention, norms and positions matter."""
    family, sizes = ARCHITECTURES[name]
    config = getattr(transformers, f"{family}Config")(**{**sizes, **options})
    head = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, head)(config).double().eval()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            draw = torch.randn_like(parameter)
            if parameter.dim() == 1:
                parameter.copy_(0.3 * draw + (0 if label.endswith("bias") else 1))
            elif any(part in label for part in ("embed", "head", "wte", "wpe")):
                # Gemma2 multiplies embeddings by sqrt(d) and ties them: with larger ones every token predicts itself
                parameter.copy_(draw * (0.1 if name == "gemma2" else 1))
            else:
                parameter.copy_(1.5 * draw / min(parameter.shape) ** 0.5)
    return model


@functools.cache
def load(name: str, attention: str | None = None, **options: object) -> transformers.PreTrainedModel:
    """The same, through `save_pretrained` and AutoModelForCausalLM; made once, so do not change it.

    attention: "eager" or "sdpa"; None is what transformers chooses ("eager" for Gemma2, which "sdpa" cannot run).
    """
    with tempfile.TemporaryDirectory() as folder:
        build(name, **options).save_pretrained(folder)
        given = {} if attention is None else {"attn_implementation": attention}
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **given)


@functools.cache
def disturbed(name: str, noise: float = 0.08) -> transformers.PreTrainedModel:
    """A draft model: the same weights with noise, so that it is right now and then."""
    model = copy.deepcopy(load(name))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            bumps = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * parameter.std() * bumps)
    return model


def ids(batch: int, n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def whole_text(model: transformers.PreTrainedModel, text: torch.Tensor, **options: object) -> object:
    """What transformers says about texts [B, n], without any cache."""
    return model(text, use_cache=False, **options)
