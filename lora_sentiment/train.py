"""The training run, from a recipe to a verified adapter folder.

accelerate launch -m lora_sentiment.train RECIPE [key=value ...]
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import nn

from lora_sentiment.adapter import folder as adapter_folder
from lora_sentiment.adapter.card import make_model_card
from lora_sentiment.adapter.parent import (
    Parent,
    choose_labels,
    compare_with_parent,
    get_parent_tensors,
    load_parent,
    resolve_parent,
    start_adapters,
    start_base,
)
from lora_sentiment.adapter.predictions import Predictions, save_predictions
from lora_sentiment.adapter.report_page import REPORT_PAGE, make_report_page
from lora_sentiment.bundled import probe_texts
from lora_sentiment.data.batches import Encoded, TextEncoder
from lora_sentiment.data.report import (
    DataReport,
    describe_judged,
    describe_seen,
    describe_unlabelled,
    log_warnings,
    report_lines,
)
from lora_sentiment.data.rows import Data, Rows, load_all_judged, load_data
from lora_sentiment.data.sources import Source, make_source, mark_as_given
from lora_sentiment.errors import (
    DRAWING_FAULTS,
    DataError,
    ModelError,
    TrainingError,
    one_line,
)
from lora_sentiment.evaluation.metric import show_metric
from lora_sentiment.evaluation.statistics import Interval, show_interval
from lora_sentiment.fast import use_fast_encoder, why_not_fused
from lora_sentiment.files import publish, write_file_aside, write_json
from lora_sentiment.models.dtype import resolve_dtype
from lora_sentiment.models.families import resolve_targets
from lora_sentiment.models.inference import make_fast, predict_logits
from lora_sentiment.models.load import Base, check_base, hash_tensors, hash_tokenizer, load_base
from lora_sentiment.models.memory import Plan
from lora_sentiment.models.parameters import ParameterCounts
from lora_sentiment.models.quantisation import Quantisation, measure_quantisation
from lora_sentiment.models.sizes import count_parameters
from lora_sentiment.models.token_limits import inference_tokens, micro_batch_tokens
from lora_sentiment.models.wrap import (
    checkpoint_activations,
    frozen_tensors,
    head_layers,
    make_head_dense,
    make_trainable,
    refuse_unfit,
)
from lora_sentiment.recipe.method import PeftMethod
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks import find_task
from lora_sentiment.tasks.label_sets import LABEL_SCORES, describe_short_labels, fit_label_scores
from lora_sentiment.tasks.task import Calibration, Objective, get_temperature
from lora_sentiment.training.checkpoint import Store
from lora_sentiment.training.history import EvalPoint, History
from lora_sentiment.training.loop import fit, why_not_graphs
from lora_sentiment.training.micro_batch import choose_max_tokens
from lora_sentiment.training.offline import resolve_offline
from lora_sentiment.training.optimizer import count_steps
from lora_sentiment.training.processes import (
    describe_machine,
    explain_lost_process,
    join_launch,
    make_accelerator,
    refuse_differences,
)
from lora_sentiment.training.report import (
    make_report,
    peak_memory,
    reset_peak_memory,
    show_progress,
)
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
        adapter: The adapter folder.
        history: Every step and evaluation.
        report: The content of report.json; empty on all processes but the main one.
    """

    adapter: Path
    history: History
    report: dict[str, Any]


@dataclass
class _Setup:
    """The data and the model of a run."""

    data: Data
    base: Base
    model: nn.Module
    parameters: ParameterCounts
    dtype: torch.dtype
    engine: str
    max_tokens: int
    quantisation: Quantisation | None
    loading_peak: int
    parent: adapter_folder.Card | None


@dataclass
class _Results:
    """The rows, logits and scores of a trained model, each by role."""

    report: DataReport
    encoded: dict[str, Encoded]
    logits: dict[str, NDArray[np.float32]]
    fingerprints: dict[str, str]
    numbers: dict[str, NDArray[np.int64]]
    scores: dict[str, Mapping[str, Interval]] = field(default_factory=dict)
    faults: dict[str, DataError] = field(default_factory=dict)
    parent: dict[str, Any] | None = None


