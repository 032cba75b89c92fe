"""Run and refresh the notebooks, and try them with other seeds.

python tools/notebooks.py run [NAME ...]      execute; copies and HTML pages go to build/
python tools/notebooks.py refresh [NAME ...]  execute in place and clean the stored outputs
python tools/notebooks.py seeds [NAME ...]    which checks fail when all seeds are shifted?
"""

import argparse
import base64
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import nbformat
from jinja2 import DictLoader
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbconvert.filters import strip_ansi

from conventions import NOTEBOOK_METADATA, ROOT, folding
from stamp import write

# nbconvert shows hidden cells in full and drops the alt text of figures, which notebooks set by
# `display(figure, metadata={"image/png": {"alt": ...}})`. On our pages a click opens them.
PAGE_TEMPLATE = """\
{%- extends "lab/index.html.j2" -%}
{%- block codecell -%}
{%- if cell.metadata.get("jupyter", {}).get("source_hidden") -%}
<details><summary>Solution</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock codecell -%}
{%- block output_group -%}
{%- if "answer" in cell.metadata.get("tags", []) -%}
<details><summary>I have my guess: show what happens</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock output_group -%}
{%- block data_png scoped -%}
{%- set alt = output | get_metadata("alt", "image/png") -%}
{{ super() | replace("<img ", '<img alt="' ~ alt | escape_html ~ '" ') if alt else super() }}
{%- endblock data_png -%}"""

NOTEBOOKS = ROOT / "notebooks"
BUILD = ROOT / "build"

# The README's picture is a stored figure: this notebook's, of this cell.
PICTURE = NOTEBOOKS / "picture.png"
PICTURE_FROM = ("02_lora_regression", "plot")


# Executing


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


# run


def run(names: list[str]) -> bool:
    """Execute the notebooks into build/; True if all of them passed."""
    BUILD.mkdir(exist_ok=True)
    passed = True
    for ok, report in one_per_core(build, [(path, BUILD) for path in find_notebooks(names)]):
        print(report, flush=True)
        passed &= ok
    print(f"The executed notebooks and their HTML pages are in {BUILD.name}/")
    return passed


def build(path: Path, folder: Path) -> tuple[bool, str]:
    """Execute a notebook and write a copy and its HTML page to a folder."""
    notebook = nbformat.read(path, as_version=4)
    result = execute(path, notebook)
    write(folder / path.name, nbformat.writes(notebook) + "\n")
    template = DictLoader({"page.html.j2": PAGE_TEMPLATE})
    exporter = HTMLExporter(extra_loaders=[template], template_file="page.html.j2")
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": path.stem}})
    page = re.sub(r'href="([\w.-]+)\.ipynb(?=["#])', r'href="\1.html', page)
    write(folder / f"{path.stem}.html", page)
    shown = path.parent / "playground.html"
    if f'src="{shown.name}"' in page and shown.is_file():  # notebook 4 wrote it, and shows it
        shutil.copy(shown, folder)
    return result


# refresh


def refresh(names: list[str]) -> bool:
    """Execute the notebooks in place; one that fails stays as it was.

    One after the other, so that the times they measure and store are those of a quiet machine.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # more threads add up in another order
    passed = True
    for path in find_notebooks(names):
        notebook = nbformat.read(path, as_version=4)
        ok, report = execute(path, notebook)
        print(report, flush=True)
        if ok:
            clean(notebook)
            write(path, nbformat.writes(notebook) + "\n")
            if path.stem == PICTURE_FROM[0]:
                PICTURE.write_bytes(figure(notebook, PICTURE_FROM[1]))
        passed &= ok
    return passed


def figure(notebook: nbformat.NotebookNode, cell_id: str) -> bytes:
    """The PNG stored in the outputs of a cell."""
    [cell] = [cell for cell in notebook.cells if cell.id == cell_id]
    [png] = [out.data["image/png"] for out in cell.outputs if "image/png" in out.get("data", {})]
    return base64.b64decode(png)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Drop what differs from run to run or from editor to editor."""
    notebook.metadata = nbformat.from_dict(NOTEBOOK_METADATA)
    notebook.nbformat_minor = 5
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        metadata = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            cell.outputs = clean_outputs(cell.outputs)
            metadata |= folding(tags)
        cell.metadata = nbformat.from_dict(metadata)


