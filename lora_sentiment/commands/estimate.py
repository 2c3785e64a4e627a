"""What a recipe will hold in memory, before it runs."""

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoConfig

from lora_sentiment.adapter.parent import resolve_parent
from lora_sentiment.errors import ModelError, RecipeError
from lora_sentiment.models.dtype import resolve_dtype
from lora_sentiment.models.families import family_of, find_public, resolve_targets
from lora_sentiment.models.load import find_local_config, set_dropouts
from lora_sentiment.models.memory import (
    CUDA_SHARE,
    GLIBC_KEEPS,
    Memory,
    Plan,
    estimate_memory,
    make_memory,
    measure_step,
    runs_fast,
)
from lora_sentiment.models.token_limits import micro_batch_tokens
from lora_sentiment.models.wrap import refuse_unfit
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks import find_task

BASELINE_BYTES = 585 * 2**20
"""Resident memory of the interpreter, the imports and one step of a toy model, measured with torch
2.13 for CPUs."""
LENGTHS = (64, 128, 256, 512)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


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
        """Most bytes that a run may hold, with the baseline and the buffers that are kept free."""
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
        RecipeError: If the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B|B)", text)
    if not match:
        raise RecipeError(
            f"budget: found {text!r}; allowed: a number and {', '.join(_UNITS)}, such as 4GiB"
        )
    return int(float(match[1]) * _UNITS[match[2]])


def find_base(model: ModelConfig, num_labels: int | None) -> tuple[Any, list[str]]:
    """Return the config of a base.

    It is read from a folder or the Hub's cache, or made from the name of a public base.

    Args:
        model: The recipe's `model` section.
        num_labels: Number of labels, where it is known.

    Returns:
        The config with its number of labels, and what was assumed, one sentence each.

    Raises:
        ModelError: If the base is nowhere and no public one.
    """
    assumed = []
    config = find_local_config(model)
    if config is None:
        public = find_public(model.name)
        if public is None:
            raise ModelError(
                f"model.name {model.name!r}: no such folder, not in the Hub's cache and no public "
                "base whose shape is known. Name a folder, or fetch its config.json first: hf "
                "download NAME config.json"
            )
        family, changes = public
        config = AutoConfig.for_model(family.model_type, **changes)
        set_dropouts(config, model)
        assumed.append(
            f"{model.name} is not on this machine: its shape is assumed from its public name"
        )
    if num_labels is None:
        has_labels = "id2label" in config.to_diff_dict()
        num_labels = config.num_labels if has_labels else 2
        source = "the data is not read; name them in data.labels"
        if has_labels:
            source = "as many as the base's head has"
        assumed.append(f"{num_labels} labels are assumed: {source}")
    config.num_labels = num_labels
    return config, assumed


def resolve_recipe(recipe: Recipe) -> Recipe:
    """Return a recipe with the adapted linears by name, as a run saves it.

    Raises:
        ModelError: As `find_base`, or if the method does not fit the base.
    """
    recipe = resolve_parent(recipe)
    family = family_of(find_base(recipe.model, None)[0])
    method = resolve_targets(recipe.method, family)
    return recipe.model_copy(update={"method": method})


