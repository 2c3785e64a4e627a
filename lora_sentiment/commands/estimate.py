"""What a recipe will hold in memory, before it runs: from shapes alone."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_sentiment.errors import ModelError, RecipeError
from lora_sentiment.models.families import FP32, Shape
from lora_sentiment.models.memory import (
    CUDA_SHARE,
    GLIBC_KEEPS,
    Memory,
    Plan,
    estimate_memory,
    runs_fast,
)
from lora_sentiment.models.parameters import inference_tokens, micro_batch_tokens
from lora_sentiment.recipe.method import Method
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.recipe import Recipe

BASELINE_BYTES = 585 * 2**20
"""Resident memory of the interpreter, the imports and one step of a toy model, measured with torch 2.13 for CPUs."""
LENGTHS = (64, 128, 256, 512)
_KNOWN = {
    f"{owner}{name}": Shape(vocab_size=vocab_size)
    for owner in ("", "distilbert/")
    for name, vocab_size in (
        ("distilbert-base-uncased", 30522),
        ("distilbert-base-uncased-finetuned-sst-2-english", 30522),
        ("distilbert-base-cased", 28996),
        ("distilbert-base-german-cased", 31102),
        ("distilbert-base-multilingual-cased", 119547),
    )
}
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Facts:
    """What is known of a base and a run without weights or data.

    Attributes:
        shape: The encoder's shape.
        config: What else the base's `config.json` says.
        num_labels: Labels of the head.
        element_bytes: Bytes of the compute dtype.
        evaluation_tokens: Padded tokens of a forward without gradients, by `inference_tokens` of the device.
        assumed: What could not be looked up and was assumed, in words; one sentence each.
        device: What the run is on.
    """

    shape: Shape
    config: Mapping[str, Any]
    num_labels: int
    element_bytes: int
    evaluation_tokens: int
    assumed: tuple[str, ...]
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True)
class Cut:
    """One length: the recipe's own micro-batch and the largest that fits the budget.

    Attributes:
        length: Tokens of each text.
        rows: Texts of a micro-batch as the recipe cuts it.
        memory: What such a run holds beyond the baseline, in bytes.
        fitting_rows: Most texts of a micro-batch within the budget; None without a budget.
    """

    length: int
    rows: int
    memory: Memory
    fitting_rows: int | None


@dataclass(frozen=True)
class Estimate:
    """A recipe's memory by length, the longest last."""

    cuts: tuple[Cut, ...]
    budget: int | None
    engine: str
    assumed: tuple[str, ...]
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def baseline(self) -> int:
        """Bytes of the interpreter and its imports, which lie on the host."""
        return BASELINE_BYTES if self.device == "cpu" else 0

    @property
    def peak(self) -> int:
        """Most bytes in use at once, baseline included."""
        return self.baseline + max(cut.memory.peak for cut in self.cuts)

    @property
    def resident(self) -> int:
        """Most bytes that a run may hold: with the baseline, and with what glibc or CUDA graphs keep beside it."""
        return self.baseline + max(cut.memory.resident for cut in self.cuts)

    @property
    def fits(self) -> bool | None:
        """Whether the recipe's own micro-batches stay within the budget; None without one."""
        return None if self.budget is None else self.resident <= _usable(self.budget, self.device)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON, in bytes."""
        cuts = [
            {
                "length": cut.length,
                "rows": cut.rows,
                "fitting_rows": cut.fitting_rows,
                **cut.memory.as_dict(),
            }
            for cut in self.cuts
        ]
        return {
            "device": self.device,
            "engine": self.engine,
            "baseline": self.baseline,
            "peak": self.peak,
            "resident": self.resident,
            "budget": self.budget,
            "fits": self.fits,
            "lengths": cuts,
            "assumed": list(self.assumed),
        }


def parse_bytes(text: str) -> int:
    """Read a size such as 4GiB, 3.5 GB or 800MiB.

    Raises:
        RecipeError: If it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B|B)", text)
    if not match:
        raise RecipeError(
            f"budget: found {text!r}; allowed: a number and {', '.join(_UNITS)}, such as 4GiB"
        )
    return int(float(match[1]) * _UNITS[match[2]])


