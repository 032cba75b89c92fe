"""What is forgotten on the way to a new task, on forty bases; write data/forty_bases.json.

python experiments/forty_bases.py    about 25 CPU minutes; a run that finds the file goes on in it

Each base is a RichBoyNet of another seed, pretrained as in notebook 3. From it rank 1, rank 8 and
all weights walk: they train on nines until a quarter of the base's errors on 9 is left, and count
on the way. On the first ten bases rank 1 also learns turned nines, alone and with replay. The
learning rates were chosen beforehand, on another base and on validation digits; all counts of the
forty bases are of test digits. Notebook 3 and its deeper notebook use `walk` and `forgotten_at`.
"""

import json
import math
import os
import sys
import time
from copy import deepcopy
from pathlib import Path

if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # one thread: sums in one order

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "experiments")]
from make_richboynet import trained  # noqa: E402
from stored import store  # noqa: E402

from lora_tasks import (  # noqa: E402
    DATA,
    Digits,
    count_errors,
    load_mnist,
    rotate,
    subset,
    train_classifier,
)
from lora_utils import add_lora  # noqa: E402

RESULT = "forty_bases.json"
CHOICE_SEEDS = (101,)  # the base that chooses the rates is none of the forty
SEEDS = tuple(range(1, 41))
REPLAY_SEEDS = SEEDS[:10]
TARGETS = ["fc1", "fc2", "fc3"]
RANKS = {"rank 1": 1, "rank 8": 8, "all weights": None}
# method: {learning rate: batches between two stops}, so that a walk takes ten stops or more.
WALKS = {
    "rank 1": {0.00025: 8, 0.0005: 4, 0.001: 2, 0.002: 1},
    "rank 8": {0.0001: 8, 0.0002: 4, 0.0004: 2, 0.0008: 1},
    "all weights": {0.00001: 5, 0.00002: 2, 0.00004: 1},
}
REPLAYS = (0.001, 0.002, 0.004)  # learning rates
REPLAY_STOPS = (5, 10, 15, 20, 30, 40, 60, 80, 100)
ALONE = {0.0005: 10, 0.001: 5, 0.002: 3, 0.004: 2}  # as WALKS; at most 100 batches, too
TURNED = {"rank 4": (0.004, 0.008, 0.016), "all weights": (0.00125, 0.0025, 0.005)}


