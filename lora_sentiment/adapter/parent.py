"""More training: begin from the tensors of a saved adapter, and compare its answers with the new ones."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import nn

from lora_sentiment.adapter.folder import Card, load, load_card
from lora_sentiment.adapter.weights import get_saved_tensors
from lora_sentiment.errors import AdapterError, ModelError, show_names
from lora_sentiment.models.families import family_of
from lora_sentiment.models.load import Base
from lora_sentiment.recipe.method import AdaloraMethod, LoraMethod
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks.task import Calibration, Labels, Task

PREFIX = "base_model.model."
"""Begins the names of an adapter's tensors in PEFT's file."""


@dataclass(frozen=True)
class Parent:
    """The adapter that a training goes on from.

    Attributes:
        folder: Its folder.
        card: Its card.
        model: The verified model, in fp32 and eval mode.
    """

    folder: Path
    card: Card
    model: nn.Module


def resolve_parent(recipe: Recipe) -> Recipe:
    """Return a recipe with the keys of its `model.adapter` in the places that it leaves out.

    Raises:
        AdapterError: There is no such adapter.
        ModelError: The recipe sets a key to another value, has another task or other labels, or the
            method cannot go on.
    """
    if recipe.model.adapter is None:
        return recipe
    folder = Path(recipe.model.adapter).expanduser()
    card = load_card(folder)
    _refuse_method(folder, card)
    _check_rows(recipe, card)
    method = {name: getattr(card.method, name) for name in type(card.method).model_fields}
    model = {
        "max_length": card.max_length,
        "truncation": card.truncation,
        "quantize": card.base.quantize,
        "double_quant": card.base.double_quant,
    }
    wanted: dict[str, dict[str, Any]] = {"method": method, "model": model}
    differing = []
    for section, values in wanted.items():
        given = getattr(recipe, section)
        for name, value in values.items():
            found = getattr(given, name, None)
            if name in given.model_fields_set and found != value:
                differing.append(f"{section}.{name}={value}, not {found}")
        is_other = section == "method" and recipe.method.kind != card.method.kind
        if is_other and recipe.method.model_fields_set:
            # The keys that the recipe sets are those of another method.
            differing = [f"method.kind={card.method.kind}, not {recipe.method.kind}"]
            break
    if differing:
        raise ModelError(
            f"{folder} was trained with {'; '.join(differing)}; set these keys to its values, or "
            "leave them out",
            key="model.adapter",
        )
    update: dict[str, Any] = {
        "method": card.method,
        "model": recipe.model.model_copy(update=model),
    }
    if recipe.data.labels is None and recipe.data.label_columns is None:
        # Names that were ordered stay so: integers may stand for them.
        update["data"] = recipe.data.model_copy(update={"labels": card.data.config.labels})
    return recipe.model_copy(update=update)


def _refuse_method(folder: Path, card: Card) -> None:
    """Refuse a method whose saved form is not the one that it trains."""
    method = card.method
    reason = None
    if isinstance(method, AdaloraMethod):
        reason = "AdaLoRA has pruned its ranks, and would begin with full ones"
    elif isinstance(method, LoraMethod) and method.changes_base:
        reason = f"{method.init_lora_weights} is saved as plain LoRA of twice the rank"
    if reason:
        raise ModelError(
            f"{folder} cannot be trained further: {reason}; train on all rows anew",
            key="model.adapter",
        )


def _check_rows(recipe: Recipe, card: Card) -> None:
    """Refuse rows of another task or with other labels than the parent's and appended ones."""
    task, pairs = card.data.config.task, card.reads_pairs
    if recipe.data.task != task:
        raise ModelError(f"is an adapter of data.task={task}", key="model.adapter")
    if recipe.data.reads_pairs != pairs:
        kind = "pairs of texts; set" if pairs else "single texts; leave out"
        raise ModelError(f"the adapter reads {kind} data.text_pair_column", key="model.adapter")
    names = recipe.data.label_columns or recipe.data.labels
    if names is not None and list(names[: len(card.labels)]) != card.labels:
        raise ModelError(
            f"the adapter has the labels {show_names(card.labels)}, and the recipe names "
            f"{show_names(names)}; name the adapter's first, in its order, and new ones after them",
            key="model.adapter",
        )


