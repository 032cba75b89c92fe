"""Count what train_parallel.py sends, and make a mistake with it (notebook 11).

    torchrun ... measure_parallel.py FOLDER SEED bytes llama orders

It measures the parts that are named, and writes its reports to FOLDER.
"""

import json
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors.torch import save_file
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import train_parallel as worker
from lora_utils import add_lora, lora_state_dict


class Spy(TorchDispatchMode):
    """Note the bytes that each operation between processes is given."""

    def __init__(self):
        super().__init__()
        self.seen = {}  # for each operation's name, the bytes of each call

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """PyTorch calls this in place of each operation on tensors."""
        if operation.namespace == "c10d":  # one between processes
            lists = [arg if isinstance(arg, list) else [arg] for arg in args]
            sizes = [t.nbytes for tensors in lists for t in tensors if isinstance(t, torch.Tensor)]
            calls = self.seen.setdefault(operation.overloadpacket.__name__, [])
            calls.append(max(sizes, default=0))  # the whole tensor: the others are its parts
        return operation(*args, **(kwargs or {}))


def watch(
    folder: Path, job: worker.Job, before_step=lambda model: None, wrap=worker.distribute, **options
) -> dict:
    """Train under the eyes of the spy, from the start and without saving.

    Return the report, and with it the bytes of each operation and the seconds of each step.
    """
    starts = []

    def note(model: nn.Module, inputs: tuple) -> None:
        starts.append(time.perf_counter())
        before_step(model)

    def wrap_and_note(model: nn.Module, *arguments) -> nn.Module:
        model.register_forward_pre_hook(note)
        return wrap(model, *arguments)

    replaced = {"distribute": wrap_and_note, "save": lambda *_: None, "resume": lambda *_: 0}
    with patch.multiple(worker, **replaced), Spy() as spy:
        report = worker.train(folder, torch.device("cpu"), job, **options)
    seconds = torch.tensor(starts, dtype=torch.float64).diff().tolist()
    return report | {"seen": spy.seen, "seconds": seconds}


def wrap_too_early(
    model: nn.Module, blocks: Iterable, fsdp: bool, device: torch.device
) -> nn.Module:
    """The mistake that raises no error: the wrapper first, then add_lora."""
    parallel = DistributedDataParallel(model)
    add_lora(model, rank=8, alpha=8, targets=["fc1", "fc2", "fc3"])
    return parallel


def count_bytes(folder: Path, seed: int) -> dict:
    """Return reports of two steps each: in full and with LoRA, in replicas and in shards."""
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    kept = {"reshard_after_forward": False}
    reports = {}
    for kind, full in {"full": True, "LoRA": False}.items():
        job = worker.Job(full=full, seed=seed)
        reports[f"DDP, {kind}"] = watch(folder, job, steps=2)
        for way, how in {"FSDP": {}, "FSDP 16": {"mp_policy": half}, "FSDP kept": kept}.items():
            wrap = partial(worker.distribute, **how)
            reports[f"{way}, {kind}"] = watch(folder, job, wrap=wrap, fsdp=True, steps=2)
    return reports


def shard_llama(folder: Path, seed: int) -> dict:
    """Return reports of two steps of the small Llama: in replicas, and in shards."""
    job = worker.Job(model="language_model", batch=4, seed=seed)
    return {
        "Llama, DDP": watch(folder, job, steps=2),
        "Llama, FSDP": watch(folder, job, fsdp=True, steps=2),
    }


def compare_orders(folder: Path, seed: int) -> dict:
    """Return reports of 20 steps, in the right and in the wrong order. Save all their factors."""
    right = worker.Job(seed=seed), worker.distribute
    wrong = worker.Job(seed=seed, full=True), wrap_too_early  # full: train itself adds no LoRA
    reports = {}
    for name, (job, wrap) in {"right": right, "wrong": wrong}.items():
        states = []  # the factors before each step
        reports[name] = watch(folder, job, lambda m, s=states: s.append(lora_state_dict(m)), wrap)
        factors = {factor: torch.stack([state[factor] for state in states]) for factor in states[0]}
        save_file(factors, folder / f"{name}{dist.get_rank()}.safetensors")
    return reports


PARTS = {"bytes": count_bytes, "llama": shard_llama, "orders": compare_orders}


def main() -> None:
    """Measure the parts that the command line names."""
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo")
    reports = {}
    for part in sys.argv[3:]:
        reports |= PARTS[part](folder, seed)
    (folder / f"measured{dist.get_rank()}.json").write_text(json.dumps(reports))
    worker.leave_together()


if __name__ == "__main__":
    main()
