"""Measure what train_parallel.py sends, and make two mistakes with it (notebook 9).

    torchrun --standalone --nproc-per-node=2 measure_parallel.py FOLDER SEED

It ends badly, on purpose: in its last training process 1 dies.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import train_parallel as worker
from lora_utils import add_lora, lora_state_dict

# In a ring each process sends this many times (N - 1)/N of an operation's bytes.
SHARE = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1}


class Spy(TorchDispatchMode):
    """Note the bytes of each operation between processes, and make it wait for the network."""

    def __init__(self, bits_per_second: float = math.inf):
        super().__init__()
        self.seen, self.speed = {}, bits_per_second  # seen: bytes for each name of an operation

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """PyTorch calls this in place of each operation on tensors."""
        if operation.namespace == "c10d":  # one between processes
            name, n = operation.overloadpacket.__name__, dist.get_world_size()
            lists = [arg if isinstance(arg, list) else [arg] for arg in args]
            sizes = [t.nbytes for tensors in lists for t in tensors if isinstance(t, torch.Tensor)]
            largest = max(sizes, default=0)  # the whole tensor: the others are its parts
            self.seen.setdefault(name, []).append(largest)
            time.sleep(8 * SHARE.get(name, 0) * (n - 1) / n * largest / self.speed)
        return operation(*args, **(kwargs or {}))


def watch(folder: Path, before_step: Callable, speed=math.inf, wrap=worker.distribute, **options):
    """Train under the eyes of the spy; return the report, with bytes and times added."""
    starts = []

    def note(model: nn.Module, inputs: tuple) -> None:
        starts.append(time.perf_counter())
        before_step(model)

    def wrap_and_note(model: nn.Module, *arguments) -> nn.Module:
        model.register_forward_pre_hook(note)
        return wrap(model, *arguments)

    worker.distribute = wrap_and_note
    with Spy(speed) as spy:
        report = worker.train(folder, torch.device("cpu"), **options)
    seconds = torch.tensor(starts, dtype=torch.float64).diff().tolist()
    return report | {"seen": spy.seen, "seconds": seconds}


def wrap_too_early(model: nn.Module, fsdp: bool, device: torch.device) -> nn.Module:
    """The mistake that raises no error: the wrapper first, then add_lora."""
    parallel = DistributedDataParallel(model)
    add_lora(model, **worker.LORA)
    return parallel


def main() -> None:
    """Train again and again: first to measure, then with the two mistakes."""
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo")
    me, reports = dist.get_rank(), {}

    def measure(name: str, before_step=lambda model: None, steps=6, **options) -> None:
        options = {"steps": steps, "save_every": 99, "seed": seed} | options
        reports[name] = watch(folder, before_step, **options)

    measure("warm-up")
    for kind, full in {"full": True, "LoRA": False}.items():
        measure(f"DDP, {kind}", full=full)
        measure(f"FSDP, {kind}", full=full, fsdp=True)
        for mbit in (1000, 100):
            measure(f"{kind} at {mbit}", full=full, speed=mbit * 1e6, steps=3 if full else 9)

    def drift(order: str, **options) -> None:
        before = []  # the factors before each step
        measure(order, lambda model: before.append(lora_state_dict(model)), steps=20, **options)
        factors = {name: torch.stack([state[name] for state in before]) for name in before[0]}
        save_file(factors, folder / f"{order}{me}.safetensors")

    drift("right")
    drift("wrong", wrap=wrap_too_early, full=True)  # full: the worker itself adds no LoRA
    (folder / f"process{me}.json").write_text(json.dumps(reports))

    steps = count(1)

    def die(model: nn.Module) -> None:
        if next(steps) == 13 and me == 1:
            os.kill(os.getpid(), 9)  # at once and without a word

    watch(folder, die, save_every=5, seed=seed)


if __name__ == "__main__":
    main()
