"""Write the repository's address wherever it stands: badges, set-up cells, README, CITATION.cff.

python tools/stamp.py [ADDRESS]    default: that of the git remote `origin`
"""

import json
import re
import subprocess
import sys
from pathlib import Path

# The address that is stamped now. Don't edit it: `make stamp` writes here, too.
REPOSITORY = "https://github.com/OWNER/lora-notebooks"

SETUP_CELL = """\
# Find the modules of this series: near the notebook or, in Colab, in a clone of the repository.
import subprocess
import sys
from pathlib import Path

if "google.colab" in sys.modules and not Path("lora-notebooks").exists():
    address = "{repository}"
    subprocess.run(["git", "clone", "--depth", "1", address, "lora-notebooks"], check=True)
folders = [Path(name) for name in ("..", "../..", ".", "lora-notebooks")]
homes = [str(folder) for folder in folders if (folder / "lora_utils.py").exists()]
if not homes:
    raise FileNotFoundError("lora_utils.py is not near: clone the repository and open it there")
sys.path.append(homes[0])"""

COLAB = "https://colab.research.google.com"

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["README.md", "CITATION.cff", "tools/stamp.py"]  # and the notebooks


def slug(address: str = REPOSITORY) -> str:
    """OWNER/NAME of a repository on GitHub: Colab opens notebooks from nowhere else."""
    found = re.fullmatch(r"(?:https://|git@)github\.com[/:]([\w.-]+/[\w.-]+?)(?:\.git)?", address)
    if not found:
        sys.exit(
            "the address must look like https://github.com/OWNER/NAME or "
            f"git@github.com:OWNER/NAME.git, not {address!r}: make stamp REPOSITORY=..."
        )
    return found[1]


def setup_cell(address: str = REPOSITORY) -> str:
    """The source of the set-up cell, the same in every notebook."""
    return SETUP_CELL.format(repository=address)


def badge(name: str) -> str:
    """The Markdown of the badge that opens the notebook `name` in Colab."""
    page = f"{COLAB}/github/{slug()}/blob/main/notebooks/{name}.ipynb"
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({page})"


def origin() -> str:
    """The address of the git remote `origin`."""
    command = ["git", "remote", "get-url", "origin"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(
            "git knows no remote `origin`: make stamp REPOSITORY=https://github.com/OWNER/NAME"
        )
    return result.stdout.strip()


def stamp(address: str) -> None:
    """Write this address in place of the one that is stamped now."""
    new = slug(address)
    link = re.compile(rf"(?<=/){re.escape(slug())}(?![\w-])")
    for path in [ROOT / name for name in TEXTS]:
        write(path, link.sub(new, path.read_text(encoding="utf-8")))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["id"] == "setup":  # an edited one becomes as new
                source = setup_cell(f"https://github.com/{new}")
            else:
                source = link.sub(new, "".join(cell["source"]))
            cell["source"] = source.splitlines(keepends=True)
        write(path, json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def write(path: Path, text: str) -> None:
    """Write by way of a temporary file, so that a file is old or new, never half."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    temporary.replace(path)


if __name__ == "__main__":
    stamp(*sys.argv[1:] or [origin()])
