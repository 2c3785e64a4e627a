"""The training loop: optimizer steps, evaluations, checkpoints, and the best tensors."""

import logging
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from numpy.typing import NDArray
from torch import nn

from lora_sentiment.console import make_bar
from lora_sentiment.data.batches import Encoded, plan_epoch, shard
from lora_sentiment.data.packing import choose_sizes, plan_packing
from lora_sentiment.errors import DivergedError, StoppedError, TrainingError
from lora_sentiment.evaluation.metric import show_metric
from lora_sentiment.fast import GraphRunner, takes_packed_rows
from lora_sentiment.models.inference import packs_rows, predict_logits
from lora_sentiment.models.wrap import (
    after_step,
    is_settled,
    learning_rate_ratios,
    penalty,
    trainable_tensors,
)
from lora_sentiment.recipe.method import Method
from lora_sentiment.recipe.train import TrainConfig
from lora_sentiment.tasks.task import Task
from lora_sentiment.training.backward import Backward, PackedBackward, PaddedBackward
from lora_sentiment.training.checkpoint import (
    Checkpoint,
    Progress,
    Store,
    load_checkpoint,
    save_checkpoint,
)
from lora_sentiment.training.history import (
    EvalPoint,
    History,
    MetricsFile,
    TrainPoint,
    hide_later_steps,
)
from lora_sentiment.training.optimizer import (
    GraphedUpdate,
    count_steps,
    make_optimizer,
    make_schedule,
)
from lora_sentiment.training.processes import run_on_main
from lora_sentiment.training.signals import StopSignals, is_out_of_memory
from lora_sentiment.training.state import (
    get_ranks,
    get_rng_state,
    get_training_state,
    set_ranks,
    set_rng_state,
    set_training_state,
)

log = logging.getLogger("lora_sentiment")

MAX_SKIPPED_STEPS = 20
"""Optimizer steps in a row that fp16's loss scaling may skip before the run ends with an error."""
GPU_READ_STEPS = 50
"""Steps on a GPU between two readings of losses and norms. A reading waits for the GPU."""
MIN_STEPS_FOR_GRAPHS = 3
"""Least steps of a run with CUDA graphs: of each size, the first runs eagerly, the second is
captured."""


def why_not_graphs(
    model: nn.Module, config: TrainConfig, *, device: torch.device, num_steps: int
) -> str | None:
    """Return why steps are not replayed as CUDA graphs, or None where they are.

    Args:
        model: With its forward pass in place.
        config: The recipe's `train` section.
        device: Where the model is.
        num_steps: Optimizer steps of the run.
    """
    if config.cuda_graphs == "off":
        return "train.cuda_graphs=off"
    if device.type != "cuda":
        return f"the device is {device.type}"
    if not takes_packed_rows(model):
        return "the stock forward pass runs"
    if config.gradient_checkpointing:
        return "train.gradient_checkpointing saves generator states on the host"
    if num_steps < MIN_STEPS_FOR_GRAPHS:
        return f"the run has {num_steps} steps"
    return None


def fit(
    model: nn.Module,
    *,
    train: Encoded,
    validation: Encoded,
    numbers: NDArray[np.int64],
    task: Task,
    config: TrainConfig,
    method: Method,
    accelerator: Accelerator,
    max_tokens: int,
    store: Store | None = None,
    on_evaluation: Callable[[Sequence[EvalPoint]], None] | None = None,
) -> History:
    """Train a model in place and leave it with the tensors that were best on validation.

    Args:
        model: On the accelerator's device, identical on every process.
        train: Rows to train on.
        validation: Rows that decide which tensors are best.
        numbers: Source row number of each training row, for messages, shape (num_rows,).
        task: The task of the labels.
        config: The recipe's `train` section.
        method: The recipe's `method` section: learning rates, and work between steps.
        accelerator: Exchanges gradients and logits between processes, scales fp16 losses, logs.
        max_tokens: Most padded tokens of a micro-batch; halved where memory runs out.
        store: Where checkpoints and `metrics.csv` are written. Without it there are none, and
            signals are not handled.
        on_evaluation: Called after each evaluation with all of them. What it raises ends the run.

    Raises:
        DivergedError: If a loss, a gradient or a logit is not finite.
        TrainingError: If one row does not fit into memory, or a checkpoint cannot be written or
            resumed from.
        StoppedError: If a signal stopped the run, after a checkpoint was saved.
    """
    loop = _Loop(
        model, train, validation, numbers, task, config, method, accelerator, max_tokens, store
    )
    loop.on_evaluation = on_evaluation
    try:
        with loop.signals if store else nullcontext():
            return loop.run()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"step {loop.done + 1}: memory ran out in the optimizer or an evaluation, where a "
            "smaller micro-batch does not help; train fewer tensors, or free memory, then the "
            f"same command with train.resume=auto resumes: {str(error).splitlines()[0]}"
        ) from error


