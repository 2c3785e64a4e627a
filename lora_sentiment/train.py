"""The whole walk, a recipe in, an adapter folder out.

accelerate launch -m lora_sentiment.train RECIPE [key=value ...]
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import nn

from lora_sentiment.adapter import folder as adapter_folder
from lora_sentiment.adapter.card import make_model_card
from lora_sentiment.adapter.predictions import Predictions, save_predictions
from lora_sentiment.bundled import probe_texts
from lora_sentiment.data.batches import Encoded, TextEncoder
from lora_sentiment.data.report import DataReport, describe_role, describe_seen
from lora_sentiment.data.rows import Counts, Data, Rows, load_data, load_judged
from lora_sentiment.errors import DataError, ModelError, TrainingError
from lora_sentiment.evaluation.statistics import Interval, show_interval
from lora_sentiment.fast import use_fast_encoder, why_not_fused
from lora_sentiment.files import publish, write_json
from lora_sentiment.models.dtype import resolve_dtype
from lora_sentiment.models.inference import predict_logits
from lora_sentiment.models.load import Base, hash_tensors, hash_tokenizer, load_base
from lora_sentiment.models.memory import Plan
from lora_sentiment.models.parameters import (
    ParameterCounts,
    count_parameters,
    inference_tokens,
    micro_batch_tokens,
)
from lora_sentiment.models.quantisation import Quantisation, measure_quantisation
from lora_sentiment.models.wrap import (
    checkpoint_activations,
    frozen_tensors,
    make_head_dense,
    make_trainable,
    refuse_unfit,
)
from lora_sentiment.recipe.method import PeftMethod
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks.metrics import confusion_matrix, score_calibrated
from lora_sentiment.tasks.single_label import (
    TEMPERATURE_BOUNDS,
    fit_temperature,
    make_class_weights,
)
from lora_sentiment.training.checkpoint import Store
from lora_sentiment.training.history import History
from lora_sentiment.training.loop import fit, why_not_graphs
from lora_sentiment.training.micro_batch import choose_max_tokens
from lora_sentiment.training.offline import resolve_offline
from lora_sentiment.training.optimizer import count_steps
from lora_sentiment.training.plots import plot_confusion, plot_training
from lora_sentiment.training.processes import (
    describe_machine,
    explain_lost_process,
    join_launch,
    make_accelerator,
    refuse_differences,
)
from lora_sentiment.training.report import make_report, peak_memory, reset_peak_memory
from lora_sentiment.training.run_folder import (
    explain_full_disk,
    lock_run_folder,
    make_adapter_folder,
    make_settings,
    remove_checkpoints,
)

log = logging.getLogger("lora_sentiment")

PROBE_TOKENS = 64


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        adapter: The folder that was written.
        history: Every step and evaluation.
        report: What report.json holds; empty on all processes but the main one.
    """

    adapter: Path
    history: History
    report: dict[str, Any]


@dataclass(frozen=True)
class _Setup:
    """What a run trains on, and with."""

    data: Data
    base: Base
    model: nn.Module
    dtype: torch.dtype
    engine: str
    max_tokens: int
    quantisation: Quantisation | None
    loading_peak: int
    offline: str | None


@dataclass
class _Verdict:
    """What a trained model answers: everything by role."""

    data: DataReport
    encoded: dict[str, Encoded]
    logits: dict[str, NDArray[np.float32]]
    fingerprints: dict[str, str]
    scores: dict[str, Mapping[str, Interval]] = field(default_factory=dict)
    faults: dict[str, DataError] = field(default_factory=dict)


def train(recipe: Recipe, *, allow_changes: bool = False) -> Run:
    """Walk a recipe from text to a saved, verified adapter.

    Every process of a launch calls this; the main one writes.

    Args:
        recipe: What to train, how, and whether to go on from the checkpoint of a run that was stopped.
        allow_changes: Go on although the recipe, data, versions or machine are not those of the checkpoint.

    Raises:
        LoraSentimentError: For anything about recipe, launch, data, base or run that a person can mend.
        StoppedError: When SIGTERM or SIGINT came while it trained; it is saved.
    """
    state = join_launch()
    with explain_lost_process(state):
        recipe, offline = resolve_offline(recipe)
        with lock_run_folder(recipe) as run_folder, explain_full_disk(run_folder):
            return _walk(recipe, state, run_folder, offline=offline, allow_changes=allow_changes)