def plan_recipe(
    recipe: Recipe, num_labels: int | None = None, *, this_machine: bool = True
) -> tuple[Plan, tuple[str, ...]]:
    """Return a recipe's plan and what was assumed for it.

    Args:
        recipe: The recipe.
        num_labels: Number of labels where the recipe does not name them.
        this_machine: Whether the run is on this machine's device; else it is on a CPU that computes
            in float32 alone.

    Raises:
        ModelError: If the base's shape is not known, or the method does not fit the base or its
            precision.
    """
    model = recipe.model
    named = find_task(recipe.data.task).count_outputs(recipe.data)
    if named is not None:
        num_labels = named
    config, assumed = find_base(model, num_labels)
    device: Literal["cpu", "cuda"] = "cpu"
    if this_machine and torch.cuda.is_available():
        device = "cuda"
    name = model.dtype
    if name == "auto" and not this_machine:
        name = "float32"
    dtype = resolve_dtype(name, torch.device(device))
    if model.dtype == "auto":
        kind = "float32" if dtype == torch.float32 else "a 16-bit dtype"
        assumed.append(f"model.dtype auto is taken as {kind}")
    # A comparison asks for no device. A GPU takes all methods.
    judged = torch.device(device if this_machine else "cuda")
    refuse_unfit(recipe.method, model, dtype=dtype, device=judged)
    plan = Plan(
        config,
        resolve_targets(recipe.method, family_of(config)),
        model,
        engine=recipe.train.engine,
        dtype=dtype,
        checkpointing=recipe.train.gradient_checkpointing,
        device=device,
        cuda_graphs=recipe.train.cuda_graphs == "auto",
    )
    return plan, tuple(assumed)