@dataclass(frozen=True)
class _UnreadStep:
    """A step whose loss and gradient norm are still on the device; `tokens` are those so far."""

    step: int
    index: NDArray[np.int64]
    tokens: int
    learning_rate: float
    loss: torch.Tensor
    norm: torch.Tensor


class _Loop:
    """The state of one run between optimizer steps.

    Attributes:
        done: Optimizer steps so far.
        saved: The step of the last checkpoint.
        best: The best tensors so far.
        unread: Steps whose losses and norms were not read from the device.
        stop_signal: The signal that all processes know of; empty without one.
        on_evaluation: Called after each evaluation with all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Encoded,
        validation: Encoded,
        numbers: NDArray[np.int64],
        task: Task,
        config: TrainConfig,
        method: Method,
        accelerator: Accelerator,
        max_tokens: int,
        store: Store | None,
    ) -> None:
        self.model = model
        self.train = train
        self.validation = validation
        self.numbers = numbers
        self.task = task
        self.config = config
        self.method = method
        self.accelerator = accelerator
        self.store = store
        self.lengths = train.lengths
        device = accelerator.device

        names = list(model.config.id2label.values())  # type: ignore[union-attr, operator]
        self.objective = task.make_objective(
            config, labels=train.labels, names=names, device=device
        )

        self.parameters = trainable_tensors(model)
        self.steps_per_epoch = math.ceil(len(train) / config.batch_size)
        self.num_steps = count_steps(len(train), config)
        ratios = learning_rate_ratios(model, method)
        self.adamw = make_optimizer(self.parameters, config, ratios=ratios)
        # A prepared schedule would step num_processes times for each update.
        self.schedule = make_schedule(self.adamw, config, num_steps=self.num_steps)
        # After the schedule, which wraps `step`: with a gradient scaler Accelerate keeps `step`.
        self.optimizer = accelerator.prepare_optimizer(self.adamw)

        reason = why_not_graphs(model, config, device=device, num_steps=self.num_steps)
        self.graphs = self._make_graphs() if reason is None else None
        if device.type == "cuda":
            log.info("CUDA graphs: %s", "on" if reason is None else f"off, because {reason}")
        self.graphed_update = None
        if self.graphs and not accelerator.scaler:
            self.graphed_update = GraphedUpdate(
                self.adamw,
                list(self.parameters.values()),
                max_norm=config.max_grad_norm or math.inf,
                graphs=self.graphs,
            )

        self.history = History(max_tokens=max_tokens)
        self.metrics: MetricsFile | None = None
        self.best = self._copy_tensors()
        self.eval_metrics = task.evaluated
        self.sign = 1 if task.find_metric(config.metric_for_best_model).greater_is_better else -1
        self.best_metric = -math.inf
        self.waited = 0
        self.skipped = 0
        self.done = 0
        self.saved = 0
        self.unread: list[_UnreadStep] = []
        # fp16 needs each norm at once: it decides whether the step counts.
        reads_each = device.type == "cpu" or accelerator.scaler
        self.read_steps = 1 if reads_each else GPU_READ_STEPS
        self.signals = StopSignals()
        self.stop_signal = ""
        self.on_evaluation: Callable[[Sequence[EvalPoint]], None] | None = None

    @staticmethod
    def _make_graphs() -> GraphRunner:
        return GraphRunner()

    def run(self) -> History:
        """Take all steps that are left, evaluate and save when due, and set the best tensors."""
        with self._stream():
            self._resume()
            self._open_metrics()
            try:
                self._take_steps()
            finally:
                if self.metrics:
                    self.metrics.close()
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self.best[name])
                    parameter.grad = None
            if self.graphs:
                self.graphs.clear()
        return self.history

    def _stream(self) -> AbstractContextManager[None]:
        """Return a context in which a GPU's work is on a stream that can be captured."""
        if self.graphs is None or self.accelerator.device.type != "cuda":
            return nullcontext()
        return _own_stream(self.accelerator.device)

    def _open_metrics(self) -> None:
        if self.store and self.accelerator.is_main_process:
            self.metrics = MetricsFile(
                self.store.run_folder / "metrics.csv", self.history, metrics=self.eval_metrics
            )
            hide_later_steps(self.accelerator.trackers, self.done)

    def _take_steps(self) -> None:
        self.backward = self._make_backward()
        is_main = self.accelerator.is_main_process
        bar = make_bar(self.num_steps, desc="training", unit="step", show=is_main)
        self.model.train()
        with bar:
            bar.update(self.done)
            # A checkpoint is saved before the evaluation of its step, which may still be due.
            self._evaluate_if_due()
            for step, index in self._remaining_steps():
                if self.history.stopped_early:
                    break
                self._step(step, index)
                self.done = step
                bar.update()
                if not self.unread:
                    loss = f"{self.history.steps[-1].loss:.4f}"
                    speed = f"{self.history.tokens / self.history.seconds:,.0f}"
                    bar.set_postfix(loss=loss, tok_s=speed, refresh=False)
                self._save_if_due()
                self._evaluate_if_due()
        self._exchange_state((), failed=False)
        self._save_if_due()

    def _remaining_steps(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield the number and the rows, over all processes, of each step that is left."""
        first_epoch = self.done // self.steps_per_epoch
        step = first_epoch * self.steps_per_epoch
        for epoch in range(first_epoch, math.ceil(self.num_steps / self.steps_per_epoch)):
            plan = plan_epoch(
                self.lengths, batch_size=self.config.batch_size, seed=self.config.seed, epoch=epoch
            )
            for index in plan[: self.num_steps - step]:
                step += 1
                if step > self.done:
                    yield step, index

    def _is_due(self, every: int | None, step: int | None = None) -> bool:
        """Return whether an action of every so many steps, or once an epoch, follows a step.

        The last step of the run is followed by all of them. By default, `step` is the last one
        that was taken.
        """
        step = self.done if step is None else step
        return step % (every or self.steps_per_epoch) == 0 or step == self.num_steps

    # Steps

    def _step(self, step: int, index: NDArray[np.int64]) -> None:
        """Take one optimizer step with the gradient of the mean loss over its rows."""
        began = time.perf_counter()
        loss = self._reduce(self._gradients(step, index))
        learning_rate = float(self.schedule.get_last_lr()[0])
        norm = self._update(step)
        self.history.seconds += time.perf_counter() - began
        self.history.tokens += int(self.lengths[index].sum())
        tokens = self.history.tokens
        self.unread.append(_UnreadStep(step, index, tokens, learning_rate, loss, norm))
        is_due = self._is_due(self.config.eval_steps, step)
        if self.store:
            is_due = is_due or self._is_due(self.config.save_steps, step)
        if is_due or len(self.unread) >= self.read_steps:
            self._read()

    def _gradients(self, step: int, index: NDArray[np.int64]) -> torch.Tensor:
        """Fill this process's gradients and return its loss.

        Where memory runs out, halve the micro-batches and repeat the step.
        """
        own = shard(
            index,
            self.lengths,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        device = self.accelerator.device
        generators = get_rng_state(device)
        while True:
            parts = self.backward.cut(own, max_tokens=self.history.max_tokens)
            loss: torch.Tensor | None = None
            try:
                loss = self._backward(index, parts)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the `except` clause: the error holds all frames and so their tensors.
            too_large = self._exchange_state(parts, failed=loss is None)
            if loss is not None and too_large is None:
                return loss
            self._clear_gradients()
            if self.graphs:
                self.graphs.clear()
            clear_device_cache(garbage_collection=True)
            set_rng_state(generators, device)
            rows, tokens = too_large or (0, 0)
            self._halve_micro_batches(step, rows, tokens)
            self.backward = self._make_backward()

    def _backward(
        self, index: NDArray[np.int64], parts: Sequence[NDArray[np.int64]]
    ) -> torch.Tensor:
        """Add up the gradients of this process's micro-batches, and return their loss."""
        loss = torch.zeros((), device=self.accelerator.device)
        total = self.objective.total_weight(self.train.labels[index])
        for part in parts:
            loss += self.backward.add_gradients(part, total=total)
        extra = penalty(self.model, self.method)
        if extra is not None:
            # Gradients are summed over processes, and every process has the whole penalty.
            self.accelerator.backward(extra / self.accelerator.num_processes)
        return loss

    def _exchange_state(
        self, parts: Sequence[NDArray[np.int64]], *, failed: bool
    ) -> tuple[int, int] | None:
        """Tell all processes of a signal, and of memory that ran out, in any of them.

        Returns:
            Most rows and most tokens of a micro-batch where memory ran out; None where it did not.
        """
        rows, tokens = 0, 0
        if failed:
            rows = max(map(len, parts), default=0)
            tokens = max(map(self.backward.count_tokens, parts), default=0)
        number = int(signal.Signals[self.signals.name]) if self.signals.name else 0
        facts = [int(failed), rows, tokens, number]
        if self.accelerator.num_processes > 1:
            # GPUs are waited for once a step here. Exchange on the CPUs would need another network.
            own = torch.tensor([facts], device=self.accelerator.device)
            facts = self.accelerator.gather(own).max(dim=0).values.tolist()
        any_failed, rows, tokens, number = facts
        self.stop_signal = signal.Signals(number).name if number else ""
        return (rows, tokens) if any_failed else None

    def _halve_micro_batches(self, step: int, rows: int, tokens: int) -> None:
        """Halve the most tokens of a micro-batch, on every process alike."""
        if rows <= 1:
            raise TrainingError(
                f"step {step}: out of memory on a micro-batch of one row, {tokens:,} tokens long; "
                "lower model.max_length, set train.gradient_checkpointing=true, or use a machine "
                "with more memory"
            )
        self.history.max_tokens = min(self.history.max_tokens, tokens) // 2
        self.history.cuts.append((step, self.history.max_tokens))
        log.warning(
            "step %d: out of memory on a micro-batch of %s tokens; the step is repeated, and from "
            "now on a micro-batch has at most %s tokens",
            step,
            f"{tokens:,}",
            f"{self.history.max_tokens:,}",
        )

    def _reduce(self, loss: torch.Tensor) -> torch.Tensor:
        """Add up gradients and loss over all processes in one flat tensor; return the loss."""
        if self.accelerator.num_processes == 1:
            return loss
        gradients = []
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), loss.reshape(1)])
        flat = self.accelerator.reduce(flat, reduction="sum")
        *sums, total = flat.split([*(gradient.numel() for gradient in gradients), 1])
        for gradient, summed in zip(gradients, sums, strict=True):
            gradient.copy_(summed.view_as(gradient))
        # A view of the flat tensor would keep it until the loss is read.
        total_loss: torch.Tensor = total.squeeze().clone()
        return total_loss

    def _update(self, step: int) -> torch.Tensor:
        """Clip the gradients, step optimizer and schedule, and clear the gradients.

        Returns:
            The gradients' norm before they were clipped.
        """
        if self.graphed_update is not None:
            unclipped = self.graphed_update()
            self.schedule.step()
            return unclipped
        limit = self.config.max_grad_norm or math.inf
        norm: torch.Tensor = self.accelerator.clip_grad_norm_(list(self.parameters.values()), limit)
        # Where gradients overflow, fp16's scaler skips the step and halves the scale. With a fused
        # optimizer, Accelerate does not report that, so the norm decides.
        is_taken = self.accelerator.scaler is None or math.isfinite(float(norm))
        self.optimizer.step()
        if is_taken:
            after_step(self.model, self.method, step=step)
            self.schedule.step()
        self._clear_gradients()
        return norm

    def _clear_gradients(self) -> None:
        """Remove the gradients. With CUDA graphs, which reuse the tensors, set them to zero."""
        self.optimizer.zero_grad(set_to_none=self.graphs is None)

    def _read(self) -> None:
        """Wait for the device, read and log the unread steps, and refuse those that diverged."""
        unread, self.unread = self.unread, []
        if not unread:
            return
        began = time.perf_counter()
        pairs = [torch.stack([each.loss.float(), each.norm.float()]) for each in unread]
        figures = torch.stack(pairs).tolist()
        self.history.seconds += time.perf_counter() - began
        max_skipped = MAX_SKIPPED_STEPS if self.accelerator.scaler else 0
        for each, (loss, norm) in zip(unread, figures, strict=True):
            if not math.isfinite(loss):
                numbers = sorted(self.numbers[each.index].tolist())
                rows = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
                raise DivergedError(
                    f"step {each.step}: the loss is {loss} on the step of train rows {rows}; lower "
                    f"train.learning_rate (now {self.config.learning_rate:g}), or set "
                    "model.dtype=float32"
                )
            self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
            if self.skipped > max_skipped:
                raise DivergedError(
                    f"step {each.step}: the gradient's norm is {norm}; lower train.learning_rate"
                )
            point = TrainPoint(
                step=each.step,
                epoch=each.step / self.steps_per_epoch,
                loss=loss,
                learning_rate=each.learning_rate,
                grad_norm=norm,
                tokens=each.tokens,
                seconds=self.history.seconds,
            )
            self.history.steps.append(point)
            self._log(point)

    def _log(self, point: TrainPoint | EvalPoint) -> None:
        self.accelerator.log(point.as_metrics(), step=point.step)
        if self.metrics:
            self.metrics.write(point)

    # Micro-batches

    def _make_backward(self) -> Backward:
        """Choose how rows are laid out in micro-batches, and their sizes."""
        if not self._packs_rows():
            return PaddedBackward(
                self.model,
                self.train,
                loss_sum=self.objective.loss_sum,
                accelerator=self.accelerator,
                lengths=self._padded_lengths(),
            )
        plan = plan_packing(
            self.lengths,
            batch_size=self.config.batch_size,
            max_tokens=self.history.max_tokens,
            max_length=int(self.lengths.max()),
            seed=self.config.seed,
            num_epochs=math.ceil(self.num_steps / self.steps_per_epoch),
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        sizes = ", ".join(map(str, plan.sizes))
        log.info("micro-batches are packed into arrays of %s tokens", sizes)
        return PackedBackward(
            self.model,
            self.train,
            plan=plan,
            loss_sum=self.objective.loss_sum,
            accelerator=self.accelerator,
            graphs=self.graphs,
        )

    def _packs_rows(self) -> bool:
        return packs_rows(self.model, self.accelerator.device)

    def _padded_lengths(self) -> tuple[int, ...] | None:
        """Return the few lengths that rows are padded to on a GPU; None on other devices."""
        if self.accelerator.device.type != "cuda":
            return None
        steps = plan_epoch(
            self.lengths, batch_size=self.config.batch_size, seed=self.config.seed, epoch=0
        )
        longest = int(self.lengths.max())
        longest_of_steps = [int(self.lengths[step].max()) for step in steps]
        lengths = choose_sizes(np.array([*longest_of_steps, longest]), multiple=1)
        # Rounded up, the last one may be more than the base has positions.
        return (*lengths[:-1], longest)

    # Evaluations

    def _evaluate_if_due(self) -> None:
        """Evaluate after the last step, unless that was done before the run was stopped."""
        evaluations = self.history.evaluations
        last = evaluations[-1].step if evaluations else 0
        if self.done > last and self._is_due(self.config.eval_steps):
            self._evaluate(self.done)

    def _evaluate(self, step: int) -> None:
        """Score the tensors on validation; keep them if they are the best so far."""
        progress = "validation" if self.accelerator.is_main_process else None
        logits = predict_logits(
            self.model, self.validation, accelerator=self.accelerator, progress=progress
        )
        if not np.isfinite(logits).all():
            raise DivergedError(
                f"step {step}: a logit of validation is nan or infinite; lower train.learning_rate "
                f"(now {self.config.learning_rate:g}), or set model.dtype=float32"
            )
        logits = self.objective.to_units(logits)
        names = dict.fromkeys([*self.eval_metrics, self.config.metric_for_best_model])
        scores = {}
        for name in names:
            scores[name] = self.task.quick_score(logits, self.validation.labels, name)
        metric = scores[self.config.metric_for_best_model]
        settled = is_settled(self.method, step=step, num_steps=self.num_steps)
        best = settled and self.sign * metric > self.best_metric
        if best:
            self.best_metric = self.sign * metric
            self.best = self._copy_tensors()
            self.waited = 0
            self.history.best_step = step
        elif settled:
            self.waited += 1
            self.history.stopped_early = self.waited == self.config.early_stopping_patience
        point = EvalPoint(
            step=step,
            epoch=step / self.steps_per_epoch,
            scores={name: scores[name] for name in self.eval_metrics},
            metric=metric,
            best=best,
            tokens=self.history.tokens,
            seconds=self.history.seconds,
        )
        self.history.evaluations.append(point)
        self._log(point)
        log.info(
            "step %d: validation %s%s",
            step,
            ", ".join(f"{show_metric(name)} {score:.4f}" for name, score in point.scores.items()),
            " (best so far)" if best else "",
        )
        if self.on_evaluation:
            self.on_evaluation(self.history.evaluations)

    def _copy_tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.parameters.items()}

    # Checkpoints

    def _save_if_due(self) -> None:
        """Save once an epoch or every `save_steps`, after the last step, and for a signal."""
        if not self.store:
            return
        if self.accelerator.num_processes == 1:
            # Several processes have exchanged their signals in the step.
            self.stop_signal = self.signals.name or ""
        is_due = self._is_due(self.config.save_steps)
        if self.saved != self.done and (self.stop_signal or is_due):
            self._save(self.store)
        if self.stop_signal:
            raise StoppedError(
                f"stopped by {self.stop_signal} after step {self.done:,} of {self.num_steps:,}, "
                f"saved in {self.store.folder}; the same command with train.resume=auto resumes from "
                "there"
            )

    def _save(self, store: Store) -> None:
        self._read()  # a signal may come between two readings
        tensors = self._get_state()
        scaler = self.accelerator.scaler
        scale = scaler.state_dict() if scaler else {}
        progress = Progress(
            step=self.done,
            history=self.history,
            schedule=self.schedule.last_epoch,
            best_metric=self.best_metric if self.best_metric > -math.inf else None,
            waited=self.waited,
            skipped=self.skipped,
            loss_scale=(scale["scale"], scale["_growth_tracker"]) if scale else None,
            ranks=get_ranks(self.model, self.method),
        )
        run_on_main(lambda: save_checkpoint(store, progress, tensors))
        self.saved = self.done

    def _get_state(self) -> dict[str, torch.Tensor]:
        return get_training_state(
            self.model,
            self.best,
            optimizer=self.adamw,
            method=self.method,
            accelerator=self.accelerator,
        )

    def _resume(self) -> None:
        """Resume from the newest whole checkpoint, if there is one."""
        store = self.store
        if not store:
            return
        like = self._get_state()
        checkpoint = run_on_main(lambda: load_checkpoint(store, like))
        if checkpoint:
            self._restore(checkpoint)

    def _restore(self, checkpoint: Checkpoint) -> None:
        progress = checkpoint.progress
        if progress.step > self.num_steps:
            raise TrainingError(
                f"{checkpoint.folder}: is beyond the {self.num_steps:,} steps of this recipe; "
                "raise train.num_train_epochs or train.max_steps"
            )
        for change in checkpoint.changes:
            log.warning("resumed with a change, so not bit for bit: %s", change)
        self.best = set_training_state(
            checkpoint.tensors,
            self.model,
            optimizer=self.adamw,
            method=self.method,
            accelerator=self.accelerator,
        )
        set_ranks(progress.ranks, self.model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for _ in range(progress.schedule):
                self.schedule.step()
        scaler = self.accelerator.scaler
        if scaler and progress.loss_scale:
            scale, growth_tracker = progress.loss_scale
            state = {"scale": scale, "_growth_tracker": growth_tracker}
            scaler.load_state_dict(scaler.state_dict() | state)
        self.done = progress.step
        self.saved = progress.step
        self.waited = progress.waited
        self.skipped = progress.skipped
        if progress.best_metric is not None:
            self.best_metric = progress.best_metric
        self.history = progress.history
        self.history.resumed.append(self.done)
        for change in checkpoint.changes:
            self.history.changes.append(f"step {self.done}: {change}")
        log.info(
            "resumed after step %d of %d from %s", self.done, self.num_steps, checkpoint.folder
        )


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Put a GPU's work on a stream of its own, between all work before it and all after it."""
    own = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    own.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(own):
            yield
    finally:
        torch.cuda.current_stream(device).wait_stream(own)
