"""The peer's side of the race: one rank of PyTorch FSDP2 over gloo, transformers' Llama, AdamW. Driven by race.py."""

import json
import os
import resource
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main():
    directory, tokens = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = dist.init_device_mesh("cpu", (ranks,))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
    model.train()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    pids = [None] * ranks
    dist.all_gather_object(pids, os.getpid())
    if rank == 0:
        print(json.dumps({"pids": pids}), flush=True)
    step = 0
    vocabulary = model.config.vocab_size
    t = torch.arange(tokens, dtype=torch.int64)
    for line in sys.stdin:
        steps = int(line)
        if steps == 0:
            break
        cpu, start = cpu_seconds(), time.perf_counter()
        for _ in range(steps):
            ids = ((t * t * 31 + t * 7919 + rank * 104729 + step * 1299709) % vocabulary)[None]
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
        seconds, used = time.perf_counter() - start, torch.tensor([cpu_seconds() - cpu], dtype=torch.float64)
        loss = loss.detach().double() / ranks
        dist.all_reduce(loss)
        dist.all_reduce(used)
        if rank == 0:
            print(json.dumps({"loss": loss.item(), "seconds": seconds, "cpu_seconds": used.item()}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
