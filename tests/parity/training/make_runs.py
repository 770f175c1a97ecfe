"""Plain single-process training by transformers and torch.optim.AdamW, for training_parity_test.

usage: make_runs.py OUTPUT_DIR

A random 12-layer model of each kind; for each number of micro-batches in a step, 20 steps from the same start over
batches that are a function of step and micro-batch. Writes the model and runs.safetensors: batches, losses, norms,
final weights, and how far PyTorch is from itself: the same run row by row, and in fp64 (spread: the largest relative
norm of difference of a tensor). AdamW turns rounding of gradients near zero into steps, more so in deep models.
"""
import os
import sys

import torch
import transformers
from safetensors.torch import save_file

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
import runs as common

MICRO_BATCHES = {"llama": (1, 2, 3, 4, 6, 9, 12), "qwen2": (3, 6)}


def train(model, micro_batches, by_row=False):
    losses, norms = common.train(model, micro_batches, weight_decay=0.01, by_row=by_row)
    return losses, norms, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def spread(weights, others):
    return max(((weights[name].double() - other.double()).norm() / other.double().norm()).item()
               for name, other in others.items() if not name.endswith("k_proj.bias"))


def main():
    torch.set_num_threads(1)
    out = sys.argv[1]
    for kind in ("llama", "qwen2"):
        torch.manual_seed(5)
        config = transformers.AutoConfig.for_model(kind, **common.llama_sizes(12))
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().train()
        directory = os.path.join(out, kind)
        model.save_pretrained(directory)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        result = common.batches(max(MICRO_BATCHES[kind]))
        for micro_batches in MICRO_BATCHES[kind]:
            runs = []
            for dtype, by_row in ((torch.float32, False), (torch.float32, True), (torch.float64, False)):
                model.to(dtype).load_state_dict(start)
                runs.append(train(model, micro_batches, by_row))
            losses, norms, weights = runs[0]
            result[f"losses.{micro_batches}"] = torch.tensor(losses, dtype=torch.float64)
            result[f"norms.{micro_batches}"] = torch.tensor(norms, dtype=torch.float64)
            result[f"spread.{micro_batches}"] = torch.tensor(
                [max(spread(weights, other[2]) for other in runs[1:])], dtype=torch.float64)
            for name, value in weights.items():
                result[f"weights.{micro_batches}.{name}"] = value
        save_file(result, os.path.join(directory, "runs.safetensors"))


if __name__ == "__main__":
    main()
