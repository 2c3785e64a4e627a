"""What every method gives and what it costs, on the same base, rows and number of tries: makes benchmarks/methods.md.

    python benchmarks/methods.py --datasets sst5
    python benchmarks/methods.py --datasets sst2 --name methods_sst2

A method's learning rate is chosen on validation from as many tries as every other method has; then one run a seed with
that rate is judged on test. A rate that looks best after a short try may not survive the whole run: where the run ends
below its own try on validation, the next best rate is run. A data set's other settings are those of its recipe,
`recipes/<data set>_lora.yaml`.

Every finished run is one line of benchmarks/methods.jsonl with the test rows that it had right, for the paired
intervals, so a killed script goes on where it was; `--render` makes the table of what is finished.

Every run has a process of its own, forked from one that has imported the libraries and done nothing else: peak memory
is the run's own, and the imports are paid for once.
"""

import argparse
import base64
import hashlib
import json
import logging
import multiprocessing
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from threading import Semaphore

import numpy as np
import torch
from journal import Journal, Line
from methods_table import Row, judged_role, render, short, validation_accuracy
from numpy.typing import NDArray

from lora_sentiment import __version__
from lora_sentiment.adapter.predictions import load_predictions
from lora_sentiment.data.tables import FORMATS
from lora_sentiment.errors import LoraSentimentError, TrainingError
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.training.report import report_roles

ROOT = Path(__file__).parents[1]
FIRST_SEED = 42
DATASETS = {
    "sst5": {"train": "train", "validation": "validation", "test": "test"},
    "sst2": {"train": "train", "dev": "validation", "test": "test"},
    "imdb": {"train": "train", "test": "test"},
}
"""Data set to role and name of the split; where there is no validation it is carved from train."""
RATES = {
    "weights": (5e-5, 2e-5, 1e-4),
    "adapters": (1e-3, 5e-4, 2e-3),
    "LoRA+": (5e-4, 2.5e-4, 1e-3),
    "scales": (3e-3, 1e-3, 1e-2),
}
"""Learning rates to try, by what is trained; the middle one first, so that one try is not an edge.

Adapters began with twice these: on SST-5 4e-3 won short tries, and all-linear runs of 534 steps then fell to one class
on validation."""
_ALL = "kind: lora, r: 4, lora_alpha: 8, target_modules: all-linear"
METHODS = {
    "full": ("weights", ["method={kind: full}"]),
    "unfreeze last 3": ("weights", ["method={kind: unfreeze, last_layers: 3}"]),
    "head": ("scales", ["method={kind: head}"]),
    "LoRA q,v": (
        "adapters",
        ["method={kind: lora, r: 8, lora_alpha: 16, target_modules: [q_lin, v_lin]}"],
    ),
    "LoRA all-linear": ("adapters", [f"method={{{_ALL}}}"]),
    "DoRA": ("adapters", [f"method={{{_ALL}, use_dora: true}}"]),
    "LoRA+": ("LoRA+", [f"method={{{_ALL}, loraplus_lr_ratio: 4}}"]),
    "int8 LoRA": ("adapters", [f"method={{{_ALL}}}", "model.quantize=int8"]),
    "nf4 LoRA": (
        "adapters",
        [f"method={{{_ALL}}}", "model.quantize=nf4", "model.double_quant=true"],
    ),
    "small-head LoRA": ("adapters", [f"method={{{_ALL}}}", "model.head=low_rank"]),
    "IA3": ("scales", ["method={kind: ia3}"]),
    "AdaLoRA": (
        "adapters",
        [
            "method={kind: adalora, init_r: 6, target_r: 4, tinit: 20, tfinal: 20, deltaT: 5,"
            " target_modules: all-linear}"
        ],
    ),
    "VeRA": ("scales", ["method={kind: vera, target_modules: all-linear}"]),
}
"""Row of the table to the rates it tries and what it overrides in the data set's recipe."""


