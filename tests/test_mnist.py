"""MNIST, RichBoyNet, training and counting errors. No test touches the network."""

import copy
import functools
import gzip
import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from filelock import FileLock

import lora_utils
from lora_utils import (
    Digits,
    RichBoyNet,
    add_lora,
    errors_per_digit,
    load_mnist,
    lora_layers,
    train_classifier,
)

CPU = torch.device("cpu")
ROOT = Path(lora_utils.__file__).parent
RAW = ROOT / "data" / "MNIST" / "raw"
TRAIN_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
NAMES = [
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Let torchvision look for MNIST in a folder that does not exist."""
    nowhere = (tmp_path / "nowhere").as_uri() + "/"
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [nowhere])


class Archives(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(offline, monkeypatch):
    """Let torchvision download MNIST from this machine: the archives in the repository."""
    handler = functools.partial(Archives, directory=RAW)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
        yield
        server.shutdown()


@pytest.fixture
def raw(monkeypatch, tmp_path):
    """A copy of the four archives that a test may damage, in place of `data/`."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in NAMES:
        shutil.copy(RAW / f"{name}.gz", raw)
    monkeypatch.setattr(lora_utils, "DATA", tmp_path / "data")
    yield raw
    shutil.rmtree(tmp_path / "data", ignore_errors=True)


@pytest.fixture(scope="module")
def mnist():
    return load_mnist(CPU)


@pytest.fixture
def unpacked(raw, mnist):
    """The copy with its archives unpacked."""
    for name in NAMES:
        shutil.copy(RAW / name, raw)
    return raw


def is_mnist(digits):
    train, test = digits
    return (
        np.bincount(train.labels).tolist() == TRAIN_COUNTS
        and np.bincount(test.labels).tolist() == TEST_COUNTS
    )


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# --- The data --------------------------------------------------------------------------


def test_digits_have_the_known_shapes_and_counts(mnist):
    for digits, counts in zip(mnist, (TRAIN_COUNTS, TEST_COUNTS), strict=True):
        assert digits.images.shape == (sum(counts), 28, 28)
        assert digits.labels.shape == (sum(counts),)
        assert digits.images.dtype == torch.float32 and digits.labels.dtype == torch.int64
        assert np.bincount(digits.labels).tolist() == counts


def test_images_are_standardised_by_the_statistics_of_the_training_set(mnist):
    train, test = mnist
    assert abs(train.images.mean().item()) < 1e-3
    assert abs(train.images.std().item() - 1) < 1e-3
    for digits in mnist:
        assert digits.images.min().item() == pytest.approx((0 - 0.1307) / 0.3081)
        assert digits.images.max().item() == pytest.approx((1 - 0.1307) / 0.3081)


def test_digits_are_those_of_the_original_files(mnist):
    for digits, part in zip(mnist, ("train", "t10k"), strict=True):
        labels = gzip.decompress((RAW / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
        pixels = gzip.decompress((RAW / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
        assert digits.labels.tolist() == list(labels)
        pixels = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28)[::500]
        expected = (pixels / 255 - 0.1307) / 0.3081
        np.testing.assert_allclose(digits.images[::500], expected, rtol=1e-5, atol=1e-6)


def test_digits_go_to_the_device():
    train, test = load_mnist(torch.device("meta"))
    assert all(tensor.is_meta for tensor in (*train, *test))


# --- Damaged files ---------------------------------------------------------------------


def test_archives_are_unpacked_beside_themselves(raw):
    assert is_mnist(load_mnist(CPU))
    assert {path.name for path in raw.iterdir()} == {*NAMES, *(f"{name}.gz" for name in NAMES)}


DAMAGES = list(zip(NAMES, ["cut", "flipped", "empty", "missing"], strict=True))


@pytest.mark.parametrize(("name", "damage"), [*DAMAGES, (NAMES[0], "flipped"), (NAMES[3], "cut")])
def test_a_damaged_archive_is_an_error_when_offline(raw, name, damage):
    archive = raw / f"{name}.gz"
    spoil(archive, damage)
    for _ in range(2):  # not the second time either
        with pytest.raises(RuntimeError, match=f"MNIST cannot be read: delete .* in {raw}"):
            load_mnist(CPU)


def spoil(archive, damage):
    content = archive.read_bytes()
    if damage == "cut":
        archive.write_bytes(content[: len(content) * 9 // 10])
    elif damage == "flipped":
        flip_bit(archive, len(content) // 2)
    elif damage == "empty":
        archive.write_bytes(b"")
    else:
        archive.unlink()


def test_damaged_archives_are_downloaded_anew(raw, mirror):
    for name, damage in DAMAGES:
        spoil(raw / f"{name}.gz", damage)
    assert is_mnist(load_mnist(CPU))
    for name in NAMES:
        assert (raw / f"{name}.gz").read_bytes() == (RAW / f"{name}.gz").read_bytes()


def test_a_missing_folder_is_downloaded(raw, mirror):
    shutil.rmtree(lora_utils.DATA)
    assert is_mnist(load_mnist(CPU))


def test_a_missing_folder_is_an_error_when_offline(raw):
    shutil.rmtree(lora_utils.DATA)
    with pytest.raises(RuntimeError, match="MNIST cannot be read"):
        load_mnist(CPU)


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3]])
def test_a_cut_unpacked_file_is_an_error(unpacked, name):
    for length in ((unpacked / name).stat().st_size - 1, 5000, 10, 3, 0):
        os.truncate(unpacked / name, length)
        with pytest.raises(RuntimeError, match=f"MNIST cannot be read: delete .* in {unpacked}"):
            load_mnist(CPU)


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_in_an_unpacked_file_is_an_error(unpacked, name):
    flip_bit(unpacked / name, 5000)
    part = "train" if "train" in name else "test"
    with pytest.raises(RuntimeError, match=f"MNIST's {part} files are damaged: delete"):
        load_mnist(CPU)


def test_swapped_labels_are_an_error(unpacked):
    path = unpacked / "train-labels-idx1-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:8] + content[:7:-1])
    with pytest.raises(RuntimeError, match="MNIST's train files are damaged"):
        load_mnist(CPU)


def test_the_advice_in_the_error_helps(unpacked):
    flip_bit(unpacked / NAMES[0], 5000)
    with pytest.raises(RuntimeError, match="delete the files without .gz"):
        load_mnist(CPU)
    for name in NAMES:
        (unpacked / name).unlink()
    assert is_mnist(load_mnist(CPU))


@pytest.mark.parametrize("finished", [0, 2, 3])
def test_interrupted_unpacking_is_taken_up_again(raw, mnist, finished):
    for name in NAMES[: finished + 1]:
        shutil.copy(RAW / name, raw)
    os.truncate(raw / NAMES[finished], 5000)
    if finished == 3:  # all four files are there, the last one is cut
        with pytest.raises(RuntimeError, match="MNIST cannot be read: delete"):
            load_mnist(CPU)
    else:
        assert is_mnist(load_mnist(CPU))


def test_loading_waits_while_another_process_unpacks(raw):
    digits = []
    loading = threading.Thread(target=lambda: digits.append(load_mnist(CPU)))
    with FileLock(lora_utils.DATA / "MNIST.lock"):
        loading.start()
        time.sleep(0.3)
        assert not (raw / NAMES[0]).exists()
    loading.join(timeout=60)
    assert is_mnist(digits[0])


TWO_LOADS = """
import os, sys, time
from pathlib import Path
import torch, torchvision
import lora_utils

lora_utils.DATA = Path(sys.argv[1])
torchvision.datasets.MNIST.mirrors = ["file:///nowhere/"]
torch.set_num_threads(1)
pids = []
for delay in (0, 0.2):
    if (pid := os.fork()) == 0:
        time.sleep(delay)
        lora_utils.load_mnist(torch.device("cpu"))
        os._exit(0)
    pids.append(pid)
assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_may_load_at_once(raw):
    command = [sys.executable, "-c", TWO_LOADS, str(lora_utils.DATA)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    assert sorted(path.name for path in raw.glob("*-ubyte")) == sorted(NAMES)


# --- The network -----------------------------------------------------------------------


def test_richboynet_computes_what_numpy_computes():
    model, images = RichBoyNet(), torch.randn(4, 28, 28)
    w1, b1, w2, b2, w3, b3 = (p.detach().double().numpy() for p in model.parameters())
    assert [w.shape for w in (w1, w2, w3)] == [(1000, 784), (2000, 1000), (10, 2000)]
    hidden = np.maximum(images.double().numpy().reshape(4, 784) @ w1.T + b1, 0)
    logits = np.maximum(hidden @ w2.T + b2, 0) @ w3.T + b3
    assert model(images).shape == (4, 10)
    np.testing.assert_allclose(model(images).detach(), logits, rtol=1e-4, atol=1e-5)


# --- Training --------------------------------------------------------------------------


def tiny_digits(count=25):
    """Images of 2 × 3 pixels that begin with their own number, and random labels."""
    images = torch.randn(count, 2, 3)
    images[:, 0, 0] = torch.arange(count) / count
    return Digits(images, torch.randint(10, (count,)))


def tiny_net():
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 10))


def watch(model, count=25):
    """Return a list that will hold the examples of each batch that the model sees."""
    seen = []
    model.register_forward_pre_hook(
        lambda _, inputs: seen.append((inputs[0][:, 0, 0] * count).round().long().tolist())
    )
    return seen


@pytest.mark.parametrize(("batches", "size"), [(10, 5), (7, 4), (3, 25), (1, 60), (25, 1)])
def test_every_example_is_drawn_once_before_any_is_drawn_again(batches, size):
    model, data = tiny_net(), tiny_digits()
    seen = watch(model)
    losses = train_classifier(model, data, batches, size)
    assert [len(batch) for batch in seen] == [size] * batches
    assert len(losses) == batches
    drawn = [example for batch in seen for example in batch]
    epochs = [drawn[start : start + 25] for start in range(0, len(drawn), 25)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch)
        assert epoch != sorted(epoch) or len(epoch) < 10
    assert len(epochs) < 2 or epochs[0] != epochs[1]


def test_the_order_depends_on_the_seed_alone():
    orders = []
    for seed in (1, 1, 2):
        model, data = tiny_net(), tiny_digits()
        seen = watch(model)
        torch.manual_seed(seed)
        train_classifier(model, data, 5, 5)
        orders.append(seen)
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("lr", [None, 0.02])
def test_training_equals_a_loop_written_by_hand(lr):
    model, data = tiny_net(), tiny_digits()
    twin = copy.deepcopy(model)
    seen = watch(model)
    losses = train_classifier(model, data, 12, 5, **({"lr": lr} if lr else {}))
    optimizer = torch.optim.Adam(twin.parameters())
    expected = []
    for step, batch in enumerate(seen):
        optimizer.param_groups[0]["lr"] = (lr or 1e-3) * (12 - step) / 12
        optimizer.zero_grad()
        loss = F.cross_entropy(twin(data.images[batch]), data.labels[batch])
        expected.append(loss.item())
        loss.backward()
        optimizer.step()
    assert all(isinstance(loss, float) for loss in losses)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_training_lowers_the_loss():
    losses = train_classifier(tiny_net(), tiny_digits(), 200, 25, lr=0.01)
    assert losses[-1] < losses[0] / 3


def test_training_leaves_frozen_parameters_bit_identical(adapt):
    model = adapt(tiny_net(), 2, 4, ["1"])
    before = copy.deepcopy(model.state_dict())
    train_classifier(model, tiny_digits(), 20, 5, lr=0.1)
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert len(changed) == 2 and all("lora_" in name for name in changed)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert len(lora_layers(model)) == 1


def test_training_leaves_the_data_alone():
    data = tiny_digits()
    images, labels = data.images.clone(), data.labels.clone()
    train_classifier(tiny_net(), data, 10, 5)
    assert torch.equal(data.images, images) and torch.equal(data.labels, labels)


def test_lora_learns_where_only_its_factors_are_trained():
    model = tiny_net()
    add_lora(model, 4, 8, ["1", "3"])
    losses = train_classifier(model, tiny_digits(), 200, 25, lr=0.02)
    assert losses[-1] < losses[0] / 2


# --- Counting errors -------------------------------------------------------------------


def test_errors_are_counted_by_the_true_digit():
    model, data = tiny_net(), tiny_digits(500)
    answers = model(data.images).detach().numpy().argmax(1)
    labels = data.labels.numpy()
    expected = [int(((labels == digit) & (answers != digit)).sum()) for digit in range(10)]
    errors = errors_per_digit(model, data)
    assert errors.tolist() == expected
    assert errors.dtype == torch.int64 and errors.shape == (10,) and errors.device == CPU
    assert 0 < errors.sum() < 500


def test_errors_have_ten_entries_even_where_digits_are_missing():
    class AlwaysThree(nn.Module):
        def forward(self, images):
            return F.one_hot(torch.full((len(images),), 3), 10).float()

    data = Digits(torch.zeros(4, 2, 3), torch.tensor([3, 1, 1, 0]))
    assert errors_per_digit(AlwaysThree(), data).tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 0]
    nines = Digits(torch.zeros(2, 2, 3), torch.tensor([3, 3]))
    assert errors_per_digit(AlwaysThree(), nines).tolist() == [0] * 10


def test_counting_errors_records_no_gradients():
    model, modes = tiny_net(), []
    model.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    errors_per_digit(model, tiny_digits())
    assert modes == [False] and torch.is_grad_enabled()
