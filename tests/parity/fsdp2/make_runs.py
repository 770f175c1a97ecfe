"""Training by PyTorch FSDP2 over gloo, for fsdp2_parity_test.

usage: make_runs.py OUTPUT_DIR

Writes the models and runs.json: for each case of CASES, the losses and gradient norms of 20 steps of 2 micro-batches a
rank. Batches are integer formulas of step and global micro-batch, which the test repeats. "fp64" is the same run in
double: how far FSDP2 in fp32 is from it says what rounding does to this run (AdamW turns rounding of gradients near
zero into steps).

It starts itself under torchrun, once with 2 ranks and once with 4.
"""
import json
import os
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import nn

STEPS, ACCUMULATION, CLASSES = 20, 2, 7
# model, optimizer, ranks, ranks of a shard group, dtype
CASES = [("mlp", "adamw", 2, 2, "float32"), ("mlp", "sgd", 2, 2, "float32"),
         ("llama", "adamw", 2, 2, "float32"), ("llama", "sgd", 2, 2, "float32"),
         ("mlp", "adamw", 2, 2, "bfloat16"), ("llama", "adamw", 2, 2, "bfloat16"),
         ("mlp", "adamw", 4, 4, "float32"), ("mlp", "adamw", 4, 2, "float32"), ("mlp", "sgd", 4, 2, "float32")]
LLAMA = dict(vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Mlp(nn.Module):
    """Odd shapes: no dimension divides by 2."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(13, 29), nn.Linear(29, CLASSES, bias=False)
        self.blocks = nn.ModuleList(Block(29, 51 + 2 * i) for i in range(5))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def mlp_loss(model, step, m):
    rows = 3 + (step + m) % 4
    i, j = torch.arange(rows)[:, None], torch.arange(13)[None, :]
    x = ((i * 7 + j * 13 + step * 31 + m * 17) % 64 - 32) / 32
    targets = (torch.arange(rows) * 11 + step * 5 + m * 3) % CLASSES
    x = x.to(next(model.parameters()).dtype)
    return F.cross_entropy(upcast(model(x)), targets, reduction="sum"), rows


def llama_loss(model, step, m):
    rows, length = 2, 11 + (step + m) % 4
    row, place = torch.arange(rows)[:, None], torch.arange(length)[None, :]
    ids = (step * 131 + m * 17 + row * 29 + place * 7 + place * place) % 97
    labels = ids.clone()
    labels[:, : 2 + m % 3] = -100
    logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    return F.cross_entropy(upcast(logits), targets, ignore_index=-100, reduction="sum"), int((targets >= 0).sum())


def upcast(logits):
    return logits if logits.dtype == torch.float64 else logits.float()


def make_model(name, out):
    if name == "mlp":
        from safetensors.torch import load_file
        model = Mlp()
        model.load_state_dict(load_file(os.path.join(out, "mlp", "model.safetensors")))
        return model, model.blocks, mlp_loss
    import transformers
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        os.path.join(out, "llama"), attn_implementation="eager", dtype=torch.float32)
    return model.train(), model.model.layers, llama_loss


def train(out, name, optimizer_name, shard_group, dtype):
    """dtype: float32, bfloat16 (mixed precision: fp32 shards, reduction in fp32) or float64."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (ranks,)) if shard_group == ranks else init_device_mesh(
        "cpu", (ranks // shard_group, shard_group), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32,
                                  cast_forward_inputs=True) if dtype == "bfloat16" else MixedPrecisionPolicy()
    model, units, loss_of = make_model(name, out)
    if dtype == "float64":
        model = model.double()
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if optimizer_name == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    losses, norms = [], []
    for step in range(STEPS):
        mine = torch.zeros(2, dtype=torch.float64)
        for a in range(ACCUMULATION):
            loss, tokens = loss_of(model, step, a * ranks + rank)
            (loss * ranks).backward()  # FSDP2 divides gradients by the number of ranks.
            mine += torch.tensor([loss.double().item(), tokens])
        dist.all_reduce(mine)
        for parameter in model.parameters():
            parameter.grad.div_(mine[1].item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norms.append(norm.full_tensor().item())
        losses.append((mine[0] / mine[1]).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"losses": losses, "norms": norms}


def run_rank(out):
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    results = {}
    for name, optimizer, case_ranks, shard_group, dtype in CASES:
        if case_ranks != ranks:
            continue
        result = train(out, name, optimizer, shard_group, dtype)
        if dtype == "float32":
            result["fp64"] = train(out, name, optimizer, shard_group, "float64")
        results[f"{name}.{optimizer}.{ranks}.{shard_group}.{dtype}"] = result
    if dist.get_rank() == 0:
        with open(os.path.join(out, f"runs.{ranks}.json"), "w") as file:
            json.dump(results, file, indent=1)
    dist.destroy_process_group()


def make_weights(out):
    import transformers
    from safetensors.torch import save_file
    torch.manual_seed(5)
    os.makedirs(os.path.join(out, "mlp"), exist_ok=True)
    save_file(Mlp().state_dict(), os.path.join(out, "mlp", "model.safetensors"))
    config = transformers.AutoConfig.for_model("llama", **LLAMA)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(os.path.join(out, "llama"))


def main():
    out = sys.argv[1]
    if "RANK" in os.environ:
        run_rank(out)
        return
    make_weights(out)
    for ranks in (2, 4):
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                        os.path.abspath(__file__), out], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
