r"""What a GPU gives, in five minutes at most: makes benchmarks/gpu.md.

    python benchmarks/gpu.py --base-small FOLDER \
        --data imdb=FOLDER --data sst2=FOLDER --data ag_news=FOLDER

In this order: a whole run of recipes/imdb_lora.yaml on a real base, and quickstart's; training on IMDB at 512 tokens,
ours beside the Trainer in several forms; the same in short on SST-2 and AG News at 128; answering, ours beside the
pipeline with batches of 16; the memory estimate beside measured peaks; each part of the fast forward pass off in turn;
the Trainer compiled by torch, last because it compiles for each new shape. Training, answering and memory take a base
of distilbert-base-uncased's exact shape with random weights, which the script makes.

Each row is a line of gpu.jsonl as soon as it is made, and gpu.md is written anew after it: what a killed script had
finished stays. A row that fails or is left out is a line with the reason. Every call is a run with a section of its own
on the page, and ratios are of rows of one run. Each part has a process of its own; within it the rows follow
one another on the same tokenised rows. Where a row leaves the GPU unusable, a new process measures those after it. The
log is gpu_log.txt.

`make gpu` runs the tests that need a GPU first. Without a GPU `--quick` walks every part with tiny sizes, the bundled
base and the bundled reviews, so that a fault shows before a card is at hand.
"""

import argparse
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from gpu_parts import (
    PARTS,
    DeviceLostError,
    Recorder,
    Settings,
    make_shape_base,
    run_part,
    shorten_folders,
)
from gpu_table import render
from journal import Journal, Line
from peers import DATASETS, describe_machine, run_isolated

from lora_sentiment.bundled import BASE

ROOT = Path(__file__).parents[1]
PROCESSES = 4
"""Processes of a part at most: another one after each that died or lost the GPU."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="folder of gpu.jsonl, gpu.md and gpu_log.txt; default benchmarks"
    )
    parser.add_argument(
        "--base-small",
        metavar="FOLDER_OR_NAME",
        help="a real base for the whole run; none: left out",
    )
    parser.add_argument(
        "--data", action="append", default=[], metavar="DATASET=FOLDER",
        help="train.parquet (and test.parquet) of a data set; default: the Hub; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help=", ".join(PARTS),
    )
    parser.add_argument(
        "--budget",
        type=float,
        help="seconds after which nothing more is begun; default 300, of --quick none",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, into adapters/gpu: shows that all of it runs",
    )
    parser.add_argument(
        "--render", action="store_true", help="make the page of what is finished, measure nothing"
    )
    found = parser.parse_args(arguments)
    found.data = dict(item.partition("=")[::2] for item in found.data)
    for dataset, where in found.data.items():
        if dataset not in DATASETS or not Path(where).is_dir():
            parser.error(
                f"--data: found {dataset}={where}; give DATASET=FOLDER; data sets: {', '.join(DATASETS)}"
            )
    if not (found.quick or found.render or torch.cuda.is_available()):
        parser.error("no CUDA device is visible here; --quick walks every part on a CPU")
    found.budget = found.budget or (math.inf if found.quick else 300)
    found.out = found.out or (ROOT / "adapters/gpu" if found.quick else ROOT / "benchmarks")
    return found


def describe_run(command: Sequence[str], *, quick: bool) -> Line:
    """Return the head of a run: what it is measured on and with."""
    found = describe_machine()
    return {
        "part": "machine",
        "row": "machine",
        "machine": found["machine"],
        "driver": read_driver(),
        "versions": {**found["versions"], "accelerate": version("accelerate")},
        "date": found["date"],
        "code": found["code"],
        "command": shorten_folders(shlex.join(["python", "benchmarks/gpu.py", *command])),
        "quick": quick,
        "cuda": torch.cuda.is_available(),
    }


def read_driver() -> str:
    """Return the version of the GPU's driver, or nothing where nvidia-smi does not tell it."""
    tool = shutil.which("nvidia-smi")
    if not tool or not torch.cuda.is_available():
        return ""
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip() if done.returncode == 0 else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and return 1 if a row failed."""
    began = time.time()
    arguments = parse_arguments(argv)
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.render:
        lines = list(Journal(out / "gpu.jsonl").lines.values())
        if not lines:
            sys.exit(f"{out / 'gpu.jsonl'}: nothing is finished; run it without --render")
        (out / "gpu.md").write_text(render(lines), encoding="utf-8")
        print(out / "gpu.md")
        return 0
    run = datetime.now(UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as folder:
        shape = str(BASE) if arguments.quick else folder
        settings = Settings(
            run, out, arguments.base_small, arguments.data, shape, arguments.budget, began + arguments.budget,
            arguments.quick,
        )  # fmt: skip
        recorder = Recorder(settings)
        recorder.write(describe_run(sys.argv[1:] if argv is None else argv, quick=arguments.quick))
        if not arguments.quick:
            make_shape_base(Path(folder), arguments.base_small or str(BASE))
        for part in arguments.only:
            for _ in range(PROCESSES):
                try:
                    run_isolated(
                        run_part, part, settings, log=out / "gpu_log.txt", preload="gpu_parts"
                    )
                    break
                except (BrokenProcessPool, DeviceLostError) as error:
                    print(
                        f"{part}: {error or type(error).__name__}; the rows left get a new process",
                        flush=True,
                    )
    lines = [line for line in Journal(out / "gpu.jsonl").lines.values() if line["run"] == run]
    print(out / "gpu.md")
    return 1 if any("failed" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
