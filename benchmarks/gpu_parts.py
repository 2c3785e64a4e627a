"""The parts of benchmarks/gpu.py. A part runs in one process, and each of its rows is written as soon as it is made."""

import gc
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate.state import AcceleratorState
from gpu_table import render
from journal import Journal, Line
from numpy.typing import NDArray
from peers import DATASETS, NAMED, VARIANTS, draw_batches
from peers_levers import CUDA_LEVERS
from peers_slice import (
    Job,
    Stopwatch,
    Variant,
    find_device,
    now,
    save_classifier,
    walk_ours,
    walk_trainer,
)
from transformers import DistilBertConfig, DistilBertForMaskedLM, pipeline

from lora_sentiment.classifier import load
from lora_sentiment.commands.estimate import plan_recipe
from lora_sentiment.commands.probe import run_probe
from lora_sentiment.data.batches import Encoded, TextEncoder
from lora_sentiment.data.rows import load_data
from lora_sentiment.models.engine import compute_logits
from lora_sentiment.models.load import load_tokenizer
from lora_sentiment.models.memory import estimate_memory
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.recipe.train import TrainConfig
from lora_sentiment.training.report import peak_memory, reset_peak_memory

ROOT = Path(__file__).parents[1]
GRACE = 20
"""Seconds past its limit after which a row is stopped in the middle of a step."""
PATIENCE = 600
"""Seconds of a row of `--quick`, which measures nothing."""
PIPELINE_BATCH = 16
ANSWERED, WARM_UP_TEXTS = 500, 64
MEMORY_RECIPES = ("imdb_full", "imdb_lora", "imdb_lora_8bit", "imdb_qlora")
MEMORY_LENGTHS = (128, 256, 512)
FLOAT32_ONLY = "a CPU walks this in float32 alone"


@dataclass(frozen=True)
class Settings:
    """What the whole script was asked for.

    Attributes:
        run: Names the run in the journal.
        out: Folder of journal, page and log.
        base_small: A real base for the whole run, or None.
        data: Data set to the folder of its parquet files.
        shape_base: Folder of the base that speed and memory are measured on.
        budget: Seconds that the script was given.
        ends: `time.time()` after which nothing more is begun.
        quick: Whether all sizes are tiny.
    """

    run: str
    out: Path
    base_small: str | None
    data: dict[str, str]
    shape_base: str
    budget: float
    ends: float
    quick: bool


@dataclass(frozen=True)
class Training:
    """A row of a training table.

    Attributes:
        variant: How it trains.
        first: Steps that are timed apart, for what is done once.
        steps: Optimizer steps; None for an epoch.
        limit: Seconds of its steps.
        cudnn: Whether attention may take cuDNN's kernel, as torch has it.
        cuda_only: Why a CPU leaves it out, or nothing.
    """

    variant: Variant
    first: int
    steps: int | None
    limit: float
    cudnn: bool = True
    cuda_only: str = ""


OURS = Training(VARIANTS["ours"], 50, None, 40)
D = Training(VARIANTS["D"], 20, 40, 30)
B_WITHOUT_CUDNN = Training(VARIANTS["B"], 20, 60, 30, cudnn=False, cuda_only="only a GPU has cuDNN")
IMDB = {
    "ours": OURS,
    "ours, eager": Training(
        Variant("ours", cuda_graphs="off"), 50, None, 15, cuda_only="only a GPU has graphs"
    ),
    "B, cuDNN off": B_WITHOUT_CUDNN,
    "D": D,
    "B": Training(VARIANTS["B"], 20, 60, 45),
}
"""Row of the table to how it trains, in the order of measuring."""
COMPILED = {
    "ours": OURS,
    "B, compiled": Training(
        NAMED["B, compiled"], 20, 40, 60, cuda_only="a CPU compiles for minutes"
    ),
}
"""Apart and last: each new shape is compiled, and on an H200 three steps took a minute."""
ABLATION = {
    "all parts": Training(VARIANTS["ours"], 50, 150, 20),
    **{
        f"without {lever}": Training(
            Variant("ours", lever=lever), 50, 150, 20, cuda_only="its parts are a GPU's"
        )
        for lever in CUDA_LEVERS
    },
    "without CUDA graphs": Training(
        Variant("ours", cuda_graphs="off"), 50, 150, 20, cuda_only="only a GPU has graphs"
    ),
    "without the fast forward pass": Training(
        Variant("ours", lever="the fast encoder"),
        50,
        150,
        30,
        cuda_only="benchmarks/peers.py --ablation is a CPU's",
    ),
    "all parts, again": Training(
        VARIANTS["ours"], 50, 150, 20, cuda_only="only a GPU is slower in its first row"
    ),
}
"""Row to how it trains: each part of the fast forward pass off in turn, the rest as it is.

All parts are measured twice, because the first row of a process is slower than the others."""
SHORT = {"ours": OURS, "D": D, "B, cuDNN off": B_WITHOUT_CUDNN}


