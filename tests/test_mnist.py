"""MNIST, RichBoyNet, training and counting errors. No test touches the network."""

import copy
import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import lora_show
import lora_tasks
import lora_utils as lora
from experiments import make_richboynet

CPU = torch.device("cpu")
ROOT = Path(lora_tasks.__file__).parent
RAW = ROOT / "data" / "MNIST" / "raw"


def test_importing_the_tasks_imports_nothing_heavy():
    heavy = "{'torchvision', 'matplotlib', 'IPython', 'transformers', 'peft', 'bitsandbytes'}"
    code = f"import sys, lora_tasks; print({heavy} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "set()\n", ran


# --- The data --------------------------------------------------------------------------


def test_digits_are_those_of_the_archives():
    train, validation, test = lora_tasks.load_mnist(CPU)
    assert [len(d.labels) for d in (train, validation, test)] == [50_000, 10_000, 10_000]
    known = lora_tasks.Digits(*map(torch.cat, zip(train, validation, strict=True)))
    for digits, part in ((known, "train"), (test, "t10k")):
        labels = gzip.decompress((RAW / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
        pixels = gzip.decompress((RAW / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
        assert digits.labels.tolist() == list(labels)
        pixels = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28)[::50]
        expected = (pixels / 255 - lora_tasks.MEAN) / lora_tasks.STD
        np.testing.assert_allclose(digits.images[::50], expected, rtol=1e-5, atol=1e-6)
    assert abs(known.images.mean()) < 1e-3 and abs(known.images.std() - 1) < 1e-3
    assert all(
        tensor.is_meta for part in lora_tasks.load_mnist(torch.device("meta")) for tensor in part
    )


@pytest.fixture
def data(monkeypatch, tmp_path):
    """A copy of the four archives, where a download finds nothing."""
    import torchvision  # a second

    shutil.copytree(RAW, tmp_path / "MNIST" / "raw", ignore=shutil.ignore_patterns("*-ubyte"))
    monkeypatch.setattr(lora_tasks, "DATA", tmp_path)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [(tmp_path / "none").as_uri() + "/"])
    return tmp_path


def test_loading_writes_nothing_beside_the_archives(data):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    (data / "MNIST" / "raw").chmod(0o555)  # a read-only checkout
    assert len(lora_tasks.load_mnist(CPU)) == 3
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_archive_that_cannot_be_had_is_an_error_that_names_it(data, damage):
    archive = data / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    os.truncate(archive, 5000) if damage == "cut" else archive.unlink()
    with pytest.raises(RuntimeError, match="train-images-idx3-ubyte"):
        lora_tasks.load_mnist(CPU)


def test_subsets_and_quarter_turns():
    images = torch.tensor([[[1.0, 2, 3], [4, 5, 6]], [[7, 8, 9], [0, 1, 2]]])
    data = lora_tasks.Digits(images, torch.tensor([3, 9]))
    turned = lora_tasks.rotate(data)  # clockwise: the left column becomes the top row
    assert turned.images.tolist() == [[[4, 1], [5, 2], [6, 3]], [[0, 7], [1, 8], [2, 9]]]
    assert turned.labels.tolist() == [3, 9]
    for chosen in (slice(1, 2), data.labels == 9, torch.tensor([1])):
        assert lora_show.same_tensors(
            lora_tasks.subset(data, chosen)._asdict(),
            {"images": images[1:], "labels": data.labels[1:]},
        )


# --- The network and its training ------------------------------------------------------


def test_richboynet_computes_what_numpy_computes():
    model, images = lora_tasks.RichBoyNet(), torch.randn(4, 28, 28)
    w1, b1, w2, b2, w3, b3 = (p.detach().double().numpy() for p in model.parameters())
    assert [w.shape for w in (w1, w2, w3)] == [(1000, 784), (2000, 1000), (10, 2000)]
    hidden = np.maximum(images.double().numpy().reshape(4, 784) @ w1.T + b1, 0)
    logits = np.maximum(hidden @ w2.T + b2, 0) @ w3.T + b3
    np.testing.assert_allclose(model(images).detach(), logits, rtol=1e-4, atol=1e-5)


def tiny_digits(count=25):
    """Images of 2 × 3 pixels that begin with their own number, and random labels."""
    images = torch.randn(count, 2, 3)
    images[:, 0, 0] = torch.arange(count) / count
    return lora_tasks.Digits(images, torch.randint(10, (count,)))


def tiny_net():
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 10))


def watch(model, note):
    """Return a list that will hold a note of each batch that the model sees."""
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(note(inputs[0])))
    return seen


def which(images):
    return (images[:, 0, 0] * 25).round().long().tolist()


@pytest.mark.parametrize(("batches", "size"), [(10, 5), (7, 4), (1, 60), (25, 1)])
def test_every_example_is_drawn_once_before_any_is_drawn_again(batches, size):
    seen = watch(model := tiny_net(), which)
    lora_tasks.train_classifier(model, tiny_digits(), batches, size)
    assert [len(batch) for batch in seen] == [size] * batches
    drawn = [example for batch in seen for example in batch]
    epochs = [drawn[start : start + 25] for start in range(0, len(drawn), 25)]
    assert all(len(set(epoch)) == len(epoch) and epoch != sorted(epoch) for epoch in epochs)
    assert len(epochs) < 2 or epochs[0] != epochs[1]


