"""Adapt RichBoyNet to rotated digits with any number of processes; notebook 9 explains how.

    torchrun --standalone --nproc-per-node=2 train_parallel.py FOLDER lora full

FOLDER/base.safetensors holds the network to adapt. Each process loads it, takes its share of
each batch, and averages its gradients with those of the others, so that all make the same step.
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
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lora_utils import RichBoyNet, add_lora, load_mnist, rotate, save_adapter

LAYERS = ["fc1", "fc2", "fc3"]


def train(run: str, options: argparse.Namespace, device: torch.device) -> dict:
    """Train one model together with the other processes; return what this one saw."""
    me, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same everywhere: A starts equal, and so does the order of the digits
    model = RichBoyNet().to(device)
    model.load_state_dict(load_file(options.folder / "base.safetensors", device=str(device)))
    if run != "full":
        add_lora(model, options.rank, alpha=options.rank, targets=LAYERS)
    parallel, sent = DistributedDataParallel(model), []  # after add_lora, never before

    def average(group, bucket):  # torch calls it for each bucket of gradients that is ready
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    parallel.register_comm_hook(None, average)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=2e-3)
    digits = rotate(load_mnist(device)[0])
    order = torch.randperm(len(digits.labels), device=device)
    losses, start = [], time.perf_counter()
    for batch in order[: 64 * options.steps].view(-1, 64):
        share = batch[me::processes]
        loss = F.cross_entropy(parallel(digits.images[share]), digits.labels[share])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = (time.perf_counter() - start) / options.steps
    if run != "full" and me == 0:  # one process saves, and it saves the model, not the wrapper
        save_adapter(model, options.folder / run)
    numbers = torch.cat([p.detach().flatten() for p in model.parameters()]).cpu().numpy()
    return {
        "losses": losses,
        "bytes": sum(sent) / options.steps,
        "seconds": seconds,
        "checksum": zlib.crc32(numbers),
    }


@record  # puts the error of a process that fails into the launcher's report
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", nargs="+", choices=["lora", "full"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    on_gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpus else "gloo")
    results = {run: train(run, options, device) for run in options.runs}
    (options.folder / f"process{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
