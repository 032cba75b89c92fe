"""The reward of notebook 10 with TRL, on the chat model of notebook 8: three steps on a CPU.

python experiments/reward_with_trl.py [STEPS]   prints the log; needs `pip install trl`

The reward is 1 if the answer is a query of the language of notebook 8 about the table that the
question names, 1/2 if it at least begins with that table, else 0. Four examples stand in the
prompt: without them, or without the half, all rewards of three steps were 0: nothing is learnt.
"""

import re
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from datasets import Dataset  # noqa: E402

from lora_chat import DESCRIPTION, KNOWN_TABLES, load_chat_model, make_pairs  # noqa: E402

from peft import LoraConfig  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

QUERY = re.compile(r"(\w+) \| .+ -> \w+( sort \w+ (up|down))? ;")


def reward(completions, table, **_):
    rewards = []
    for completion, wanted in zip(completions, table, strict=True):
        text = completion[0]["content"].strip()
        query = QUERY.fullmatch(text)
        is_right = query and query[1] == wanted
        rewards.append(1.0 if is_right else 0.5 * text.startswith(wanted))
    return rewards


def main(steps: int) -> None:
    model, tokenizer = load_chat_model()
    pairs = make_pairs(204, KNOWN_TABLES, seed=0)
    begin = [{"role": "system", "content": DESCRIPTION}]
    for question, query in pairs[:4]:
        begin.append({"role": "user", "content": question})
        begin.append({"role": "assistant", "content": query})
    rows = []
    for question, query in pairs[4:]:
        prompt = [*begin, {"role": "user", "content": question}]
        rows.append({"prompt": prompt, "table": query.split()[0]})
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            max_steps=steps,
            learning_rate=1e-4,
            beta=0.04,
            num_generations=8,
            per_device_train_batch_size=8,
            max_completion_length=24,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=1, lora_alpha=32, target_modules="all-linear"),
        )
        trainer.train()
    for entry in trainer.state.log_history:
        print(
            {name: entry[name] for name in ("step", "reward", "kl", "step_time") if name in entry}
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
