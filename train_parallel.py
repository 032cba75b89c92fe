"""Adapt RichBoyNet with any number of processes, on one machine or several (notebook 9).

    torchrun --standalone --nproc-per-node=2 train_parallel.py FOLDER

FOLDER, which all processes read, holds base.safetensors and digits.safetensors. The job leaves
there a checkpoint, the adapter, and a report of each process.
"""

import argparse
import json
import os
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lora_tasks import RichBoyNet
from lora_utils import add_lora, load_lora_state_dict, save_adapter

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
    parallel = distribute(model, fsdp, device)  # after add_lora, never before
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    job = {"full": full, "seed": seed}  # what a checkpoint must have been made for
    done = resume(parallel, optimizer, folder, job)
    digits = load_file(folder / "digits.safetensors", device=str(device))
    order = torch.randperm(len(digits["labels"]) // BATCH * BATCH)  # whole batches, equal shares
    losses = []
    for step in range(done, steps):
        batch = order[step * BATCH % len(order) :][:BATCH]  # each epoch in the same order
        share = batch[me::processes].to(device)
        loss = F.cross_entropy(parallel(digits["images"][share]), digits["labels"][share])
        optimizer.zero_grad()
        loss.backward()  # and average the gradients over the processes
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % save_every == 0:
            save(parallel, optimizer, step + 1, folder, job)
    held = [p.to_local() if fsdp else p for p in model.parameters()]  # its share, or all of it
    numbers = torch.cat([tensor.detach().flatten().cpu() for tensor in held])
    return {"losses": losses, "held": len(numbers), "checksum": zlib.crc32(numbers.numpy())}


def distribute(model: torch.nn.Module, fsdp: bool, device: torch.device) -> torch.nn.Module:
    """Return the model, wrapped so that all processes train it together."""
    if not fsdp:
        return DistributedDataParallel(model.to(device))  # each process holds a replica
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))  # all processes, in one row
    for layer in model.children():
        fully_shard(layer, mesh=mesh)  # each holds a share on its device, and borrows the others
    return fully_shard(model, mesh=mesh)


def save(parallel, optimizer, step: int, folder: Path, job: dict) -> None:
    """Save checkpoint and adapter. All processes call it, for each may hold a share; one writes."""
    whole = {"full_state_dict": True, "cpu_offload": True, "ignore_frozen_params": True}
    options = states.StateDictOptions(**whole)
    weights, state = states.get_state_dict(parallel, optimizer, options=options)
    if dist.get_rank() == 0:
        saved = {"step": step, "job": job, "weights": weights, "optimizer": state}
        torch.save(saved, folder / "checkpoint.new")
        os.replace(folder / "checkpoint.new", folder / "checkpoint.pt")  # the old or the new one
        if not job["full"]:
            plain = RichBoyNet()  # without wrapper and shares
            add_lora(plain, **LORA)
            load_lora_state_dict(plain, weights)
            save_adapter(plain, folder / "adapter")


def resume(parallel, optimizer, folder: Path, job: dict) -> int:
    """Load the checkpoint, if there is one, and return how many steps are done."""
    if not (folder / "checkpoint.pt").exists():
        return 0
    saved = torch.load(folder / "checkpoint.pt")
    if saved["job"] != job:
        raise ValueError(f"the checkpoint in {folder} was made for {saved['job']}, not for {job}")
    parts = {"model_state_dict": saved["weights"], "optim_state_dict": saved["optimizer"]}
    options = states.StateDictOptions(full_state_dict=True, strict=False)  # no frozen weights
    states.set_state_dict(parallel, optimizer, **parts, options=options)
    print(f"going on after step {saved['step']}")
    return saved["step"]


@record  # puts the error of a process that fails into the launcher's report
def main() -> None:
    """Read the command line, meet the other processes, train, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full", action="store_true", help="train all weights, without LoRA")
    parser.add_argument("--fsdp", action="store_true", help="shard the weights, the frozen too")
    for option, default in {"--steps": 20, "--save-every": 10, "--seed": 0}.items():
        parser.add_argument(option, type=int, default=default)
    options = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):  # a GPU for each process
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    # Written whole, with its end: else two processes may write into one line.
    print(f"process {dist.get_rank()} of {dist.get_world_size()}, on {device}\n", end="")
    report = train(device=device, **vars(options))
    (options.folder / f"process{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