def train(
    recipe: Recipe,
    *,
    data: Mapping[str, Any] | Data | None = None,
    allow_changes: bool = False,
    judge: bool = True,
    on_evaluation: Callable[[Sequence[EvalPoint]], None] | None = None,
    end_launch: bool = True,
) -> Run:
    """Train a recipe and write its adapter folder.

    Every process of a launch calls this; the main one writes.

    Args:
        recipe: The recipe. Its `train.resume` says whether a stopped run is resumed.
        data: Role to its table: a pandas DataFrame, a `datasets.Dataset` or a list of dicts. The
            roles are those of `data.source`, which is not read then. Each process of a launch
            gives the same tables. Or the rows themselves, as `load_data` reads them.
        allow_changes: Resume although recipe, data, versions or machine differ from those of the
            checkpoint.
        judge: Whether the rows that chose nothing are judged at the end. False leaves them unread.
        on_evaluation: Called on every process after each evaluation, with all of the run. What it
            raises ends the run, which leaves no adapter.
        end_launch: Disconnect the processes of a launch at the end. False lets another `train`
            follow.

    Raises:
        LoraSentimentError: For a mistake in recipe, launch, data, base or run.
        StoppedError: If SIGTERM or SIGINT stopped the training, after a checkpoint was saved.
    """
    source: Source | Data | None = None
    if data is not None:
        source = data if isinstance(data, Data) else make_source(data, for_training=True)
        recipe = recipe.model_copy(update={"data": mark_as_given(recipe.data)})
    state = join_launch()
    with explain_lost_process(state):
        recipe, offline = resolve_offline(recipe)
        with lock_run_folder(recipe) as run_folder, explain_full_disk(run_folder):
            accelerator = make_accelerator(
                state,
                recipe.model.dtype,
                report_to=recipe.train.report_to,
                run_folder=run_folder,
            )
            run = _run(
                recipe,
                accelerator,
                run_folder,
                offline,
                source,
                judge=judge,
                allow_changes=allow_changes,
                on_evaluation=on_evaluation,
            )
    if end_launch:
        state.destroy_process_group()
    return run


def _run(
    recipe: Recipe,
    accelerator: Accelerator,
    run_folder: Path,
    offline: str | None,
    source: Source | Data | None,
    *,
    judge: bool,
    **fitting: Any,
) -> Run:
    """Load, train, save, evaluate and publish."""
    dtype = resolve_dtype(recipe.model.dtype, accelerator.device)
    recipe = resolve_parent(recipe)
    method = resolve_targets(recipe.method, check_base(recipe.model))
    recipe = recipe.model_copy(update={"method": method})
    refuse_unfit(recipe.method, recipe.model, dtype=dtype, device=accelerator.device)
    parent = None
    if recipe.model.adapter is not None:
        parent = load_parent(recipe, device=accelerator.device)
    data = _load_data(recipe, source)
    setup = _load_model(recipe, data, dtype, accelerator, parent)
    encoded = {role: _encode(rows, setup, recipe, accelerator) for role, rows in data.seen.items()}
    data_report = describe_seen(data, encoded, max_length=recipe.model.max_length)
    _log_lines(report_lines(data_report))
    log_warnings(data_report)

    history = _fit(recipe, setup, encoded, run_folder, accelerator, **fitting)
    logits = _predict(setup, encoded["validation"], "validation", accelerator)
    task = find_task(recipe.data.task)
    calibration, fitted = task.calibrate(logits, encoded["validation"].labels, data.labels)
    if fitted:
        log.info("%s", fitted)
    if "calibration" in encoded:
        unchosen = _predict(setup, encoded["calibration"], "calibration", accelerator)
        scores = task.compute_scores(unchosen, temperature=get_temperature(calibration) or 1.0)
        label_scores = fit_label_scores(scores, encoded["calibration"].labels)
        calibration = {**(calibration or {}), LABEL_SCORES: label_scores}
        short = describe_short_labels(calibration, 0.95, data.labels)
        log.info(
            "label sets: calibrated on rows that chose nothing; %s", short or "enough for 95 %"
        )

    # The adapter is saved before the judged rows are read: a bad row there must not cost the run.
    folder, card = run_folder, None
    if accelerator.is_main_process:
        folder = make_adapter_folder(run_folder)
        card = _save_adapter(recipe, setup, accelerator, folder, calibration, offline)
    results = _Results(
        data_report,
        encoded,
        {"validation": logits},
        {"validation": data.validation.fingerprint},
        {"validation": data.validation.numbers},
    )
    if judge:
        _predict_judged(recipe, setup, results, accelerator)
    for role, role_logits in results.logits.items():
        labels = encoded[role].labels
        results.scores[role] = task.score(
            role_logits, labels, names=data.labels, calibration=calibration
        )
        best_known = task.shown[0]
        shown = show_interval(results.scores[role][best_known].as_dict())
        log.info("%s: %s %s", role, show_metric(best_known), shown)
    if setup.parent:
        results.parent = _compare_with_parent(recipe, setup, results, calibration, accelerator)

    report: dict[str, Any] = {}
    if card is not None:
        report = _save_report(recipe, setup, card, history, results, folder, offline)
        publish(folder, recipe.folder, overwrite=recipe.output.overwrite)
        remove_checkpoints(run_folder)
        log.info("saved and verified: %s", recipe.folder)
        _draw(recipe, card, history, results, run_folder)
    if offline:
        log.warning("%s", offline)
    for tracker in accelerator.trackers:
        tracker.finish()
    _refuse_faults(results, recipe.folder)
    return Run(recipe.folder, history, report)