def choose_labels(recipe: Recipe) -> tuple[str, ...] | None:
    """Return the labels of a training that goes on: the parent's, or those of the recipe.

    Returns:
        None where the recipe names no `model.adapter`, and the rows decide.
    """
    if recipe.model.adapter is None:
        return None
    names = recipe.data.label_columns or recipe.data.labels
    return tuple(names or load_card(Path(recipe.model.adapter).expanduser()).labels)


def load_parent(recipe: Recipe, *, device: torch.device) -> Parent:
    """Load and verify the adapter of `model.adapter`, as for an answer.

    Raises:
        AdapterError: As `folder.load`.
        ModelError: As `folder.load`.
    """
    folder = Path(str(recipe.model.adapter)).expanduser()
    card = load_card(folder)
    base = None if recipe.model.name == card.base.name else recipe.model.place
    loaded = load(folder, base=base, device=device)
    return Parent(folder, loaded.card, loaded.model)


def get_parent_tensors(parent: Parent) -> dict[str, torch.Tensor]:
    """Return copies of the parent's tensors on the CPU, by the names of its file."""
    tensors = get_saved_tensors(parent.model)
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def start_base(base: Base, card: Card, tensors: Mapping[str, torch.Tensor]) -> Base:
    """Return a base with the parent's head, and with the tensors of it that the parent trained.

    A head for more labels keeps the parent's rows bit for bit. The rows of new labels stay as they
    are.

    Raises:
        AdapterError: The base is not the parent's.
    """
    if base.sha256 != card.base.base_sha256:
        raise AdapterError(
            f"model.adapter was trained on the base {card.base.name!r} with hash "
            f"{card.base.base_sha256[:12]}; {base.name!r} has {base.sha256[:12]}"
        )
    own = dict(base.model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameter = own.get(name.removeprefix(PREFIX))
            if parameter is not None:
                parameter[: len(tensor)] = tensor.to(parameter)
    return replace(base, new_layers=())


def start_adapters(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Set the tensors that PEFT put beside the base to the parent's.

    Raises:
        AdapterError: The parent has a tensor that the model lacks.
    """
    if not isinstance(model, PeftModel):
        return
    head = tuple(f"{PREFIX}{layer}." for layer in family_of(model.config).head)
    # These share their memory with the model's parameters.
    own = get_saved_tensors(model)
    for name, tensor in tensors.items():
        if name.startswith(head):
            continue
        if name not in own:
            raise AdapterError(f"model.adapter: the model lacks its tensor {name}")
        own[name].copy_(tensor)


def compare_with_parent(
    task: Task,
    before: tuple[NDArray[np.float32], Calibration | None],
    after: tuple[NDArray[np.float32], Calibration | None],
    labels: Labels,
    *,
    old_names: tuple[str, ...],
    names: tuple[str, ...],
) -> dict[str, Any]:
    """Compare the answers of the parent and of the new adapter on the same rows.

    Args:
        task: The task of the labels.
        before: Logits and calibration of the parent.
        after: Those of the new adapter.
        labels: Labels of the rows.
        old_names: The parent's labels.
        names: All labels.

    Returns:
        `rows`; the metrics `before` and `after`; and the paired `difference` of the first metric
        that tables show, with the p value of the task's test. With appended labels, of single
        labels only the rows with a label of the parent's count, and of several labels only these
        labels. If no such row is left, only `rows`.
    """
    num_old = len(old_names)
    own, kept = task.narrow(after, labels, num_old)
    other, _ = task.narrow(before, labels, num_old)
    if not len(kept):
        return {"rows": 0}
    own_names = names if own[0].shape[1] == len(names) else old_names
    difference, p = task.compare_runs(own, other, kept)
    scores = {}
    for key, run, run_names in (("before", other, old_names), ("after", own, own_names)):
        found = task.score(run[0], kept, names=run_names, calibration=run[1])
        scores[key] = {name: interval.as_dict() for name, interval in found.items()}
    return {
        "rows": len(kept),
        **scores,
        "difference": {"metric": task.shown[0], **difference.as_dict(), task.test[0]: p},
    }
