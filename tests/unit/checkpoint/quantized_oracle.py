"""Models that transformers quantises with bitsandbytes on the CPU, for quantized_oracle_test.cpp.

quantized_oracle.py make DIR    writes DIR/base*, and each case as transformers saves it to DIR/<case>
quantized_oracle.py check DIR   transformers reads what we wrote to DIR/<case>-ours, logits as of DIR/<case>
Exits with 77 where a package is missing.
"""
import os
import sys

os.environ["TORCHDYNAMO_DISABLE"] = "1"
try:
    import accelerate  # noqa: F401  transformers needs it to quantise
    import bitsandbytes  # noqa: F401
    import torch
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
except ImportError as error:
    print(error)
    sys.exit(77)

torch.set_num_threads(1)
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
NESTED = {"bnb_4bit_use_double_quant": True}
CASES = {  # Name: base, type that it is loaded as, configuration.
    "nf4": ("base", "bfloat16", NF4),
    "nf4-nested": ("base", "bfloat16", {**NF4, **NESTED, "bnb_4bit_compute_dtype": "bfloat16"}),
    "nf4-f32": ("base-f32", "float32", {**NF4, **NESTED}),
    "nf4-converted": ("base-f32", "bfloat16", {**NF4, **NESTED}),
    "fp4-storage": ("base", "bfloat16", {**FP4, "bnb_4bit_quant_storage": "bfloat16"}),
    "fp4-nested": ("base-f32", "float16", {**FP4, **NESTED, "bnb_4bit_quant_storage": "float32"}),
    "nf4-skip": ("base", "bfloat16", {**NF4, "llm_int8_skip_modules": ["lm_head", "down_proj"]}),
    "int8": ("base", "bfloat16", {"load_in_8bit": True}),
    "int8-f32": ("base-f32", "float32", {"load_in_8bit": True}),
}


def load(path, dtype, config=None):
    kwargs = {"quantization_config": BitsAndBytesConfig(**config)} if config else {}
    return LlamaForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), device_map="cpu", **kwargs)


def make(root):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 272, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, tie_word_embeddings=False, **shape, **heads))
    model.save_pretrained(f"{root}/base-f32")
    model.to(torch.bfloat16).save_pretrained(f"{root}/base")
    for name, (base, dtype, config) in CASES.items():
        load(f"{root}/{base}", dtype, config).save_pretrained(f"{root}/{name}")


def check(root):
    tokens = torch.arange(90).reshape(3, 30)
    for name, (_, dtype, _) in CASES.items():
        logits = [load(f"{root}/{name}{end}", dtype)(tokens).logits for end in ("", "-ours")]
        assert torch.equal(*logits), name
        assert logits[0].isfinite().all(), name


{"make": make, "check": check}[sys.argv[1]](sys.argv[2])
