"""train_parallel.py with one process and with two, on two hosts, and when things go wrong.

Starting a process takes seconds, so one launch (parallel_cases.py) tries many things and reports
them in a file. Two tests need namespaces of Linux and are an extra: pytest -m two_hosts.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import lora_tasks
import lora_utils as lora
import train_parallel as worker
from lora_show import relative_difference, same_tensors

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
KINDS = {"full": {"full": True}, "lora": {}, "llama": {"model": "language_model", "batch": 4}}


def running(folder):
    """The processes that have this folder on their command line."""
    lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    return [line for line in lines if str(folder) in line]


def close(ours, theirs):
    """Equal up to rounding, which grows from step to step."""
    return relative_difference(torch.as_tensor(ours), torch.as_tensor(theirs)) < 1e-3


def close_states(ours, theirs):
    return ours.keys() == theirs.keys() and all(close(ours[name], theirs[name]) for name in ours)


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt")


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A base and digits. The answers do not depend on what they show, so they are noise."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(1)
    digits = {"images": torch.randn(280, 28, 28), "labels": torch.randint(10, (280,))}
    save_file(lora_tasks.RichBoyNet().state_dict(), folder / "base.safetensors")
    save_file(digits, folder / "digits.safetensors")
    return folder


@pytest.fixture(scope="module")
def one(start, tmp_path_factory):
    """What one process answers after six steps of each kind; "half" folders hold three."""
    folder = tmp_path_factory.mktemp("one")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    answers = {}
    for kind, job in KINDS.items():
        for name, steps in {f"{kind} half": 3, kind: 6}.items():
            shutil.copytree(start, folder / name)
            report = worker.train(folder / name, CPU, worker.Job(**job), steps=steps)
        answers[kind] = report | {"weights": checkpoint(folder / kind)["weights"]}
    dist.destroy_process_group()
    shutil.copytree(folder / "lora half", folder / "rebased")
    save_file(lora_tasks.RichBoyNet().state_dict(), folder / "rebased" / "base.safetensors")
    return SimpleNamespace(folder=folder, answers=answers)


@pytest.fixture(scope="module")
def two(start, one, tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    cases = ROOT / "tests" / "parallel_cases.py"
    status, printed = worker.launch(cases, start, one.folder, folder)
    assert status == 0 and not running(folder), printed
    found = [json.loads((folder / f"{k}.json").read_text()) for k in range(2)]
    return SimpleNamespace(folder=folder, found=found)


def losses(two, name):
    """The mean over both shares is the loss of the batch."""
    return torch.tensor([process[name]["losses"] for process in two.found]).mean(dim=0)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_compute_what_one_does(two, one, kind):
    expected = one.answers[kind]
    for way in (kind, f"{kind} fsdp"):
        assert close(losses(two, way), expected["losses"])
        assert close(losses(two, f"{way} resumed"), expected["losses"][3:])
        for name in (way, f"{way} resumed"):
            saved = checkpoint(two.folder / name)
            assert saved["step"] == 6 and close_states(saved["weights"], expected["weights"])
    first, second = (process[kind]["checksum"] for process in two.found)
    assert first == second


def test_each_epoch_has_another_order_and_whole_batches():
    drawn = torch.stack([worker.draw(step, 100, worker.Job(batch=32)) for step in range(30)])
    epochs = drawn.view(10, 96)
    assert all(len(epoch.unique()) == 96 for epoch in epochs)
    assert len(drawn.unique()) == 100  # what one epoch leaves out, another draws
    assert not epochs[0].equal(epochs[1])


def test_each_takes_its_share_and_one_writes(two):
    for process in two.found:
        assert process["lora"]["examples"] == 6 * [32]
        assert process["llama"]["examples"] == 6 * [2]
    first, second = (process["writes"] for process in two.found)
    assert first > 0 and second == 0


def test_the_adapter_is_that_of_the_last_checkpoint(two):
    for way in ("lora", "lora fsdp", "lora resumed", "settings", "llama", "llama fsdp"):
        if "llama" in way:
            model, _ = lora_tasks.load_language_model("language_model", CPU)
        else:
            model = lora_tasks.RichBoyNet()
        lora.load_adapter(model, two.folder / way / "adapter")
        saved = checkpoint(two.folder / way)
        assert saved["step"] == 6
        assert same_tensors(lora.lora_state_dict(model), saved["weights"])
        layers = lora.lora_layers(model)
        settings = {(layer.rank, layer.alpha) for layer in layers.values()}
        assert settings == ({(2, 5)} if way == "settings" else {(8, 8)})
        assert len(layers) == {"settings": 1, "llama": 21, "llama fsdp": 21}.get(way, 3)
    assert not (two.folder / "full" / "adapter").exists()
    assert not list(two.folder.glob("*/checkpoint.new"))


def test_one_process_resumes_what_two_saved_in_shards(two, one, group_of_one):
    report = worker.train(two.folder / "lora fsdp half", CPU, worker.Job(), steps=6)
    assert close(report["losses"], one.answers["lora"]["losses"][3:])


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_shares_are_exact(two, kind):
    if kind == "llama":
        model, _ = lora_tasks.load_language_model("language_model", CPU)
        lora.add_lora(model, 8, 8, lora_tasks.ATTENTION + lora_tasks.MLP)
        blocks = list(model.model.layers)
    else:
        model = lora_tasks.RichBoyNet()
        blocks = list(model.children())
    if kind == "lora":
        lora.add_lora(model, 8, 8, ["fc1", "fc2", "fc3"])
        blocks = list(model.children())
    total, trained = lora.count_parameters(model)
    inside = [lora.count_parameters(block).total for block in blocks]
    # What is in no block is gathered once a step and kept: here a Llama's embedding and norm.
    gathered = 2 * sum(inside) + (total - sum(inside))
    for process in two.found:
        replica, shards = process[kind], process[f"{kind} fsdp"]
        assert replica["held"] == total and shards["held"] == total // 2
        assert replica["averaged"] == 6 * 4 * trained  # of each step, by DDP's own hook
        assert max(replica["seen"]["broadcast_"]) >= 4 * (total if kind != "llama" else trained)
        gathers = shards["seen"]["_allgather_base_"]
        assert sum(gathers) >= 6 * 4 * gathered  # and once more for each checkpoint
        assert max(gathers) == 4 * max(*inside, total - sum(inside))  # one block at a time
        assert sum(shards["seen"]["_reduce_scatter_base_"]) == 6 * 4 * trained


def test_what_breaks_the_same_answer_and_what_does_not(two):
    right = losses(two, "lora")
    assert close(losses(two, "other base"), right)  # DDP sends process 0's weights to all
    assert not close(losses(two, "other base fsdp"), right)  # FSDP does not
    assert not close(losses(two, "other order"), right)
    agree = {
        name: two.found[0][name]["checksum"] == two.found[1][name]["checksum"]
        for name in ("other base", "other order", "too early", "no share")
    }
    assert agree == {"other base": True, "other order": True, "too early": False, "no share": True}
    for process in two.found:
        assert "allreduce_" not in process["too early"]["seen"]
        assert close(process["no share"]["losses"], right)  # each did all the work


def test_errors_say_what_is_wrong(two):
    for process in two.found:
        assert "2 processes cannot share a batch of 63 evenly" in process["uneven"]
        assert "280 examples do not fill a batch of 600" in process["few"]
        assert "save_every must be at least 1" in process["never"]
        assert "another job (other: full, rank)" in process["other job"]
        assert "another job (other: base and examples)" in process["rebased"]
        assert "DistributedDataParallel is not needed" in process["nothing to train"]
        assert all(name.startswith("module.") for name in process["names"])
        assert "renames the layers" in process["wrapped"]
        assert "find_unused_parameters=True" in process["unused"]
        assert process["unused, found"] is None


# When something ends in the middle


def test_after_a_death_between_the_files_and_a_restart_they_agree(
    start, tmp_path, monkeypatch, group_of_one
):
    folder = tmp_path / "run"
    shutil.copytree(start, folder)
    replace = os.replace

    def die_at_4(source, target):
        if target == folder / "checkpoint.pt" and (folder / "checkpoint.pt").exists():
            raise InterruptedError
        replace(source, target)

    monkeypatch.setattr(os, "replace", die_at_4)
    with pytest.raises(InterruptedError):
        worker.train(folder, CPU, worker.Job(), steps=4, save_every=2)
    assert checkpoint(folder)["step"] == 2
    monkeypatch.setattr(os, "replace", replace)
    for done_again in (2, 0):
        report = worker.train(folder, CPU, worker.Job(), steps=4, save_every=2)
        assert len(report["losses"]) == done_again
        model = lora_tasks.RichBoyNet()
        lora.load_adapter(model, folder / "adapter")
        assert same_tensors(lora.lora_state_dict(model), checkpoint(folder)["weights"])


OFF = """
import os, lora_utils, train_parallel
distribute = train_parallel.distribute
def off(model, *arguments):
    if os.environ["RANK"] == "1":
        lora_utils.set_lora_strength(model, 0)
    return distribute(model, *arguments)
