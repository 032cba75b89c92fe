"""Adapt RichBoyNet with any number of processes, on one machine or several (notebook 9).

    torchrun --standalone --nproc-per-node=2 train_parallel.py FOLDER

FOLDER holds base.safetensors, the network, and digits.safetensors, what it is to learn. The job
leaves there a checkpoint, the adapter, and a report of each process. All processes read FOLDER:
for several machines it lies on a disk that they share.
"""

import argparse
import json
import os
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam

from lora_utils import RichBoyNet, add_lora, load_lora_state_dict, save_adapter

LORA = {"rank": 8, "alpha": 8, "targets": ["fc1", "fc2", "fc3"]}
BATCH = 64  # digits in a step, of all processes together


def train(
    folder: Path, device: torch.device, full=False, fsdp=False, steps=20, save_every=10, seed=0
) -> dict:
    """Train one model together with the other processes; return what this one has to report."""
    me, processes = dist.get_rank(), dist.get_world_size()
    if BATCH % processes:
        raise ValueError(f"{processes} processes cannot share a batch of {BATCH} evenly")
    torch.manual_seed(seed)  # the same everywhere: A starts equal, and so does the order
    model = RichBoyNet()
    model.load_state_dict(load_file(folder / "base.safetensors"))
    if not full:
        add_lora(model, **LORA)
    parallel = distribute(model.to(device), fsdp, device)  # after add_lora, never before
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = Adam(trained, lr=2e-3)
    done = resume(parallel, optimizer, folder)
    digits = load_file(folder / "digits.safetensors", device=str(device))
    order = torch.randperm(len(digits["labels"]))
    losses, seconds = [], []
    for step in range(done, steps):
        start = time.perf_counter()
        batch = order[step * BATCH % len(order) :][:BATCH]
        share = batch[me::processes].to(device)
        loss = F.cross_entropy(parallel(digits["images"][share]), digits["labels"][share])
        optimizer.zero_grad()
        loss.backward()  # and average the gradients over the processes
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        if (step + 1) % save_every == 0:
            save(parallel, optimizer, step + 1, folder, full)
    held = [p.to_local() if fsdp else p for p in model.parameters()]
    numbers = torch.cat([tensor.detach().flatten().cpu() for tensor in held])
    report = {"held": len(numbers), "checksum": zlib.crc32(numbers.numpy())}
    return report | {"losses": losses, "seconds": seconds}


def distribute(model: nn.Module, fsdp: bool, device: torch.device) -> nn.Module:
    """Return the model, wrapped so that all processes train it together."""
    if not fsdp:
        return DistributedDataParallel(model)  # each process holds a replica
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.children():
        fully_shard(layer, mesh=mesh)  # each process holds a share, and borrows the others
    return fully_shard(model, mesh=mesh)


def save(parallel: nn.Module, optimizer: Adam, step: int, folder: Path, full: bool) -> None:
    """Save the checkpoint and the adapter. All processes call it, for each may hold a share."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights, state = get_state_dict(parallel, optimizer, options=whole)
    if dist.get_rank() != 0:  # one process writes
        return
    torch.save({"step": step, "weights": weights, "optimizer": state}, folder / "checkpoint.new")
    os.replace(folder / "checkpoint.new", folder / "checkpoint.pt")  # the old one or the new one
    if not full:
        plain = RichBoyNet()  # without wrapper and shares
        add_lora(plain, **LORA)
        load_lora_state_dict(plain, weights)
        save_adapter(plain, folder / "adapter")


def resume(parallel: nn.Module, optimizer: Adam, folder: Path) -> int:
    """Load the checkpoint, if there is one, and return how many steps are done."""
    if not (folder / "checkpoint.pt").exists():
        return 0
    saved = torch.load(folder / "checkpoint.pt")
    parts = {"model_state_dict": saved["weights"], "optim_state_dict": saved["optimizer"]}
    options = StateDictOptions(full_state_dict=True, strict=False)  # it has no frozen weights
    set_state_dict(parallel, optimizer, **parts, options=options)
    return saved["step"]


@record  # puts the error of a process that fails into the launcher's report
def main() -> None:
    """Read the command line, meet the other processes, train, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full", action="store_true", help="train all weights, without LoRA")
    parser.add_argument("--fsdp", action="store_true", help="shard the weights, the frozen too")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])  # one for each
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    report = train(device=device, **vars(options))
    (options.folder / f"process{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