def _walk(
    recipe: Recipe,
    state: PartialState,
    run_folder: Path,
    *,
    offline: str | None,
    allow_changes: bool,
) -> Run:
    """Train, save, judge, publish."""
    accelerator = make_accelerator(
        state, recipe.model.dtype, report_to=recipe.train.report_to, run_folder=run_folder
    )
    setup = _set_up(recipe, accelerator, offline)
    encoded = {
        "train": _encode(setup.data.train, setup, recipe, accelerator),
        "validation": _encode(setup.data.validation, setup, recipe, accelerator),
    }
    described = _describe_seen(setup.data, encoded, recipe)
    history = _train(recipe, setup, encoded, run_folder, accelerator, allow_changes=allow_changes)
    setup = replace(setup, max_tokens=history.max_tokens)  # lower where memory ran out
    aside = make_adapter_folder(run_folder) if accelerator.is_main_process else run_folder
    logits = _predict(setup, encoded["validation"], "validation", accelerator)
    calibration = {"temperature": fit_temperature(logits, encoded["validation"].labels)}
    log.info(
        "temperature fitted on validation: %.3f, within %s to %s",
        calibration["temperature"],
        *TEMPERATURE_BOUNDS,
    )
    # Saved before what is judged is read: a bad row there must not cost the run.
    card = (
        _save_adapter(recipe, setup, accelerator, aside, calibration)
        if accelerator.is_main_process
        else None
    )
    fingerprints = {"validation": setup.data.validation.fingerprint}
    verdict = _Verdict(described, encoded, {"validation": logits}, fingerprints)
    _judge(recipe, setup, verdict, accelerator, calibration)
    report: dict[str, Any] = {}
    if card is not None:
        report = _save_report(recipe, setup, card, history, verdict, aside)
        publish(aside, recipe.folder, overwrite=recipe.output.overwrite)
        remove_checkpoints(run_folder)
        log.info("saved and verified: %s", recipe.folder)
    if offline:
        log.warning("%s", offline)
    accelerator.end_training()
    _refuse_faults(verdict, recipe.folder)
    return Run(recipe.folder, history, report)


def _train(
    recipe: Recipe,
    setup: _Setup,
    encoded: Mapping[str, Encoded],
    run_folder: Path,
    accelerator: Accelerator,
    *,
    allow_changes: bool,
) -> History:
    """Leave the model with its best tensors and a dense head; nothing else of it may have changed."""
    frozen = hash_tensors(frozen_tensors(setup.model).items())
    settings = _settings(recipe, setup, frozen_sha256=frozen)
    refuse_differences(settings)
    # From here on the global generator draws dropout: other masks on every process, the same ones in every run.
    torch.manual_seed(recipe.train.seed + accelerator.process_index)
    history = fit(
        setup.model,
        train=encoded["train"],
        validation=encoded["validation"],
        numbers=setup.data.train.numbers,
        config=recipe.train,
        method=recipe.method,
        accelerator=accelerator,
        max_tokens=setup.max_tokens,
        store=Store(
            run_folder,
            settings,
            resume=recipe.train.resume,
            allow_changes=allow_changes,
            limit=recipe.train.save_total_limit,
        ),
    )
    if hash_tensors(frozen_tensors(setup.model).items()) != frozen:
        raise TrainingError(
            "a frozen tensor of the base changed during training; nothing was saved; please report this"
        )
    make_head_dense(setup.model)
    return history


def _settings(recipe: Recipe, setup: _Setup, *, frozen_sha256: str) -> dict[str, Any]:
    found = {
        "engine": setup.engine,
        "num_steps": count_steps(len(setup.data.train), recipe.train),
        "labels": list(setup.data.labels),
        "train_sha256": setup.data.train.fingerprint,
        "validation_sha256": setup.data.validation.fingerprint,
        "base_sha256": setup.base.sha256,
        "frozen_sha256": frozen_sha256,
        "tokenizer_sha256": hash_tokenizer(setup.base.tokenizer),
    }
    # A cut that was measured on a GPU is no setting. The checkpoint keeps it: other free memory must not stop a resume.
    measured = (
        next(setup.model.parameters()).device.type == "cuda"
        and recipe.train.max_tokens_per_micro_batch is None
    )
    machine = describe_machine(setup.dtype, max_tokens=None if measured else setup.max_tokens)
    config: Any = setup.base.model.config
    return make_settings(recipe, found, machine=machine, base=config.to_dict())


