"""Loads a model directory with transformers, and an adapter with PEFT, and compares their loss on given sequences with
ours.

Sequences are the lines of `finetune show-data --json`: input_ids, labels (-100 = not trained on), position_ids. The
loss is the sum of token losses divided by the number of trainable tokens, in fp32 on the CPU.
"""

import argparse
import json
import sys

import torch
from transformers import AutoModelForCausalLM


def loss_of(model, sequences):
    total, tokens = 0.0, 0
    for sequence in sequences:
        ids = torch.tensor([sequence["input_ids"]])
        labels = torch.tensor(sequence["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=torch.tensor([sequence["position_ids"]])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
        total += losses.double().item()
        tokens += int((labels != -100).sum())
    return total / tokens, tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", help="PEFT directory of an adapter of the model")
    parser.add_argument("--sequences", required=True)
    parser.add_argument("--results", required=True, help="eval_results.json of finetune eval")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative")
    options = parser.parse_args()

    model, loading = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True)
    problems = {key: sorted(names) for key, names in loading.items() if names and key != "error_msgs"}
    reader = "transformers"
    if options.adapter:
        import peft
        model, reader = peft.PeftModel.from_pretrained(model, options.adapter), "PEFT"
    with open(options.sequences, encoding="utf-8") as lines:
        theirs, tokens = loss_of(model.eval(), [json.loads(line) for line in lines])
    with open(options.results, encoding="utf-8") as file:
        results = json.load(file)
    ours = results["eval_loss"]
    print(f"eval loss: finetune {ours:.8f}, {reader} {theirs:.8f}, {tokens} tokens, "
          f"relative difference {abs(ours - theirs) / theirs:.1e}")
    if problems:
        sys.exit(f"transformers reports: {problems}")
    if tokens != results["eval_tokens"] or not abs(ours - theirs) <= options.tolerance * theirs:
        sys.exit("the losses differ")


if __name__ == "__main__":
    main()
