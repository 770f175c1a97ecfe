"""PEFT loads adapters that we saved and transformers the models that we merged: their logits must be ours.

usage: load_ours.py RUNS_DIR, after make_runs.py and peft_parity_test.
"""
import os
import sys

import peft
import torch
import transformers
from safetensors.torch import load_file

import make_runs


def compare(what, got, expected):
    difference = (got - expected).abs().max().item() / expected.abs().max().item()
    print(f"{what}: largest difference {difference:.1e}")
    if not difference <= 1e-5:
        sys.exit(f"{what}: logits differ")


def main():
    runs = sys.argv[1]
    ids = make_runs.common.batch(0, 0)[0]
    for kind in make_runs.KINDS:
        directory = os.path.join(runs, kind)
        theirs, written = (load_file(os.path.join(directory, which, "adapter_model.safetensors")) for which in ("end", "ours"))
        if {name: value.shape for name, value in theirs.items()} != {name: value.shape for name, value in written.items()}:
            sys.exit(f"{kind}: other tensors than PEFT's: {sorted(set(theirs) ^ set(written))}")
        ours = load_file(os.path.join(directory, "ours_logits.safetensors"))
        expected = ours["logits"]
        base = transformers.AutoModelForCausalLM.from_pretrained(os.path.join(runs, make_runs.base_of(kind)),
                                                                 attn_implementation="eager")
        with torch.no_grad():
            model = peft.PeftModel.from_pretrained(base, os.path.join(directory, "ours")).eval()
            compare(f"{kind} in PEFT", model(input_ids=ids).logits, expected)
            model.generation_config.eos_token_id = None
            prompt, count = ids[:1], len(ours["tokens"])
            tokens = model.generate(input_ids=prompt, max_new_tokens=count, do_sample=False)[0, prompt.shape[1]:]
            if not torch.equal(tokens, ours["tokens"]):
                sys.exit(f"{kind}: PEFT generates {tokens.tolist()}, we {ours['tokens'].tolist()}")
            if kind in make_runs.PROMPT_KINDS:
                continue  # They cannot be merged.
            merged = transformers.AutoModelForCausalLM.from_pretrained(os.path.join(directory, "merged"),
                                                                       attn_implementation="eager").eval()
            compare(f"{kind} merged, in transformers", merged(input_ids=ids).logits, expected)


if __name__ == "__main__":
    main()
