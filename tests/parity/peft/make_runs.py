"""Adapters trained by PEFT and torch.optim.AdamW, for peft_parity_test.

usage: make_runs.py OUTPUT_DIR

A random 4-layer Llama; for LoRA, rsLoRA and DoRA an adapter with random A and B, 20 steps over batches that are a function
of step and micro-batch. Writes the model, and for each kind: start/ and end/ as PEFT saves them, and run.safetensors:
losses, norms, logits after the last step, and how far PEFT is from itself when it runs row by row.
"""
import os
import sys

import peft
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

STEPS, ROWS, LENGTH, VOCABULARY, MICRO_BATCHES = 20, 2, 17, 97, 4
COMMON = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
         "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"down_proj": 3},
                      "layers_to_transform": [0, 1, 3], "modules_to_save": None}}


def batch(step, m):
    generator = torch.Generator().manual_seed(1000 * step + m)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, : 3 + m % 4] = -100
    return ids, labels


def train(model, by_row=False):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, foreach=False)
    losses, norms = [], []
    for step in range(STEPS):
        total, tokens = 0.0, 0
        for m in range(MICRO_BATCHES):
            ids, labels = batch(step, m)
            for part_ids, part_labels in zip(ids.split(1 if by_row else ROWS), labels.split(1 if by_row else ROWS)):
                logits = model(input_ids=part_ids, use_cache=False).logits
                loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), part_labels[:, 1:].reshape(-1),
                                       ignore_index=-100, reduction="sum")
                loss.backward()
                total += loss.double().item()
            tokens += int((labels[:, 1:] != -100).sum())
        for parameter in trained:
            parameter.grad.div_(tokens)
        norms.append(torch.nn.utils.clip_grad_norm_(trained, 1.0).item())
        losses.append(total / tokens)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses, norms


def adapters_of(model):
    return {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}


def main():
    torch.set_num_threads(1)
    out = sys.argv[1]
    torch.manual_seed(5)
    config = transformers.AutoConfig.for_model("llama", **COMMON)
    base = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    base_dir = os.path.join(out, "base")
    base.save_pretrained(base_dir)
    batches = {}
    for step in range(STEPS):
        for m in range(MICRO_BATCHES):
            batches[f"ids.{step}.{m}"], batches[f"labels.{step}.{m}"] = batch(step, m)
    save_file(batches, os.path.join(out, "batches.safetensors"))
    for kind, options in KINDS.items():
        directory = os.path.join(out, kind)
        ends = []
        for by_row in (False, True):
            torch.manual_seed(11)
            model = transformers.AutoModelForCausalLM.from_pretrained(base_dir, attn_implementation="eager").float()
            # B is random too: PEFT's own start, zero, says nothing about B's part in the first loss.
            model = peft.get_peft_model(model, peft.LoraConfig(
                r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM", **options))
            model.train()
            if not by_row:
                model.save_pretrained(os.path.join(directory, "start"))
            losses, norms = train(model, by_row)
            ends.append((losses, norms, adapters_of(model)))
            if by_row:
                continue
            model.save_pretrained(os.path.join(directory, "end"))
            with torch.no_grad():
                logits = model.eval()(input_ids=batch(0, 0)[0]).logits
        losses, norms, adapters = ends[0]
        spread = max(((adapters[name] - other).norm() / other.norm()).item() for name, other in ends[1][2].items())
        save_file({"losses": torch.tensor(losses, dtype=torch.float64), "norms": torch.tensor(norms, dtype=torch.float64),
                   "logits": logits.contiguous(), "spread": torch.tensor([spread], dtype=torch.float64)},
                  os.path.join(directory, "run.safetensors"))


if __name__ == "__main__":
    main()
