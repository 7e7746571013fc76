"""Every refusal of load_model names what is wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdecode.models import NativeModel, load_model


@pytest.fixture
def folder(checkpoint, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("llama")[0], copy)
    return copy


CONFIGS = [
    ({"architectures": ["GPT2LMHeadModel"]}, "architectures: expected one of LlamaForCausalLM.*got 'GPT2LMHeadModel'"),
    ({"architectures": [["a"]]}, r"architectures: expected one of Llama.*, got \['a'\]"),
    ({"architectures": {"a": 1}}, "architectures: expected one of Llama.*, got {'a': 1}"),
    ({"hidden_act": "gelu"}, "hidden_act: expected silu, got 'gelu'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: expected none, got 'gptq'"),
    ({"quantization_config": "x"}, "quantization_config: expected none, got 'x'"),
    ({"hidden_size": None}, "config.json: hidden_size: expected a positive integer, got None"),
    ({"num_attention_heads": 3}, "num_attention_heads: expected a multiple of num_key_value_heads 2, got 3"),
    ({"head_dim": 7}, "head_dim: expected an even number, got 7"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type: expected one of default, linear.*got 'longrope'"),
    ({"rope_parameters": {"rope_type": "linear"}}, "linear rope: factor: expected a number above 0, got None"),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 0}},
        "linear rope: factor: expected a number above 0, got 0",
    ),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "llama3 rope: low_freq_factor: expected a number"),
    (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2, "high_freq_factor": 2}},
        "llama3 rope: high_freq_factor: expected more than low_freq_factor 2, got 2",
    ),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": "x"}},
        "yarn rope: original_max_position_embeddings: expected a number above 0, got 'x'",
    ),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": "x"}},
        "yarn rope: original_max_position_embeddings: expected a number above 0, got 'x'",
    ),
    (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": "x"}},
        "yarn rope: beta_fast: expected a number above 0, got 'x'",
    ),
    ({"rope_parameters": {"rope_type": ["x"]}}, r"rope_type: expected one of default, linear.*got \['x'\]"),
    ({"rope_parameters": None, "rope_theta": "x"}, "rope_theta: expected a number above 0, got 'x'"),
    ({"rms_norm_eps": "x"}, "config.json: rms_norm_eps: expected a number above 0, got 'x'"),
    ({"eos_token_id": "a"}, "eos_token_id: expected ids, integers >= 0, got 'a'"),
    ({"eos_token_id": [1.5]}, "eos_token_id: expected ids, integers >= 0, got 1.5"),
    (
        {"architectures": ["MistralForCausalLM"], "sliding_window": "x"},
        "config.json: sliding_window: expected a positive integer, got 'x'",
    ),
    (
        {"architectures": ["MistralForCausalLM"], "sliding_window": 0},
        "config.json: sliding_window: expected a positive integer, got 0",
    ),
    (
        {"architectures": ["Qwen2ForCausalLM"], "max_window_layers": None, "layer_types": None},
        "config.json: max_window_layers: expected an integer >= 0, got None",
    ),
    ({"architectures": ["Qwen2ForCausalLM"], "layer_types": 3}, "layer_types: expected a list, got 3"),
    ({"rope_parameters": "yarn"}, "rope_parameters: expected an object, got 'yarn'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1, got 0.5"),
    (
        {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention", "chunked_attention", "x"]},
        "layer_types: expected one of full_attention, sliding_attention, got 'chunked_attention'",
    ),
    (
        {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"]},
        "layer_types: expected 3 entries, got 1",
    ),
]


@pytest.mark.parametrize("change,message", CONFIGS)
def test_config_refusals(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=f"load_model: {message}"):
        load_model(folder)


def test_generation_config_refusals(folder):
    file = folder / "generation_config.json"
    for value, got in (("a", "'a'"), ([1, 1.5], "1.5"), (-1, "-1"), (True, "True")):
        file.write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(ValueError, match=f"load_model: eos_token_id: expected ids, integers >= 0, got {got}"):
            load_model(folder)
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config.json: expected a JSON object, got list"):
        load_model(folder)


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    "change,message",
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"expected model.layers.1.mlp.up_proj.weight \[48, 32\]",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"model.norm.weight: expected \[32\], got \[31\]"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            "model.norm.weight: expected a floating dtype of 16 bits or more, got torch.int8",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
            "unexpected tensor model.layers.0.self_attn.q_proj.bias",
        ),
    ],
)
def test_tensor_refusals(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_harmless_tensors_are_ignored(folder):
    change_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load_model(folder)


def test_untied_head_must_be_there(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"weights: expected lm_head.weight \[97, 32\], got no such tensor"):
        load_model(folder)


def test_no_checkpoint(tmp_path, folder):
    with pytest.raises(ValueError, match=r"load_model: path: expected a folder with config.json, got"):
        load_model(tmp_path / "nothing")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected model.safetensors or its index in .*, got neither"):
        load_model(folder)


def test_damaged_files(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (len(whole) - 100, 20, 0):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="expected a whole safetensors file, got"):
            load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: expected JSON, got"):
        load_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: expected a JSON object, got list"):
        load_model(folder)


def test_bad_index(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match=r"expected the shard model-00001-of-00002.safetensors in the folder"):
        load_model(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ValueError, match=r"expected the shard model.safetensors in the folder"):
        load_model(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="expected weight_map, tensor name to file name"):
        load_model(folder)


def test_dtype_and_missing_package(folder, monkeypatch):
    with pytest.raises(
        ValueError, match=r"NativeModel: dtype: expected float32, bfloat16 or float64, got torch.float16"
    ):
        load_model(folder, dtype=torch.float16)
    assert isinstance(load_model(folder, dtype=torch.bfloat16), NativeModel)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdecode\[models\]'"):
        load_model(folder)