class Skipped(Exception):  # noqa: N818 - no error
    """A row that is not measured, with its reason."""


class DeviceLostError(Exception):
    """The GPU takes nothing more from this process."""


class Recorder:
    """Measures rows one by one. Each becomes a line of the journal and stands on the page before the next begins."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.journal = settings, Journal(settings.out / "gpu.jsonl")

    def measure(
        self,
        part: str,
        row: str,
        limit: float,
        function: Callable[[], Line],
        *,
        repeats: bool = False,
        **facts: Any,
    ) -> None:
        """Measure one row, or write why there is none. A row that a process before this one began is left alone.

        Args:
            part: Table that it stands in.
            row: Its name there.
            limit: Seconds that it should take at most.
            function: Returns its figures.
            repeats: Whether every process needs it.
            facts: What else names it.

        Raises:
            DeviceLostError: If the row left the GPU unusable.
        """
        named = {"part": part, "row": row, **facts}
        if self.key(named) in self.journal.lines and not repeats:
            return
        # The line that follows takes its place.
        self.write({**named, "failed": "it was begun and did not end"}, says=False)
        left = self.settings.ends - time.time()
        began = time.perf_counter()
        line: Line = {}
        try:
            if left <= 0:
                raise Skipped(f"the budget of {self.settings.budget:,.0f} s was spent")
            # A busy machine without a GPU only shows that all of it runs.
            with interrupt_after(PATIENCE if self.settings.quick else min(limit, left) + GRACE):
                line = function()
        except Skipped as reason:
            line = {"skipped": str(reason)}
        except subprocess.TimeoutExpired as error:
            line = {"failed": f"the command did not end in {error.timeout:,.0f} s"}
        except Exception as error:
            traceback.print_exc()
            line = {
                "failed": shorten_folders(" ".join(f"{type(error).__name__}: {error}".split()))[
                    :300
                ]
            }
        spent = round(time.perf_counter() - began, 2)
        self.write({**named, "spent_seconds": spent, **line})
        if "failed" in line:
            refuse_lost_device()

    def key(self, named: Line) -> str:
        """Return what a row is called in the journal: in a table of several lengths with its length."""
        name = f"{self.settings.run} {named['part']} {named['row']}"
        return f"{name} {named['length']}" if named["part"] == "memory" else name

    def write(self, line: Line, *, says: bool = True) -> None:
        """Append a line of this run, make the page anew, and print the line unless told otherwise."""
        self.journal.append({"key": self.key(line), "run": self.settings.run, **line})
        page = render(list(self.journal.lines.values()))
        (self.settings.out / "gpu.md").write_text(page, encoding="utf-8")
        if says:
            print(json.dumps(line), flush=True)


def shorten_folders(text: str) -> str:
    """Return a text in which an absolute path is its last name: folders of one machine mean nothing on another."""
    return re.sub(r"(?<![\w.])/(?:[\w.+@-]+/)+", ".../", text)


def refuse_lost_device() -> None:
    """Wait for the GPU.

    Raises:
        DeviceLostError: If it tells a fault of before, as it then does at every call.
    """
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLostError(shorten_folders(str(error))[:300]) from None


@contextmanager
def interrupt_after(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread when the time is up; compiling and kernels run to their own end."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"stopped after {seconds:,.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def clean_process(*, cudnn: bool = True) -> Iterator[None]:
    """Give a row the process as it was: the Trainer leaves variables and a state of Accelerate behind.

    Args:
        cudnn: Whether attention may take cuDNN's kernel.
    """
    as_it_was = torch.backends.cuda.cudnn_sdp_enabled()
    AcceleratorState._reset_state(reset_partial_state=True)
    free_memory()
    with patch.dict(os.environ):
        torch.backends.cuda.enable_cudnn_sdp(cudnn and as_it_was)
        try:
            yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(as_it_was)
            torch._dynamo.reset()
            AcceleratorState._reset_state(reset_partial_state=True)


def free_memory() -> int:
    """Drop what nothing refers to any more, and return the bytes that a GPU still holds."""
    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def make_shape_base(folder: Path, tokenizer_of: str) -> None:
    """Write distilbert-base-uncased's exact shape with random weights: for speed and memory, never for accuracy.

    Raises:
        ValueError: If the tokenizer has more tokens than that shape.
    """
    config = DistilBertConfig()
    tokenizer = load_tokenizer(ModelConfig(name=tokenizer_of))
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer):,} tokens, more than the shape's {config.vocab_size:,}"
        )
    torch.manual_seed(0)
    DistilBertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def name_source(dataset: str, settings: Settings) -> list[str]:
    """Return the overrides that make a recipe read its rows from where they are."""
    if settings.quick and dataset not in settings.data:
        return [
            "data.source=bundled",
            "data.splits=null",
            "data.text_column=text",
            "data.labels=null",
        ]
    where = settings.data.get(dataset)
    if where is None:
        return []
    files = {path.stem: str(path.resolve()) for path in sorted(Path(where).glob("*.parquet"))}
    source = {split: files[split] for split in ("train", "test") if split in files}
    if "train" not in source:
        raise FileNotFoundError(
            f"--data {dataset}: there is no train.parquet in {Path(where).name}"
        )
    return [f"data.source={json.dumps(source)}", "data.splits=null"]


@dataclass(frozen=True)
class Pool:
    """All training rows of a data set, as the shape's base reads them."""

    rows: Encoded
    texts: list[str]
    labels: tuple[str, ...]
    length: int