def walk(
    model: nn.Module,
    digits: Digits,
    new: Digits,
    others: Digits,
    rate: float,
    stops: range | tuple[int, ...],
    enough: float = 0,
) -> np.ndarray:
    """Train at a constant rate, 64 digits a batch; count errors at each stop.

    Returns one row per stop: batches so far, errors on the new digits, errors on the others. The
    walk ends at the last stop, or where no more than `enough` errors on the new digits are left.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=rate, fused=True)
    path = []
    for batch in range(1, stops[-1] + 1):
        chosen = torch.randint(len(digits.labels), (64,), device=digits.labels.device)
        loss = F.cross_entropy(model(digits.images[chosen]), digits.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if batch in stops:
            path.append((batch, count_errors(model, new), count_errors(model, others)))
            if path[-1][1] <= enough:
                break
    return np.array(path)


def forgotten_at(path: np.ndarray | list, left: float) -> float:
    """Return the others forgotten where this many errors on the new digits are left.

    The path is that of `walk`, with the base's own row (0, errors, errors) first. Forgotten is
    the rise since that row, read on the straight line between two stops; NaN where the path never
    comes so far.
    """
    _, errors, others = np.asarray(path).T
    if left >= errors[0]:
        return 0.0
    if left < errors.min():
        return float("nan")
    stop = int(np.argmax(errors <= left))  # the first that leaves no more
    part = (errors[stop - 1] - left) / (errors[stop - 1] - errors[stop])
    return float(others[stop - 1] + part * (others[stop] - others[stop - 1]) - others[0])


def with_replay(new: Digits, train: Digits) -> Digits:
    """Return the new digits and as many old ones that are no nines, drawn at random."""
    others = (train.labels != 9).nonzero().flatten()
    order = torch.randperm(len(others), device=others.device)
    old = subset(train, others[order[: len(new.labels)]])
    images, labels = zip(new, old, strict=True)
    return Digits(torch.cat(images), torch.cat(labels))


@torch.no_grad()
def close_calls(model: nn.Module, digits: Digits) -> tuple[Digits, Digits]:
    """Return the 250 nines that come first to be no 9, and the 1,500 others that come first to be.

    A walk to nines changes the answer to hardly any other digit, so it need not count them.
    """
    logits = model(digits.images)
    lead = logits[:, 9] - logits[:, :9].max(dim=1).values  # 9 over the best other digit
    is_nine = digits.labels == 9
    nines = lead.masked_fill(~is_nine, torch.inf).argsort()[:250]
    others = lead.masked_fill(is_nine, -torch.inf).argsort(descending=True)[:1500]
    return subset(digits, nines), subset(digits, others)


class Base:
    """A pretrained network, and what is counted on the way from it."""

    def __init__(self, seed: int, counted: Digits, train: Digits):
        self.seed, self.model, self.train = seed, trained(train.labels.device, seed), train
        self.nines = subset(train, train.labels == 9)
        self.new, self.others = close_calls(self.model, counted)
        # What turned nines spoil is no close call: count on all of them, and on every third other.
        self.turned = rotate(subset(counted, counted.labels == 9))
        self.third = subset(counted, (counted.labels != 9).nonzero().flatten()[::3])

    def fresh(self, rank: int | None) -> nn.Module:
        """Return a copy, with LoRA of a rank if one is given; then the same batches for all."""
        torch.manual_seed(self.seed)
        model = deepcopy(self.model)
        if rank:
            add_lora(model, rank, alpha=rank, targets=TARGETS)
        torch.manual_seed(self.seed)
        return model

    def row(self, new: Digits, others: Digits) -> np.ndarray:
        """Return the base's own row, the first of a path."""
        return np.array([(0, count_errors(self.model, new), count_errors(self.model, others))])

    def to_nines(self, rates: dict[str, float]) -> dict[str, np.ndarray]:
        """Return a path for each method, until a quarter of the errors on 9 is left."""
        first, paths = self.row(self.new, self.others), {}
        for name, rate in rates.items():
            every = WALKS[name][rate]
            stops = range(every, 25 * every, every)
            model, enough = self.fresh(RANKS[name]), first[0, 1] / 4
            path = walk(model, self.nines, self.new, self.others, rate, stops, enough)
            paths[name] = np.concatenate([first, path])
        return paths

    def with_replay(self, rate: float) -> np.ndarray:
        """Return rank 1's path to turned nines, with old digits in half of each batch."""
        model = self.fresh(1)
        mixed = with_replay(rotate(self.nines), self.train)
        path = walk(model, mixed, self.turned, self.third, rate, REPLAY_STOPS)
        return np.concatenate([self.row(self.turned, self.third), path])

    def alone(self, rate: float, enough: int) -> np.ndarray:
        """Return rank 1's path on turned nines alone, until so few are misread."""
        stops = range(ALONE[rate], 101, ALONE[rate])
        model, nines = self.fresh(1), rotate(self.nines)
        path = walk(model, nines, self.turned, self.third, rate, stops, enough)
        return np.concatenate([self.row(self.turned, self.third), path])

    def constants(self) -> list[tuple[int, int]]:
        """Return (errors on 9, errors on the others) with c = 0, 0.1 … 8 added to 9's logit."""
        points = []
        with torch.no_grad():
            logits = [self.model(digits.images) for digits in (self.new, self.others)]
            for tenth in range(81):
                nine = F.one_hot(torch.tensor(9, device=logits[0].device), 10) * tenth / 10
                on_nine = ((logits[0] + nine).argmax(dim=1) != 9).sum().item()
                on_others = ((logits[1] + nine).argmax(dim=1) != self.others.labels).sum().item()
                points.append((on_nine, on_others))
        return points

    def to_turned_digits(self, counted: Digits, name: str, rate: float) -> int:
        """Return the errors on turned digits after 100 batches of 64, as in notebook 3."""
        torch.manual_seed(self.seed)
        model = deepcopy(self.model)
        if name == "rank 4":
            add_lora(model, rank=4, alpha=8, targets=TARGETS)
        torch.manual_seed(self.seed)
        train_classifier(model, rotate(self.train), batches=100, batch_size=64, lr=rate)
        return count_errors(model, rotate(counted))