def clean_outputs(outputs: list) -> list:
    """Outputs without stderr and widgets, one stream where several pieces followed each other."""
    kept = []
    for output in outputs:
        is_stream = output.output_type == "stream"
        if is_stream and output.name == "stderr":
            continue
        if any("widget" in mime for mime in output.get("data", {})):
            continue
        if is_stream and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


# seeds

# Runs before a notebook's first cell. It reaches the seeds in the modules, too, for torch, numpy
# and `check` are patched before anything imports them. A failed check is noted: the rest goes on.
SHIFT_SEEDS = """\
def patch():
    import sys, numpy, torch
    sys.path.append("..")

    def move(seed):
        return seed + {shift} if isinstance(seed, int) else seed

    def shifted(function):
        def call(*args, **kwargs):
            return function(*map(move, args), **{{key: move(kwargs[key]) for key in kwargs}})
        return call

    class Generator(torch.Generator):
        manual_seed = shifted(torch.Generator.manual_seed)

    torch.Generator = Generator
    torch.manual_seed = shifted(torch.manual_seed)
    numpy.random.default_rng = shifted(numpy.random.default_rng)

    import lora_show, lora_tasks
    strict = lora_show.check

    def check(*claim):
        try:
            strict(*claim)
        except AssertionError as error:
            print("✗", error)

    lora_show.check = check

    sys.path.append({tools!r})
    import make_richboynet  # and not the base in data/, which is of one seed
    lora_tasks.pretrained_richboynet = make_richboynet.trained

patch()"""


def seeds(names: list[str], shifts: int) -> bool:
    """Execute the notebooks with all seeds moved by 1000, 2000 and so on; True if all claims hold.

    Moved are whole numbers handed to `torch.manual_seed`, `torch.Generator().manual_seed` and
    `np.random.default_rng`, in notebooks and in the module; not those of processes they start.
    """
    tasks = [(path, 1000 * k) for path in find_notebooks(names) for k in range(1, shifts + 1)]
    failures: dict[str, list[int]] = {}
    for name, shift, failed in one_per_core(try_shift, tasks):
        print(f"{name}  seeds + {shift}: {len(failed)} failed", *failed, sep="\n    ", flush=True)
        for claim in failed:
            failures.setdefault(f"{name}: {claim}", []).append(shift)
    print(f"\n{len(failures)} claims failed on one or more of {shifts} shifts")
    for claim, where in sorted(failures.items()):
        print(f"{len(where):5} of {shifts}  {claim} ({', '.join(map(str, sorted(where)))})")
    return not failures


def try_shift(path: Path, shift: int) -> tuple[str, int, list[str]]:
    """Execute a copy of a notebook with all seeds moved. Return its name, shift and failures."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    moved = SHIFT_SEEDS.format(shift=shift, tools=str(Path(__file__).parent))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(moved))
    ok, report = execute(path, notebook)
    lines = [
        line
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for line in output.get("text", "").splitlines()
    ]
    failed = [line.removeprefix("✗ ") for line in lines if line.startswith("✗ ")]
    return path.stem, shift, failed + ([] if ok else [f"stopped: {report.splitlines()[-1]}"])


# The command line


def find_notebooks(names: list[str]) -> list[Path]:
    """The notebooks of these names, or all of them, in order."""
    paths = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    if not paths:
        sys.exit(f"there are no notebooks in {NOTEBOOKS}")
    stems = [Path(name).stem for name in names] or list(paths)
    if unknown := [stem for stem in stems if stem not in paths]:
        sys.exit(f"no such notebook: {', '.join(unknown)}; there are {', '.join(paths)}")
    return [paths[stem] for stem in stems]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "refresh", "seeds"])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all notebooks")
    parser.add_argument("--shifts", type=int, default=10, help="of seeds: how many (default: 10)")
    options = parser.parse_args(arguments)
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in the set-up cell
    if options.command == "seeds":
        return 0 if seeds(options.names, options.shifts) else 1
    command = {"run": run, "refresh": refresh}[options.command]
    return 0 if command(options.names) else 1


if __name__ == "__main__":
    sys.exit(main())