# Load


def _load_data(recipe: Recipe, source: Source | Data | None) -> Data:
    labels = choose_labels(recipe)
    data = (
        source if isinstance(source, Data) else load_data(recipe.data, labels=labels, source=source)
    )
    log.info(
        "training on %s rows, validating on %s", f"{len(data.train):,}", f"{len(data.validation):,}"
    )
    # Before the base is loaded, which takes time that a wrong setting should not cost.
    task = find_task(recipe.data.task)
    task.check_metric(
        recipe.train.metric_for_best_model, labels=data.validation.labels, names=data.labels
    )
    sentence = task.describe_objective(recipe.train, labels=data.train.labels, names=data.labels)
    if sentence:
        log.info("%s", sentence)
    return data


def _load_model(
    recipe: Recipe,
    data: Data,
    dtype: torch.dtype,
    accelerator: Accelerator,
    parent: Parent | None,
) -> _Setup:
    """Load the base and make it trainable on this process's device."""
    device = accelerator.device
    set_seed(recipe.train.seed)
    head_type = find_task(recipe.data.task).head_type
    base = load_base(recipe.model, labels=data.labels, problem_type=head_type, device=device)
    loading_peak = peak_memory(device)
    quantisation = None
    if recipe.model.quantize != "none":
        quantisation = _measure_quantisation(
            recipe, base, dtype, device, num_processes=accelerator.num_processes
        )
        log.info("quantisation: %s", quantisation.verdict)
        # The peak held an unquantised base for the measurement, which is not the run's.
        reset_peak_memory(device)
    num_steps = count_steps(len(data.train), recipe.train)
    tensors = {}
    if parent:
        tensors = get_parent_tensors(parent)
        base = start_base(base, parent.card, tensors)
    model = make_trainable(base, recipe.method, recipe.model, dtype=dtype, num_steps=num_steps)
    model = model.to(device)
    if parent:
        start_adapters(model, tensors)
        objective = _make_objective(recipe, data, accelerator)
        objective.unfold_from(_last_layer(model))
    parameters = count_parameters(model)
    head = "new head" if base.new_head else "its own head"
    if parent:
        head = f"head and tensors of {parent.folder}, {parent.card.sha256[:12]}"
    log.info("base %s (%s): %s", base.name, head, parameters)
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(model)
    engine = _choose_engine(model, recipe.train.engine, dtype)
    if device.type == "cuda" and recipe.train.max_tokens_per_micro_batch is None:
        max_tokens = _measure_max_tokens(recipe, model, accelerator, num_steps)
    else:
        max_tokens = _max_tokens(recipe, base, dtype)
    log.info(
        "%s on %s, %s engine, micro-batches of at most %s tokens",
        dtype,
        device,
        engine,
        f"{max_tokens:,}",
    )
    return _Setup(
        data,
        base,
        model,
        parameters,
        dtype,
        engine,
        max_tokens,
        quantisation,
        loading_peak,
        parent.card if parent else None,
    )


