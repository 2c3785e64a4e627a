"""The training loop: optimizer steps of whole batches, evaluations, the best tensors kept."""

import logging
import math
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from numpy.typing import NDArray
from torch import nn

from lora_sentiment.console import make_bar
from lora_sentiment.data.batches import Encoded, plan_epoch, shard
from lora_sentiment.data.packing import choose_sizes, plan_packing
from lora_sentiment.errors import StoppedError, TrainingError
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
from lora_sentiment.tasks.losses import loss_sum, make_class_weights, total_weight
from lora_sentiment.tasks.metrics import METRICS, quick_score
from lora_sentiment.training.backward import Backward, PackedBackward, PaddedBackward
from lora_sentiment.training.checkpoint import (
    Checkpoint,
    Progress,
    Store,
    load_checkpoint,
    save_checkpoint,
)
from lora_sentiment.training.history import EvalPoint, History, TrainPoint
from lora_sentiment.training.optimizer import (
    GraphedUpdate,
    count_steps,
    make_optimizer,
    make_schedule,
)
from lora_sentiment.training.signals import StopSignals, is_out_of_memory
from lora_sentiment.training.state import (
    put_ranks,
    put_rng,
    put_state,
    take_ranks,
    take_rng,
    take_state,
)
from lora_sentiment.training.trackers import rewind, sync

log = logging.getLogger("lora_sentiment")

MAX_SKIPPED_STEPS = 20
"""Optimizer steps in a row that fp16's loss scaling may skip before the run is given up."""
GPU_READ_STEPS = 50
"""Steps on a GPU after which their losses and norms are read: each reading waits for all that the device was given."""
MIN_STEPS_FOR_GRAPHS = 3
"""Optimizer steps from which on a run can replay anything: the first of a size runs eagerly, the second is captured."""


@dataclass(frozen=True)
class _Taken:
    """A step whose mean loss and gradient's norm still lie on the device; `tokens` counts those before it too."""

    step: int
    index: NDArray[np.int64]
    tokens: int
    rate: float
    loss: torch.Tensor
    norm: torch.Tensor


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
    config: TrainConfig,
    method: Method,
    accelerator: Accelerator,
    max_tokens: int,
    store: Store | None = None,
) -> History:
    """Train a model in place and leave it with the best tensors that validation saw.

    Args:
        model: On the accelerator's device, identical on every process.
        train: Rows to train on.
        validation: Rows that decide which tensors are best.
        numbers: Source row number of each training row, for messages, shape (num_rows,).
        config: The recipe's `train` section.
        method: The recipe's `method` section: its learning rates, and what it does between steps.
        accelerator: Carries gradients and logits between processes, scales fp16 losses, logs.
        max_tokens: Most padded tokens of a micro-batch; halved where memory runs out.
        store: Where to go on from and to save; None to do neither, and to leave signals alone.

    Raises:
        TrainingError: When a loss is not finite, with step and row numbers; when one row does not fit into memory; when
            a checkpoint cannot be written, or none can be gone on with.
        StoppedError: When a signal said so, after the step is saved.
    """
    loop = _Loop(model, train, validation, numbers, config, method, accelerator, max_tokens, store)
    try:
        with loop.signals if store else nullcontext():
            return loop.run()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"step {loop.done + 1}: memory ran out in the optimizer or an evaluation, where a smaller micro-batch does "
            f"not help; train fewer tensors, or free memory and go on with --resume: {str(error).splitlines()[0]}"
        ) from error


@contextmanager
def _on_own_stream(device: torch.device) -> Iterator[None]:
    """Put a GPU's work on a stream of its own, after all that it was given before, and before all that follows."""
    own = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    own.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(own):
            yield
    finally:
        torch.cuda.current_stream(device).wait_stream(own)


