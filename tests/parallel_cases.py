"""What each process of test_parallel.py does: many trainings, reported in a file.

parallel_cases.py START ONE OUT: START holds a base and digits, ONE the folders that one process
left. Each training gets a folder of its own in OUT, and takes six steps.
"""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import lora_tasks
import lora_utils as lora
import train_parallel as worker
from measure_parallel import Spy, wrap_too_early

CPU = torch.device("cpu")
LINEAR = ["fc1", "fc2", "fc3"]
LLAMA = {"model": "language_model", "batch": 4}
START, ONE, OUT = map(Path, sys.argv[1:])
found = {}  # what this process reports


def attempt(name, begin=START, fsdp=False, steps=6, **job):
    """Train in a folder of this name; report what was learnt, and what the spy saw."""
    if dist.get_rank() == 0:
        shutil.copytree(begin, OUT / name)
    dist.barrier()
    with Spy() as spy:
        report = worker.train(OUT / name, CPU, worker.Job(**job), fsdp, steps, save_every=4)
    found[name] = report | {"seen": spy.seen}


def attempt_with_hook(name, **job):
    """The same with DDP's own way to see what it averages, and with a count of the examples."""
    averaged, examples = [], []

    def hook(group, bucket):
        averaged.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    def with_hook(*arguments, distribute=worker.distribute):
        parallel = distribute(*arguments)
        parallel.register_comm_hook(None, hook)
        parallel.register_forward_pre_hook(lambda _, inputs: examples.append(len(inputs[0])))
        return parallel

    with patch.object(worker, "distribute", with_hook):
        attempt(name, **job)
    found[name] |= {"averaged": sum(averaged), "examples": examples}


def error_of(function, *arguments, **options):
    """Return the error that a call ends with, as text."""
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def same_answers():
    """What must be as with one process: replicas and shards, from the start and resumed."""
    for name, job in {"full": {"full": True}, "lora": {}, "llama": LLAMA}.items():
        attempt_with_hook(name, **job)
        attempt(f"{name} fsdp", fsdp=True, **job)
        attempt(f"{name} resumed", ONE / f"{name} half", **job)
        attempt(f"{name} fsdp resumed", ONE / f"{name} half", fsdp=True, **job)
    attempt("lora fsdp half", steps=3, fsdp=True)  # for one process to go on from
    attempt("settings", rank=2, alpha=5, targets="fc2")


def broken_answers():
    """What would make it another answer, or N times the work."""
    me = dist.get_rank()

    def other_base(path, load_file=worker.load_file):
        shift = 0.1 * me if path.stem == "base" else 0
        return {name: tensor + shift for name, tensor in load_file(path).items()}

    with patch.object(worker, "load_file", other_base):
        attempt("other base")
        attempt("other base fsdp", fsdp=True)
    attempt("other order", seed=me)
    alone = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1)
    with patch.object(worker, "save"):
        with patch.object(worker, "distribute", wrap_too_early):
            attempt("too early", full=True)
        with patch.object(worker, "dist", alone):
            found["no share"] = worker.train(START, CPU, worker.Job(), steps=6)


def errors():
    """What train refuses, and what DDP does."""
    train, Job = worker.train, worker.Job
    found["uneven"] = error_of(train, START, CPU, Job(batch=63))
    found["few"] = error_of(train, START, CPU, Job(batch=600))
    found["never"] = error_of(train, START, CPU, Job(), save_every=0)
    found["other job"] = error_of(train, ONE / "lora half", CPU, Job(full=True, rank=4))
    found["rebased"] = error_of(train, ONE / "rebased", CPU, Job())
    frozen = lora_tasks.RichBoyNet().requires_grad_(False)
    found["nothing to train"] = error_of(DistributedDataParallel, frozen)
    parallel = DistributedDataParallel(lora_tasks.RichBoyNet())
    found["names"] = list(parallel.state_dict())
    found["wrapped"] = error_of(lora.save_adapter, parallel, OUT / "wrapped")
    found["unused"] = error_of(two_steps)
    found["unused, found"] = error_of(two_steps, find_unused_parameters=True)


def two_steps(**options):
    """Train without fc1, whose factors exist all the same."""
    model = lora_tasks.RichBoyNet()
    lora.add_lora(model, 8, 8, LINEAR)
    model.forward = lambda hidden: nn.Sequential(model.fc2, model.fc3)(hidden)
    parallel = DistributedDataParallel(model, **options)
    for _ in range(2):
        parallel(torch.randn(4, 1000)).sum().backward()


def main():
    """Do it all, and write the report."""
    dist.init_process_group("gloo")
    writes = []
    save = partial(lambda save, *arguments: save(*arguments) or writes.append(1), torch.save)
    with patch.object(torch, "save", save):
        same_answers()
        broken_answers()
        errors()
    found["writes"] = len(writes)
    (OUT / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    worker.leave_together()


if __name__ == "__main__":
    main()
