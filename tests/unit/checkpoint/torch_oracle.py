"""Makes files of PyTorch for torch_oracle_test: torch_oracle.py DIR.

DIR/whole/model.safetensors holds the tensors; DIR/file.pth the same in a dict of dicts, beside other values;
DIR/dcp the same saved by two ranks with torch.distributed.checkpoint in its own format;
DIR/refused/*.pth files that must not be read.
"""

import collections
import os
import sys
import tempfile
import zipfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

RANKS = 2


def tensors():
    generator = torch.Generator().manual_seed(3)
    shapes = {"w": [5, 7], "b": [5], "cube": [3, 4, 5], "wide": [1, 6], "big": [300, 257]}
    result = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for name, shape in shapes.items():
            result[f"model.{str(dtype)[6:]}.{name}"] = torch.randn(shape, generator=generator).to(dtype)
    result["optim.state.w.step"] = torch.tensor(17.0)
    result["optim.steps"] = torch.randint(0, 2**60, [5], generator=generator)
    result["optim.codes"] = torch.randint(0, 255, [7, 3], generator=generator, dtype=torch.uint8)
    return result


def nested(whole):
    """A dict of OrderedDicts, with values that are no tensors between them."""
    model = collections.OrderedDict((n.removeprefix("model."), t) for n, t in whole.items() if n.startswith("model."))
    model["float32.w"] = torch.nn.Parameter(model["float32.w"])
    model["view"] = torch.arange(20.0)[4:16].view(3, 4)  # Into a larger storage.
    optim = {n.removeprefix("optim."): t for n, t in whole.items() if n.startswith("optim.")}
    return {"model": model, "optim": {**optim, "lr": 1e-3}, "epoch": 3, "name": "x"}


def save_rank(rank, directory, rendezvous):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    state = {"epoch": 3, "nested": {"lr": 0.1, "names": ["a", "b"]}}
    for i, (name, tensor) in enumerate(tensors().items()):
        placement = Replicate() if tensor.dim() == 0 else Shard(i % tensor.dim())
        state[name] = distribute_tensor(tensor, mesh, [placement], src_data_rank=None)
    dcp.save(state, checkpoint_id=f"{directory}/dcp")
    dist.destroy_process_group()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def make_refused(folder):
    os.makedirs(folder)
    torch.save({"w": Evil(f"{folder}/ran")}, f"{folder}/system.pth")
    torch.save({"w": torch.zeros(3, 4).t()}, f"{folder}/strided.pth")
    torch.save({"w": torch.zeros(3)}, f"{folder}/legacy.pth", _use_new_zipfile_serialization=False)
    torch.save([torch.zeros(3)], f"{folder}/list.pth")
    torch.save({"w": torch.zeros(100_000)}, f"{folder}/plain.pth")
    with zipfile.ZipFile(f"{folder}/plain.pth") as source, \
            zipfile.ZipFile(f"{folder}/deflated.pth", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    os.remove(f"{folder}/plain.pth")


def main(directory):
    whole = tensors()
    os.makedirs(f"{directory}/whole")
    torch.save(nested(whole), f"{directory}/file.pth")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(save_rank, (directory, os.path.join(folder, "store")), nprocs=RANKS)
    make_refused(f"{directory}/refused")
    save_file(whole, f"{directory}/whole/model.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