def load_pool(dataset: str, settings: Settings) -> Pool:
    """Read and tokenise the training rows of a recipe; what is carved for validation is left out."""
    length = 48 if settings.quick else DATASETS[dataset].length
    overrides = [
        *name_source(dataset, settings),
        f"model.name={json.dumps(settings.shape_base)}",
        f"model.max_length={length}",
        *(["data.max_train_rows=60"] if settings.quick else []),
    ]
    recipe = Recipe.load(ROOT / f"recipes/{dataset}_lora.yaml", overrides)
    data = load_data(recipe.data)
    encoder = TextEncoder.of(load_tokenizer(recipe.model), max_length=length, truncation="head")
    return Pool(encoder.encode(data.train), list(data.train.texts), data.labels, length)


def choose_batches(
    training: Training, pool: Pool, *, batch_size: int
) -> tuple[NDArray[np.int64], ...]:
    """Return the rows of each step: of the whole epoch in its order, or of as many steps as the row takes.

    Those are spread evenly over the epoch's by size, and shuffled: else the first would be shorter than the others.
    """
    variant, lengths = training.variant, pool.rows.lengths
    drawn = draw_batches(variant.order, lengths, batch_size=batch_size, seed=0)
    if training.steps is None or training.steps >= len(drawn):
        return tuple(drawn)
    # The last of an epoch may be smaller, which the Trainer's arguments do not provide for.
    whole = [batch for batch in drawn if len(batch) == batch_size]
    ordered = np.argsort([int(lengths[batch].max()) for batch in whole], kind="stable")
    places = ((np.arange(training.steps) + 0.5) / training.steps * len(whole)).astype(int)
    return tuple(whole[i] for i in np.random.default_rng(0).permutation(ordered[places]))