def cut_rows(plan: Plan, recipe: Recipe, *, length: int, budget: int | None = None) -> int:
    """Return how many texts of one length the recipe puts into a micro-batch.

    On a GPU that is a whole step, unless the recipe sets a number of tokens or the memory is
    smaller.

    Args:
        plan: What fixes the memory of the run.
        recipe: The recipe.
        length: Tokens of each text.
        budget: Bytes of a GPU's memory, if they are known.
    """
    tokens = recipe.train.max_tokens_per_micro_batch
    if plan.device == "cuda" and tokens is None:
        rows = recipe.train.batch_size
        if budget is None:
            return rows
        usable = _usable(budget, "cuda")
        memory = estimate_memory(plan, rows=rows, length=length, batch_size=rows)
        if memory.resident <= usable:
            return rows
        return min(rows, max(1, _fitting_rows(plan, usable, rows=rows, length=length)))
    tokens = tokens or micro_batch_tokens(
        plan.config,
        max_length=recipe.model.max_length,
        element_bytes=plan.dtype.itemsize,
        checkpointing=plan.checkpointing,
    )
    return min(max(1, tokens // length), recipe.train.batch_size)


def estimate(recipe: Recipe, *, budget: int | None = None) -> Estimate:
    """Estimate a recipe's memory at several lengths up to its longest.

    Args:
        recipe: The recipe.
        budget: Bytes that the process may hold, baseline included; on a GPU bytes of its memory.

    Raises:
        ModelError: If the base's shape is not known, or the method does not fit the base or its
            precision.
    """
    recipe = resolve_parent(recipe)
    plan, assumed = plan_recipe(recipe)
    longest = recipe.model.max_length
    cuts = []
    for length in [*(length for length in LENGTHS if length < longest), longest]:
        rows = cut_rows(plan, recipe, length=length, budget=budget)
        memory = estimate_memory(plan, rows=rows, length=length, batch_size=recipe.train.batch_size)
        fitting = None
        if budget is not None:
            room = _usable(budget, plan.device)
            if plan.device == "cpu":
                room -= BASELINE_BYTES
            fitting = _fitting_rows(plan, room, rows=rows, length=length)
        cuts.append(Cut(length, rows, memory, fitting))
    engine = "fast" if runs_fast(plan) else "stock"
    return Estimate(tuple(cuts), budget, engine, assumed, plan.device)


def make_columns(estimate: Estimate) -> dict[str, list[str]]:
    """Return the table by column: heading to one cell a length, sizes in MiB."""
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
    reserved = "with freed"
    if estimate.device == "cuda":
        names.insert(names.index("loading"), "fixed")
        reserved = "reserved"
    memories = [cut.memory for cut in estimate.cuts]
    columns = {
        "length": [str(cut.length) for cut in estimate.cuts],
        "rows": [str(cut.rows) for cut in estimate.cuts],
    }
    for name in names:
        columns[name] = [_mebibytes(getattr(memory, name)) for memory in memories]
    columns["peak"] = [_mebibytes(estimate.baseline + memory.peak) for memory in memories]
    columns[reserved] = [_mebibytes(estimate.baseline + memory.resident) for memory in memories]
    if estimate.budget is not None:
        columns["rows that fit"] = [str(cut.fitting_rows) for cut in estimate.cuts]
    return columns


def make_notes(estimate: Estimate) -> list[str]:
    """Return what a reader of the table must know, the verdict on the budget first."""
    notes = []
    if estimate.budget is not None:
        notes.append(_judge_budget(estimate, estimate.budget))
    if estimate.device == "cuda":
        notes += [
            f"{estimate.engine} engine on a GPU; MiB of its memory; kept: the copy of the best "
            "tensors; fixed: cuBLAS",
            "rows: a micro-batch; the run measures its own, a whole step where the free memory "
            "allows",
            "peak: the largest of loading, evaluating and a step; a run plans with "
            f"{CUDA_SHARE:.0%} of the free memory",
            "reserved: the buffers of an evaluation and of a step together; CUDA graphs hold those "
            "of a step up to twice",
            "not counted: the CUDA context, about 500 MiB of the card",
        ]
    else:
        notes += [
            f"{estimate.engine} engine; MiB; rows: a micro-batch as the recipe cuts it; kept: the "
            "copy of the best tensors",
            "peak: the largest of loading, evaluating and a step (all before it), with "
            f"{_mebibytes(BASELINE_BYTES)} MiB of interpreter and imports",
            f"with freed: on a CPU glibc keeps freed buffers, up to {GLIBC_KEEPS:.0%} of "
            "activations and workspace",
        ]
    return [*notes, *estimate.assumed]


def _judge_budget(estimate: Estimate, budget: int) -> str:
    """Return whether the recipe's own micro-batches fit, and which would."""
    longest = estimate.cuts[-1]
    most = (longest.fitting_rows or 0) * longest.length
    on_gpu = estimate.device == "cuda"
    usable = _mebibytes(_usable(budget, estimate.device))
    within = f"{_mebibytes(estimate.resident)} of {usable} MiB"
    if on_gpu:
        within = f"{_mebibytes(estimate.resident)} MiB of the {usable} MiB to plan with"
    if estimate.fits and on_gpu:
        return f"fits: {within}, in micro-batches of {longest.rows} rows of {longest.length} tokens"
    if estimate.fits:
        return (
            f"fits: {within}; the largest cut that does is train.max_tokens_per_micro_batch={most}"
        )
    if not most:
        return (
            f"does not fit: {within}, and no single row of {longest.length} tokens does; lower "
            "model.max_length, train less (method.kind=lora), or set "
            "train.gradient_checkpointing=true"
        )
    if on_gpu:
        return f"does not fit: {within}; leave out train.max_tokens_per_micro_batch, or set it to {most}"
    return f"does not fit: {within}; set train.max_tokens_per_micro_batch={most}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def _usable(budget: int, device: Literal["cpu", "cuda"]) -> int:
    """Return the bytes of a budget that a run plans with: a GPU's memory has gaps."""
    return int(CUDA_SHARE * budget) if device == "cuda" else budget


def _fitting_rows(plan: Plan, budget: int, *, rows: int, length: int) -> int:
    """Return the most texts of a length that fit a budget in one micro-batch, or 0.

    The memory of a micro-batch grows evenly with its texts. So two measured sizes give all others.

    Args:
        plan: What fixes the memory of the run.
        budget: Bytes beyond the baseline.
        rows: A number of texts near the answer, the first size.
        length: Tokens of each text.
    """
    few, many = max(1, rows // 2), max(2, rows)
    first = measure_step(plan, rows=few, length=length)
    second = measure_step(plan, rows=many, length=length)

    def fits(number: int) -> bool:
        share = (number - few) / (many - few)
        activations, workspace = (
            int(a + share * (b - a)) for a, b in zip(first, second, strict=True)
        )
        memory = make_memory(
            plan,
            rows=number,
            batch_size=2 * number,
            activations=activations,
            workspace=workspace,
        )
        return memory.resident <= budget

    low, high = 0, 1
    while high < 2**16 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
