"""The other side of hf_oracle_test: what transformers and safetensors write, and whether they load what we wrote.

make DIR   writes DIR/types.safetensors and one small model of each type into DIR/<case>.
check DIR  loads what the test wrote: DIR/save (element i of every tensor is i / 8), DIR/config/<case>.json.
"""

import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file

TYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
SIZES = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32, rope_theta=500000.0)


def cases():
    yield "llama", transformers.LlamaConfig(**SIZES)
    yield "llama_biased", transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
                                                   eos_token_id=[2, 3], rope_parameters=LLAMA3)
    yield "llama_linear", transformers.LlamaConfig(**SIZES, head_dim=16,
                                                   rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4))
    yield "mistral", transformers.MistralConfig(**SIZES, sliding_window=None)
    yield "qwen2", transformers.Qwen2Config(**SIZES)
    yield "qwen3", transformers.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)


def make(root):
    save_file({f"t.{name}": torch.arange(12).remainder(2 if name == "bool" else 12).to(getattr(torch, name)).reshape(3, 4)
               for name in TYPES}, root / "types.safetensors", metadata={"format": "pt"})
    torch.manual_seed(0)
    for name, config in cases():
        model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        model.save_pretrained(root / name, max_shard_size="20KB")
        sums = {key: value.double().sum().item() for key, value in model.state_dict().items()}
        (root / name / "sums.json").write_text(json.dumps(sums))


def check(root):
    loaded = {}
    for path in sorted((root / "save").glob("*.safetensors")):
        tensors = load_file(path)
        loaded.update(tensors)
        save_file(tensors, root / "again.safetensors", metadata={"format": "pt"})
        assert path.read_bytes() == (root / "again.safetensors").read_bytes(), f"{path.name}: other bytes"
    for name, tensor in loaded.items():
        expected = (torch.arange(tensor.numel()) / 8).to(tensor.dtype).reshape(tensor.shape)
        assert torch.equal(tensor, expected), name
    index = json.loads((root / "save" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(loaded), "the index names other tensors"
    for name, config in cases():
        saved = transformers.AutoConfig.from_pretrained(root / "config" / name)
        assert saved.dtype == torch.float16, saved.dtype
        for key, value in config.to_dict().items():
            if key in ("dtype", "architectures", "_name_or_path", "transformers_version"):
                continue
            assert getattr(saved, key) == value, f"{name}: {key}: {getattr(saved, key)!r} instead of {value!r}"
    print(f"{len(loaded)} tensors checked")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    {"make": make, "check": check}[sys.argv[1]](pathlib.Path(sys.argv[2]))