def measure_training(training: Training, pool: Pool, settings: Settings) -> Line:
    """Train as a row does, and return the figures of its first steps and of those after them.

    Raises:
        Skipped: If this device, or this version of the package, cannot run the row.
    """
    device = find_device()
    if training.cuda_only and device.type != "cuda":
        raise Skipped(training.cuda_only)
    if training.variant.cuda_graphs and "cuda_graphs" not in TrainConfig.model_fields:
        raise Skipped("this version has no train.cuda_graphs")
    if settings.quick:
        training = replace(training, first=1, steps=3)
    batch_size = 8 if settings.quick else DATASETS["imdb"].cuda_batch_size
    batches = choose_batches(training, pool, batch_size=batch_size)
    job = Job(
        training.variant, settings.shape_base, pool.labels, pool.length, pool.rows, batches, training.first,
        counts=False,
    )  # fmt: skip
    limit = (
        PATIENCE if settings.quick else min(training.limit, max(1.0, settings.ends - time.time()))
    )
    watch = Stopwatch(job, device, limit=limit)
    with clean_process(cudnn=training.cudnn):
        held = free_memory()
        walk = (walk_ours if training.variant.engine == "ours" else walk_trainer)(
            job, device, watch
        )
        peak = peak_memory(device) - held
    if not math.isfinite(walk.loss):
        raise ArithmeticError(f"the mean loss is {walk.loss}")
    lengths = [int(pool.rows.lengths[batch].sum()) for batch in batches[: watch.taken]]
    if watch.taken < training.first:
        raise TimeoutError(
            f"{watch.taken} steps in {limit:,.0f} s, of the {training.first} that are timed first"
        )
    return {
        "dtype": str(walk.dtype).removeprefix("torch."),
        "length": pool.length,
        "batch_size": batch_size,
        "first_steps": training.first,
        "first_seconds": watch.warm_up_seconds,
        "first_tokens": sum(lengths[: training.first]),
        "steps": watch.taken - training.first,
        "steps_wanted": len(batches) - training.first,
        "seconds": watch.seconds,
        "tokens": sum(lengths[training.first :]),
        "peak_bytes": peak,
        "loss": walk.loss,
    }


def run_training(dataset: str, settings: Settings, *, part: str | None = None) -> None:
    """Measure every row of one data set, in one process and on the same tokenised rows.

    Args:
        dataset: Name of the data set.
        settings: What the script was asked for.
        part: The table; by default the data set's own.
    """
    part = part or dataset
    rows = {"imdb": IMDB, "ablation": ABLATION, "compiled": COMPILED}.get(part, SHORT)
    recorder = Recorder(settings)
    pools: list[Pool] = []

    def read() -> Line:
        pools.append(load_pool(dataset, settings))
        found = pools[0].rows
        return {
            "num_rows": len(found),
            "tokens": int(found.lengths.sum()),
            "seconds": time.perf_counter() - began,
        }

    began = time.perf_counter()
    recorder.measure(part, "rows read and tokenised", 120, read, repeats=True)
    for row, training in rows.items() if pools else ():
        recorder.measure(
            part,
            row,
            training.limit + 30,
            lambda training=training: measure_training(training, pools[0], settings),
        )