train_parallel.distribute = off
train_parallel.main()
"""


def test_an_error_in_one_process_ends_all_and_stands_in_the_report(start, tmp_path):
    """Here: process 1 has its adapter switched off, so that its loss needs no gradient."""
    (tmp_path / "off.py").write_text(OFF)
    status, printed = worker.launch(tmp_path / "off.py", start, "--steps=1000000")
    report = printed.partition("Root Cause")[2]
    assert status != 0 and "rank      : 1 " in report, printed
    assert "does not require grad" in report and "in train" in report, printed
    assert not running(tmp_path) and not list(start.glob("process*.json"))


def test_when_the_time_is_up_nothing_stays_and_what_was_said_is_told(tmp_path):
    lines = "import time; print('I wait', flush=True); time.sleep(1000)"
    (tmp_path / "wait.py").write_text(lines)
    for seconds in (10, 30, 90):  # until it is long enough for both to have started
        with pytest.raises(TimeoutError, match=f"not done after {seconds} s") as said:
            worker.launch(tmp_path / "wait.py", timeout=seconds)
        assert not running(tmp_path)
        if str(said.value).count("I wait") == 2:
            return
    pytest.fail(str(said.value))


def test_without_torchrun_it_says_who_starts_it(tmp_path):
    command = [sys.executable, str(ROOT / "train_parallel.py"), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "torchrun starts this script" in ended.stderr


@pytest.mark.parametrize("gpus, backend", [(0, "gloo"), (1, "gloo"), (2, "nccl")])
def test_gpus_are_used_if_there_is_one_for_each_process(monkeypatch, tmp_path, gpus, backend):
    used = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(sys, "argv", ["train_parallel.py", str(tmp_path), "--rank=3"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(worker, "train", lambda device, job, **_: used.append((device, job)) or {})
    fake = {"init_process_group": used.append, "get_rank": lambda: 1, "get_world_size": lambda: 2}
    left = []  # gloo may abort a process whose peers have left, or that tidies up at its end
    fake["barrier"] = lambda: left.append("barrier")
    fake["destroy_process_group"] = lambda: left.append("destroy")
    monkeypatch.setattr(worker, "dist", SimpleNamespace(**fake))
    monkeypatch.setattr(worker.os, "_exit", left.append)
    worker.main()
    device = CPU if backend == "gloo" else torch.device("cuda", 1)
    assert used == [backend, (device, worker.Job(rank=3))]
    assert left == ["barrier", "destroy", 0]
    assert (tmp_path / "process1.json").exists()


def test_a_process_imports_no_drawing():
    command = "import sys, train_parallel; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True)
    assert not {b"matplotlib", b"IPython", b"torchvision", b"transformers"} & {
        *loaded.stdout.split()
    }


# Extras, which need namespaces of Linux: pytest -m two_hosts


def unshared(*command, timeout=240):
    """Run a command in namespaces of its own; skip the test where that is not possible."""
    needed = [tool for tool in ("unshare", "nsenter", "ip", "tc") if not shutil.which(tool)]
    if needed:
        pytest.skip(f"this machine lacks {', '.join(needed)}")
    may = subprocess.run(["unshare", "-Urn", "--uts", "true"], capture_output=True, text=True)
    if may.returncode:
        pytest.skip(f"this machine does not allow namespaces: {may.stderr.strip()}")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.two_hosts
def test_two_hosts_on_a_slow_link(start, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(start, folder)
    experiments = ROOT / "experiments"
    script = [experiments / "two_hosts.sh", sys.executable, experiments / "slow_link.py"]
    speeds = json.dumps({"DDP, full": [100], "DDP, LoRA": [100], "FSDP, full": [100]})
    unshared("bash", *map(str, script), str(folder), speeds)
    assert not running(folder)
    for host in range(2):
        full, few, shards = json.loads((folder / f"host{host}.json").read_text())
        wire = 8 * 4 * 2_807_010 / 100e6  # 2(N - 1)/N is 1 for two processes
        assert min(full["seconds"]) > 0.95 * wire
        assert min(few["seconds"]) < min(full["seconds"]) / 4
        assert 1 <= full["sent"] / (4 * 2_807_010) < 1.1
        assert 1 <= few["sent"] / (4 * 54_352) < 1.15
        # Two all-gathers and a reduce-scatter, for which gloo sends as for an all-reduce.
        assert 1.5 < shards["sent"] / (4 * 2_807_010) < 2.2


@pytest.mark.two_hosts
def test_a_host_whose_name_means_nothing_trains_all_the_same(start, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(start, folder)
    code = f"import train_parallel as w; exit(w.launch(w.__file__, {str(folder)!r})[0])"
    shell = f'hostname nowhere.invalid; cd "{ROOT}"; exec "{sys.executable}" -c "{code}"'
    unshared("unshare", "-Ur", "--uts", "sh", "-c", shell)
    assert (folder / "process1.json").exists()