def try_rates(seed: int, train: Digits, validation: Digits) -> dict:
    """Return what each rate comes to on validation digits, from one base."""
    base = Base(seed, validation, train)
    nines = {name: {} for name in WALKS}
    for name, grid in WALKS.items():
        for rate in grid:
            path = base.to_nines({name: rate})[name]
            nines[name][rate] = forgotten_if_reached(path, path[0, 1] / 4)
    replay = {}
    for rate in REPLAYS:
        path = base.with_replay(rate)
        replay[rate] = {"misread": int(path[-1, 1]), "forgotten": int(path[-1, 2] - path[0, 2])}
    goal = min(replay.values(), key=lambda end: sum(end.values()))["misread"]
    alone = {rate: forgotten_if_reached(base.alone(rate, goal), goal) for rate in ALONE}
    turned = {
        name: {rate: base.to_turned_digits(validation, name, rate) for rate in grid}
        for name, grid in TURNED.items()
    }
    found = {"nines": nines, "replay": replay, "alone": alone, "turned digits": turned}
    return {"seed": seed} | found


def forgotten_if_reached(path: np.ndarray, left: float) -> int | None:
    """Return the others forgotten where so many errors are left, or None: it never came there."""
    forgotten = forgotten_at(path, left)
    return None if math.isnan(forgotten) else round(forgotten)


def chosen(choices: list[dict]) -> dict:
    """Return the best rates: fewest forgotten, with replay fewest errors of both kinds."""

    def best(grid, *names):
        costs = dict.fromkeys(grid, 0)
        for found in choices:
            for name in names:
                found = found[name]
            for rate in grid:
                cost = found[str(rate)]
                costs[rate] += sum(cost.values()) if isinstance(cost, dict) else cost or 10_000
        return min(costs, key=costs.get)

    return {
        "nines": {name: best(grid, "nines", name) for name, grid in WALKS.items()},
        "replay": best(REPLAYS, "replay"),
        "alone": best(ALONE, "alone"),
        "turned digits": {name: best(grid, "turned digits", name) for name, grid in TURNED.items()},
    }


def explore(seed: int, rates: dict, train: Digits, test: Digits) -> dict:
    """Return all paths from one base, counted on test digits."""
    base = Base(seed, test, train)
    result = {"seed": seed, "nines": base.to_nines(rates["nines"]), "constant": base.constants()}
    if seed in REPLAY_SEEDS:
        replay = base.with_replay(rates["replay"])
        alone = base.alone(rates["alone"], replay[-1, 1])
        equal_rate = base.alone(rates["replay"], replay[-1, 1])
        paths = {"replay": replay, "alone": alone, "alone at replay's rate": equal_rate}
        result["turned nines"] = paths
    return result


def main() -> None:
    """Choose the rates, then explore base after base; store after each."""
    file = DATA / RESULT
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    results = before.get("results", {"validation": [], "rates": {}, "bases": []})
    earlier = before.get("made", {}).get("seconds", 0)
    train, validation, test = load_mnist(torch.device("cpu"))

    def keep(kind: str, found: dict) -> None:
        results[kind].append(json.loads(json.dumps(found, default=np.ndarray.tolist)))
        store(RESULT, results, earlier + time.process_time())
        print(kind, results[kind][-1], flush=True)

    for seed in CHOICE_SEEDS[len(results["validation"]) :]:
        keep("validation", try_rates(seed, train, validation))
    results["rates"] = chosen(results["validation"])
    for seed in SEEDS[len(results["bases"]) :]:
        keep("bases", explore(seed, results["rates"], train, test))


if __name__ == "__main__":
    main()