def run_command(recipe: str, overrides: list[str], settings: Settings, *, limit: float) -> Line:
    """Run the training command as a user does, and return its time and what its report says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "lora_sentiment.train",
            str(ROOT / f"recipes/{recipe}.yaml"),
        ]
        command += [*overrides, f"output.dir={json.dumps(f'{folder}/adapter')}", "offline=error"]
        command += ["train.max_steps=2", "train.num_train_epochs=1"] if settings.quick else []
        log = Path(folder, "log.txt")
        began = time.perf_counter()
        with log.open("w", encoding="utf-8") as file:
            child = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
            try:
                child.wait(limit)
            finally:
                # Also where the time is up, or a signal came.
                child.kill()
                child.wait()
                wall = time.perf_counter() - began
                said = log.read_text(encoding="utf-8")
                print(said, file=sys.stderr)
        if child.returncode:
            reason = (said.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"exit status {child.returncode}: {reason}")
        report = json.loads(Path(folder, "adapter/report.json").read_text(encoding="utf-8"))
    cost = report["train"]
    return {
        "wall_seconds": wall,
        "seconds": cost["seconds"],
        "steps": cost["steps"],
        "tokens_per_second": cost["tokens_per_second"],
        "peak_bytes": cost["peak_memory_bytes"],
        "train_rows": report["data"]["train"]["rows"],
        "test_rows": report["data"]["test"]["rows"],
        "accuracy": report["test"]["accuracy"],
    }


def run_whole(settings: Settings) -> None:
    """Run imdb_lora.yaml on a real base, from the start of the command to its end."""

    def whole() -> Line:
        base = settings.base_small or ("bundled" if settings.quick else None)
        if base is None:
            raise Skipped("no base was given: --base-small FOLDER_OR_NAME")
        place = str(Path(base).resolve()) if Path(base).is_dir() else base
        overrides = [f"model.name={json.dumps(place)}", *name_source("imdb", settings)]
        return {"base": Path(base).name} | run_command(
            "imdb_lora", overrides, settings, limit=PATIENCE if settings.quick else 120
        )

    Recorder(settings).measure("whole", "recipes/imdb_lora.yaml, one epoch", 150, whole)


def run_quickstart(settings: Settings) -> None:
    """Run quickstart.yaml, whose base and reviews ship with the package."""

    def quickstart() -> Line:
        return {"base": "bundled"} | run_command(
            "quickstart", [], settings, limit=PATIENCE if settings.quick else 60
        )

    Recorder(settings).measure("whole", "recipes/quickstart.yaml", 90, quickstart)


def measure_forward(pool: Pool, folder: Path) -> Line:
    """Time the logits of the whole pool, tokenised before: a first pass, and a second one over the same rows."""
    with clean_process():
        held = free_memory()
        reset_peak_memory(find_device())
        classifier = load(folder)
        seconds = []
        for _ in range(2):
            began = now(find_device())
            logits = compute_logits(classifier.engine, pool.rows)
            seconds.append(now(find_device()) - began)
        peak = peak_memory(find_device()) - held
    if not np.isfinite(logits).all():
        raise ArithmeticError("a logit is not finite")
    tokens = int(pool.rows.lengths.sum())
    return {
        "texts": len(pool.rows),
        "first_tokens": tokens,
        "first_seconds": seconds[0],
        "tokens": tokens,
        "seconds": seconds[1],
        "peak_bytes": peak,
    }


def measure_answers(answer: Callable[[list[str]], object], pool: Pool, settings: Settings) -> Line:
    """Time texts from strings to answers, after other texts have warmed up."""
    warm_ups, answered = (4, 8) if settings.quick else (WARM_UP_TEXTS, ANSWERED)
    held = free_memory()
    reset_peak_memory(find_device())
    # Files are often sorted by label or by source.
    order = np.random.default_rng(0).permutation(len(pool.texts))[: warm_ups + answered]
    texts = [pool.texts[i] for i in order]
    answer(texts[:warm_ups])
    began = now(find_device())
    answer(texts[warm_ups:])
    seconds = now(find_device()) - began
    tokens = int(pool.rows.lengths[order[warm_ups:]].sum())
    peak = peak_memory(find_device()) - held
    return {
        "texts": len(texts) - warm_ups,
        "tokens": tokens,
        "seconds": seconds,
        "peak_bytes": peak,
    }


def measure_pipeline(dtype: torch.dtype, pool: Pool, folder: Path, settings: Settings) -> Line:
    """Time transformers' own pipeline with batches.

    Raises:
        Skipped: If the dtype is a GPU's and there is none.
    """
    device = find_device()
    if dtype != torch.float32 and device.type != "cuda":
        raise Skipped(FLOAT32_ONLY)
    with clean_process():
        stock: Any = pipeline("text-classification", model=str(folder), device=device, dtype=dtype)
        how = {"truncation": True, "max_length": pool.length, "batch_size": PIPELINE_BATCH}
        return measure_answers(lambda texts: stock(texts, **how), pool, settings)


def run_inference(settings: Settings) -> None:
    """Measure ours and the pipeline on IMDB."""
    recorder = Recorder(settings)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "classifier")
        pools: list[Pool] = []

        def prepare() -> Line:
            pools.append(load_pool("imdb", settings))
            save_classifier(settings.shape_base, folder, pools[0].labels)
            return {"num_rows": len(pools[0].rows)}

        def ours() -> Line:
            with clean_process():
                return measure_answers(load(folder).probabilities, pools[0], settings)

        recorder.measure("inference", "rows read and tokenised", 120, prepare, repeats=True)
        if not pools:
            return
        forward = "ours, forward alone, the whole pool"
        recorder.measure("inference", forward, 30, lambda: measure_forward(pools[0], folder))
        recorder.measure("inference", "ours, texts to answers", 30, ours)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            shown = str(dtype).removeprefix("torch.")
            recorder.measure(
                "inference", f"pipeline, batches of {PIPELINE_BATCH}, {shown}", 30,
                lambda dtype=dtype: measure_pipeline(dtype, pools[0], folder, settings),
            )  # fmt: skip


def measure_memory(recipe_name: str, length: int, settings: Settings) -> Line:
    """Take two real steps of a recipe at its longest length, and hold its estimate against what they held.

    Two, because the optimizer holds its moments from the end of the first step on.
    """
    overrides = [f"model.name={json.dumps(settings.shape_base)}", f"model.max_length={length}"]
    overrides += ["train.batch_size=4"] if settings.quick else []
    recipe = Recipe.load(
        ROOT / f"recipes/{recipe_name}.yaml", [*overrides, "data.labels=[negative, positive]"]
    )
    plan, _ = plan_recipe(recipe)
    with tempfile.TemporaryDirectory() as folder, clean_process():
        given, found = Path(folder, "probe.yaml"), Path(folder, "found.json")
        given.write_text(recipe.to_yaml(), encoding="utf-8")
        held = free_memory()
        reset_peak_memory(find_device())
        run_probe(str(given), str(found), str(plan.config.num_labels))
        numbers = json.loads(found.read_text(encoding="utf-8"))
    measured = numbers["peak"] - max(held, numbers["baseline"])
    plan = replace(plan, cuda_graphs=False)
    rows = numbers["rows"]
    estimated = estimate_memory(
        plan, rows=rows, length=length, batch_size=recipe.train.batch_size
    ).peak
    return {"rows": rows, "estimated_bytes": estimated, "measured_bytes": measured}


def run_memory(settings: Settings) -> None:
    """Hold the estimates of four recipes against measured peaks at three lengths."""
    recorder = Recorder(settings)
    for length in (16,) if settings.quick else sorted(MEMORY_LENGTHS, reverse=True):
        for name in MEMORY_RECIPES:
            recorder.measure(
                "memory", name, 30, lambda name=name, length=length: measure_memory(name, length, settings),
                length=length,
            )  # fmt: skip


def run_part(part: str, settings: Settings) -> None:
    """Measure the rows of one part in this process."""
    if part in DATASETS:
        run_training(part, settings)
    else:
        run: Callable[[Settings], None] = {
            "ablation": lambda given: run_training("imdb", given, part="ablation"),
            "compiled": lambda given: run_training("imdb", given, part="compiled"),
            "whole": run_whole,
            "quickstart": run_quickstart,
            "inference": run_inference,
            "memory": run_memory,
        }[part]
        run(settings)


PARTS = (
    "whole",
    "quickstart",
    "imdb",
    "sst2",
    "ag_news",
    "inference",
    "memory",
    "ablation",
    "compiled",
)
"""What the script measures, in order."""