def _set_up(recipe: Recipe, accelerator: Accelerator, offline: str | None) -> _Setup:
    """Load data and base, and make the base trainable on this process's device."""
    device = accelerator.device
    dtype = resolve_dtype(recipe.model.dtype, device)
    refuse_unfit(recipe.method, recipe.model, dtype=dtype, device=device)
    data = _load_data(recipe)
    set_seed(recipe.train.seed)
    base = load_base(recipe.model, labels=data.labels, device=device)
    log.info(
        "base %s (%s): %s",
        base.name,
        "new head" if base.new_head else "its own head",
        _counts(recipe, base, data),
    )
    loading_peak, quantisation = peak_memory(device), None
    if recipe.model.quantize != "none":
        quantisation = _measure(
            recipe, base, data, dtype, device, num_processes=accelerator.num_processes
        )
        log.info("quantisation: %s", quantisation.verdict)
        reset_peak_memory(
            device
        )  # the unquantised base beside it is the measurement's, not the run's
    num_steps = count_steps(len(data.train), recipe.train)
    model = make_trainable(base, recipe.method, recipe.model, dtype=dtype, num_steps=num_steps).to(
        device
    )
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(model)
    engine = _choose_engine(model, recipe.train.engine, dtype)
    max_tokens = _max_tokens(recipe, base, dtype)
    if device.type == "cuda" and recipe.train.max_tokens_per_micro_batch is None:
        max_tokens = _measure_max_tokens(recipe, model, accelerator, num_steps)
    log.info(
        "%s on %s, %s engine, micro-batches of at most %s tokens",
        dtype,
        device,
        engine,
        f"{max_tokens:,}",
    )
    return _Setup(data, base, model, dtype, engine, max_tokens, quantisation, loading_peak, offline)


def _load_data(recipe: Recipe) -> Data:
    """Read train and validation and say what was found."""
    data = load_data(recipe.data)
    log.info(
        "training on %s rows, choosing on %s", f"{len(data.train):,}", f"{len(data.validation):,}"
    )
    # Before the base is loaded: a wrong number of weights should not cost that time.
    weights = make_class_weights(
        recipe.train.class_weights, labels=data.train.labels, names=data.labels
    )
    if weights is not None:
        pairs = zip(data.labels, weights, strict=True)
        log.info("class weights: %s", ", ".join(f"{name} {weight:.3g}" for name, weight in pairs))
    return data


def _counts(recipe: Recipe, base: Base, data: Data) -> ParameterCounts:
    return count_parameters(base.shape, recipe.method, recipe.model, num_labels=len(data.labels))


