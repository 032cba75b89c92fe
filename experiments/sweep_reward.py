"""How few numbers can a reward train? The trainings whose results notebook 10 shows.

python experiments/sweep_reward.py [MINUTES]   writes data/reward.json, goes on where it stopped

The reward: marked tokens (those with an "e") and others take turns. Every method trains with the
same leash BETA, on the same prompts under the same seed, for 60, 240 and 960 steps of 128 answers.
For each number of steps the seed CHOICE chooses each method's rate on validation prompts, by
reward − BETA · KL; it goes on by factors of two until the best rate has a worse one on both sides.
The seeds RESULT took no part in the choice and are measured on test prompts. Runs of 240 steps are
also tested at half and twice the chosen rate, so that methods can be compared at equal distance
from the base. A run that has lasted MINUTES stores what it has and ends.
"""

import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.utils import parametrize

sys.path.append(str(Path(__file__).resolve().parents[1]))
from experiments.stored import DATA, store  # noqa: E402
from lora_reward import (  # noqa: E402
    PROMPTS,
    SAMPLES,
    Reward,
    divergence,
    draw_prompts,
    measure_policy,
    reward_in_turn,
    reward_without,
    score_answers,
    tokens_with,
    train_policy,
    write_answers,
)
from lora_tasks import (  # noqa: E402
    ATTENTION,
    MLP,
    bits_per_byte,
    encode,
    load_language_model,
    load_text,
)
from lora_utils import add_lora, count_parameters  # noqa: E402

BOOK = "austen_prideandprejudice"
LENGTH, BETA = 2, 0.1
ALL_STEPS = (60, 240, 960)
STEPS = 240  # of the controls
CONTROL = "rank 4, shuffled"
CHOICE, RESULT = 0, (100, 101, 102, 103, 104)
OTHER_RATES = ("bias", "rank 1", "rank 4", "all weights")
WIDE = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

# --- What is trained: each function changes the model in place ----------------------------------


def bias(model) -> None:
    """One number for each token of the vocabulary, added to its score, whatever came before."""
    model.requires_grad_(False)
    model.lm_head.bias = nn.Parameter(torch.zeros(model.config.vocab_size))


class Shared(nn.Module):
    """TinyLoRA: W₀ ↦ W₀ + U·diag(S)·(v₁P₁ + v₂P₂ + …)·Vᵀ; U, S, V and the random P stay as drawn.

    U, S, V are the two largest singular directions of W₀; only v is trained.
    """

    def __init__(self, weight: torch.Tensor, v: nn.Parameter):
        super().__init__()
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        self.v = v
        self.register_buffer("left", U[:, :2] * S[:2])
        self.register_buffer("right", Vh[:2])
        self.register_buffer("P", torch.randn(len(v), 2, 2))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        mixed = torch.einsum("n,nij->ij", self.v, self.P)
        return weight + self.left @ mixed @ self.right


def thirteen(model) -> None:
    """Thirteen numbers, shared by all linear layers."""
    model.requires_grad_(False)
    v = nn.Parameter(torch.zeros(13))
    for name, layer in model.named_modules():
        if name.split(".")[-1] in ATTENTION + MLP:
            parametrize.register_parametrization(layer, "weight", Shared(layer.weight.detach(), v))


def lora(rank: int) -> Callable:
    """LoRA in all linear layers, α = r."""
    return lambda model: add_lora(model, rank, alpha=rank, targets=ATTENTION + MLP)


def everything(model) -> None:
    model.requires_grad_(True)


METHODS = {  # what is trained, and the rates to begin with
    "13 numbers": (thirteen, WIDE),
    "bias": (bias, (0.05, 0.1)),
    "rank 1": (lora(1), (0.01, 0.02)),
    "rank 4": (lora(4), (0.01, 0.02)),
    "all weights": (everything, (1e-3, 2e-3)),
    "rejection, rank 4": (lora(4), (0.01, 0.02)),
}


def shuffled(reward: Reward) -> Reward:
    """The control: the same rewards, but each goes to any answer of its prompt."""

    def reward_of_another(prompts, answers):
        rewards = reward(prompts, answers)
        return rewards.gather(1, torch.rand_like(rewards).argsort(dim=1))

    return reward_of_another


