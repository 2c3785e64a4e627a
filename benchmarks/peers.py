"""Ours beside transformers' Trainer with PEFT, on one machine and the same rows: makes benchmarks/peers.md.

    python benchmarks/peers.py --bases distilbert-shape=FOLDER minilm=local/minilm-l6-distilbert

FOLDER is a base of distilbert-base-uncased's shape with random weights.

D is the Trainer as every tutorial has it: fp32, random batches padded to their longest row, the model's dropout as it
ships, dropout of a tenth before the adapters. B is what an expert's flags give: bf16 where `model.dtype: auto` takes
it, rows grouped by length, fused AdamW, no dropout before the adapters; with the model's dropout and without, on a GPU
compiled too. `--variants` names more: B compiled, in four micro-batches a step, in bf16, ours in bf16. Where `auto` is
bf16, B and ours are in bf16 as they are, and the last two names mean them: nothing is measured twice.
Ours is this package's own loop, with the model's dropout and without. All have one base, rank, learning rate, batch
size and pool of tokenised rows; each draws its batches from the whole pool in its own way, takes the largest to warm
up, and then as many as the table DATASETS says, evenly spread over its batches by size, other ones in every round.

Every slice of a round is a process of its own, forked from one that has imported the libraries and done nothing else;
the variants of a round follow each other in an order that turns from round to round, and ratios are taken round by
round. A finished slice is one line of benchmarks/peers.jsonl, so a killed script goes on where it was; `--render` makes
the page of what is finished.

`--ablation` turns off what makes ours fast, one part at a time. `--time-to 0.88` runs D, B and ours whole, start-up
counted, until validation accuracy is that high (peers_whole.py). With a CUDA device the same script runs on that.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import peers_whole
import torch
from journal import Journal
from methods import enter_process, machine
from numpy.typing import NDArray
from peers_levers import LEVERS
from peers_slice import (
    FOUR_GB,
    WARM_UP_TEXTS,
    Job,
    Variant,
    find_device,
    measure_steps,
    measure_texts,
    save_classifier,
    take,
)
from peers_table import render
from transformers.trainer_pt_utils import get_length_grouped_indices

from lora_sentiment.data.batches import Encoded, TextEncoder, plan_epoch
from lora_sentiment.data.rows import load_data
from lora_sentiment.models.dtype import resolve_dtype
from lora_sentiment.models.load import load_tokenizer
from lora_sentiment.recipe.recipe import Recipe

ROOT = Path(__file__).parents[1]
POOL_STEPS = 200
"""Steps whose rows make the pool: no fewer than either way of grouping rows by length sorts together."""
MEGA_BATCH = 50
"""Batches that transformers sorts together on a whole data set; on a pool it would take fewer."""
TEXTS = 32
"""Texts of an inference slice that are timed."""


@dataclass(frozen=True)
class Dataset:
    """A data set as it is measured.

    Attributes:
        length: Most tokens of a text.
        batch_size: Rows of an optimizer step.
        steps: Timed steps of a slice.
        cuda_batch_size: Rows of a step on a GPU.
        cuda_steps: Timed steps on a GPU.
    """

    length: int
    batch_size: int
    steps: int
    cuda_batch_size: int
    cuda_steps: int


DATASETS = {
    "imdb": Dataset(512, 16, 1, 32, 20),
    "ag_news": Dataset(128, 32, 2, 32, 40),
    "sst2": Dataset(128, 32, 4, 32, 40),
}
"""Data set, whose rows are those of recipes/<name>_lora.yaml, to how it is measured; constants, never timings."""

VARIANTS = {
    "D": Variant("Trainer", "random", lora_dropout=0.1, tuned=False),
    "B": Variant("Trainer", "grouped"),
    "B, no dropout": Variant("Trainer", "grouped", dropout=False),
    "ours": Variant("ours"),
    "ours, no dropout": Variant("ours", dropout=False),
}
COMPILED = {"B, compiled": Variant("Trainer", "grouped", compiled=True)}
NAMED = {
    **COMPILED,
    "B, in 4 parts": Variant("Trainer", "grouped", parts=4),
    "B, bf16": Variant("Trainer", "grouped", dtype="bfloat16"),
    "ours, bf16": Variant("ours", dtype="bfloat16"),
}
"""Rows that are measured only where --variants names them; of the first each process compiles for minutes."""
CUDA_VARIANTS = {
    **COMPILED,
    "ours, fp16 within 4 GB": Variant("ours", dtype="float16", bytes_limit=FOUR_GB),
}
ABLATION = {
    "ours": VARIANTS["ours"],
    **{
        f"without {lever}": Variant(
            "ours", "random" if lever == "rows of like length" else "buckets", lever=lever
        )
        for lever in LEVERS
    },
    "with freed buffers kept (mallopt)": Variant("ours", keeps_freed=True),
    "with huge pages (THP_MEM_ALLOC_ENABLE)": Variant("ours", huge_pages=True),
}
INFERENCE = {
    "pipeline": Variant("pipeline"),
    "pipeline, batches of 16": Variant("pipeline", batch_size=16),
    "ours": Variant("ours"),
}
"""Row of each table to what it measures."""


WIDTHS = {"amx_bf16": "AMX", "avx512_f": "AVX-512, no AMX", "avx2": "AVX2"}
"""What a CPU multiplies with, the widest first."""


@dataclass(frozen=True)
class Cell:
    """A base on a data set: what is compared.

    Attributes:
        task: `train`, `ablation` or `inference`.
        base: Its name in the table.
        dataset: One of DATASETS.
    """

    task: str
    base: str
    dataset: str

    @property
    def variants(self) -> dict[str, Variant]:
        """The rows that its table can have on this machine."""
        return {
            "train": {**VARIANTS, **NAMED, **usual_more()},
            "ablation": ABLATION,
            "inference": INFERENCE,
        }[self.task]


def usual_more() -> dict[str, Variant]:
    """Return the rows of training that a GPU measures beside VARIANTS; none on a CPU."""
    return CUDA_VARIANTS if torch.cuda.is_available() else {}


def choose_rows(cell: Cell, asked: Sequence[str] | None) -> list[str]:
    """Return the rows of a cell that are measured, those of one dtype once.

    `auto` is the dtype of every row that names none. Where it is bf16, `ours, bf16` would be `ours` again.
    """
    if asked is None:
        return [name for name in cell.variants if name not in NAMED or name in usual_more()]
    if resolve_dtype("auto", find_device()) == torch.bfloat16:
        asked = [name.removesuffix(", bf16") for name in asked]
    return [name for name in cell.variants if name in asked]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bases", nargs="+", default=["minilm=local/minilm-l6-distilbert"], metavar="NAME=WHERE",
        help="name in the table and Hub name or folder of each base",
    )  # fmt: skip
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="DATASET=WHERE",
        help="read rows from elsewhere",
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=("train", "inference"), default=["train", "inference"]
    )
    rows = list({**VARIANTS, **NAMED, **usual_more(), **ABLATION, **INFERENCE})
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=rows,
        metavar="ROW",
        help="rows of the tables to measure; default all",
    )
    parser.add_argument(
        "--ablation",
        action="store_true",
        help="turn each part of ours off, and measure nothing else",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one round of one step each, into --cache: shows that all of it runs",
    )
    parser.add_argument(
        "--time-to", type=float, metavar="ACCURACY", help="whole runs on IMDB, with the last base"
    )
    parser.add_argument(
        "--render", action="store_true", help="make the page of what is finished, measure nothing"
    )
    parser.add_argument(
        "--length", type=int, help="most tokens of a text, instead of the data set's own"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of peers.jsonl and peers.md; default benchmarks"
    )
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "adapters/peers", help="folder of what is only passing"
    )
    parser.add_argument(
        "--note", default="", help="sentence for the page, such as what else the machine was doing"
    )
    found = parser.parse_args(arguments)
    found.bases, found.data = (
        dict(item.partition("=")[::2] for item in given) for given in (found.bases, found.data)
    )
    if not all(found.bases.values()):
        parser.error(
            f"--bases: found {', '.join(found.bases)}; give each as NAME=WHERE, as in minilm=FOLDER"
        )
    if found.quick:
        found.rounds = 1
    found.out = found.out or (found.cache if found.quick else ROOT / "benchmarks")
    return found


def list_cells(arguments: argparse.Namespace) -> list[Cell]:
    """Return what is compared, in order: the slowest last, so that a stopped script has whole tables."""
    if arguments.ablation:
        return [
            Cell("ablation", base, dataset)
            for base in arguments.bases
            for dataset in arguments.datasets
        ]
    cells = []
    for base in arguments.bases:
        if "train" in arguments.tasks:
            cells += [Cell("train", base, dataset) for dataset in arguments.datasets]
        if "inference" in arguments.tasks and "imdb" in arguments.datasets:
            cells.append(Cell("inference", base, "imdb"))
    return cells


def describe(
    cell: Cell, variant: str, number: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return all that names one slice: another length, step count or machine is another slice."""
    dataset, cuda = DATASETS[cell.dataset], torch.cuda.is_available()
    key = {
        **dataclasses.asdict(cell),
        "variant": variant,
        "round": number,
        "rounds": arguments.rounds,
        "length": arguments.length or dataset.length,
        "batch_size": dataset.cuda_batch_size if cuda else dataset.batch_size,
        "steps": 1 if arguments.quick else dataset.cuda_steps if cuda else dataset.steps,
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "machine": describe_machine()["machine"],
    }
    return {"key": json.dumps(key), **key}


