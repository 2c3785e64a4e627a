"""Two real optimizer steps in a fresh process, and how far the estimate of their memory was off."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from lora_sentiment.commands.estimate import cut_rows, plan_recipe
from lora_sentiment.data.batches import Encoded
from lora_sentiment.errors import ModelError
from lora_sentiment.fast import use_fast_encoder
from lora_sentiment.models.dtype import resolve_dtype
from lora_sentiment.models.load import hash_tensors, load_base
from lora_sentiment.models.memory import Plan, estimate_memory
from lora_sentiment.models.sizes import MANY_STEPS
from lora_sentiment.models.token_limits import inference_tokens
from lora_sentiment.models.wrap import checkpoint_activations, frozen_tensors, make_trainable
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks import find_task
from lora_sentiment.train import train  # noqa: F401 - the baseline has all the imports of a run
from lora_sentiment.training.loop import fit
from lora_sentiment.training.processes import join_launch, make_accelerator
from lora_sentiment.training.report import peak_memory

STEPS = 2
"""The optimizer holds its moments from the end of the first step on, so the peak is the
second's."""
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Probe:
    """A real run of a few steps at the longest length beside its estimate, in bytes.

    The baseline is not counted. On a GPU the bytes are those that torch allocated on it.

    Attributes:
        length: Tokens of each text.
        rows: Texts of the micro-batch.
        baseline: Resident after imports and one step of a toy model, in the probe's own process.
        measured: Peak beyond it while loading, stepping and evaluating.
        estimated: The estimate for the same micro-batch.
    """

    length: int
    rows: int
    baseline: int
    measured: int
    estimated: int

    @property
    def error(self) -> float:
        """(estimated - measured) / measured."""
        return (self.estimated - self.measured) / self.measured

    def as_dict(self) -> dict[str, float]:
        """Return the figures for JSON."""
        return {**vars(self), "error": self.error}

    def __str__(self) -> str:
        mib = 2**20
        held = f"{self.measured / mib:,.0f} MiB"
        if self.baseline:
            held += f" beyond the {self.baseline / mib:,.0f} MiB of its imports"
        return (
            f"probe: {self.rows} rows of {self.length} tokens held {held}; estimated "
            f"{self.estimated / mib:,.0f} MiB ({self.error:+.1%})"
        )


def probe(recipe: Recipe, *, in_use: bool = True) -> Probe:
    """Compare the estimate with two real optimizer steps at the longest length.

    They run in a fresh process, which does what training does, from the base to an evaluation, on
    random token ids.

    Args:
        recipe: The recipe.
        in_use: Measure only what is in use: glibc is told to return freed buffers at once, which
            takes longer. Otherwise the buffers that it keeps for later count too, as in a run.

    Raises:
        LoraSentimentError: If the recipe's base, method or step cannot run here.
    """
    plan, _ = plan_recipe(recipe)
    length = recipe.model.max_length
    with tempfile.TemporaryDirectory() as folder:
        recipe_path, result_path = Path(folder, "probe.yaml"), Path(folder, "result.json")
        recipe_path.write_text(recipe.to_yaml(), encoding="utf-8")
        call = "import sys; from lora_sentiment.commands.probe import run_probe; run_probe(*sys.argv[1:])"
        paths = [str(recipe_path), str(result_path)]
        environment = {**os.environ, **(_GIVE_BACK if in_use else {})}
        done = subprocess.run(  # noqa: S603 - this interpreter, on files of our own
            [sys.executable, "-c", call, *paths, str(plan.config.num_labels)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise ModelError(f"the probe of {recipe.name} did not finish: {reason}")
        result = json.loads(result_path.read_text(encoding="utf-8"))
    # Two steps are too few to be replayed as CUDA graphs.
    plan = replace(plan, cuda_graphs=False)
    estimated = estimate_memory(
        plan, rows=result["rows"], length=length, batch_size=recipe.train.batch_size
    )
    return Probe(
        length,
        result["rows"],
        result["baseline"],
        result["peak"] - result["baseline"],
        estimated.peak,
    )


def run_probe(recipe_path: str, result_path: str, num_labels: str) -> None:
    """Measure in this fresh process, and write baseline, peak and texts as JSON."""
    recipe = Recipe.load(recipe_path)
    accelerator = make_accelerator(join_launch(), recipe.model.dtype)
    device = accelerator.device
    _warm_up(device)
    baseline = 0 if device.type == "cuda" else psutil.Process().memory_info().rss
    torch.manual_seed(recipe.train.seed)
    plan, _ = plan_recipe(recipe, int(num_labels))
    plan = replace(plan, cuda_graphs=False)
    model = _make_model(recipe, plan, device)
    length = recipe.model.max_length
    budget = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    rows = cut_rows(plan, recipe, length=length, budget=budget)
    # Two micro-batches a step: the second meets the gradients of the first.
    step_rows = min(2 * rows, recipe.train.batch_size)
    steps = {"batch_size": step_rows, "max_steps": STEPS, "eval_steps": None, "report_to": ()}
    texts = _make_texts(recipe, step_rows * STEPS, length, plan)
    num_validation = max(1, inference_tokens(device.type) // length)
    fit(
        model,
        train=texts,
        validation=_make_texts(recipe, num_validation, length, plan),
        numbers=np.arange(len(texts)),
        task=find_task(recipe.data.task),
        config=recipe.train.model_copy(update=steps),
        method=recipe.method,
        accelerator=accelerator,
        max_tokens=rows * length,
    )
    result = {"baseline": baseline, "peak": peak_memory(device), "rows": rows}
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")


def _make_model(recipe: Recipe, plan: Plan, device: torch.device) -> nn.Module:
    """Load and wrap the base as training does."""
    labels = tuple(str(i) for i in range(plan.config.num_labels))
    base = load_base(recipe.model, labels=labels, device=device)
    dtype = resolve_dtype(recipe.model.dtype, device)
    model = make_trainable(base, recipe.method, recipe.model, dtype=dtype, num_steps=MANY_STEPS)
    model.to(device)
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(model)
    if recipe.train.engine != "stock":
        use_fast_encoder(model, compute_dtype=dtype)
    hash_tensors(frozen_tensors(model).items())
    return model


def _make_texts(recipe: Recipe, num_rows: int, length: int, plan: Plan) -> Encoded:
    generator = np.random.default_rng(0)
    vocab_size = plan.config.vocab_size
    input_ids = generator.integers(vocab_size, size=num_rows * length, dtype=np.int32)
    offsets = np.arange(num_rows + 1, dtype=np.int64) * length
    task = find_task(recipe.data.task)
    labels = task.make_toy_labels(num_rows, plan.config.num_labels)
    return Encoded(input_ids, offsets, labels, 0, 0)


def _warm_up(device: Any) -> None:
    """Take one step of a toy model, so that what libraries load on first use counts as baseline."""
    toy = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=10, dim=16, hidden_dim=16, n_heads=2)
    )
    optimizer = torch.optim.AdamW(toy.to(device).parameters(), fused=True)
    ids = torch.ones(2, 8, dtype=torch.int64, device=device)
    toy(input_ids=ids, labels=torch.zeros(2, dtype=torch.int64, device=device)).loss.backward()
    optimizer.step()