def train_on_kept(model, base, tokens, reward, length, steps, rate, seed) -> None:
    """Rejection sampling: the base writes all samples of a run; imitate those with a reward."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    kept = []
    for _ in range(steps):
        prompts = draw_prompts(tokens, PROMPTS, generator)
        answers = write_answers(base, prompts, SAMPLES, length)
        prompt, sample = reward(prompts, answers).nonzero(as_tuple=True)
        kept.append(torch.cat([prompts[prompt], answers[prompt, sample]], dim=1))
    kept = torch.cat(kept)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 20, 1 - step / steps)
        batch = kept[torch.randint(len(kept), (64,), generator=generator)]
        answers = batch[:, None, -length:]
        scores = score_answers(model, batch[:, :-length], answers)
        loss = -scores.gather(3, answers[..., None]).sum(dim=2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


@torch.no_grad()
def banned(base, marked, prompts, samples: int) -> tuple[float, float]:
    """No training: forbid at each place the tokens that break the turn. Return reward and KL."""
    text = prompts.repeat_interleave(samples, dim=0)
    kl = 0.0
    for _ in range(LENGTH):
        scores = base(text, use_cache=False, logits_to_keep=1).logits[:, -1].log_softmax(dim=1)
        allowed = marked[None] != marked[text[:, -1:]]
        rest = scores.masked_fill(~allowed, -torch.inf).log_softmax(dim=1)
        kl += divergence(rest.clamp(min=-1e4), scores).mean().item()
        text = torch.cat([text, torch.multinomial(rest.exp(), 1)], dim=1)
    answers = text[:, -LENGTH:].view(len(prompts), samples, LENGTH)
    return reward_in_turn(marked)(prompts, answers).mean().item(), kl


# --- The sweep -----------------------------------------------------------------------------------


def best_rate(tried: dict) -> float:
    """The rate with the most reward − BETA · KL, of those tried."""
    best = max(tried, key=lambda rate: tried[rate]["reward"] - BETA * tried[rate]["kl"])
    return float(best)


class Sweep:
    def __init__(self):
        path = DATA / "reward.json"
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.found = stored.get("results", {"base": {}, "choice": {}, "test": {}})
        self.earlier = stored.get("made", {}).get("seconds", 0)
        self.base, self.tokenizer = load_language_model("language_model", torch.device("cpu"))
        self.texts = load_text(BOOK)
        tokens = [encode(self.tokenizer, text, self.base.device) for text in self.texts]
        self.training = tokens[0]
        generator = torch.Generator().manual_seed(1)
        self.validation = draw_prompts(tokens[1], 64, generator)
        self.test = draw_prompts(tokens[2], 64, generator)
        self.marked = tokens_with("e", self.tokenizer, self.base.device)
        self.reward = reward_in_turn(self.marked)

    def train(self, method: str, rate: float, seed: int, steps: int, reward: Reward):
        model = copy.deepcopy(self.base)
        torch.manual_seed(seed)
        METHODS[method][0](model)
        if method.startswith("rejection"):
            train_on_kept(model, self.base, self.training, reward, LENGTH, steps, rate, seed)
        else:
            train_policy(
                model, self.training, reward, LENGTH, steps, rate, BETA, seed, base=self.base
            )
        return model

    def measure(self, model, prompts: torch.Tensor, samples: int, reward=None) -> dict:
        reward = reward or self.reward
        rewards, kl = measure_policy(model, prompts, reward, LENGTH, samples, 1, self.base)
        return {"reward": round(rewards.mean().item(), 4), "kl": round(kl.mean().item(), 4)}

    def austen(self, model) -> float:
        return round(bits_per_byte(model, self.tokenizer, self.texts[2][:30_000]), 4)

    def begin(self) -> None:
        """Measure the base, prompt by prompt, and decoding with a ban."""
        success, _ = measure_policy(self.base, self.test, self.reward, LENGTH, 512, 1, self.base)
        ban, kl = banned(self.base, self.marked, self.test, 64)
        rounded = [round(p, 4) for p in success.tolist()]
        self.found["base"] = {"success": rounded, "austen": self.austen(self.base)}
        self.found["ban"] = {"reward": ban, "kl": round(kl, 4)}
        self.found["numbers"] = {}
        for method, (change, _) in METHODS.items():
            model = copy.deepcopy(self.base)
            change(model)
            self.found["numbers"][method] = count_parameters(model).trainable

    def tried(self, steps: int, method: str) -> dict:
        """What was measured at each rate on validation prompts."""
        return self.found["choice"].setdefault(str(steps), {}).setdefault(method, {})

    def choose(self, steps: int, method: str, rate: float) -> None:
        model = self.train(method, rate, CHOICE, steps, self.reward)
        result = self.measure(model, self.validation, 64)
        self.tried(steps, method)[f"{rate:g}"] = result
        print(steps, method, rate, result, flush=True)

    def next_rates(self, steps: int, method: str) -> list[float]:
        """The rates that are missing: on by factors of two until the best lies inside."""
        tried = self.tried(steps, method)
        if missing := [rate for rate in METHODS[method][1] if f"{rate:g}" not in tried]:
            return missing
        if METHODS[method][1] == WIDE:
            return []
        best = best_rate(tried)
        return [rate for rate in (best / 2, best * 2) if f"{rate:g}" not in tried]

    def test_run(self, steps: int, name: str, rate: float, seed: int) -> None:
        """Train and measure one run that the notebook shows."""
        method = name.removesuffix(", shuffled")
        reward = shuffled(self.reward) if name == CONTROL else self.reward
        model = self.train(method, rate, seed, steps, reward)
        result = self.measure(model, self.test, 32) | {"austen": self.austen(model)}
        self.runs(steps, name, rate)[str(seed)] = result
        print(steps, name, rate, seed, result, flush=True)

    def runs(self, steps: int, name: str, rate: float) -> dict:
        """The tested runs of a method at a rate, one for each seed."""
        rates = self.found["test"].setdefault(str(steps), {}).setdefault(name, {})
        return rates.setdefault(f"{rate:g}", {})

    def test_letter(self) -> None:
        """Can 13 numbers learn at all? A reward that needs no context: no token is marked."""
        reward = reward_without(self.marked)
        choice, runs = {}, {}
        for rate in WIDE:
            model = self.train("13 numbers", rate, CHOICE, STEPS, reward)
            choice[f"{rate:g}"] = self.measure(model, self.validation, 64, reward)
        rate = best_rate(choice)
        for seed in RESULT:
            model = self.train("13 numbers", rate, seed, STEPS, reward)
            runs[str(seed)] = self.measure(model, self.test, 32, reward)
        base = self.measure(self.base, self.test, 512, reward)["reward"]
        self.found["letter"] = {"base": base, "choice": choice, "rate": rate, "runs": runs}
        print(self.found["letter"], flush=True)

    def jobs(self):
        """Yield what is still to do, one training after the other."""
        if not self.found["base"]:
            yield self.begin
        for steps in ALL_STEPS:
            tests = []
            for method in METHODS:
                while rates := self.next_rates(steps, method):
                    yield lambda s=steps, m=method, rate=rates[0]: self.choose(s, m, rate)
                rate = best_rate(self.tried(steps, method))
                rates = [rate]
                if steps == STEPS and method in OTHER_RATES:
                    rates += [rate / 2, rate * 2]
                tests += [(method, rate) for rate in rates]
                if steps == STEPS and CONTROL.startswith(method):
                    tests.append((CONTROL, rate))
            for name, rate in tests:
                for seed in RESULT:
                    if str(seed) not in self.runs(steps, name, rate):
                        yield lambda s=steps, n=name, r=rate, k=seed: self.test_run(s, n, r, k)
        if "letter" not in self.found:
            yield self.test_letter

    def write(self) -> None:
        facts = {
            "kl": "nats per answer on 64 prompts",
            "choice": "on validation prompts: steps, method, rate",
            "test": "on test prompts: steps, method, rate, seed",
            "settings": {"length": LENGTH, "beta": BETA},
        }
        store("reward.json", self.found, self.earlier + time.process_time(), **facts)


def main(minutes: float) -> None:
    torch.set_num_threads(1)  # sums in one order
    start = time.perf_counter()
    sweep = Sweep()
    for job in sweep.jobs():
        job()
        sweep.write()
        if time.perf_counter() - start > 60 * minutes:
            break


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1e9)
