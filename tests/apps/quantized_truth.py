"""What bitsandbytes, transformers and PEFT make of a model, for test_quantized.py.

quantized_truth.py make DIR    quantises DIR/<base> into DIR/<case>; prints each case's loss on DIR/sequences.jsonl
quantized_truth.py merge DIR   merges DIR/<case>-adapter into DIR/<case>: DIR/<case>-peft, and DIR/<case>-peft16 of what
                               transformers dequantises
quantized_truth.py load DIR    transformers loads DIR/<case>-merged; prints the largest difference of logits from PEFT's
Exits with 77 where a package is missing.
"""
import json
import os
import shutil
import sys

os.environ["TORCHDYNAMO_DISABLE"] = "1"
try:
    import accelerate  # noqa: F401  transformers needs it to quantise
    import bitsandbytes  # noqa: F401
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
except ImportError as error:
    print(error)
    sys.exit(77)

torch.set_num_threads(1)
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
NESTED = {"bnb_4bit_use_double_quant": True}
CASES = {  # Name: base, its type, configuration, size of a file.
    "nf4": ("float32", NF4, "5GB"),
    "nf4-nested": ("bfloat16", {**NF4, **NESTED, "bnb_4bit_quant_storage": "bfloat16"}, "20KB"),
    "fp4-nested": ("bfloat16", {**FP4, **NESTED}, "5GB"),
    "int8": ("float32", {"load_in_8bit": True}, "20KB"),
}


# With gradients off, and rows of whole blocks, bitsandbytes computes with another layout of the weights on some CPUs.
def logits_of(model, ids):
    return model(input_ids=ids).logits.detach().float()


def load(path, dtype, **more):
    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), device_map="cpu", **more).eval()


def loss_of(model, sequences):
    total, tokens = 0.0, 0
    for sequence in sequences:
        labels = torch.tensor(sequence["labels"])[1:]
        logits = logits_of(model, torch.tensor([sequence["input_ids"]]))[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").double().item()
        tokens += int((labels != -100).sum())
    return total / tokens


def make(root):
    with open(f"{root}/sequences.jsonl", encoding="utf-8") as lines:
        sequences = [json.loads(line) for line in lines]
    for name, (dtype, config, size) in CASES.items():
        model = load(f"{root}/{dtype}", dtype, quantization_config=BitsAndBytesConfig(**config))
        model.save_pretrained(f"{root}/{name}", max_shard_size=size)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(f"{root}/{dtype}/{file}", f"{root}/{name}/{file}")
        print(json.dumps({"case": name, "loss": loss_of(model, sequences)}))


def merged(base, adapter):
    return peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()


def merge(root):
    for name, (dtype, _, _) in CASES.items():
        quantised = merged(load(f"{root}/{name}", dtype), f"{root}/{name}-adapter")
        quantised.save_pretrained(f"{root}/{name}-peft", save_original_format=False)
        whole = merged(load(f"{root}/{name}", dtype).dequantize().float(), f"{root}/{name}-adapter")
        whole.to(torch.bfloat16).save_pretrained(f"{root}/{name}-peft16", save_original_format=False)


def logits(path, dtype):
    return logits_of(load(path, dtype), torch.arange(3, 40).reshape(1, -1))


def compare(root):
    for name, (dtype, _, _) in CASES.items():
        theirs, ours, base = (logits(f"{root}/{name}{end}", dtype) for end in ("-peft", "-merged", ""))
        print(json.dumps({"case": name, "difference": (ours - theirs).abs().max().item() / theirs.abs().max().item(),
                          "effect": (base - theirs).abs().max().item() / theirs.abs().max().item()}))


if __name__ == "__main__":
    {"make": make, "merge": merge, "load": compare}[sys.argv[1]](sys.argv[2])
