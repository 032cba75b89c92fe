"""Reinforcement learning with a reward that code can check (notebook 10).

A model answers prompts, a program gives each answer a reward, and the model learns to get more.
For each prompt it writes a group of answers, its samples. Shapes:

    prompts   prompts × tokens                            numbers of tokens
    answers   prompts × samples × tokens                  likewise
    rewards   prompts × samples                           0 or 1
    scores    prompts × samples × tokens × vocabulary     log-probabilities of all possible tokens
"""

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from lora_utils import lora_disabled

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Reward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (prompts, answers) -> rewards

PROMPTS, SAMPLES = 8, 16  # of a step
PROMPT_TOKENS = 16

# --- Rewards: programs that check an answer ------------------------------------------------------


def tokens_with(letter: str, tokenizer: "PreTrainedTokenizerBase", device) -> torch.Tensor:
    """Say for each token of the vocabulary whether its text holds the letter."""
    texts = [tokenizer.decode([number]) for number in range(len(tokenizer))]
    return torch.tensor([letter in text.lower() for text in texts], device=device)


def reward_without(marked: torch.Tensor) -> Reward:
    """Return a reward: 1 if no token of the answer is marked."""

    def reward(prompts: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        return (~marked[answers]).all(dim=2).float()

    return reward


def reward_in_turn(marked: torch.Tensor) -> Reward:
    """Return a reward: 1 if marked tokens and others take turns, the prompt's last included."""

    def reward(prompts: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        last = prompts[:, None, -1:].expand(-1, answers.shape[1], -1)
        text = marked[torch.cat([last, answers], dim=2)]
        return (text[:, :, 1:] != text[:, :, :-1]).all(dim=2).float()

    return reward


# --- Sampling and scoring ------------------------------------------------------------------------


def draw_prompts(tokens: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return pieces of 16 tokens from anywhere in a text."""
    starts = torch.randint(len(tokens) - PROMPT_TOKENS, (count, 1), generator=generator)
    return tokens[starts.to(tokens.device) + torch.arange(PROMPT_TOKENS, device=tokens.device)]


@torch.no_grad()
def write_answers(
    model: "PreTrainedModel", prompts: torch.Tensor, samples: int, length: int
) -> torch.Tensor:
    """Let the model write to each prompt `samples` answers of `length` tokens, drawn at random."""
    logits, memory = _read_prompts(model, prompts, samples)
    written = []
    while True:
        written.append(torch.multinomial(logits.softmax(dim=1), 1))
        if len(written) == length:
            return torch.cat(written, dim=1).view(len(prompts), samples, length)
        logits = _read(model, written[-1], memory)[:, -1]


def score_answers(
    model: "PreTrainedModel", prompts: torch.Tensor, answers: torch.Tensor
) -> torch.Tensor:
    """Return the log-probability of every token at every place of the answers: the scores."""
    first, memory = _read_prompts(model, prompts, answers.shape[1])
    later = _read(model, answers.flatten(0, 1)[:, :-1], memory)
    logits = torch.cat([first[:, None], later], dim=1)
    return logits.log_softmax(dim=2).view(*answers.shape, -1)


def _read_prompts(model, prompts: torch.Tensor, samples: int):
    """Read each prompt once; return the logits after it and the memory, both for each sample."""
    from transformers import DynamicCache  # takes seconds to import

    memory = DynamicCache()
    logits = _read(model, prompts, memory, logits_to_keep=1)
    memory.batch_repeat_interleave(samples)
    return logits[:, -1].repeat_interleave(samples, dim=0), memory


def _read(model, tokens: torch.Tensor, memory, **options) -> torch.Tensor:
    """Return the logits after each token; the memory holds what came before, and grows."""
    known = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"  # transformers renamed it
    return model(tokens, use_cache=True, **{name: memory}, **options).logits


# --- The policy gradient -------------------------------------------------------------------------


def divergence(scores: torch.Tensor, base_scores: torch.Tensor) -> torch.Tensor:
    """Return the exact KL at each token, in nats: how far the model has gone from its base."""
    return (scores.exp() * (scores - base_scores)).sum(dim=-1)


def policy_loss(
    scores: torch.Tensor,
    base_scores: torch.Tensor,
    answers: torch.Tensor,
    rewards: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """Return a number whose gradient, with a minus, raises the mean of reward − beta · KL."""
    kl = divergence(scores, base_scores)
    chosen = scores.gather(3, answers[..., None])[..., 0]  # of the tokens that were written
    after = kl.detach().flip(2).cumsum(dim=2).flip(2) - kl.detach()  # KL that a token leads to
    value = rewards[..., None] - beta * after
    advantage = value - value.mean(dim=1, keepdim=True)  # better than the group?
    return (beta * kl - advantage * chosen).sum(dim=2).mean()


def train_policy(
    model: "PreTrainedModel",
    tokens: torch.Tensor,
    reward: Reward,
    length: int,
    steps: int,
    rate: float,
    beta: float,
    seed: int,
    base: "PreTrainedModel | None" = None,
    watch: Callable[[int, float, float], None] = lambda step, reward, kl: None,
) -> list[tuple[float, float]]:
    """Train what needs a gradient, in place; return each step's mean reward and KL per answer.

    The prompts come from a text's tokens. Without a `base`, the base is the model with LoRA off.
    Adam's rate rises for 20 steps, then falls to zero, and long gradients are cut.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained)
    history = []
    for step in tqdm(range(steps), leave=False):
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 20, 1 - step / steps)
        prompts = draw_prompts(tokens, PROMPTS, generator)
        answers = write_answers(model, prompts, SAMPLES, length)
        rewards = reward(prompts, answers)
        scores = score_answers(model, prompts, answers)
        base_scores = score_base(model, base, prompts, answers)
        loss = policy_loss(scores, base_scores, answers, rewards, beta)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        kl = divergence(scores.detach(), base_scores).sum(dim=2).mean()
        history.append((rewards.mean().item(), kl.item()))
        watch(step, *history[-1])
    return history


@torch.no_grad()
def score_base(model, base, prompts: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Return the base's scores of the answers: without a `base`, of the model with LoRA off."""
    if base is not None:
        return score_answers(base, prompts, answers)
    with lora_disabled(model):
        return score_answers(model, prompts, answers)


@torch.no_grad()
def measure_policy(
    model: "PreTrainedModel",
    prompts: torch.Tensor,
    reward: Reward,
    length: int,
    samples: int,
    seed: int,
    base: "PreTrainedModel | None" = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each prompt the mean reward and the mean KL per answer, in nats."""
    torch.manual_seed(seed)
    rewards, distances = [], []
    for part in prompts.split(16):
        answers = write_answers(model, part, samples, length)
        scores = score_answers(model, part, answers)
        kl = divergence(scores, score_base(model, base, part, answers)).sum(dim=2)
        rewards.append(reward(part, answers).mean(dim=1))
        distances.append(kl.mean(dim=1))
    return torch.cat(rewards), torch.cat(distances)


# --- The floor: what success must cost -----------------------------------------------------------


def least_kl(p: float, q: float) -> float:
    """Return the fewest nats of KL that can raise success from p to q (both between 0 and 1)."""
    failure = (1 - q) * math.log((1 - q) / (1 - p)) if q < 1 else 0.0
    success = q * math.log(q / p) if q > 0 else 0.0
    return success + failure


def best_model(successes: torch.Tensor, beta: float) -> tuple[float, float]:
    """Return mean success and mean KL of the best model for reward − beta · KL.

    `successes` holds the base's success after each prompt. The best model multiplies the odds of
    success by exp(1 / beta) after each; so no model gets its mean success for fewer nats.
    """
    p = successes.double()
    scale = 1 - p + p * math.exp(1 / beta)
    best = p * math.exp(1 / beta) / scale
    kl = best / beta - scale.log()
    return best.mean().item(), kl.mean().item()