@dataclass(frozen=True)
class Job:
    """One run that the table needs.

    Attributes:
        dataset: One of DATASETS.
        method: One of METHODS.
        stage: `try` or `final`.
        seed: `train.seed`.
        rate: `train.learning_rate`.
        overrides: What the run changes in the data set's recipe.
    """

    dataset: str
    method: str
    stage: str
    seed: int
    rate: float
    overrides: tuple[str, ...]

    @property
    def recipe(self) -> Path:
        """The recipe that the run starts from."""
        return ROOT / f"recipes/{self.dataset}_lora.yaml"

    @property
    def key(self) -> str:
        """Hash of all that recipe and overrides state: another base, row count or rate is another run."""
        recipe = Recipe.load(self.recipe, self.overrides)
        stated = recipe.model_dump(mode="json", exclude_unset=True, exclude={"name", "output"})
        return hashlib.sha256(
            json.dumps([self.stage, stated], sort_keys=True).encode()
        ).hexdigest()[:16]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=["sst5"])
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="DATASET=WHERE",
        help="a folder with a file for each split (train.parquet, ...), or another Hub name; repeatable",
    )
    parser.add_argument(
        "--base", default="local/minilm-l6-distilbert", help="model.name of every run"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="METHOD", help="default: all"
    )
    parser.add_argument("--seeds", type=int, default=1, help="final runs of each method")
    parser.add_argument(
        "--tries",
        type=int,
        choices=(1, 2, 3),
        default=3,
        help="learning rates tried by each method",
    )
    # As many as may be: of 1,500 rows (47 steps) LoRA's 4e-3 looked best on SST-5, and 267 steps of it diverged.
    parser.add_argument(
        "--tries-rows", type=int, default=10_000, help="training rows of a try, at most 10,000"
    )
    parser.add_argument(
        "--rows", type=int, default=None, help="training rows of a final run; default all"
    )
    parser.add_argument(
        "--epochs", type=float, default=2, help="epochs of a final run; a try has one"
    )
    parser.add_argument(
        "--render", action="store_true", help="make the table of what is finished and run nothing"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override of every run"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks", help="folder of the page and its journal"
    )
    parser.add_argument(
        "--name", default="methods", help="what both are called, without .md and .jsonl"
    )
    parser.add_argument(
        "--note", default="", help="sentence for the page, such as what else the machine was doing"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at the same time; with more than one their seconds and tokens/s mean nothing",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=ROOT / "adapters/methods",
        help="folder of what is only passing",
    )
    found = parser.parse_args(arguments)
    if not 0 < found.tries_rows <= 10_000:
        parser.error(f"--tries-rows: found {found.tries_rows}; allowed: 1 to 10,000")
    found.data = dict(item.partition("=")[::2] for item in found.data)
    if unknown := set(found.data) - set(DATASETS):
        parser.error(
            f"--data: found {', '.join(sorted(unknown))}; allowed: {', '.join(DATASETS)}, as in sst5=FOLDER"
        )
    return found


def data_overrides(dataset: str, where: str | None, *, judge: bool) -> list[str]:
    """Return what makes a recipe read a data set from where it is; a try has no split that could be judged."""
    roles = {
        role: split
        for role, split in DATASETS[dataset].items()
        if judge or role in ("train", "validation")
    }
    if where is None or not Path(where).is_dir():
        return [
            *([f"data.source={json.dumps(where)}"] if where else []),
            f"data.splits={json.dumps(roles)}",
        ]
    files = {}
    for role, split in roles.items():
        found = sorted(
            str(Path(where, split + suffix).resolve())
            for suffix in FORMATS
            if Path(where, split + suffix).is_file()
        )
        if len(found) != 1:
            sys.exit(
                f"--data {dataset}={where}: found {found or 'no file'} for {split}; name one, such as {split}.csv"
            )
        files[role] = found[0]
    return [f"data.source={json.dumps(files)}", "data.splits=null"]


def make_job(arguments: argparse.Namespace, row: Row, *, stage: str, seed: int, rate: float) -> Job:
    """Return the run of a method at one rate: a try on few rows, or a final one that is judged."""
    final = stage == "final"
    rows = arguments.rows if final else arguments.tries_rows
    overrides = [
        *data_overrides(row.dataset, arguments.data.get(row.dataset), judge=final),
        f"model.name={json.dumps(arguments.base)}",
        *METHODS[row.method][1],
        f"train.learning_rate={rate}",
        f"train.num_train_epochs={arguments.epochs if final else 1}",
        f"train.seed={seed}",
        f"data.max_train_rows={'null' if rows is None else rows}",
    ]
    if not final and "validation" not in DATASETS[row.dataset]:
        # A tenth of few rows would be too few to choose on.
        overrides.append("data.validation_fraction=0.25")
    return Job(row.dataset, row.method, stage, seed, rate, (*overrides, *arguments.set))


