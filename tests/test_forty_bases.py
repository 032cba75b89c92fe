"""The counting behind notebook 3's figures, on paths written by hand."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))
from experiments.forty_bases import close_calls, forgotten_at, walk, with_replay
from lora_tasks import Digits

PATH = [(0, 40, 100), (5, 30, 110), (10, 32, 115), (15, 10, 160)]  # batch, on 9, on the others


@pytest.mark.parametrize(
    ("left", "forgotten"),
    [(40, 0), (50, 0), (35, 5), (30, 10), (21, 37.5), (10, 60)],
)
def test_forgotten_is_read_between_the_first_stop_that_leaves_so_few_and_the_one_before(
    left, forgotten
):
    assert forgotten_at(PATH, left) == pytest.approx(forgotten)


def test_nothing_is_read_where_a_path_never_comes():
    assert math.isnan(forgotten_at(PATH, 9))


def test_replay_adds_as_many_others_and_no_nine():
    labels = torch.arange(10).repeat(20)
    train = Digits(labels.float().view(-1, 1, 1), labels)
    new = Digits(torch.full((20, 1, 1), -1.0), torch.full((20,), 9))
    mixed = with_replay(new, train)
    assert mixed.images[:20].eq(-1).all() and mixed.labels[:20].eq(9).all()
    assert len(mixed.labels) == 40 and not mixed.labels[20:].eq(9).any()
    assert mixed.images[20:].flatten().equal(mixed.labels[20:].float())


class Scores(torch.nn.Module):
    """A model whose images are its logits, moved by a constant on 9 that can be trained."""

    def __init__(self):
        super().__init__()
        self.on_nine = torch.nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return torch.cat([images[:, 0, :9], images[:, 0, 9:] + self.on_nine], dim=1)


def digits_with_lead(lead, label):
    """Digits of one label, with these leads of 9's logit over all others."""
    images = torch.zeros(len(lead), 1, 10)
    images[:, 0, 9] = lead
    return Digits(images, torch.full((len(lead),), label))


def test_close_calls_are_the_digits_that_change_first():
    nines = digits_with_lead(torch.linspace(-3, 9, 601), 9)
    fives = digits_with_lead(torch.linspace(-9, 3, 2001), 5)
    both = Digits(*(torch.cat(part) for part in zip(nines, fives, strict=True)))
    close_nines, close_others = close_calls(Scores(), both)
    assert close_nines.labels.tolist() == [9] * 250
    assert close_others.labels.tolist() == [5] * 1500
    assert close_nines.images[:, 0, 9].max() < nines.images[250:, 0, 9].min()
    assert close_others.images[:, 0, 9].min() > fives.images[:501, 0, 9].max()


def test_a_walk_counts_at_each_stop_and_ends_where_enough_is_learnt():
    nines = digits_with_lead(torch.linspace(-1.05, -0.05, 11), 9)
    fives = digits_with_lead(torch.linspace(-2.05, -0.05, 21), 0)
    torch.manual_seed(0)
    path = walk(Scores(), nines, nines, fives, 0.1, range(2, 101, 2), enough=5)
    assert path[:, 0].tolist() == [2, 4, 6]  # Adam's steps are of nearly 0.1 here
    assert path[0, 1] > 5 and path[-1, 1] <= 5
    assert (path[1:, 2] >= path[:-1, 2]).all()
