"""Adapt a model with any number of processes, on one machine or several (notebook 11).

    torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node=2 train_parallel.py FOLDER

All processes read FOLDER. For RichBoyNet it holds base.safetensors and digits.safetensors; a
language model (--model language_model) comes from data/ or from the Hub. The job leaves in FOLDER
a checkpoint, the adapter, and a report of each process.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_tasks as tasks
from lora_utils import add_lora, load_lora_state_dict, lora_state_dict, save_adapter


@dataclass(frozen=True)
class Job:
    """What is trained. A checkpoint belongs to one job, and no other job goes on from it."""

    model: str = ""  # a language model, in data/ or on the Hub; if empty, RichBoyNet
    text: str = "kjv"  # what the language model reads, from data/texts
    full: bool = False  # train all weights, without LoRA
    rank: int = 8
    alpha: float = 8
    targets: str = ""  # names of linear layers, with commas between them; if empty, all
    rate: float = 2e-3
    batch: int = 64  # examples in a step, of all processes together
    seed: int = 0


def train(
    folder: Path, device: torch.device, job: Job, fsdp=False, steps=20, save_every=10
) -> dict:
    """Train one model together with the other processes; return what this one has to report."""
    me, processes = dist.get_rank(), dist.get_world_size()
    refuse_what_cannot_work(job, processes, save_every)
    model, blocks, linear, examples, loss_of = load_task(job, folder, device)
    made_for = asdict(job) | {"base and examples": checksum([*model.parameters(), examples])}
    light = None
    if not job.full:
        torch.manual_seed(job.seed)  # the same everywhere, so that each A starts equal
        targets = job.targets.split(",") if job.targets else linear
        add_lora(model, job.rank, job.alpha, targets)
        light = without_frozen(model)
    parallel = distribute(model, blocks, fsdp, device)  # after add_lora, never before
    trained = [parameter for parameter in parallel.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=job.rate)
    done = resume(parallel, optimizer, folder, made_for)
    losses = []
    for step in range(done, steps):
        batch = draw(step, len(examples), job)  # the same everywhere
        loss = loss_of(parallel, batch[me::processes])  # each takes its share
        optimizer.zero_grad()
        loss.backward()  # and average the gradients over the processes
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save(parallel, optimizer, light, step + 1, folder, made_for)
    return {"losses": losses} | describe_held(parallel, fsdp)


def refuse_what_cannot_work(job: Job, processes: int, save_every: int) -> None:
    """Raise an error before anything is loaded."""
    if job.batch % processes:
        raise ValueError(f"{processes} processes cannot share a batch of {job.batch} evenly")
    if save_every < 1:
        raise ValueError(f"save_every must be at least 1, not {save_every}")


def load_task(job: Job, folder: Path, device: torch.device) -> tuple:
    """Return the base, its blocks, its linear layers' names, examples, and a function for a loss.

    The base is on the CPU. An example is a digit, or a window of 65 tokens.
    """
    if job.model:
        model, tokenizer = tasks.load_language_model(job.model, torch.device("cpu"))
        tokens = tasks.encode(tokenizer, tasks.load_text(job.text)[0], torch.device("cpu"))
        windows = tokens.unfold(0, 65, 64)

        def bits(model: nn.Module, chosen: torch.Tensor) -> torch.Tensor:
            return tasks.token_bits(model, tokenizer, windows[chosen].to(device)).mean()

        return model, model.model.layers, tasks.ATTENTION + tasks.MLP, windows, bits
    model = tasks.RichBoyNet()
    model.load_state_dict(load_file(folder / "base.safetensors"))
    digits = load_file(folder / "digits.safetensors")
    images, labels = digits["images"], digits["labels"]

    def cross_entropy(model: nn.Module, chosen: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(images[chosen].to(device)), labels[chosen].to(device))

    return model, model.children(), ["fc1", "fc2", "fc3"], images, cross_entropy


def draw(step: int, count: int, job: Job) -> torch.Tensor:
    """Return the numbers of a step's examples. Each epoch has a new order, and whole batches."""
    if count < job.batch:
        raise ValueError(f"{count} examples do not fill a batch of {job.batch}")
    epoch, place = divmod(step, count // job.batch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(job.seed + epoch))
    return order[place * job.batch :][: job.batch]


def distribute(model: nn.Module, blocks: Iterable, fsdp: bool, device: torch.device, **how):
    """Return the model, wrapped so that all processes train it together."""
    if not fsdp:
        return DistributedDataParallel(model.to(device))  # each process holds a replica
    how["mesh"] = dist.init_device_mesh(device.type, (dist.get_world_size(),))  # all in one row
    for block in blocks:
        fully_shard(block, **how)  # each holds a share of it, and borrows the others when needed
    return fully_shard(model, **how)  # what is in no block


def save(parallel, optimizer, light, step: int, folder: Path, made_for: dict) -> None:
    """Save adapter and checkpoint. All processes call it, for each may hold a share; one writes."""
    parts = {"full_state_dict": True, "cpu_offload": True, "ignore_frozen_params": True}
    options = states.StateDictOptions(**parts)
    weights, state = states.get_state_dict(parallel, optimizer, options=options)
    if dist.get_rank() > 0:
        return
    if light is not None:
        weights = {name: weights[name] for name in lora_state_dict(light)}  # without a tied head
        load_lora_state_dict(light, weights)
        save_adapter(light, folder / "adapter")  # first: it may be ahead for a moment, never behind
    saved = {"step": step, "job": made_for, "weights": weights, "optimizer": state}
    torch.save(saved, folder / "checkpoint.new")
    os.replace(folder / "checkpoint.new", folder / "checkpoint.pt")  # the old or the new one


def resume(parallel, optimizer, folder: Path, made_for: dict) -> int:
    """Load the checkpoint, if there is one, and return how many steps are done."""
    if not (folder / "checkpoint.pt").exists():
        return 0
    saved = torch.load(folder / "checkpoint.pt", map_location="cpu")
    other = [name for name in made_for if made_for[name] != saved["job"].get(name)]
    if other:
        raise ValueError(f"{folder} holds a checkpoint of another job (other: {', '.join(other)})")
    parts = {"model_state_dict": saved["weights"], "optim_state_dict": saved["optimizer"]}
    options = states.StateDictOptions(full_state_dict=True, strict=False)  # no frozen weights
    states.set_state_dict(parallel, optimizer, **parts, options=options)
    print(f"going on after step {saved['step']}\n", end="")
    return saved["step"]


def without_frozen(model: nn.Module) -> nn.Module:
    """Return a copy whose frozen weights take no memory: save_adapter needs only its factors."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    zeros = {id(p): nn.Parameter(p.new_zeros(1).expand(p.shape), False) for p in frozen}
    return copy.deepcopy(model, zeros)  # which takes what it finds there as copied already


def describe_held(parallel: nn.Module, fsdp: bool) -> dict:
    """Return how many weights this process holds, its share or all, and their checksum."""
    held = [p.to_local() if fsdp else p for p in parallel.parameters()]
    count = sum(parameter.numel() for parameter in held)
    return {"held": count, "checksum": checksum(held)}


def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """Return a number that is another one if a bit of the tensors is."""
    total = 0
    for tensor in tensors:
        numbers = tensor.detach().cpu().contiguous().flatten()
        total = zlib.crc32(numbers.view(torch.uint8).numpy(), total)
    return total


@record  # puts the error of a process that fails into the launcher's report
def main() -> None:
    """Read the command line, meet the other processes, train, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fsdp", action="store_true", help="shard the weights, the frozen too")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=10)
    for field in fields(Job):
        switch = {"action": "store_true"} if field.type is bool else {"type": field.type}
        parser.add_argument(f"--{field.name}", default=field.default, **switch)
    options = vars(parser.parse_args())
    if "LOCAL_RANK" not in os.environ:
        parser.error("torchrun starts this script: torchrun --standalone ... train_parallel.py")
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):  # a GPU for each process
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    # Written whole, with its end: else two processes may write into one line.
    print(f"process {dist.get_rank()} of {dist.get_world_size()}, on {device}\n", end="")
    job = Job(**{field.name: options.pop(field.name) for field in fields(Job)})
    report = train(device=device, job=job, **options)
    (options["folder"] / f"process{dist.get_rank()}.json").write_text(json.dumps(report))
    leave_together()


def leave_together() -> None:
    """End this process once all are done: call it last.

    gloo may abort a process whose peers have left, or in the interpreter's last steps, which tidy
    up. So all leave together, and leave those steps out.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def launch(script: Path, *options, processes: int = 2, timeout: float = 300) -> tuple[int, str]:
    """Start a script as torchrun does; return its exit status and what the processes printed.

    Nothing stays behind when you interrupt it, or when the time is up.

    Raises:
        TimeoutError: the time is up. It says what the processes printed.
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    environment["USE_LIBUV"] = "0"  # PyTorch for Windows is built without it
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += ["--standalone", "--local-addr=127.0.0.1"]  # else it looks up this machine's name
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    with TemporaryDirectory() as logs:
        command += [f"--log-dir={logs}", str(script), *map(str, options)]
        with subprocess.Popen(command, env=environment, **pipes) as launcher:
            try:
                printed, _ = launcher.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                launcher.terminate()
                printed, _ = launcher.communicate()
                raise TimeoutError(
                    f"not done after {timeout} s. They printed:\n{printed}"
                ) from None
            finally:
                launcher.terminate()  # and with it, its processes
    return launcher.returncode, printed


if __name__ == "__main__":
    main()