def _measure_quantisation(
    recipe: Recipe,
    base: Base,
    dtype: torch.dtype,
    device: torch.device,
    *,
    num_processes: int,
) -> Quantisation:
    """Compare a quantised base with the unquantised one, before anything is wrapped around it."""
    plan = Plan(
        base.config,
        recipe.method,
        recipe.model,
        engine=recipe.train.engine,
        dtype=dtype,
        checkpointing=recipe.train.gradient_checkpointing,
        device="cuda" if device.type == "cuda" else "cpu",
    )
    length = recipe.model.max_length
    rows = min(max(1, _max_tokens(recipe, base, dtype) // length), recipe.train.batch_size)
    if device.type == "cuda" and recipe.train.max_tokens_per_micro_batch is None:
        # A whole step where memory allows, but no more than one batch of an evaluation.
        most = max(1, inference_tokens(device.type) // length)
        rows = min(math.ceil(recipe.train.batch_size / num_processes), most)
    return measure_quantisation(
        base,
        plan,
        rows=rows,
        length=length,
        batch_size=recipe.train.batch_size,
        input_ids=_probe_ids(base, length),
        dtype=dtype,
        device=device,
    )


def _max_tokens(recipe: Recipe, base: Base, dtype: torch.dtype) -> int:
    return recipe.train.max_tokens_per_micro_batch or micro_batch_tokens(
        base.config,
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


def _choose_engine(model: nn.Module, engine: str, dtype: torch.dtype) -> str:
    """Use the fast encoder where it is exact; return the engine, and why it is not the fast one."""
    if engine == "stock":
        return "stock"
    reason = use_fast_encoder(model, compute_dtype=dtype)
    if reason and engine == "fast":
        raise ModelError(f"train.engine=fast cannot run here: {reason}; set train.engine=auto")
    if reason:
        return f"stock ({reason})"
    if next(model.parameters()).device.type == "cuda":
        unfused = why_not_fused()
        if unfused:
            log.warning(
                "dropout, residual and LayerNorm run as three operations instead of one kernel: %s",
                unfused,
            )
    return "fast"


def _encode(rows: Rows, setup: _Setup, recipe: Recipe, accelerator: Accelerator) -> Encoded:
    encoder = TextEncoder.of(
        setup.base.tokenizer,
        max_length=recipe.model.max_length,
        truncation=recipe.model.truncation,
        reads_pairs=recipe.data.reads_pairs,
        has_types=setup.base.family.token_types,
    )
    # The first process of a machine tokenises; the others read the ids that it kept.
    with accelerator.local_main_process_first():
        return encoder.encode(rows, progress=accelerator.is_main_process)


# Train


def _fit(
    recipe: Recipe,
    setup: _Setup,
    encoded: Mapping[str, Encoded],
    run_folder: Path,
    accelerator: Accelerator,
    *,
    allow_changes: bool,
    on_evaluation: Callable[[Sequence[EvalPoint]], None] | None,
) -> History:
    """Train the model and leave it with its best tensors and a dense head."""
    frozen = hash_tensors(frozen_tensors(setup.model).items())
    settings = _settings(recipe, setup, frozen_sha256=frozen)
    refuse_differences(settings)
    # From here on the global generator draws dropout: each process has its own masks, and the same
    # ones in each run.
    torch.manual_seed(recipe.train.seed + accelerator.process_index)
    history = fit(
        setup.model,
        train=encoded["train"],
        validation=encoded["validation"],
        numbers=setup.data.train.numbers,
        task=find_task(recipe.data.task),
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
        on_evaluation=on_evaluation,
    )
    if hash_tensors(frozen_tensors(setup.model).items()) != frozen:
        raise TrainingError(
            "a frozen tensor of the base changed during training; nothing was saved; please report "
            "this"
        )
    make_head_dense(setup.model)
    _make_objective(recipe, setup.data, accelerator).fold_into(_last_layer(setup.model))
    setup.max_tokens = history.max_tokens  # lower where memory ran out
    return history


def _make_objective(recipe: Recipe, data: Data, accelerator: Accelerator) -> Objective:
    return find_task(recipe.data.task).make_objective(
        recipe.train, labels=data.train.labels, names=data.labels, device=accelerator.device
    )


def _last_layer(model: nn.Module) -> nn.Linear:
    *_, last = head_layers(model).values()
    return cast(nn.Linear, last)


def _settings(recipe: Recipe, setup: _Setup, *, frozen_sha256: str) -> dict[str, Any]:
    """Return the values that must be equal to resume the run."""
    facts = {
        "engine": setup.engine,
        "num_steps": count_steps(len(setup.data.train), recipe.train),
        "labels": list(setup.data.labels),
        "train_sha256": setup.data.train.fingerprint,
        "validation_sha256": setup.data.validation.fingerprint,
        "base_sha256": setup.base.sha256,
        "frozen_sha256": frozen_sha256,
        "tokenizer_sha256": hash_tokenizer(setup.base.tokenizer),
    }
    if setup.parent:
        facts["parent_sha256"] = setup.parent.sha256
    max_tokens: int | None = setup.max_tokens
    device = next(setup.model.parameters()).device
    if device.type == "cuda" and recipe.train.max_tokens_per_micro_batch is None:
        # Measured, so other free memory must not stop a resume. The checkpoint keeps the value.
        max_tokens = None
    machine = describe_machine(setup.dtype, max_tokens=max_tokens)
    config: Any = setup.base.model.config
    return make_settings(recipe, facts, machine=machine, base=config.to_dict())


# Save and evaluate


def _save_adapter(
    recipe: Recipe,
    setup: _Setup,
    accelerator: Accelerator,
    folder: Path,
    calibration: Calibration | None,
    offline: str | None,
) -> adapter_folder.Card:
    """Write weights, tokenizer and card, and compare the reloaded model with the trained one."""
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
            config=data.config,
            train_sha256=data.train.fingerprint,
            validation_sha256=data.validation.fingerprint,
            carved_test_sha256=data.carved_test.fingerprint if data.carved_test else None,
        ),
        machine=describe_machine(setup.dtype, max_tokens=setup.max_tokens),
        offline=offline,
        parent_sha256=setup.parent.sha256 if setup.parent else None,
        calibration=calibration,
        trained=trained,
        # The reloaded model is fp32. bf16 keeps eight bits of a value.
        tolerance=1e-4 if setup.dtype == torch.float32 else 0.1,
    )


def _probe_ids(base: Base, max_length: int) -> list[list[int]]:
    texts = probe_texts()
    rows = Rows(texts, np.zeros(len(texts), dtype=np.int64), np.arange(len(texts)))
    length = min(PROBE_TOKENS, max_length)
    encoded = TextEncoder.of(base.tokenizer, max_length=length, truncation="head").encode(rows)
    return [part.tolist() for part in np.split(encoded.input_ids, encoded.offsets[1:-1])]


def _predict_judged(
    recipe: Recipe, setup: _Setup, results: _Results, accelerator: Accelerator
) -> None:
    """Read the judged roles, which happens nowhere else in a run, and predict them."""
    judged = load_all_judged(recipe.data, setup.data)
    results.faults = judged.faults
    results.report |= describe_unlabelled(judged.unlabelled)
    for line in report_lines(results.report, list(judged.unlabelled)):
        log.warning("%s", line)
    for role, rows in judged.rows.items():
        results.fingerprints[role] = rows.fingerprint
    # Row numbers alone: the messages name files, whose paths may differ between machines.
    bad_rows = {role: fault.rows for role, fault in judged.faults.items()}
    refuse_differences(results.fingerprints | {"list of bad rows": bad_rows})
    for role, rows in judged.rows.items():
        encoded = _encode(rows, setup, recipe, accelerator)
        results.encoded[role] = encoded
        results.numbers[role] = rows.numbers
        results.report[role] = describe_judged(
            setup.data, judged, role, encoded, max_length=recipe.model.max_length
        )
        results.logits[role] = _predict(setup, encoded, role, accelerator)
    _log_lines(report_lines(results.report, list(judged.rows)))
    log_warnings(results.report, list(judged.rows))


def _predict(
    setup: _Setup, rows: Encoded, role: str, accelerator: Accelerator
) -> NDArray[np.float32]:
    progress = role if accelerator.is_main_process else None
    return predict_logits(setup.model, rows, accelerator=accelerator, progress=progress)


def _compare_with_parent(
    recipe: Recipe,
    setup: _Setup,
    results: _Results,
    calibration: Calibration | None,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Let the parent answer the rows of validation and of the judged roles, and compare."""
    task, device = find_task(recipe.data.task), accelerator.device
    parent = load_parent(recipe, device=device)
    model = make_fast(parent.model, dtype=setup.dtype, device=device)
    old_names = tuple(parent.card.labels)
    compared: dict[str, Any] = {
        "sha256": parent.card.sha256,
        "new_labels": list(setup.data.labels[len(old_names) :]),
    }
    for role, logits in results.logits.items():
        encoded = results.encoded[role]
        before = predict_logits(model, encoded, accelerator=accelerator)
        compared[role] = compare_with_parent(
            task,
            (before, parent.card.calibration),
            (logits, calibration),
            encoded.labels,
            old_names=old_names,
            names=setup.data.labels,
        )
        log.info("%s: %s", role, show_progress(compared[role]))
    return compared


def _save_report(
    recipe: Recipe,
    setup: _Setup,
    card: adapter_folder.Card,
    history: History,
    results: _Results,
    folder: Path,
    offline: str | None,
) -> dict[str, Any]:
    """Write report, predictions and model card beside the adapter; return the report."""
    device = next(setup.model.parameters()).device
    report = make_report(
        scores=results.scores,
        parameters=setup.parameters,
        adapter_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        history=history,
        engine=setup.engine,
        data=results.report,
        quantisation=setup.quantisation,
        offline=offline,
        peak_memory_bytes=max(setup.loading_peak, peak_memory(device)),
        parent=results.parent,
    )
    if setup.quantisation:
        log.info("quantisation: %s", report["quantisation"]["verdict"])
    write_json(folder / "report.json", report)
    predictions = {}
    for role, logits in results.logits.items():
        labels = results.encoded[role].labels
        predictions[role] = Predictions(logits, labels, results.fingerprints[role])
    save_predictions(folder, predictions)
    is_peft = isinstance(recipe.method, PeftMethod)
    model_card = make_model_card(recipe.name, card, report, is_peft=is_peft)
    (folder / "README.md").write_text(model_card, encoding="utf-8")
    return report


def _draw(
    recipe: Recipe,
    card: adapter_folder.Card,
    history: History,
    results: _Results,
    run_folder: Path,
) -> None:
    """Draw the pictures and the page of a finished adapter. One that fails is a warning."""
    # Validation comes first, so it is the last role if no other was judged.
    role = "test" if "test" in results.logits else list(results.logits)[-1]
    task = find_task(recipe.data.task)
    title = f"{recipe.name}: {role}"
    pictures = ("training.png", task.picture)
    missing = []
    for name in (*pictures, REPORT_PAGE):
        try:
            # Late, because matplotlib may be broken, and that must not cost a training.
            from lora_sentiment.evaluation.plots import plot_training

            with write_file_aside(recipe.folder / name, folder=run_folder) as picture:
                if name == REPORT_PAGE:
                    page = make_report_page(
                        recipe.name,
                        card,
                        role,
                        results.logits[role],
                        results.encoded[role],
                        results.numbers[role],
                        scores=results.scores,
                        pictures={
                            "training curve": recipe.folder / "training.png",
                            task.picture_text: recipe.folder / task.picture,
                        },
                        data=report_lines(results.report),
                    )
                    picture.write_text(page, encoding="utf-8")
                elif name == "training.png":
                    plot_training(history, picture, title=recipe.name)
                else:
                    task.draw(
                        results.logits[role],
                        results.encoded[role].labels,
                        picture,
                        names=card.labels,
                        title=title,
                        calibration=card.calibration,
                    )
        except DRAWING_FAULTS as error:
            reason = one_line(str(error)) or type(error).__name__
            log.warning("%s cannot be drawn: %s; the adapter is complete without it", name, reason)
            missing.append(name)
    if missing:
        try:
            _leave_out_pictures(recipe.folder / "README.md", missing, run_folder)
        except OSError as error:
            log.warning("README.md still shows %s: %s", ", ".join(missing), error.strerror)


def _leave_out_pictures(model_card: Path, names: list[str], run_folder: Path) -> None:
    """Remove the paragraphs of a model card that show these pictures."""
    kept = []
    for paragraph in model_card.read_text(encoding="utf-8").split("\n\n"):
        if not any(f"]({name})" in paragraph for name in names):
            kept.append(paragraph)
    with write_file_aside(model_card, folder=run_folder) as aside:
        aside.write_text("\n\n".join(kept), encoding="utf-8")


def _refuse_faults(results: _Results, folder: Path) -> None:
    """Report the roles that could not be judged, after everything else was saved."""
    if not results.faults:
        return
    faults = list(results.faults.values())
    lines = "\n".join(map(str, faults))
    raise DataError(
        f"{lines}\nthe adapter is saved in {folder}, judged on {', '.join(results.scores)} only; "
        "correct the rows, or name others: lora-sentiment evaluate ADAPTER --source ROWS"
    ) from faults[0]


def _log_lines(lines: list[str]) -> None:
    for line in lines:
        log.info("%s", line)


if __name__ == "__main__":
    import sys

    from lora_sentiment.cli import main

    main(["train", *sys.argv[1:]])