def look_up(model: ModelConfig, labels: int | None, *, this_machine: bool = True) -> Facts:
    """Find the facts of a base in its folder or the Hub cache, else among the public ones known here.

    Args:
        model: The recipe's `model` section.
        labels: Number of labels where it is known.
        this_machine: Whether the run is on this machine's device; else it is on a CPU that computes in float32 alone.

    Raises:
        ModelError: If the base is nowhere and its shape is not known.
    """
    assumed = []
    config = _read_config(model)
    if config is None:
        if model.name not in _KNOWN:
            raise ModelError(
                f"model.name {model.name!r}: no such folder, not in the Hub cache and no shape known by heart; name a "
                "folder, or fetch its config.json first: hf download NAME config.json"
            )
        assumed.append(
            f"{model.name} is not on this machine: its shape is assumed from its public name"
        )
    shape = _KNOWN[model.name] if config is None else Shape.from_config(config)
    own = len((config or {}).get("id2label", ()))
    if labels is None:
        labels = own or 2
        source = (
            "as many as the base's head has"
            if own
            else "the data is not read; name them in data.labels"
        )
        assumed.append(f"{labels} labels are assumed: {source}")
    size = {"float32": 4, "bfloat16": 2, "float16": 2}.get(model.dtype) or (
        _native_bytes() if this_machine else FP32
    )
    if model.dtype == "auto":
        assumed.append(
            f"model.dtype auto is taken as {'float32' if size == 4 else 'a 16-bit dtype'}"
        )
    device: Literal["cpu", "cuda"] = "cuda" if this_machine and _has_gpu() else "cpu"
    return Facts(
        shape, config or {}, labels, size, inference_tokens(device), tuple(assumed), device
    )


def make_plan(
    facts: Facts,
    method: Method,
    model: ModelConfig,
    *,
    engine: str,
    checkpointing: bool,
    cuda_graphs: str = "auto",
) -> Plan:
    """Return what fixes the memory of a run.

    Args:
        facts: What is known of the base.
        method: The recipe's `method` section.
        model: The recipe's `model` section.
        engine: The recipe's `train.engine`.
        checkpointing: The recipe's `train.gradient_checkpointing`.
        cuda_graphs: The recipe's `train.cuda_graphs`. They run where a GPU takes the fast engine.

    Raises:
        ModelError: If a pattern of the method matches nothing.
    """
    dropouts = {}
    for name in ("dropout", "attention_dropout"):
        stated = getattr(model, name)
        dropouts[name] = float(facts.config.get(name, 0.1) if stated is None else stated)
    fast = runs_fast(method, model, engine=engine)
    return Plan(
        facts.shape,
        method,
        model,
        num_labels=facts.num_labels,
        evaluation_tokens=facts.evaluation_tokens,
        element_bytes=facts.element_bytes,
        fast=fast,
        checkpointing=checkpointing,
        device=facts.device,
        graphs=facts.device == "cuda" and fast and not checkpointing and cuda_graphs == "auto",
        **dropouts,
    )


def plan_recipe(recipe: Recipe) -> tuple[Plan, tuple[str, ...]]:
    """Return a recipe's plan and what was assumed for it.

    Raises:
        ModelError: If the base's shape is not known, or a pattern of the method matches nothing.
    """
    facts = look_up(recipe.model, len(recipe.data.labels) if recipe.data.labels else None)
    train = recipe.train
    plan = make_plan(
        facts,
        recipe.method,
        recipe.model,
        engine=train.engine,
        checkpointing=train.gradient_checkpointing,
        cuda_graphs=train.cuda_graphs,
    )
    return plan, facts.assumed


