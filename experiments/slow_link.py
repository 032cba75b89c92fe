"""Time steps of train_parallel.py on two hosts that a slow link joins (notebook 11).

    python experiments/slow_link.py

The hosts are two network namespaces of one Linux machine (two_hosts.sh), and the kernel slows the
link down to each speed in turn. torchrun starts this same file on both.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from stored import store

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from lora_tasks import RichBoyNet  # noqa: E402
from measure_parallel import watch  # noqa: E402
from train_parallel import Job, leave_together  # noqa: E402

# For each way to train, the speeds of the link in Mbit/s; 0 is as fast as the machine can.
SPEEDS = {
    "DDP, full": [0, 1000, 300, 100, 30],
    "DDP, LoRA": [0, 1000, 300, 100, 30, 10],
    "FSDP, full": [100],
    "FSDP, LoRA": [100],
}


def slow_down(mbit: int) -> None:
    """Let this host send so many megabits in a second, at most a millisecond's worth at once."""
    device = ["dev", os.environ["GLOO_SOCKET_IFNAME"], "root"]
    subprocess.run(["tc", "qdisc", "del", *device], stderr=subprocess.DEVNULL)
    if mbit:
        bucket = ["burst", str(max(4000, 125 * mbit)), "latency", "400ms"]
        rate = ["tbf", "rate", f"{mbit}mbit", *bucket]
        subprocess.run(["tc", "qdisc", "add", *device, *rate], check=True)


def bytes_sent() -> int:
    """Return what this host's end of the link has sent so far."""
    device = os.environ["GLOO_SOCKET_IFNAME"]
    [line] = [line for line in open("/proc/net/dev") if f"{device}:" in line]
    return int(line.split()[9])


def time_steps(folder: Path, way: str, mbit: int) -> dict:
    """Train at one speed; return the seconds of the steps, and the bytes that a step sent."""
    slow_down(mbit)
    dist.barrier()
    job, fsdp = Job(full="full" in way), "FSDP" in way
    steps = 41 if mbit == 0 or way == "DDP, LoRA" else 7
    sent = []
    report = watch(folder, job, lambda model: sent.append(bytes_sent()), fsdp=fsdp, steps=steps)
    return {
        "way": way,
        "mbit": mbit,
        "seconds": sorted(round(seconds, 4) for seconds in report["seconds"][1:]),
        "sent": round((sent[-1] - sent[1]) / (steps - 2)),
    }


def main() -> None:
    """Start this file on two hosts, and store what the first one measured."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)  # what is learnt makes no difference, so the digits are noise
        save_file(RichBoyNet().state_dict(), folder / "base.safetensors")
        digits = {"images": torch.randn(640, 28, 28), "labels": torch.randint(10, (640,))}
        save_file(digits, folder / "digits.safetensors")
        command = ["bash", str(HERE / "two_hosts.sh"), sys.executable, __file__, name]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, json.dumps(SPEEDS)], check=True, env=environment)
        results = json.loads((folder / "host0.json").read_text())
    times = os.times()
    store("slow_link.json", results, times.children_user + times.children_system)


def measure_here() -> None:
    """Measure what the command line asks for, on one of the two hosts."""
    folder, speeds = Path(sys.argv[1]), json.loads(sys.argv[2])
    dist.init_process_group("gloo")
    watch(folder, Job(), steps=5)  # a warm-up
    found = [time_steps(folder, way, mbit) for way in speeds for mbit in speeds[way]]
    (folder / f"host{dist.get_rank()}.json").write_text(json.dumps(found))
    leave_together()


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun started it
        measure_here()
    else:
        main()
