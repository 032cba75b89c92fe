"""Execute the notebooks.

python tools/execute.py run [NAME ...]      copies with outputs go to build/; the main path alone
python tools/execute.py run --deeper        the notebooks in notebooks/deeper/, too
python tools/execute.py refresh [NAME ...]  in place, with clean outputs and folded cells
python tools/execute.py seeds [NAME ...]    with other seeds: which claims fail?
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert.filters import strip_ansi
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

from conventions import NOTEBOOK_METADATA, ROOT, SEED, folding

NOTEBOOKS = ROOT / "notebooks"
BUILD = ROOT / "build"


def execute(path: Path, notebook: nbformat.NotebookNode) -> tuple[bool, str]:
    """Run all cells, as far as they go. Return whether none failed, and a line of report."""
    start = time.perf_counter()
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": path.parent}},
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # no warnings of the kernel about its transport
    )
    try:
        client.execute()
    except Exception as error:  # a failed cell, a time-out, a dead kernel: the others go on
        return False, f"{path.stem}  FAILED\n{strip_ansi(str(error))}"
    return True, f"{path.stem}  {time.perf_counter() - start:.1f} s"


def one_per_core(function, tasks: list[tuple]) -> Iterator:
    """Yield what `function` returns for each task, as they end, from one process per core."""
    workers = min(len(tasks), os.cpu_count() or 1)
    if workers > 1:
        os.environ["OMP_NUM_THREADS"] = "1"  # the cores are taken by the other notebooks
    with ProcessPoolExecutor(workers) as pool:
        try:
            for future in as_completed([pool.submit(function, *task) for task in tasks]):
                yield future.result()
        finally:  # after Ctrl-C start no more of them
            pool.shutdown(cancel_futures=True)


def run(paths: list[Path]) -> bool:
    """Execute the notebooks into build/, the longest first; True if all of them passed."""
    passed = True
    paths = sorted(paths, key=run_time, reverse=True)  # no core waits for a long one at the end
    tasks = [(path, BUILD / path.relative_to(NOTEBOOKS)) for path in paths]
    for ok, report in one_per_core(build, tasks):
        print(report, flush=True)
        passed &= ok
    print(f"The executed notebooks are in {BUILD.name}/")
    return passed


def run_time(path: Path) -> int:
    """The seconds that a notebook says it takes; 0 if it says nothing."""
    found = re.findall(r"\*\*Run time\*\* (\d+) (s|min)", path.read_text(encoding="utf-8"))
    return sum(int(number) * {"s": 1, "min": 60}[unit] for number, unit in found)


def build(path: Path, copy: Path) -> tuple[bool, str]:
    notebook = nbformat.read(path, as_version=4)
    result = execute(path, notebook)
    copy.parent.mkdir(parents=True, exist_ok=True)
    write(copy, notebook)
    return result


def write(path: Path, notebook: nbformat.NotebookNode) -> None:
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8", newline="\n")


def refresh(paths: list[Path]) -> bool:
    """Execute the notebooks in place; one that fails stays as it was.

    One after the other, so that the times they measure and store are those of a quiet machine.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # more threads add up in another order
    passed = True
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        ok, report = execute(path, notebook)
        print(report, flush=True)
        if ok:
            clean(notebook)
            write(path, notebook)
        passed &= ok
    return passed


def clean(notebook: nbformat.NotebookNode) -> None:
    """Drop what differs from run to run or from editor to editor, and fold the tagged cells."""
    notebook.metadata = nbformat.from_dict(NOTEBOOK_METADATA)
    notebook.nbformat_minor = 5
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} | folding(tags) if tags else {})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    CoalesceStreamsPreprocessor().preprocess(notebook, {})


# seeds

# Runs right after the imports: a claim that fails is noted, and the notebook goes on.
NOTE_FAILURES = """\
def check(claim, condition, strict=check):
    try:
        strict(claim, condition)
    except AssertionError:
        print("✗", claim)
"""

# The base in data/ is of one seed.
TRAIN_THE_BASE = f"""\
sys.path.append({str(ROOT / "experiments")!r})
from make_richboynet import trained

def pretrained_richboynet(device):
    return trained(device, SEED)
"""


def seeds(paths: list[Path], shifts: int) -> bool:
    """Execute the notebooks with SEED = 1000, 2000 and so on; True if all claims hold."""
    tasks = [(path, 1000 * k) for path in paths for k in range(1, shifts + 1)]
    failures: dict[str, list[int]] = {}
    for name, seed, failed in one_per_core(try_seed, tasks):
        print(f"{name}  SEED = {seed}: {len(failed)} failed", *failed, sep="\n    ", flush=True)
        for claim in failed:
            failures.setdefault(f"{name}: {claim}", []).append(seed)
    print(f"\n{len(failures)} claims failed with one or more of {shifts} seeds")
    for claim, where in sorted(failures.items()):
        print(f"{len(where):5} of {shifts}  {claim} ({', '.join(map(str, sorted(where)))})")
    return not failures


def try_seed(path: Path, seed: int) -> tuple[str, int, list[str]]:
    """Execute a notebook with another SEED. Return its name, the seed, and what failed."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    [imports] = [cell for cell in notebook.cells if cell.id == "imports"]
    imports.source, count = re.subn(SEED, f"SEED = {seed}", imports.source, flags=re.MULTILINE)
    if count != 1:
        return path.stem, seed, ["stopped: the cell `imports` has no line SEED = 0"]
    more = TRAIN_THE_BASE if "pretrained_richboynet" in imports.source else ""
    after = notebook.cells.index(imports) + 1
    notebook.cells.insert(after, nbformat.v4.new_code_cell(NOTE_FAILURES + more))
    ok, report = execute(path, notebook)
    lines = [
        line
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for line in output.get("text", "").splitlines()
    ]
    failed = [line.removeprefix("✗ ") for line in lines if line.startswith("✗ ")]
    return path.stem, seed, failed + ([] if ok else [f"stopped: {report.splitlines()[-1]}"])


def find_notebooks(names: list[str], deeper: bool) -> list[Path]:
    """The notebooks of these names; without names the main path, or with `deeper` all."""
    main = sorted(NOTEBOOKS.glob("*.ipynb"))
    every = main + sorted(NOTEBOOKS.glob("deeper/*.ipynb"))
    if not names:
        return every if deeper else main
    paths = {path.stem: path for path in every}
    stems = [Path(name).stem for name in names]
    if unknown := [stem for stem in stems if stem not in paths]:
        sys.exit(f"no such notebook: {', '.join(unknown)}; there are {', '.join(paths)}")
    return [paths[stem] for stem in stems]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "refresh", "seeds"])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all notebooks")
    parser.add_argument("--deeper", action="store_true", help="of run: not the main path alone")
    parser.add_argument("--shifts", type=int, default=10, help="of seeds: how many (default: 10)")
    options = parser.parse_intermixed_args(arguments)
    os.environ["TQDM_DISABLE"] = "1"
    paths = find_notebooks(options.names, options.deeper or options.command != "run")
    if options.command == "seeds":
        passed = seeds(paths, options.shifts)
    else:
        passed = {"run": run, "refresh": refresh}[options.command](paths)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
