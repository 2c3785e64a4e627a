"""Two real optimizer steps in a fresh process, and how far the estimate of their memory was off."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_sentiment.commands.estimate import cut_rows, plan_recipe
from lora_sentiment.errors import ModelError
from lora_sentiment.models.memory import Plan, estimate_memory
from lora_sentiment.models.parameters import inference_tokens
from lora_sentiment.recipe.recipe import Recipe

STEPS = 2
"""The optimizer holds its moments from the end of the first step on, so the peak is the second's."""
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Probe:
    """A real run of a few steps at the longest length beside its estimate, in bytes without the baseline.

    On a GPU the bytes are those that torch allocated on it, and the baseline is 0.

    Attributes:
        length: Tokens of each text.
        rows: Texts of the micro-batch.
        baseline: Resident after imports and one step of a toy model, in the probe's own process.
        measured: Peak beyond it while loading, stepping and evaluating.
        estimated: What was estimated for the same micro-batch.
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
    """Run two real optimizer steps at the longest length in a fresh process, and hold the estimate against them.

    The process walks what training walks, from the base to an evaluation, on token ids of no meaning.

    Args:
        recipe: The recipe.
        in_use: Measure what is in use: glibc is told to give freed buffers back at once, which takes longer. Otherwise
            those that it keeps for later count too, as in a run.

    Raises:
        LoraSentimentError: If the recipe's base, method or step cannot run here.
    """
    plan, _ = plan_recipe(recipe)
    length = recipe.model.max_length
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "probe.yaml"), Path(folder, "found.json")
        given.write_text(recipe.to_yaml(), encoding="utf-8")
        call = "import sys; from lora_sentiment.commands.probe import run_probe; run_probe(*sys.argv[1:])"
        arguments = [sys.executable, "-c", call, str(given), str(found), str(plan.num_labels)]
        environment = {**os.environ, **(_GIVE_BACK if in_use else {})}
        done = subprocess.run(  # noqa: S603 - this interpreter, on files of our own
            arguments, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise ModelError(f"the probe of {recipe.name} did not finish: {reason}")
        numbers = json.loads(found.read_text(encoding="utf-8"))
    rows = numbers["rows"]
    plan = as_it_ran(plan, device=numbers["device"], element_bytes=numbers["element_bytes"])
    estimated = estimate_memory(plan, rows=rows, length=length, batch_size=recipe.train.batch_size)
    return Probe(
        length, rows, numbers["baseline"], numbers["peak"] - numbers["baseline"], estimated.peak
    )


def run_probe(recipe_path: str, found_path: str, num_labels: str) -> None:
    """Measure in this process, which must be fresh, and write JSON: baseline and peak in bytes, and what ran."""
    import psutil
    import torch

    from lora_sentiment.models.dtype import resolve_dtype
    from lora_sentiment.train import train  # noqa: F401 - the baseline is a run's, with all that it imports
    from lora_sentiment.training.loop import fit
    from lora_sentiment.training.processes import join_launch, make_accelerator
    from lora_sentiment.training.report import peak_memory

    recipe = Recipe.load(recipe_path)
    accelerator = make_accelerator(join_launch(), recipe.model.dtype)
    device = accelerator.device
    _warm_up(device)
    baseline = 0 if device.type == "cuda" else psutil.Process().memory_info().rss
    torch.manual_seed(recipe.train.seed)
    element_bytes = resolve_dtype(recipe.model.dtype, device).itemsize
    plan = as_it_ran(plan_recipe(recipe)[0], device=device.type, element_bytes=element_bytes)
    model = _make_model(recipe, plan, [str(i) for i in range(int(num_labels))], device)
    length = recipe.model.max_length
    budget = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    rows = cut_rows(plan, recipe, length=length, budget=budget)
    # Two micro-batches a step: the second meets the gradients of the first.
    step_rows = min(2 * rows, recipe.train.batch_size)
    steps = {"batch_size": step_rows, "max_steps": STEPS, "eval_steps": None, "report_to": ()}
    texts = _make_texts(step_rows * STEPS, length, plan)
    fit(
        model,
        train=texts,
        validation=_make_texts(max(1, plan.evaluation_tokens // length), length, plan),
        numbers=texts.labels,
        config=recipe.train.model_copy(update=steps),
        method=recipe.method,
        accelerator=accelerator,
        max_tokens=rows * length,
    )
    found = {
        "baseline": baseline,
        "peak": peak_memory(device),
        "rows": rows,
        "device": device.type,
        "element_bytes": element_bytes,
    }
    Path(found_path).write_text(json.dumps(found), encoding="utf-8")


def as_it_ran(plan: Plan, *, device: str, element_bytes: int) -> Plan:
    """Return a plan for the device and dtype that torch took, and for too few steps to replay as CUDA graphs."""
    return replace(
        plan,
        device="cuda" if device == "cuda" else "cpu",
        element_bytes=element_bytes,
        evaluation_tokens=inference_tokens(device),
        graphs=False,
    )


def _make_model(recipe: Recipe, plan: Plan, labels: list[str], device: Any) -> Any:
    """Load and wrap the base as training does."""
    from lora_sentiment.fast import use_fast_encoder
    from lora_sentiment.models.dtype import resolve_dtype
    from lora_sentiment.models.load import hash_tensors, load_base
    from lora_sentiment.models.wrap import checkpoint_activations, frozen_tensors, make_trainable

    base = load_base(recipe.model, labels=tuple(labels), device=device)
    dtype = resolve_dtype(recipe.model.dtype, device)
    model = make_trainable(base, recipe.method, recipe.model, dtype=dtype, num_steps=10**6).to(
        device
    )  # AdaLoRA's pruning lies beyond
    if plan.checkpointing:
        checkpoint_activations(model)
    reason = (
        "asked for"
        if recipe.train.engine == "stock"
        else use_fast_encoder(model, compute_dtype=dtype)
    )
    if (reason is None) != plan.fast:
        raise ModelError(
            f"the estimate is of the other engine; stock: {reason}; please report this"
        )
    hash_tensors(frozen_tensors(model).items())
    return model


def _make_texts(num_rows: int, length: int, plan: Plan) -> Any:
    import numpy as np

    from lora_sentiment.data.batches import Encoded

    generator = np.random.default_rng(0)
    input_ids = generator.integers(plan.shape.vocab_size, size=num_rows * length, dtype=np.int32)
    offsets = np.arange(num_rows + 1, dtype=np.int64) * length
    return Encoded(input_ids, offsets, np.arange(num_rows, dtype=np.int64) % plan.num_labels, 0, 0)


def _warm_up(device: Any) -> None:
    """Take one step of a toy model, so that what libraries load on first use counts as baseline."""
    import torch
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    toy = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=10, dim=16, hidden_dim=16, n_heads=2)
    )
    optimizer = torch.optim.AdamW(toy.to(device).parameters(), fused=True)
    ids = torch.ones(2, 8, dtype=torch.int64, device=device)
    toy(input_ids=ids, labels=torch.zeros(2, dtype=torch.int64, device=device)).loss.backward()
    optimizer.step()