class _Loop:
    """The state of one run between optimizer steps."""

    def __init__(
        self,
        model: nn.Module,
        train: Encoded,
        validation: Encoded,
        numbers: NDArray[np.int64],
        config: TrainConfig,
        method: Method,
        accelerator: Accelerator,
        max_tokens: int,
        store: Store | None,
    ) -> None:
        self.model, self.config, self.method, self.accelerator, self.store = (
            model,
            config,
            method,
            accelerator,
            store,
        )
        self.train, self.validation, self.numbers = train, validation, numbers
        self.lengths = train.lengths
        names = list(model.config.id2label.values())  # type: ignore[union-attr, operator]
        self.class_weights = make_class_weights(
            config.class_weights, labels=train.labels, names=names
        )
        self.weights_there = None  # on the device
        if self.class_weights is not None:
            self.weights_there = torch.from_numpy(self.class_weights).to(accelerator.device)
        self.parameters = trainable_tensors(model)
        self.steps_per_epoch = math.ceil(len(train) / config.batch_size)
        self.num_steps = count_steps(len(train), config)
        optimizer = make_optimizer(
            self.parameters, config, ratios=learning_rate_ratios(model, method)
        )
        # The scheduler is not prepared: a prepared one steps num_processes times per update.
        self.scheduler = make_schedule(optimizer, config, num_steps=self.num_steps)
        self.adamw, self.optimizer = optimizer, accelerator.prepare_optimizer(optimizer)
        reason = why_not_graphs(model, config, device=accelerator.device, num_steps=self.num_steps)
        self.graphs = self._make_graphs() if reason is None else None
        if accelerator.device.type == "cuda":
            log.info("CUDA graphs: %s", "on" if reason is None else f"off, because {reason}")
        self.update = None  # clips and steps as a graph
        if self.graphs and not accelerator.scaler:
            self.update = GraphedUpdate(
                optimizer,
                list(self.parameters.values()),
                max_norm=config.max_grad_norm or math.inf,
                graphs=self.graphs,
            )
        self.history = History(max_tokens=max_tokens)
        self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.sign = 1 if METRICS[config.metric_for_best_model].greater_is_better else -1
        self.best_metric, self.waited, self.skipped = -math.inf, 0, 0
        self.done, self.saved = 0, 0
        self.taken: list[_Taken] = []
        # fp16 needs each norm at once: it says whether the step counts.
        self.read_steps = (
            1 if accelerator.device.type == "cpu" or accelerator.scaler else GPU_READ_STEPS
        )
        self.signals, self.stop_by = StopSignals(), ""

    def run(self) -> History:
        """Walk all steps that are left; evaluate once an epoch or every `eval_steps`, and after the last step."""
        with self._stream():
            return self._run()

    def _stream(self) -> AbstractContextManager[None]:
        """Return a context in which a GPU's work is put on a stream that can be captured."""
        if self.graphs is None or self.accelerator.device.type != "cuda":
            return nullcontext()
        return _on_own_stream(self.accelerator.device)

    @staticmethod
    def _make_graphs() -> GraphRunner:
        return GraphRunner()

    def _make_backward(self) -> Backward:
        """Choose how micro-batches are laid out, and their sizes."""
        device = self.accelerator.device
        if not self._packs_rows():
            lengths = None
            if device.type == "cuda":
                longest = [
                    int(self.lengths[step].max())
                    for step in plan_epoch(
                        self.lengths,
                        batch_size=self.config.batch_size,
                        seed=self.config.seed,
                        epoch=0,
                    )
                ]
                most = int(self.lengths.max())
                lengths = choose_sizes(np.array([*longest, most]), multiple=1)
                # Rounded up it may be more than the base has positions.
                lengths = (*lengths[:-1], most)
            return PaddedBackward(
                self.model,
                self.train,
                loss_sum=self._loss_sum,
                accelerator=self.accelerator,
                lengths=lengths,
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
        log.info(
            "micro-batches are packed into arrays of %s tokens", ", ".join(map(str, plan.sizes))
        )
        return PackedBackward(
            self.model,
            self.train,
            plan=plan,
            loss_sum=self._loss_sum,
            accelerator=self.accelerator,
            graphs=self.graphs,
        )

    def _packs_rows(self) -> bool:
        return packs_rows(self.model, self.accelerator.device)

    def _run(self) -> History:
        self._resume()
        self.backward = self._make_backward()
        bar = make_bar(
            self.num_steps, desc="training", unit="step", show=self.accelerator.is_main_process
        )
        self.model.train()
        with bar:
            bar.update(self.done)
            # A run is saved before it is judged, which takes long: stopped meanwhile, it has that still before it.
            self._evaluate_if_due()
            for step, index in self._step_rows():
                if self.history.stopped_early:
                    break
                self._step(step, index)
                self.done = step
                bar.update()
                if not self.taken:
                    speed = self.history.tokens / self.history.seconds
                    bar.set_postfix(
                        loss=f"{self.history.steps[-1].loss:.4f}",
                        tok_s=f"{speed:,.0f}",
                        refresh=False,
                    )
                self._save_if_due()
                self._evaluate_if_due()
        self._agree((), failed=False)
        self._save_if_due()
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best[name])
                parameter.grad = None
        if self.graphs:
            self.graphs.clear()
        return self.history

    def _is_due(self, every: int | None, step: int | None = None) -> bool:
        """Whether what is done every so many steps, or once an epoch, follows the step; by default the last one."""
        step = self.done if step is None else step
        return step % (every or self.steps_per_epoch) == 0 or step == self.num_steps

    def _evaluate_if_due(self) -> None:
        """Judge what the last step made, unless it was judged before the run was stopped."""
        if self.done > self._judged and self._is_due(self.config.eval_steps):
            self._evaluate(self.done)

    @property
    def _judged(self) -> int:
        return self.history.evaluations[-1].step if self.history.evaluations else 0

    def _save_if_due(self) -> None:
        """Save once an epoch or every `save_steps`, after the last step, and before obeying a signal."""
        if not self.store:
            return
        if self.accelerator.num_processes == 1:
            self.stop_by = self.signals.name or ""  # several have agreed in the step
        if self.saved != self.done and (self.stop_by or self._is_due(self.config.save_steps)):
            self._save(self.store)
        if self.stop_by:
            raise StoppedError(
                f"stopped by {self.stop_by} after step {self.done:,} of {self.num_steps:,}, saved in "
                f"{self.store.folder}; the same command with --resume goes on from there"
            )

    def _save(self, store: Store) -> None:
        """Save on the main process, and raise on all where that fails."""
        fault: list[TrainingError | None] = [None]
        try:
            self._read()  # a signal comes between two readings
        except TrainingError as error:
            fault = [error]
        if told := broadcast_object_list(fault)[0]:
            raise told
        tensors = take_state(
            self.model,
            self.best,
            optimizer=self.adamw,
            method=self.method,
            accelerator=self.accelerator,
        )
        if self.accelerator.is_main_process:
            try:
                sync(self.accelerator.trackers)
                save_checkpoint(store, self._progress(), tensors)
            except TrainingError as error:
                fault = [error]
        if told := broadcast_object_list(fault)[0]:
            raise told
        self.saved = self.done

    def _progress(self) -> Progress:
        scaler = self.accelerator.scaler
        scale = scaler.state_dict() if scaler else {}
        return Progress(
            step=self.done,
            history=self.history,
            schedule=self.scheduler.last_epoch,
            best_metric=self.best_metric if self.best_metric > -math.inf else None,
            waited=self.waited,
            skipped=self.skipped,
            loss_scale=(scale["scale"], scale["_growth_tracker"]) if scale else None,
            ranks=take_ranks(self.model, self.method),
        )

    def _resume(self) -> None:
        """Go on from the newest checkpoint that verifies, if there is one; the main process reads it for all."""
        if not self.store:
            return
        like = take_state(
            self.model,
            self.best,
            optimizer=self.adamw,
            method=self.method,
            accelerator=self.accelerator,
        )
        read: list[Checkpoint | TrainingError | None] = [None]
        if self.accelerator.is_main_process:
            try:
                read = [load_checkpoint(self.store, like)]
            except TrainingError as error:
                read = [error]
        found = broadcast_object_list(read)[0]
        if isinstance(found, TrainingError):
            raise found
        if found:
            self._put_back(found)
        if self.accelerator.is_main_process:
            rewind(self.accelerator.trackers, self.done, evaluated=self._judged)

    def _put_back(self, found: Checkpoint) -> None:
        progress = found.progress
        if progress.step > self.num_steps:
            raise TrainingError(
                f"{found.folder}: is beyond the {self.num_steps:,} steps of this recipe; raise them"
            )
        for change in found.changes:
            log.warning("resumed all the same, so not bit for bit: %s", change)
        self.best = put_state(
            found.tensors,
            self.model,
            optimizer=self.adamw,
            method=self.method,
            accelerator=self.accelerator,
        )
        put_ranks(progress.ranks, self.model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for _ in range(progress.schedule):
                self.scheduler.step()
        if (scaler := self.accelerator.scaler) and progress.loss_scale:
            scale, tracker = progress.loss_scale
            scaler.load_state_dict(
                scaler.state_dict() | {"scale": scale, "_growth_tracker": tracker}
            )
        self.done = self.saved = progress.step
        self.history, self.waited, self.skipped = (
            progress.history,
            progress.waited,
            progress.skipped,
        )
        self.best_metric = -math.inf if progress.best_metric is None else progress.best_metric
        self.history.resumed.append(self.done)
        self.history.changes += [f"step {self.done}: {change}" for change in found.changes]
        log.info("resumed after step %d of %d from %s", self.done, self.num_steps, found.folder)

    def _step_rows(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield (step number, the step's rows over all processes) of what is left."""
        first = self.done // self.steps_per_epoch
        step = first * self.steps_per_epoch
        for epoch in range(first, math.ceil(self.num_steps / self.steps_per_epoch)):
            plan = plan_epoch(
                self.lengths, batch_size=self.config.batch_size, seed=self.config.seed, epoch=epoch
            )
            for index in plan[: self.num_steps - step]:
                step += 1
                if step > self.done:
                    yield step, index

    def _step(self, step: int, index: NDArray[np.int64]) -> None:
        """Take one optimizer step: gradients of the (weighted) mean loss over its examples, however they are cut."""
        began = time.perf_counter()
        loss = self._reduce(self._gradients(step, index))
        rate = float(self.scheduler.get_last_lr()[0])
        norm = self._update(step)
        self.history.seconds += time.perf_counter() - began
        self.history.tokens += int(self.lengths[index].sum())
        self.taken.append(_Taken(step, index, self.history.tokens, rate, loss, norm))
        periods = [self.config.eval_steps, *([self.config.save_steps] if self.store else [])]
        if (
            any(self._is_due(every, step) for every in periods)
            or len(self.taken) >= self.read_steps
        ):
            self._read()

    def _read(self) -> None:
        """Wait for the device, and note and log the steps that were not read yet; refuse those that went wrong."""
        taken, self.taken = self.taken, []
        if not taken:
            return
        began = time.perf_counter()
        figures = torch.stack(
            [torch.stack([each.loss.float(), each.norm.float()]) for each in taken]
        ).tolist()
        self.history.seconds += time.perf_counter() - began
        for each, (loss, norm) in zip(taken, figures, strict=True):
            if not math.isfinite(loss):
                raise TrainingError(self._not_finite(each.step, each.index, loss))
            self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
            if self.skipped > (MAX_SKIPPED_STEPS if self.accelerator.scaler else 0):
                raise TrainingError(
                    f"step {each.step}: the gradient's norm is {norm}; lower train.learning_rate"
                )
            point = TrainPoint(each.step, each.step / self.steps_per_epoch, loss, each.rate, norm)
            self.history.steps.append(point)
            figure = {
                "loss": loss,
                "learning_rate": each.rate,
                "grad_norm": norm,
                "tokens": each.tokens,
            }
            self._log(each.step, epoch=point.epoch, **figure)

    def _gradients(self, step: int, index: NDArray[np.int64]) -> torch.Tensor:
        """Fill this process's gradients and return its loss; where memory runs out, halve the cut and begin again."""
        own = shard(
            index,
            self.lengths,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        device = self.accelerator.device
        generators = take_rng(device)
        while True:
            parts = self.backward.cut(own, max_tokens=self.history.max_tokens)
            loss: torch.Tensor | None
            try:
                loss = self._backward(index, parts)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                loss = None
            # Out of the `except`, whose error holds on to every frame and so to their tensors.
            too_large = self._agree(parts, failed=loss is None)
            if loss is not None and too_large is None:
                return loss
            self._clear_gradients()
            if self.graphs:
                self.graphs.clear()
            clear_device_cache(garbage_collection=True)
            put_rng(generators, device)
            self._halve(step, *(too_large or (0, 0)))
            self.backward = self._make_backward()

    def _agree(self, parts: Sequence[NDArray[np.int64]], *, failed: bool) -> tuple[int, int] | None:
        """Let all processes know of a signal, and of memory that ran out in any of them.

        Returns:
            (rows, tokens) of the largest micro-batch that did not fit; None where all did.
        """
        rows = max(map(len, parts), default=0) if failed else 0
        tokens = max(map(self.backward.count_tokens, parts), default=0) if failed else 0
        facts = [
            int(failed),
            rows,
            tokens,
            signal.Signals[self.signals.name] if self.signals.name else 0,
        ]
        if self.accelerator.num_processes > 1:
            # GPUs are waited for here, once a step, as they wait for each other; a group of hosts needs a network more.
            told = self.accelerator.gather(torch.tensor([facts], device=self.accelerator.device))
            facts = told.max(dim=0).values.tolist()
        self.stop_by = signal.Signals(facts[3]).name if facts[3] else ""
        return (facts[1], facts[2]) if facts[0] else None

    def _halve(self, step: int, rows: int, tokens: int) -> None:
        """Halve the micro-batch cut, on every process alike."""
        if rows <= 1:
            raise TrainingError(
                f"step {step}: out of memory on a micro-batch of one row, {tokens:,} tokens long; lower "
                "model.max_length, set train.gradient_checkpointing=true, or train on a machine with more memory"
            )
        self.history.max_tokens = min(self.history.max_tokens, tokens) // 2
        self.history.cuts.append((step, self.history.max_tokens))
        log.warning(
            "step %d: out of memory on a micro-batch of %s tokens; done again with at most %s, as are all after it",
            step, f"{tokens:,}", f"{self.history.max_tokens:,}",
        )  # fmt: skip

    def _backward(
        self, index: NDArray[np.int64], parts: Sequence[NDArray[np.int64]]
    ) -> torch.Tensor:
        loss = torch.zeros((), device=self.accelerator.device)
        total = total_weight(self.train.labels[index], self.class_weights)
        for part in parts:
            loss += self.backward.add_gradients(part, total=total)
        extra = penalty(self.model, self.method)
        if extra is not None:
            # Gradients are summed over processes, and every process has the whole penalty.
            self.accelerator.backward(extra / self.accelerator.num_processes)
        return loss

    def _loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        smoothing = self.config.label_smoothing_factor
        return loss_sum(logits, labels, class_weights=self.weights_there, label_smoothing=smoothing)

    def _reduce(self, loss: torch.Tensor) -> torch.Tensor:
        """Add up gradients and loss over all processes, in one flat tensor; return the loss."""
        if self.accelerator.num_processes > 1:
            gradients = [
                p.grad if p.grad is not None else torch.zeros_like(p)
                for p in self.parameters.values()
            ]
            flat = torch.cat([g.reshape(-1) for g in gradients] + [loss.reshape(1)])
            flat = self.accelerator.reduce(flat, reduction="sum")
            pieces = flat.split([g.numel() for g in gradients] + [1])
            for parameter, piece in zip(self.parameters.values(), pieces, strict=False):
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(piece.view_as(parameter))
            loss = (
                pieces[-1].squeeze().clone()
            )  # a view of it would keep all gradients until it is read
        return loss

    def _clear_gradients(self) -> None:
        """Forget the gradients; graphs write to those that are there, so these stay and become zero."""
        self.optimizer.zero_grad(set_to_none=self.graphs is None)

    def _update(self, step: int) -> torch.Tensor:
        """Clip the gradients, step the optimizer, and the schedule unless fp16's scaler skipped the step.

        Returns:
            The gradients' norm before it was clipped.
        """
        if self.update is not None:
            before = self.update()
            self.scheduler.step()
            return before
        limit = self.config.max_grad_norm or math.inf
        norm: torch.Tensor = self.accelerator.clip_grad_norm_(list(self.parameters.values()), limit)
        # fp16's scaler meets infinities on purpose: it skips the step and halves the scale. Accelerate's own flag for
        # that stays False with a fused optimizer, so the norm decides.
        counts = self.accelerator.scaler is None or math.isfinite(float(norm))
        self.optimizer.step()
        if counts:
            after_step(self.model, self.method, step=step)
            self.scheduler.step()
        self._clear_gradients()
        return norm

    def _evaluate(self, step: int) -> None:
        """Judge the tensors on validation; keep them if they are the best so far."""
        main = self.accelerator.is_main_process
        logits = predict_logits(
            self.model,
            self.validation,
            accelerator=self.accelerator,
            progress="validation" if main else None,
        )
        labels, name = self.validation.labels, self.config.metric_for_best_model
        metric = quick_score(logits, labels, name)
        settled = is_settled(self.method, step=step, num_steps=self.num_steps)
        best = settled and self.sign * metric > self.best_metric
        if best:
            self.best_metric, self.waited, self.history.best_step = self.sign * metric, 0, step
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        elif settled:
            self.waited += 1
            self.history.stopped_early = self.waited == self.config.early_stopping_patience
        accuracy, log_loss = (quick_score(logits, labels, key) for key in ("accuracy", "log_loss"))
        point = EvalPoint(step, step / self.steps_per_epoch, accuracy, log_loss, metric, best)
        self.history.evaluations.append(point)
        self._log(
            step,
            epoch=point.epoch,
            eval_accuracy=accuracy,
            eval_log_loss=log_loss,
            eval_best=int(best),
        )
        mark = " (best so far)" if best else ""
        log.info(
            "step %d: validation accuracy %.4f, log-loss %.4f%s", step, accuracy, log_loss, mark
        )

    def _log(self, step: int, **values: float) -> None:
        tokens = values.get("tokens", self.history.tokens)
        self.accelerator.log(
            {**values, "tokens": tokens, "seconds": self.history.seconds}, step=step
        )

    def _not_finite(self, step: int, index: NDArray[np.int64], loss: float) -> str:
        rows = ", ".join(map(str, sorted(self.numbers[index].tolist())[:8]))
        return (
            f"step {step}: the loss is {loss} on the step of train rows {rows}{', ...' if len(index) > 8 else ''}; "
            f"lower train.learning_rate (now {self.config.learning_rate:g}), or set model.dtype=float32"
        )
