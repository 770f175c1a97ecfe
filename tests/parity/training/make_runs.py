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
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

STEPS, ROWS, LENGTH, VOCABULARY = 20, 2, 17, 97
COMMON = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=56, num_hidden_layers=12, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True)
MICRO_BATCHES = {"llama": (1, 2, 3, 4, 6, 9, 12), "qwen2": (3, 6)}


def batch(step, m):
    generator = torch.Generator().manual_seed(1000 * step + m)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, : 3 + m % 4] = -100  # Micro-batches with unequal numbers of trainable tokens.
    return ids, labels


def train(model, micro_batches, by_row=False):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, foreach=False)
    losses, norms = [], []
    for step in range(STEPS):
        total, tokens = 0.0, 0
        for m in range(micro_batches):
            ids, labels = batch(step, m)
            for part_ids, part_labels in zip(ids.split(1 if by_row else ROWS), labels.split(1 if by_row else ROWS)):
                logits = model(part_ids, use_cache=False).logits
                loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), part_labels[:, 1:].reshape(-1),
                                       ignore_index=-100, reduction="sum")
                loss.backward()
                total += loss.double().item()
            tokens += int((labels[:, 1:] != -100).sum())
        for parameter in model.parameters():
            parameter.grad.div_(tokens)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        losses.append(total / tokens)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses, norms, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def spread(weights, others):
    return max(((weights[name].double() - other.double()).norm() / other.double().norm()).item()
               for name, other in others.items() if not name.endswith("k_proj.bias"))


def main():
    torch.set_num_threads(1)
    out = sys.argv[1]
    for kind in ("llama", "qwen2"):
        torch.manual_seed(5)
        config = transformers.AutoConfig.for_model(kind, **COMMON)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().train()
        directory = os.path.join(out, kind)
        model.save_pretrained(directory)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        result = {}
        for step in range(STEPS):
            for m in range(max(MICRO_BATCHES[kind])):
                result[f"ids.{step}.{m}"], result[f"labels.{step}.{m}"] = batch(step, m)
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