def _measure(
    recipe: Recipe,
    base: Base,
    data: Data,
    dtype: torch.dtype,
    device: torch.device,
    *,
    num_processes: int,
) -> Quantisation:
    """Hold a quantised base against the unquantised one before anything is wrapped around it."""
    plan = Plan(
        base.shape,
        recipe.method,
        recipe.model,
        num_labels=len(data.labels),
        evaluation_tokens=inference_tokens(device.type),
        element_bytes=dtype.itemsize,
        fast=False,
        checkpointing=recipe.train.gradient_checkpointing,
        dropout=float(base.model.config.dropout),  # type: ignore[union-attr, arg-type]
        attention_dropout=float(base.model.config.attention_dropout),  # type: ignore[union-attr, arg-type]
        device="cuda" if device.type == "cuda" else "cpu",
    )
    length = recipe.model.max_length
    rows = min(max(1, _max_tokens(recipe, base, dtype) // length), recipe.train.batch_size)
    if device.type == "cuda" and recipe.train.max_tokens_per_micro_batch is None:
        # A whole step, where memory allows: no more than an evaluation takes at once.
        most = max(1, inference_tokens(device.type) // length)
        rows = min(math.ceil(recipe.train.batch_size / num_processes), most)
    return measure_quantisation(
        base,
        plan,
        engine=recipe.train.engine,
        rows=rows,
        length=length,
        batch_size=recipe.train.batch_size,
        input_ids=_probe_ids(base, length),
        dtype=dtype,
        device=device,
    )


def _max_tokens(recipe: Recipe, base: Base, dtype: torch.dtype) -> int:
    return recipe.train.max_tokens_per_micro_batch or micro_batch_tokens(
        base.shape,
        max_length=recipe.model.max_length,
        element_bytes=dtype.itemsize,
        checkpointing=recipe.train.gradient_checkpointing,
    )


def _measure_max_tokens(
    recipe: Recipe, model: nn.Module, accelerator: Accelerator, num_steps: int
) -> int:
    """Return the most tokens of a micro-batch on a GPU: a whole step where its memory allows."""
    reason = why_not_graphs(model, recipe.train, device=accelerator.device, num_steps=num_steps)
    max_tokens = choose_max_tokens(
        model,
        accelerator=accelerator,
        max_length=recipe.model.max_length,
        batch_size=math.ceil(recipe.train.batch_size / accelerator.num_processes),
        graphs=reason is None,
    )
    reset_peak_memory(accelerator.device)
    return max_tokens


def _choose_engine(model: nn.Module, wanted: str, dtype: torch.dtype) -> str:
    """Put the fast encoder in place where it is exact; say why where it is not."""
    if wanted == "stock":
        return "stock"
    reason = use_fast_encoder(model, compute_dtype=dtype)
    on_cuda = next(model.parameters()).device.type == "cuda"
    if on_cuda and not reason and (unfused := why_not_fused()):
        log.warning(
            "dropout, residual and LayerNorm run as three operations instead of one kernel: %s",
            unfused,
        )
    if reason and wanted == "fast":
        raise ModelError(f"train.engine=fast cannot run here: {reason}; set train.engine=auto")
    return f"stock ({reason})" if reason else "fast"


def _encode(rows: Rows, setup: _Setup, recipe: Recipe, accelerator: Accelerator) -> Encoded:
    model = recipe.model
    encoder = TextEncoder.of(
        setup.base.tokenizer, max_length=model.max_length, truncation=model.truncation
    )
    # The first process of a machine tokenises; the others then find the ids of many rows where it has kept them.
    with accelerator.local_main_process_first():
        return encoder.encode(rows, progress=accelerator.is_main_process)


def _describe_seen(data: Data, encoded: Mapping[str, Encoded], recipe: Recipe) -> DataReport:
    """Say what train and validation look like; what is judged is read at the end, or by `lora-sentiment data`."""
    described = describe_seen(data, encoded, max_length=recipe.model.max_length)
    for line in described.to_lines():
        log.info("%s", line)
    return described


def _save_adapter(
    recipe: Recipe,
    setup: _Setup,
    accelerator: Accelerator,
    folder: Path,
    calibration: dict[str, float],
) -> adapter_folder.Card:
    """Write weights, tokenizer and card, and hold the rebuilt model against the trained one."""
    data = setup.data
    with accelerator.autocast():
        trained = adapter_folder.compute_probe(
            setup.model.eval(), _probe_ids(setup.base, recipe.model.max_length)
        )
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return adapter_folder.save(
        folder,
        setup.model,
        base=setup.base,
        labels=data.labels,
        model_config=recipe.model,
        method=recipe.method,
        data=adapter_folder.DataRecord(
            config=recipe.data,
            train_sha256=data.train.fingerprint,
            validation_sha256=data.validation.fingerprint,
            carved_test_sha256=data.carved_test.fingerprint if data.carved_test else None,
        ),
        machine=describe_machine(setup.dtype, max_tokens=setup.max_tokens),
        offline=setup.offline,
        calibration=calibration,
        trained=trained,
        # bf16 keeps eight bits of a value; the rebuilt model is fp32.
        tolerance=1e-4 if setup.dtype == torch.float32 else 0.1,
    )


def _judge(
    recipe: Recipe,
    setup: _Setup,
    verdict: _Verdict,
    accelerator: Accelerator,
    calibration: dict[str, float],
) -> None:
    """Score validation and every judged role; this is the one place where what is judged is read."""
    data = setup.data
    rows = {"test": data.carved_test} if data.carved_test else {}
    reading: dict[str, Counts] = {}
    for role in data.judged:
        try:
            found, reading[role] = load_judged(recipe.data, role=role, labels=data.labels)
        except DataError as error:
            verdict.faults[role] = error
            continue
        if found is None:
            verdict.data.unlabelled[role] = reading[role].read
            log.warning("%s", verdict.data.to_lines([role])[0])
        else:
            rows[role] = found
    verdict.fingerprints |= {role: judged.fingerprint for role, judged in rows.items()}
    # Row numbers alone: the messages name files, whose paths may differ between machines.
    bad_rows = {role: fault.rows for role, fault in verdict.faults.items()}
    refuse_differences(verdict.fingerprints | {"list of bad rows": bad_rows})
    for role, judged in rows.items():
        verdict.encoded[role] = _encode(judged, setup, recipe, accelerator)
        verdict.data.roles[role] = describe_role(
            judged,
            verdict.encoded[role],
            names=data.labels,
            max_length=recipe.model.max_length,
            read=reading.get(role),
            seen_texts=data.seen_texts,
        )
        verdict.logits[role] = _predict(setup, verdict.encoded[role], role, accelerator)
    for line in verdict.data.to_lines(list(rows)):
        log.info("%s", line)
    for role, logits in verdict.logits.items():
        verdict.scores[role] = score_calibrated(
            logits, verdict.encoded[role].labels, calibration=calibration
        )
        log.info("%s: accuracy %s", role, show_interval(verdict.scores[role]["accuracy"].as_dict()))


def _refuse_faults(verdict: _Verdict, folder: Path) -> None:
    """Say at the very end what could not be judged: the run itself is saved."""
    if verdict.faults:
        faults = "\n".join(map(str, verdict.faults.values()))
        raise DataError(
            f"{faults}\nthe adapter is saved in {folder}, judged on {', '.join(verdict.scores)} only; mend the rows, "
            "or name others: lora-sentiment evaluate ADAPTER --source ROWS"
        ) from next(iter(verdict.faults.values()))


def _predict(
    setup: _Setup, rows: Encoded, role: str, accelerator: Accelerator
) -> NDArray[np.float32]:
    bar = role if accelerator.is_main_process else None
    return predict_logits(setup.model, rows, accelerator=accelerator, progress=bar)


def _save_report(
    recipe: Recipe,
    setup: _Setup,
    card: adapter_folder.Card,
    history: History,
    verdict: _Verdict,
    folder: Path,
) -> dict[str, Any]:
    """Write report, model card and pictures beside the adapter; return the report."""
    report = make_report(
        scores=verdict.scores,
        parameters=_counts(recipe, setup.base, setup.data),
        adapter_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        history=history,
        engine=setup.engine,
        data=verdict.data,
        quantisation=setup.quantisation,
        offline=setup.offline,
        peak_memory_bytes=max(
            setup.loading_peak, peak_memory(next(setup.model.parameters()).device)
        ),
    )
    if setup.quantisation:
        log.info("quantisation: %s", report["quantisation"]["verdict"])
    write_json(folder / "report.json", report)
    found = {
        role: Predictions(logits, verdict.encoded[role].labels, verdict.fingerprints[role])
        for role, logits in verdict.logits.items()
    }
    save_predictions(folder, found)
    is_peft = isinstance(recipe.method, PeftMethod)
    (folder / "README.md").write_text(
        make_model_card(recipe.name, card, report, is_peft=is_peft), encoding="utf-8"
    )
    plot_training(history, folder / "training.png", title=recipe.name)
    # Validation stands first: without a role to judge it is the last.
    role = "test" if "test" in verdict.logits else list(verdict.logits)[-1]
    labels = setup.data.labels
    matrix = confusion_matrix(
        verdict.encoded[role].labels, verdict.logits[role].argmax(axis=1), len(labels)
    )
    plot_confusion(matrix, folder / "confusion.png", labels=labels, title=f"{recipe.name}: {role}")
    return report


def _probe_ids(base: Base, max_length: int) -> list[list[int]]:
    texts = probe_texts()
    rows = Rows(texts, np.zeros(len(texts), dtype=np.int64), np.arange(len(texts)))
    length = min(PROBE_TOKENS, max_length)
    encoded = TextEncoder.of(base.tokenizer, max_length=length, truncation="head").encode(rows)
    return [part.tolist() for part in np.split(encoded.input_ids, encoded.offsets[1:-1])]


if __name__ == "__main__":
    import sys

    from lora_sentiment.cli import main

    main(["train", *sys.argv[1:]])
