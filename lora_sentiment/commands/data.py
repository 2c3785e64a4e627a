"""Read and count a recipe's data before anything is trained."""

import logging

import torch
from accelerate import PartialState

from lora_sentiment.data.batches import TextEncoder
from lora_sentiment.data.report import (
    DataReport,
    describe_judged,
    describe_seen,
    describe_unlabelled,
    log_warnings,
)
from lora_sentiment.data.rows import load_all_judged, load_data
from lora_sentiment.models.families import resolve_targets
from lora_sentiment.models.load import check_base, load_tokenizer
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks import find_task
from lora_sentiment.training.offline import resolve_offline

log = logging.getLogger("lora_sentiment")


def describe_data(recipe: Recipe) -> DataReport:
    """Read every split of a recipe, judged ones too, and count its rows. No weights are loaded.

    Raises:
        DataError: If a source, column, label or row cannot be used, or the rows do not serve
            `train.metric_for_best_model` or `train.class_weights`.
        ModelError: If the base is refused, or its tokenizer, which decides the lengths, is missing.
    """
    PartialState(cpu=not torch.accelerator.is_available())
    recipe, offline = resolve_offline(recipe)
    labels = None
    if recipe.model.adapter is not None:
        # Late: this imports PEFT, which takes seconds.
        from lora_sentiment.adapter.parent import choose_labels, resolve_parent

        recipe = resolve_parent(recipe)
        labels = choose_labels(recipe)
    data = load_data(recipe.data, labels=labels)
    task = find_task(recipe.data.task)
    task.check_metric(
        recipe.train.metric_for_best_model, labels=data.validation.labels, names=data.labels
    )
    task.describe_objective(recipe.train, labels=data.train.labels, names=data.labels)
    family = check_base(recipe.model)
    resolve_targets(recipe.method, family)
    max_length = recipe.model.max_length
    encoder = TextEncoder.of(
        load_tokenizer(recipe.model),
        max_length=max_length,
        truncation=recipe.model.truncation,
        reads_pairs=recipe.data.reads_pairs,
        has_types=family.token_types,
    )
    encoded = {role: encoder.encode(rows) for role, rows in data.seen.items()}
    report = describe_seen(data, encoded, max_length=max_length)
    judged = load_all_judged(recipe.data, data)
    for fault in judged.faults.values():
        raise fault
    report |= describe_unlabelled(judged.unlabelled)
    for role, rows in judged.rows.items():
        encoded_rows = encoder.encode(rows)
        report[role] = describe_judged(data, judged, role, encoded_rows, max_length=max_length)
    log_warnings(report)
    if offline:
        log.warning("%s", offline)
    return report