@pytest.mark.parametrize("lr", [None, 0.02])
def test_training_equals_a_loop_written_by_hand(lr):
    model, data = tiny_net(), tiny_digits()
    twin, before = copy.deepcopy(model), data.images.clone()
    seen = watch(model, which)
    losses = lora_tasks.train_classifier(model, data, 12, 5, **({"lr": lr} if lr else {}))
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
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert torch.equal(data.images, before)


def test_lora_learns_and_leaves_frozen_parameters_bit_identical(adapt):
    adapt(model := tiny_net(), 4, 8, ["1", "3"])
    before = copy.deepcopy(model.state_dict())
    losses = lora_tasks.train_classifier(model, tiny_digits(), 200, 25, lr=0.02)
    assert losses[-1] < losses[0] / 2
    changed = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert len(changed) == 4 and all("lora_" in name for name in changed)


@pytest.mark.parametrize("sizes", [(0, 5, 6), (25, 0, 6), (25, 5, 0)])
def test_training_on_nothing_is_refused(refused, sizes):
    with refused(model := tiny_net(), *sizes):
        lora_tasks.train_classifier(model, tiny_digits(sizes[0]), *sizes[1:])


@pytest.mark.parametrize(("steps", "trained"), [(0, True), (5, False)])
def test_training_without_steps_or_weights_is_refused(refused, steps, trained):
    model = tiny_net().requires_grad_(trained)
    with refused(model, "4 trainable" if trained else "0 trainable", steps):
        lora_tasks.train(model, lambda step: model(torch.ones(1, 6)).sum(), steps, lr=0.1)


def test_a_model_trains_in_training_mode_and_answers_in_evaluation_mode():
    model, data = tiny_net(), tiny_digits()
    seen = watch(model, lambda _: ({m.training for m in model.modules()}, torch.is_grad_enabled()))
    lora_tasks.train_classifier(model, data, 1, 5)
    assert seen.pop() == ({True}, True) and not model.training
    lora_tasks.errors_per_digit(model.train(), data)
    assert seen.pop() == ({False}, False)


@pytest.mark.parametrize("adapted", [True, False])
def test_a_frozen_batch_norm_keeps_its_statistics_and_a_trained_one_does_not(adapted):
    """Else the base without LoRA would not be the base, and an adapter file not the model."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
    images = torch.randn(8, 2, 3)
    before = model.eval()(images)
    if adapted:
        lora.add_lora(model, 2, 4, ["1"])
    lora_tasks.train_classifier(model, tiny_digits(), 20, 25, lr=0.02)
    assert (model[2].num_batches_tracked == 0) == adapted
    if adapted:
        with lora.lora_disabled(model):
            assert torch.equal(model(images), before)


def test_what_is_kept_for_the_backward_pass_is_counted_once_and_without_the_model():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 10))
    x = torch.randn(4, 6)
    with lora_tasks.kept_for_backward(model) as kept:
        model(x).square().sum()
    assert [tuple(tensor.shape) for tensor in kept] == [(4, 6), (4, 16), (4, 10)]
    assert lora_tasks.byte_count(kept) == 4 * 4 * (6 + 16 + 10)
    assert lora_tasks.byte_count([x[:1], torch.ones(3, dtype=torch.float64)]) == 4 * 24 + 8 * 3


def test_the_peak_is_the_model_and_what_lives_at_once():
    model = nn.Linear(10, 10, bias=False)

    def run():
        first = torch.ones(1000)
        second = first + 1  # both live
        del first
        third = second[:500]  # a view, no bytes
        return torch.ones(100) + third.sum()  # second, and two of a hundred

    assert lora_tasks.peak_bytes(model, run) == 4 * (100 + 2000)
    assert lora_tasks.peak_bytes(model, lambda: model(torch.ones(5, 10))) == 4 * (100 + 50 + 50)


def test_errors_are_counted_by_the_true_digit():
    model, data = tiny_net(), lora_tasks.subset(digits := tiny_digits(500), digits.labels < 9)
    answers = model(data.images).detach().numpy().argmax(1)
    labels = data.labels.numpy()
    expected = [int(((labels == digit) & (answers != digit)).sum()) for digit in range(10)]
    errors = lora_tasks.errors_per_digit(model, data)
    assert errors.tolist() == expected and not errors.is_floating_point()
    assert lora_tasks.count_errors(model, data) == sum(expected)
    assert 0 < sum(expected) < len(labels) and expected[9] == 0


def test_the_base_in_data_answers_as_the_one_that_its_script_trains():
    *_, test = lora_tasks.load_mnist(CPU)
    stored, trained = lora_tasks.pretrained_richboynet(CPU), make_richboynet.trained(CPU)
    with torch.no_grad():  # on another processor the sums round differently, all the way
        same = stored(test.images).argmax(dim=1) == trained(test.images).argmax(dim=1)
    assert same.float().mean() > 0.995  # two seeds: 0.987
    assert lora_tasks.pretrained_richboynet(torch.device("meta")).fc1.weight.is_meta
