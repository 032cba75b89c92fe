"""The reward of notebook 10 with TRL, on the chat model of notebook 8.

python experiments/reward_with_trl.py [STEPS]   writes data/reward_with_trl.json; needs trl

The reward is 1 if the answer is a query of the language of notebook 8 about the table that the
question names, 1/2 if it at least begins with that table, else 0. That is less than to be right.
Four examples stand in the prompt: without them all rewards of the first steps were 0: nothing is
learnt. Before and after the 40 steps the model answers 40 new questions, most likely token by most
likely token. It takes under half an hour with one thread.
"""

import os
import re
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # one thread: sums in one order
    os.environ |= {"OMP_NUM_THREADS": "1"}
sys.path.append(str(Path(__file__).resolve().parents[1]))
from datasets import Dataset  # noqa: E402

from experiments.stored import store  # noqa: E402
from lora_chat import (  # noqa: E402
    DESCRIPTION,
    KNOWN_TABLES,
    answer,
    chat_prompt,
    load_chat_model,
    make_pairs,
)

from peft import LoraConfig  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

QUERY = re.compile(r"(\w+) \| .+ -> \w+( sort \w+ (up|down))? ;")
EXAMPLES = make_pairs(4, KNOWN_TABLES, seed=0)
TRAINING = make_pairs(200, KNOWN_TABLES, seed=2)


def reward(completions, table, **_):
    rewards = []
    for completion, wanted in zip(completions, table, strict=True):
        text = completion[0]["content"].strip()
        query = QUERY.fullmatch(text)
        has_form = query and query[1] == wanted
        rewards.append(1.0 if has_form else 0.5 * text.startswith(wanted))
    return rewards


def conversations(pairs: list) -> list[dict]:
    """Return a row for each pair: a conversation that waits for the answer, and the table."""
    begin = [{"role": "system", "content": DESCRIPTION}]
    for question, query in EXAMPLES:
        begin.append({"role": "user", "content": question})
        begin.append({"role": "assistant", "content": query})
    rows = []
    for question, query in pairs:
        prompt = [*begin, {"role": "user", "content": question}]
        rows.append({"prompt": prompt, "table": query.split()[0]})
    return rows


def examine(model, tokenizer, pairs: list) -> list[dict]:
    """Return for each question what the model answers, and its reward."""
    model.eval()
    prompts = [chat_prompt(tokenizer, question, DESCRIPTION, EXAMPLES) for question, _ in pairs]
    written = answer(model, tokenizer, prompts)
    rewards = reward([[{"content": t}] for t in written], [query.split()[0] for _, query in pairs])
    found = []
    for (question, query), text, earned in zip(pairs, written, rewards, strict=True):
        found.append({"question": question, "right": query, "answer": text, "reward": earned})
    return found


def main(steps: int) -> None:
    model, tokenizer = load_chat_model()
    new = make_pairs(40, KNOWN_TABLES, seed=1)
    before = examine(model, tokenizer, new)
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            max_steps=steps,
            learning_rate=5e-4,
            beta=0.04,
            num_generations=8,
            per_device_train_batch_size=8,
            max_completion_length=24,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=0,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list(conversations(TRAINING)),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=1, lora_alpha=32, target_modules="all-linear"),
        )
        trainer.train()
    after = examine(trainer.model, tokenizer, new)
    log = [{name: x[name] for name in ("reward", "kl")} for x in trainer.state.log_history[:-1]]
    results = {"steps": log, "before": before, "after": after}
    store("reward_with_trl.json", results, time.process_time(), rank=1, rate=5e-4, beta=0.04)
    for name in ("before", "after"):
        found = results[name]
        right = sum(x["answer"] == x["right"] for x in found)
        print(name, sum(x["reward"] for x in found) / len(found), f"{right} of {len(found)} right")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