def run_job(job: Job, cache: Path) -> Line:
    """Train one job in this process and return its line for the journal.

    Raises:
        LoraSentimentError: For anything but a loss that stopped being finite, which is a result.
    """
    from lora_sentiment.train import train

    folder = cache / job.key
    recipe = Recipe.load(
        job.recipe, [*job.overrides, f"output.dir={json.dumps(str(folder / 'adapter'))}"]
    )
    began = time.perf_counter()
    line = {
        "key": job.key,
        "dataset": job.dataset,
        "method": job.method,
        "stage": job.stage,
        "seed": job.seed,
    }
    line |= {
        "rate": job.rate,
        "epochs": recipe.train.num_train_epochs,
        "base": short(recipe.model.name),
    }
    line |= {"source": str(Recipe.load(job.recipe).data.source)}
    shutil.rmtree(folder, ignore_errors=True)
    try:
        done = train(recipe)
        if job.stage == "final":
            judged = load_predictions(done.adapter)[judged_role(done.report)]
            line["right"] = pack(judged.logits.argmax(axis=1) == judged.labels)
    except TrainingError as error:
        return line | machine() | {"failed": str(error)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    metrics = {
        role: {name: interval["value"] for name, interval in done.report[role].items()}
        for role in report_roles(done.report)
    }
    rows = {split: counts["rows"] for split, counts in done.report["data"].items()}
    cost = {name: value for name, value in done.report["train"].items() if name != "evaluations"}
    cost["wall_seconds"] = round(time.perf_counter() - began, 1)
    return (
        line
        | machine()
        | {"rows": rows, "metrics": metrics, "parameters": done.report["parameters"], "train": cost}
    )


def machine() -> Line:
    """Return what a run was made on and with, and when."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        cpu = next(
            (
                line.partition(": ")[2]
                for line in info.read_text().splitlines()
                if "model name" in line
            ),
            cpu,
        )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    libraries = [
        name for name in ("torch", "transformers", "peft", "bitsandbytes") if find_spec(name)
    ]
    return {
        "machine": gpu or f"{cpu}, {torch.get_num_threads()} threads",
        "versions": {"lora_sentiment": __version__, **{name: version(name) for name in libraries}},
        "date": datetime.now(UTC).date().isoformat(),
    }


def enter_process(log: Path) -> None:
    """Make a run's process write its log and bars to a file, and end when the script ends, killed or not."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%X")
    logging.getLogger("lora_sentiment").setLevel(logging.INFO)


def run_isolated(job: Job, cache: Path) -> Line:
    """Run a job in a process of its own, so that its peak memory is no other run's."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    if torch.cuda.is_available():
        # Imports set CUDA up, and a process that is forked afterwards cannot use it.
        method = "spawn"
    context = multiprocessing.get_context(method)
    # The server imports these once and never computes: every run is forked from it in no time.
    context.set_forkserver_preload(["lora_sentiment.train", "datasets"])
    with ProcessPoolExecutor(
        1, mp_context=context, initializer=enter_process, initargs=(cache / "log.txt",)
    ) as pool:
        return pool.submit(run_job, job, cache).result()


def fill_row(row: Row, arguments: argparse.Namespace, journal: Journal, slots: Semaphore) -> None:
    """Take a row's tries and final runs from the journal, and run what is missing unless only the table is asked for.

    Args:
        row: Filled in place.
        arguments: The command line.
        journal: Holds the finished runs.
        slots: As many as runs may go on at the same time.

    Raises:
        LoraSentimentError: For a run that cannot be made.
    """

    def have(stage: str, seed: int, rate: float) -> Line | None:
        job = make_job(arguments, row, stage=stage, seed=seed, rate=rate)
        line = journal.lines.get(job.key)
        # Without its rows a final run cannot be compared; journals of before 2026-11-22 have none.
        kept = line is not None and (stage == "try" or "right" in line or "failed" in line)
        if line is not None and not kept and arguments.render:
            sys.exit(f"{row.dataset} {row.method}, seed {seed}: the journal does not say which rows it had right; the "
                     "page stays as it is; without --render the run is made again")  # fmt: skip
        if not kept:
            line = None
            if not arguments.render:
                with slots:
                    line = run_isolated(job, arguments.cache)
                journal.append(line)
                print(
                    f"{row.dataset} {row.method} {stage}, rate {rate:g}, seed {seed}: {show_run(line)}",
                    flush=True,
                )
        return line

    rates = RATES[METHODS[row.method][0]][: arguments.tries]
    with ThreadPoolExecutor(arguments.jobs) as threads:
        tries = threads.map(lambda rate: have("try", FIRST_SEED, rate), rates)
        row.tries += filter(None, tries)
    if len(row.tries) < len(rates):
        return
    for rate in row.rates:
        first = have("final", FIRST_SEED, rate)
        if first is None:
            return
        if row.holds(first):
            row.finals = [first]
            break
        row.dropped.append(first)
    if not row.finals and row.dropped:
        # None held: the best of them is what this method gave.
        row.finals = [max(row.dropped, key=validation_accuracy)]
    if row.finals:
        rate = row.finals[0]["rate"]
        others = range(FIRST_SEED + 1, FIRST_SEED + arguments.seeds)
        with ThreadPoolExecutor(arguments.jobs) as threads:
            finals = threads.map(lambda seed: have("final", seed, rate), others)
            row.finals += filter(None, finals)
    if (
        row.finals
        and all("metrics" in line for line in row.finals)
        and len(row.finals) == arguments.seeds
    ):
        row.right = np.stack([unpack(line) for line in row.finals])


def pack(right: NDArray[np.bool_]) -> str:
    """Return what a run had right as text, a bit a row."""
    return base64.b64encode(np.packbits(right)).decode()


def unpack(line: Line) -> NDArray[np.bool_]:
    """Return what a final run had right, of all rows that it was judged on."""
    bits = np.frombuffer(base64.b64decode(line["right"]), dtype=np.uint8)
    return np.unpackbits(bits, count=line["rows"][judged_role(line["metrics"])]).astype(bool)


def show_run(line: Line) -> str:
    """Return one line about a finished run."""
    if "failed" in line:
        return f"failed: {line['failed']}"
    role = judged_role(line["metrics"]) if line["stage"] == "final" else "validation"
    cost = line["train"]
    return (
        f"{role} {line['metrics'][role]['accuracy']:.4f}, {cost['wall_seconds']:.0f} s, {cost['seconds']:.0f} of them "
        f"training at {cost['tokens_per_second']:,.0f} tokens/s, peak {cost['peak_memory_bytes'] / 2**20:,.0f} MiB"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Make the table; return 1 if a run could not be made."""
    arguments = parse_arguments(argv)
    for folder in (arguments.out, arguments.cache):
        folder.mkdir(parents=True, exist_ok=True)
    journal, page = (
        Journal(arguments.out / f"{arguments.name}.jsonl"),
        arguments.out / f"{arguments.name}.md",
    )
    rows = [
        Row(dataset, method)
        for dataset in arguments.datasets
        for method in arguments.methods or METHODS
    ]
    num_faults = 0
    slots = Semaphore(arguments.jobs)
    threads = ThreadPoolExecutor(arguments.jobs)
    filled = [threads.submit(fill_row, row, arguments, journal, slots) for row in rows]
    try:
        for row, done in zip(rows, filled, strict=True):
            try:
                done.result()
            except (LoraSentimentError, BrokenProcessPool) as error:
                num_faults += 1
                print(
                    f"{row.dataset} {row.method}: {error or type(error).__name__}",
                    file=sys.stderr,
                    flush=True,
                )
            if not arguments.render:
                page.write_text(render(rows, arguments), encoding="utf-8")
    finally:
        threads.shutdown(cancel_futures=True)
    page.write_text(render(rows, arguments), encoding="utf-8")
    print(page)
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
