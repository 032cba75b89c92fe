"""How the scripts of this folder store what they found: one file in data/, with how it was made.

{"made": {"command": ..., "seconds": ..., "versions": {...}, ...}, "results": ...}

Read it with `json.loads((DATA / name).read_text(encoding="utf-8"))["results"]`.
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "data"


def store(name: str, results: object, seconds: float, **facts: object) -> None:
    """Write data/NAME: the results, the CPU seconds they took, and further facts about them.

    A sweep may call it after each training: the file is replaced whole, or not at all.
    """
    libraries = ("torch", "transformers", "numpy")
    loaded = {library: version(library) for library in libraries if library in sys.modules}
    made = {
        "command": f"python experiments/{Path(sys.argv[0]).name}",
        "seconds": round(seconds),
        "versions": {"python": platform.python_version()} | loaded,
    }
    text = write_json({"made": made | facts, "results": results}) + "\n"
    unfinished = DATA / f"{name}.tmp"
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    unfinished.replace(DATA / name)


def write_json(thing: object, margin: str = "") -> str:
    """Return a thing as JSON, on one line where it fits: a file whose changes can be read."""
    line = json.dumps(thing, ensure_ascii=False)
    if not isinstance(thing, (dict, list, tuple)) or len(margin + line) <= 100:
        return line
    inner = margin + "  "
    if isinstance(thing, dict):
        names = [json.dumps(str(name), ensure_ascii=False) for name in thing]
        parts = [
            f"{inner}{name}: {write_json(part, inner)}"
            for name, part in zip(names, thing.values(), strict=True)
        ]
    else:
        parts = [inner + write_json(part, inner) for part in thing]
    opening, closing = "{}" if isinstance(thing, dict) else "[]"
    return f"{opening}\n" + ",\n".join(parts) + f"\n{margin}{closing}"
