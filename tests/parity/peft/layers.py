"""Adapters of plain PyTorch layers, trained by PEFT, for layers_parity_test; and PEFT loading what that wrote.

usage: layers.py make|load RUNS_DIR

A model of Embedding, Conv1d (one with groups), Conv2d, Conv3d and Linear. Writes base/model.safetensors, batches, and for
each kind start/, end/ and run.safetensors as make_runs.py does.
"""
import os
import sys

import peft
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

STEPS, ROWS, LENGTH, VOCABULARY, MICRO_BATCHES = 20, 4, 8, 23, 4
TARGETS = ["table", "line", "plane", "space", "hidden", "head"]
KINDS = {"layers_lora": {"target_modules": TARGETS + ["grouped"]},
         "layers_dora": {"target_modules": TARGETS, "use_dora": True}}


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, 12)
        self.line = torch.nn.Conv1d(12, 16, 3, padding=1)
        self.grouped = torch.nn.Conv1d(16, 16, 3, padding="same", groups=2)
        self.plane = torch.nn.Conv2d(4, 6, 3, stride=(1, 2), padding=1)
        self.space = torch.nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.hidden = torch.nn.Linear(192, 24)
        self.head = torch.nn.Linear(24, VOCABULARY, bias=False)

    def forward(self, ids):
        x = F.gelu(self.line(self.table(ids).transpose(1, 2)))
        x = x + torch.tanh(self.grouped(x))
        x = F.gelu(self.plane(x.reshape(-1, 4, 4, LENGTH)))
        x = F.gelu(self.space(x.reshape(-1, 2, 3, 4, 4)))
        return self.head(torch.tanh(self.hidden(x.flatten(1))))


def batch(step, m):
    generator = torch.Generator().manual_seed(1000 * step + m)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    return ids, torch.randint(0, VOCABULARY, (ROWS,), generator=generator)


def base_model(runs):
    model = Layers()
    model.load_state_dict(load_file(os.path.join(runs, "layers_base", "model.safetensors")))
    return model


def train(model, by_row):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, foreach=False)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for m in range(MICRO_BATCHES):
            ids, labels = batch(step, m)
            for part, expected in zip(ids.split(1 if by_row else ROWS), labels.split(1 if by_row else ROWS)):
                loss = F.cross_entropy(model(part), expected, reduction="sum")
                loss.backward()
                total += loss.double().item()
        for parameter in trained:
            parameter.grad.div_(ROWS * MICRO_BATCHES)
        losses.append(total / (ROWS * MICRO_BATCHES))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def make(runs):
    torch.manual_seed(5)
    os.makedirs(os.path.join(runs, "layers_base"), exist_ok=True)
    save_file(Layers().state_dict(), os.path.join(runs, "layers_base", "model.safetensors"))
    batches = {}
    for step in range(STEPS):
        for m in range(MICRO_BATCHES):
            batches[f"ids.{step}.{m}"], batches[f"labels.{step}.{m}"] = batch(step, m)
    save_file(batches, os.path.join(runs, "layers_base", "batches.safetensors"))
    for kind, options in KINDS.items():
        directory = os.path.join(runs, kind)
        ends = []
        for by_row in (False, True):
            torch.manual_seed(11)
            config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **options)
            model = peft.get_peft_model(base_model(runs), config).train()
            for name, parameter in model.named_parameters():
                if "lora_embedding" in name:  # Normal numbers are far larger than those of the others.
                    parameter.data.mul_(0.1)
            if not by_row:
                model.save_pretrained(os.path.join(directory, "start"))
            losses = train(model, by_row)
            ends.append((losses, {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}))
            if not by_row:
                model.save_pretrained(os.path.join(directory, "end"))
        spread = max(((ends[0][1][name] - other).norm() / other.norm()).item() for name, other in ends[1][1].items())
        save_file({"losses": torch.tensor(ends[0][0], dtype=torch.float64), "spread": torch.tensor([spread], dtype=torch.float64)},
                  os.path.join(directory, "run.safetensors"))


def load(runs):
    for kind in KINDS:
        directory = os.path.join(runs, kind)
        expected = load_file(os.path.join(directory, "ours_logits.safetensors"))["logits"]
        with torch.no_grad():
            got = peft.PeftModel.from_pretrained(base_model(runs), os.path.join(directory, "ours")).eval()(batch(0, 0)[0])
        difference = (got - expected).abs().max().item() / expected.abs().max().item()
        print(f"{kind}: largest difference {difference:.1e}")
        if not difference <= 1e-5:
            sys.exit(f"{kind}: logits differ")
        shapes = [{name: value.shape for name, value in load_file(os.path.join(directory, which, "adapter_model.safetensors")).items()}
                  for which in ("end", "ours")]
        if shapes[0] != shapes[1]:
            sys.exit(f"{kind}: other tensors than PEFT's: {shapes}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"make": make, "load": load}[sys.argv[1]](sys.argv[2])
