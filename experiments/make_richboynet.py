"""Train the base of notebooks 4 and 5, as notebook 3 does, into data/richboynet.safetensors.

Run it with `.venv/bin/python experiments/make_richboynet.py`; it takes about half a minute.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_model

sys.path.append(str(Path(__file__).parent.parent))
import lora_tasks


def trained(device: torch.device, seed: int = 0) -> lora_tasks.RichBoyNet:
    """Return a RichBoyNet after one epoch in batches of 128, as in notebook 3."""
    train, _, _ = lora_tasks.load_mnist(device)
    torch.manual_seed(seed)
    model = lora_tasks.RichBoyNet().to(device)
    lora_tasks.train_classifier(model, train, batches=len(train.labels) // 128, batch_size=128)
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)  # as for the stored outputs: more threads add up in another order
    save_model(trained(torch.device("cpu")), str(lora_tasks.DATA / "richboynet.safetensors"))
