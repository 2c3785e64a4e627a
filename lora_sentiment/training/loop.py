"""The training loop: optimizer steps of whole batches, evaluations, the best tensors kept."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn
from transformers import get_scheduler

from lora_sentiment.data.batches import Encoded, cut, make_batch, plan_epoch, shard
from lora_sentiment.errors import TrainingError
from lora_sentiment.evaluation.metrics import METRICS, quick_score
from lora_sentiment.model.inference import predict_logits
from lora_sentiment.model.method_config import Method
from lora_sentiment.model.methods import after_step, is_settled, learning_rate_ratios, penalty, trainable_tensors
from lora_sentiment.progress import make_bar
from lora_sentiment.training.config import TrainConfig
from lora_sentiment.training.losses import loss_sum, make_class_weights, total_weight

log = logging.getLogger("lora_sentiment")

MAX_SKIPPED_STEPS = 20
"""Optimizer steps in a row that fp16's loss scaling may skip before the run is given up."""


@dataclass(frozen=True)
class TrainPoint:
    """One optimizer step: its (weighted) mean loss over the step's examples, and the rate it was taken at."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float


@dataclass(frozen=True)
class EvalPoint:
    """One evaluation on validation, after `step` optimizer steps."""

    step: int
    epoch: float
    accuracy: float
    log_loss: float
    metric: float
    best: bool


@dataclass
class History:
    """What happened in a run.

    Attributes:
        steps: Every optimizer step.
        evaluations: Every evaluation.
        best_step: The step whose tensors were kept.
        tokens: Real tokens trained on over all processes, padding left out.
        seconds: Time spent training, evaluations left out.
        max_tokens: The micro-batch cut in padded tokens.
        stopped_early: Whether patience ran out.
    """

    steps: list[TrainPoint] = field(default_factory=list)
    evaluations: list[EvalPoint] = field(default_factory=list)
    best_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    max_tokens: int = 0
    stopped_early: bool = False


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
        max_tokens: Most padded tokens of a micro-batch.

    Raises:
        TrainingError: When a loss is not finite, with step and row numbers.
    """
    return _Loop(model, train, validation, numbers, config, method, accelerator, max_tokens).run()


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
    ) -> None:
        self.model, self.config, self.method, self.accelerator = model, config, method, accelerator
        self.train, self.validation, self.numbers = train, validation, numbers
        self.lengths = train.lengths
        names = list(model.config.id2label.values())  # type: ignore[union-attr, operator]
        self.class_weights = make_class_weights(config.class_weights, labels=train.labels, names=names)
        self.parameters = trainable_tensors(model)
        self.steps_per_epoch = math.ceil(len(train) / config.batch_size)
        self.num_steps = count_steps(len(train), config)
        optimizer = make_optimizer(self.parameters, config, ratios=learning_rate_ratios(model, method))
        # The scheduler is not prepared: a prepared one steps num_processes times per update.
        self.scheduler = get_scheduler(
            config.lr_scheduler_type, optimizer, math.ceil(self.num_steps * config.warmup_ratio), self.num_steps
        )
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.history = History(max_tokens=max_tokens)
        self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.sign = 1 if METRICS[config.metric_for_best_model].greater_is_better else -1
        self.best_metric, self.waited, self.skipped = -math.inf, 0, 0

    def run(self) -> History:
        """Walk all steps; evaluate once an epoch or every `eval_steps`, and after the last step."""
        bar = make_bar(self.num_steps, desc="training", unit="step", show=self.accelerator.is_main_process)
        self.model.train()
        every = self.config.eval_steps or self.steps_per_epoch
        with bar:
            for step, index in self._step_rows():
                point = self._step(step, index)
                bar.update()
                speed = self.history.tokens / self.history.seconds
                bar.set_postfix(loss=f"{point.loss:.4f}", tok_s=f"{speed:,.0f}", refresh=False)
                if step % every == 0 or step == self.num_steps:
                    self._evaluate(step)
                    if self.history.stopped_early:
                        break
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best[name])
        return self.history

    def _step_rows(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield (step number from 1, the step's rows over all processes)."""
        step = 0
        for epoch in range(math.ceil(self.num_steps / self.steps_per_epoch)):
            plan = plan_epoch(self.lengths, batch_size=self.config.batch_size, seed=self.config.seed, epoch=epoch)
            for index in plan[: self.num_steps - step]:
                step += 1
                yield step, index

    def _step(self, step: int, index: NDArray[np.int64]) -> TrainPoint:
        """Take one optimizer step: gradients of the (weighted) mean loss over its examples, however they are cut."""
        began = time.perf_counter()
        own = shard(
            index, self.lengths, rank=self.accelerator.process_index, num_processes=self.accelerator.num_processes
        )
        loss = torch.zeros((), device=self.accelerator.device)
        total = total_weight(self.train.labels[index], self.class_weights)
        for part in cut(own, self.lengths, max_tokens=self.history.max_tokens):
            batch = make_batch(self.train, part, device=self.accelerator.device)
            with self.accelerator.autocast():
                logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            part_loss = self._loss_sum(logits, batch.labels) / total
            self.accelerator.backward(part_loss)
            loss += part_loss.detach()
        extra = penalty(self.model, self.method)
        if extra is not None:
            # Gradients are summed over processes, and every process has the whole penalty.
            self.accelerator.backward(extra / self.accelerator.num_processes)
        mean_loss = self._reduce(loss)
        if not math.isfinite(mean_loss):
            raise TrainingError(self._not_finite(step, index, mean_loss))
        rate = self.scheduler.get_last_lr()[0]
        norm = self._update(step)
        self.history.seconds += time.perf_counter() - began
        self.history.tokens += int(self.lengths[index].sum())
        point = TrainPoint(step, step / self.steps_per_epoch, mean_loss, rate, norm)
        self.history.steps.append(point)
        self._log(step, epoch=point.epoch, loss=mean_loss, learning_rate=rate, grad_norm=norm)
        return point

    def _loss_sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weights = None if self.class_weights is None else torch.from_numpy(self.class_weights).to(logits.device)
        return loss_sum(logits, labels, class_weights=weights, label_smoothing=self.config.label_smoothing_factor)

    def _reduce(self, loss: torch.Tensor) -> float:
        """Add up gradients and loss over all processes, in one flat tensor; return the loss."""
        if self.accelerator.num_processes > 1:
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters.values()]
            flat = torch.cat([g.reshape(-1) for g in gradients] + [loss.reshape(1)])
            flat = self.accelerator.reduce(flat, reduction="sum")
            pieces = flat.split([g.numel() for g in gradients] + [1])
            for parameter, piece in zip(self.parameters.values(), pieces, strict=False):
                parameter.grad = piece.view_as(parameter).clone()
            loss = pieces[-1]
        return float(loss)

    def _update(self, step: int) -> float:
        """Clip, step the optimizer, and the schedule unless fp16's scaler skipped the step; return the norm."""
        limit = self.config.max_grad_norm or math.inf
        norm = float(self.accelerator.clip_grad_norm_(list(self.parameters.values()), limit))
        # fp16's scaler meets infinities on purpose: it skips the step and halves the scale. Accelerate's own flag for
        # that stays False with a fused optimizer, so the norm decides.
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped > (MAX_SKIPPED_STEPS if self.accelerator.scaler else 0):
            raise TrainingError(f"step {step}: the gradient's norm is {norm}; lower train.learning_rate")
        self.optimizer.step()
        if not self.skipped:
            after_step(self.model, self.method, step=step)
            self.scheduler.step()
        self.optimizer.zero_grad()
        return norm

    def _evaluate(self, step: int) -> None:
        """Judge the tensors on validation; keep them if they are the best so far."""
        main = self.accelerator.is_main_process
        logits = predict_logits(
            self.model, self.validation, accelerator=self.accelerator, progress="validation" if main else None
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
        self._log(step, epoch=point.epoch, eval_accuracy=accuracy, eval_log_loss=log_loss, eval_best=int(best))
        mark = " (best so far)" if best else ""
        log.info("step %d: validation accuracy %.4f, log-loss %.4f%s", step, accuracy, log_loss, mark)

    def _log(self, step: int, **values: float) -> None:
        self.accelerator.log(values | {"tokens": self.history.tokens, "seconds": self.history.seconds}, step=step)

    def _not_finite(self, step: int, index: NDArray[np.int64], loss: float) -> str:
        rows = ", ".join(map(str, sorted(self.numbers[index].tolist())[:8]))
        return (
            f"step {step}: the loss is {loss} on the step of train rows {rows}{', ...' if len(index) > 8 else ''}; "
            f"lower train.learning_rate (now {self.config.learning_rate:g}), or set model.dtype=float32"
        )


def count_steps(num_rows: int, config: TrainConfig) -> int:
    """Return the optimizer steps of a run over this many training rows."""
    return config.max_steps or math.ceil(config.num_train_epochs * math.ceil(num_rows / config.batch_size))


def make_optimizer(
    parameters: dict[str, nn.Parameter], config: TrainConfig, *, ratios: Mapping[str, float]
) -> torch.optim.Optimizer:
    """Return fused AdamW (Loshchilov & Hutter 2019); biases and norms (one axis) are not decayed.

    Args:
        parameters: What is trained, by name.
        config: The recipe's `train` section.
        ratios: Names of the tensors that take another rate than the rest, and how many times it.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((ratios.get(name, 1.0), decay), []).append(parameter)
    # The first group is one at the plain rate: that is the rate which is logged.
    ordered = sorted(groups.items(), key=lambda group: group[0][0] != 1.0)
    return torch.optim.AdamW(
        [
            {"params": members, "lr": config.learning_rate * ratio, "weight_decay": decay}
            for (ratio, decay), members in ordered
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )
