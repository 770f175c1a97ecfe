"""The other side of dcp_oracle_test: torch.distributed.checkpoint writes and reads the sharded form.

dcp_oracle.py make DIR    DIR/whole.safetensors, and the same tensors saved by two ranks as DTensors:
                          DIR/one_file, DIR/three_files, DIR/replicated
dcp_oracle.py check DIR   DIR/ours (sharded, written by the library) equals DIR/ours_whole, loaded by
                          one process and by two ranks into DTensors
"""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, zeros

RANKS = 2


def tensors():
    generator = torch.Generator().manual_seed(7)
    shapes = {"w": [5, 7], "b": [5], "cube": [3, 4, 5], "wide": [1, 6], "row": [7], "none": [0, 3],
              "big": [513, 300]}
    result = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, shape in shapes.items():
            name = f"state.{name}.exp_avg" if dtype is torch.float32 else f"{name}.weight"
            result[name] = torch.randn(shape, generator=generator).to(dtype)
    result["state.w.step"] = torch.tensor(17.0)
    result["half"] = torch.randn([4, 6], generator=generator).to(torch.float16)
    result["double"] = torch.randn([9], generator=generator, dtype=torch.float64)
    result["codes"] = torch.randint(0, 255, [7, 3], generator=generator, dtype=torch.uint8)
    result["signed"] = torch.randint(-9, 9, [4, 3], generator=generator, dtype=torch.int8)
    result["steps"] = torch.randint(0, 2**60, [5], generator=generator, dtype=torch.int64)
    result["ints"] = torch.randint(0, 2**30, [2, 2, 3], generator=generator, dtype=torch.int32)
    return result


def placement(name, tensor, index):
    if tensor.dim() == 0:
        return Replicate()
    return Shard(index % tensor.dim())


def same_bytes(a, b):
    return (a.dtype == b.dtype and a.shape == b.shape and
            a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8)))


def as_dtensors(whole, mesh, shift):
    return {name: distribute_tensor(tensor, mesh, [placement(name, tensor, i * shift)], src_data_rank=None)
            for i, (name, tensor) in enumerate(whole.items())}


def save_rank(mesh, directory):
    whole = tensors()
    dcp.save(as_dtensors(whole, mesh, 0),
             storage_writer=HuggingFaceStorageWriter(f"{directory}/one_file", save_distributed=True))
    files = {name: 1 + i % 3 for i, name in enumerate(whole)}
    dcp.save(as_dtensors(whole, mesh, 1),
             storage_writer=HuggingFaceStorageWriter(f"{directory}/three_files", files, save_distributed=True))
    replicated = {name: distribute_tensor(tensor, mesh, [Replicate()], src_data_rank=None) for name, tensor in whole.items()}
    dcp.save(replicated,
             storage_writer=HuggingFaceStorageWriter(f"{directory}/replicated", save_distributed=True))


def load_rank(mesh, directory):
    whole = load_file(f"{directory}/ours_whole/model.safetensors")
    for shift in (0, 1):
        loaded = {}
        for i, (name, tensor) in enumerate(whole.items()):
            loaded[name] = zeros(tensor.shape, dtype=tensor.dtype, device_mesh=mesh,
                                 placements=[placement(name, tensor, i * shift)])
        dcp.load(loaded, storage_reader=HuggingFaceStorageReader(f"{directory}/ours"))
        expected = as_dtensors(whole, mesh, shift)
        for name, tensor in loaded.items():
            assert isinstance(tensor, DTensor)
            assert same_bytes(tensor.to_local(), expected[name].to_local()), name


def run_rank(rank, function, directory, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    function(mesh, directory)
    dist.destroy_process_group()


def on_ranks(function, directory):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (function, directory, os.path.join(folder, "store")), nprocs=RANKS)


def load_alone(directory):
    whole = load_file(f"{directory}/ours_whole/model.safetensors")
    loaded = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    dcp.load(loaded, storage_reader=HuggingFaceStorageReader(f"{directory}/ours"), no_dist=True)
    for name, tensor in whole.items():
        assert same_bytes(loaded[name], tensor), name
    assert len(whole) > 10


def consolidate(directory):
    """The files that torch's own tool makes of ours (it knows floating types only)."""
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
    whole = load_file(f"{directory}/floats_whole/model.safetensors")
    out = f"{directory}/consolidated"
    os.makedirs(out)
    consolidate_safetensors_files(f"{directory}/floats", out, dict.fromkeys(whole, 1))
    merged = load_file(f"{out}/model-00001-of-00001.safetensors")
    assert merged.keys() == whole.keys()
    for name, tensor in whole.items():
        assert same_bytes(merged[name], tensor), name


def main(command, directory):
    if command == "make":
        save_file(tensors(), f"{directory}/whole.safetensors")
        on_ranks(save_rank, directory)
    else:
        load_alone(directory)
        consolidate(directory)
        on_ranks(load_rank, directory)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