def cut_rows(plan: Plan, recipe: Recipe, *, length: int, budget: int | None = None) -> int:
    """Return how many texts of one length the recipe puts into a micro-batch.

    On a GPU that is a whole step, unless the recipe sets a number of tokens or the memory is smaller.

    Args:
        plan: What fixes the memory of the run.
        recipe: The recipe.
        length: Tokens of each text.
        budget: Bytes of a GPU's memory, if they are known.
    """
    tokens = recipe.train.max_tokens_per_micro_batch
    if plan.device == "cuda" and tokens is None:
        rows = recipe.train.batch_size
        memory = estimate_memory(plan, rows=rows, length=length, batch_size=rows)
        if budget is None or memory.resident <= _usable(budget, "cuda"):
            return rows
        return min(rows, max(1, _fitting_rows(plan, _usable(budget, "cuda"), length=length)))
    tokens = tokens or micro_batch_tokens(
        plan.shape,
        max_length=recipe.model.max_length,
        element_bytes=plan.element_bytes,
        checkpointing=plan.checkpointing,
    )
    return min(max(1, tokens // length), recipe.train.batch_size)


def estimate(recipe: Recipe, *, budget: int | None = None) -> Estimate:
    """Estimate a recipe's memory at several lengths up to its longest.

    Args:
        recipe: The recipe.
        budget: Bytes that the process may hold, baseline included; on a GPU bytes of its memory.

    Raises:
        ModelError: If the base's shape is not known, or a pattern of the method matches nothing.
    """
    plan, assumed = plan_recipe(recipe)
    longest = recipe.model.max_length
    cuts = []
    for length in [*(length for length in LENGTHS if length < longest), longest]:
        rows = cut_rows(plan, recipe, length=length, budget=budget)
        memory = estimate_memory(plan, rows=rows, length=length, batch_size=recipe.train.batch_size)
        fitting = None
        if budget is not None:
            baseline = BASELINE_BYTES if plan.device == "cpu" else 0
            fitting = _fitting_rows(plan, _usable(budget, plan.device) - baseline, length=length)
        cuts.append(Cut(length, rows, memory, fitting))
    return Estimate(tuple(cuts), budget, "fast" if plan.fast else "stock", assumed, plan.device)


def make_columns(found: Estimate) -> dict[str, list[str]]:
    """Return the table by column: heading to one cell a length, sizes in MiB."""
    memories = [cut.memory for cut in found.cuts]

    def sizes(name: str) -> list[str]:
        return [f"{getattr(memory, name) / 2**20:,.0f}" for memory in memories]

    names = [
        "weights",
        "kept",
        "gradients",
        "optimizer",
        "activations",
        "workspace",
        "loading",
        "evaluating",
    ]
    if found.device == "cuda":
        names.insert(names.index("loading"), "fixed")
    columns = {
        "length": [str(cut.length) for cut in found.cuts],
        "rows": [str(cut.rows) for cut in found.cuts],
        **{name: sizes(name) for name in names},
        "peak": [f"{(found.baseline + memory.peak) / 2**20:,.0f}" for memory in memories],
    }
    reserved = "with freed" if found.device == "cpu" else "reserved"
    columns[reserved] = [
        f"{(found.baseline + memory.resident) / 2**20:,.0f}" for memory in memories
    ]
    if found.budget is not None:
        columns["rows that fit"] = [str(cut.fitting_rows) for cut in found.cuts]
    return columns


def make_notes(found: Estimate) -> list[str]:
    """Return what a reader of the table must know, the verdict on the budget first."""
    if found.device == "cuda":
        return _make_cuda_notes(found)
    notes = []
    if found.budget is not None:
        longest = found.cuts[-1]
        most = (longest.fitting_rows or 0) * longest.length
        within = f"{found.resident / 2**20:,.0f} of {found.budget / 2**20:,.0f} MiB"
        if found.fits:
            notes.append(
                f"fits: {within}; the largest cut that does is train.max_tokens_per_micro_batch={most}"
            )
        elif most:
            notes.append(f"does not fit: {within}; set train.max_tokens_per_micro_batch={most}")
        else:
            notes.append(
                f"does not fit: {within}, and no single row of {longest.length} tokens does; lower model.max_length, "
                "train less (method.kind=lora), or set train.gradient_checkpointing=true"
            )
    return [
        *notes,
        f"{found.engine} engine; MiB; rows: a micro-batch as the recipe cuts it; kept: the copy of the best tensors",
        f"peak: the largest of loading, evaluating and a step (all before it), with {BASELINE_BYTES / 2**20:,.0f} MiB "
        "of interpreter and imports",
        f"with freed: on a CPU glibc keeps freed buffers, up to {GLIBC_KEEPS:.0%} of activations and workspace",
        *found.assumed,
    ]


def _make_cuda_notes(found: Estimate) -> list[str]:
    notes = []
    if found.budget is not None:
        longest = found.cuts[-1]
        usable = _usable(found.budget, "cuda")
        within = f"{found.resident / 2**20:,.0f} MiB of the {usable / 2**20:,.0f} MiB to plan with"
        if found.fits:
            notes.append(
                f"fits: {within}, in micro-batches of {longest.rows} rows of {longest.length} tokens"
            )
        elif longest.fitting_rows:
            most = longest.fitting_rows * longest.length
            notes.append(
                f"does not fit: {within}; leave out train.max_tokens_per_micro_batch, or set it to {most}"
            )
        else:
            notes.append(
                f"does not fit: {within}, and no single row of {longest.length} tokens does; lower model.max_length, "
                "train less (method.kind=lora), or set train.gradient_checkpointing=true"
            )
    return [
        *notes,
        f"{found.engine} engine on a GPU; MiB of its memory; kept: the copy of the best tensors; fixed: cuBLAS",
        "rows: a micro-batch; the run measures its own, a whole step where the free memory allows",
        f"peak: the largest of loading, evaluating and a step; a run plans with {CUDA_SHARE:.0%} of the free memory",
        "reserved: the buffers of an evaluation and of a step together; CUDA graphs hold those of a step up to twice",
        "not counted: the CUDA context, about 500 MiB of the card",
        *found.assumed,
    ]


def _usable(budget: int, device: Literal["cpu", "cuda"]) -> int:
    """Return the bytes of a budget that a run plans with: a GPU's allocator cannot use every gap."""
    return int(CUDA_SHARE * budget) if device == "cuda" else budget


def _fitting_rows(plan: Plan, budget: int, *, length: int) -> int:
    """Return the most texts of a length that a micro-batch may have within a budget; 0 where none fits."""

    def fits(rows: int) -> bool:
        return (
            estimate_memory(plan, rows=rows, length=length, batch_size=2 * rows).resident <= budget
        )

    low, high = 0, 1
    while high < 2**16 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _read_config(model: ModelConfig) -> dict[str, Any] | None:
    """Return a base's `config.json` from its folder or the Hub cache; None where it is in neither."""
    folder = Path(model.place)
    if folder.is_dir():
        path: Path | None = folder / "config.json"
    else:
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
        except ValueError as error:
            raise ModelError(
                f"model.name {model.name!r}: no such folder, and no name of the Hub"
            ) from error
        path = Path(cached) if isinstance(cached, str) else None
    if path is None:
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: is no JSON object; it must be a DistilBERT's")
    if config.get("model_type") != "distilbert":
        raise ModelError(
            f"{path}: is a {config.get('model_type')} model; this package adapts distilbert checkpoints"
        )
    return config


def _has_gpu() -> bool:
    # The list ends before the first id that is none, which -1 is by custom.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return Path("/dev/nvidia0").exists() and first not in ("", "-1")


def _native_bytes() -> int:
    """Return the bytes of the dtype that `model.dtype: auto` means on this machine."""
    import torch

    from lora_sentiment.models.dtype import resolve_dtype

    if _has_gpu():
        return 2
    return resolve_dtype("auto", torch.device("cpu")).itemsize