def slices(cell: Cell, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what names each slice of a cell: every variant of a round, in an order that turns, then the next round."""
    names = choose_rows(cell, arguments.variants)
    for number in range(arguments.rounds):
        turn = number % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            if "4 GB" not in name or cell.dataset == "imdb":
                yield describe(cell, name, number, arguments)


def draw_batches(
    order: str, lengths: NDArray[np.int64], *, batch_size: int, seed: int
) -> list[NDArray[np.int64]]:
    """Return the rows of every step of a pass over the pool, as a variant draws them."""
    if order == "buckets":
        return plan_epoch(lengths, batch_size=batch_size, seed=seed, epoch=0)
    if order == "grouped":
        generator = torch.Generator().manual_seed(seed)
        order_of: Any = get_length_grouped_indices
        drawn = np.array(
            order_of(lengths.tolist(), batch_size, mega_batch_mult=MEGA_BATCH, generator=generator)
        )
    else:
        drawn = np.random.default_rng(seed).permutation(len(lengths))
    return [drawn[start : start + batch_size] for start in range(0, len(drawn), batch_size)]


def choose_batches(
    batches: Sequence[NDArray[np.int64]],
    lengths: NDArray[np.int64],
    *,
    steps: int,
    number: int,
    rounds: int,
    warm_ups: int = 1,
) -> tuple[NDArray[np.int64], ...]:
    """Return batches to warm up on, and `steps` that stand for all: evenly spread by padded tokens.

    The largest warms up; of three the smallest and the middle one too, because a compiler compiles again when a second
    shape comes. Of few steps drawn at random, one variant would get short rows and another long ones. Round `number` of
    `rounds` takes batches between those of the others.
    """
    sizes = np.array([len(batch) * lengths[batch].max() for batch in batches])
    ordered = np.argsort(sizes, kind="stable")
    places = (np.arange(steps) + (number + 0.5) / rounds) / steps * len(batches)
    warm = [ordered[-1], ordered[0], ordered[len(ordered) // 2]][:warm_ups]
    return *(batches[i] for i in warm), *(batches[ordered[int(place)]] for place in places)


class Pools:
    """The tokenised rows of each data set and base, made when they are first asked for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.found: dict[tuple[str, str, int], tuple[Encoded, list[str], tuple[str, ...]]] = {}

    def get(self, line: dict[str, Any]) -> tuple[Encoded, list[str], tuple[str, ...]]:
        """Return rows, their texts and the label names for a slice."""
        key = (line["base"], line["dataset"], line["length"])
        if key not in self.found:
            where = self.arguments.data.get(line["dataset"])
            overrides = [
                *([f"data.source={json.dumps(where)}", "data.splits=null"] if where else []),
                f"model.name={json.dumps(self.arguments.bases[line['base']])}",
                f"model.max_length={line['length']}",
                # Validation is carved out of them, and not used.
                f"data.max_train_rows={POOL_STEPS * line['batch_size'] * 10 // 9 + 10}",
            ]
            recipe = Recipe.load(ROOT / f"recipes/{line['dataset']}_lora.yaml", overrides)
            data = load_data(recipe.data)
            tokenizer = load_tokenizer(recipe.model)
            rows = TextEncoder.of(tokenizer, max_length=line["length"], truncation="head").encode(
                data.train
            )
            # Copied: those of many rows are mapped from a file.
            self.found[key] = (
                take(rows, np.arange(len(rows))),
                list(data.train.texts),
                data.labels,
            )
        return self.found[key]


def make_job(line: dict[str, Any], cell: Cell, arguments: argparse.Namespace, pools: Pools) -> Job:
    """Return what a slice measures."""
    rows, texts, labels = pools.get(line)
    variant, base = cell.variants[line["variant"]], arguments.bases[cell.base]
    if cell.task == "inference":
        count = WARM_UP_TEXTS + (2 if arguments.quick else TEXTS)
        start = line["round"] * count % max(1, len(texts) - count)
        chosen = np.arange(start, start + count)
        folder = arguments.cache / f"classifier-{cell.base}"
        if not folder.is_dir():
            run_isolated(
                save_classifier, base, folder.resolve(), labels, log=arguments.cache / "log.txt"
            )
        own = tuple(texts[i] for i in chosen)
        return Job(
            variant, str(folder.resolve()), labels, line["length"], take(rows, chosen), texts=own
        )
    num_rows = len(rows) // line["batch_size"] * line["batch_size"]
    lengths = rows.lengths[: min(num_rows, POOL_STEPS * line["batch_size"])]
    drawn = draw_batches(variant.order, lengths, batch_size=line["batch_size"], seed=line["round"])
    warm_ups = 3 if variant.compiled or line["device"] != "CPU" else 1
    batches = choose_batches(
        drawn,
        lengths,
        steps=line["steps"],
        number=line["round"],
        rounds=arguments.rounds,
        warm_ups=warm_ups,
    )
    return Job(variant, base, labels, line["length"], rows, batches, warm_ups)


def run_isolated(
    function: Callable[..., Any],
    *arguments: Any,
    log: Path,
    huge_pages: bool = False,
    preload: str = "peers_slice",
) -> Any:
    """Call a function in a process of its own, so that memory and threads are no other's.

    Args:
        function: What is called there.
        arguments: What it is given.
        log: File for what the process writes to stderr.
        huge_pages: Let torch ask the kernel for huge pages.
        preload: Module that the server of processes imports.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    if torch.cuda.is_available():
        # Imports set CUDA up, and a process that is forked afterwards cannot use it.
        method = "spawn"
    # torch reads the variable once, at its first tensor: that process cannot be forked from one that has imported.
    context = multiprocessing.get_context("spawn" if huge_pages else method)
    # The server imports this once and never computes: every slice is forked from it in no time.
    context.set_forkserver_preload([preload])
    # Python 3.11 does not tell the server this script's folder, and the server then imports nothing without a word.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with (
        patch.dict(
            os.environ, {**environment, **({"THP_MEM_ALLOC_ENABLE": "1"} if huge_pages else {})}
        ),
        ProcessPoolExecutor(
            1, mp_context=context, initializer=enter_process, initargs=(log,)
        ) as pool,
    ):
        return pool.submit(function, *arguments).result()


def measure(
    line: dict[str, Any], cell: Cell, arguments: argparse.Namespace, pools: Pools
) -> dict[str, Any]:
    """Return the line of one slice, measured."""
    job = make_job(line, cell, arguments, pools)
    function = measure_texts if cell.task == "inference" else measure_steps
    found = run_isolated(
        function, job, log=arguments.cache / "log.txt", huge_pages=job.variant.huge_pages
    )
    return {**line, **describe_machine(), **found}


def describe_machine() -> dict[str, Any]:
    """Return what slices are measured on and with; their threads are their own."""
    found, has = machine(), torch.cpu.get_capabilities()
    name = found["machine"].rpartition(", ")[0]
    # A virtual machine's name does not say what it was given of its processor.
    widest = next((text for flag, text in WIDTHS.items() if has.get(flag)), "")
    return {
        **found,
        "machine": f"{name} ({widest})" if name and widest else name or found["machine"],
        "code": hash_code(),
    }


@functools.cache
def hash_code() -> str:
    """Return a short hash of the package and of these scripts as they were at the start: other code, other figures."""
    files = [
        *sorted((ROOT / "lora_sentiment").rglob("*.py")),
        *sorted(Path(__file__).parent.glob("peers*.py")),
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def time_whole_runs(arguments: argparse.Namespace, journal: Journal) -> None:
    """Run D, B and ours whole, from the start of the process to the accuracy that is asked for."""
    name, where = list(arguments.bases.items())[-1]
    source = arguments.data.get("imdb")
    for variant in ("D", "B", "ours"):
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        line = {
            "task": "whole",
            "base": name,
            "dataset": "imdb",
            "variant": variant,
            "target": arguments.time_to,
        }
        line |= {"length": arguments.length or peers_whole.LENGTH, "device": device}
        line |= {"machine": describe_machine()["machine"]}
        line["key"] = json.dumps(line)
        if line["key"] in journal.lines:
            continue
        command = [
            sys.executable,
            str(Path(__file__).with_name("peers_whole.py")),
            variant,
            str(arguments.time_to),
        ]
        command += [
            f"model.name={json.dumps(where)}",
            *([f"data.source={json.dumps(source)}"] if source else []),
        ]
        command += [f"model.max_length={arguments.length}"] if arguments.length else []
        command += ["train.max_steps=2", "train.eval_steps=1"] if arguments.quick else []
        with (arguments.cache / "log.txt").open("a", encoding="utf-8") as log:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=log, text=True, check=True
            )
        journal.append({**line, **describe_machine(), **json.loads(done.stdout.splitlines()[-1])})
        print(done.stdout.splitlines()[-1], flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the page."""
    arguments = parse_arguments(argv)
    for folder in (arguments.out, arguments.cache):
        folder.mkdir(parents=True, exist_ok=True)
    hash_code()
    journal, page = Journal(arguments.out / "peers.jsonl"), arguments.out / "peers.md"
    pools = Pools(arguments)
    if arguments.time_to and not arguments.render:
        time_whole_runs(arguments, journal)
    for cell in list_cells(arguments) if not (arguments.render or arguments.time_to) else ():
        for line in slices(cell, arguments):
            if line["key"] not in journal.lines:
                journal.append(measure(line, cell, arguments, pools))
                shown = journal.lines[line["key"]]
                rate = shown["tokens"] / shown["seconds"]
                print(f"{cell.task} {cell.base} {cell.dataset} round {line['round']} {line['variant']}: "
                      f"{rate:,.0f} tokens/s", flush=True)  # fmt: skip
        page.write_text(render(list(journal.lines.values()), arguments.note), encoding="utf-8")
    page.write_text(render(list(journal.lines.values()), arguments.note), encoding="utf-8")
    for folder in arguments.cache.glob("classifier-*"):
        shutil.rmtree(folder)
    print(page)


if __name__ == "__main__":
    main()
