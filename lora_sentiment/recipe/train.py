"""The recipe's `train` section. Names are those of transformers' TrainingArguments."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from lora_sentiment.errors import did_you_mean
from lora_sentiment.recipe.section import Names, Section

METRICS = {
    "single_label": ("accuracy", "macro_f1", "mcc", "log_loss", "auroc", "ece"),
    "multi_label": (
        "average_precision",
        "macro_f1",
        "micro_f1",
        "samples_f1",
        "subset_accuracy",
        "log_loss",
        "ece",
    ),
    "regression": ("mae", "rmse", "r2", "pearson", "spearman"),
}
"""The metrics of each task that may choose the best model. The first is the default."""
TRACKERS = (
    "tensorboard",
    "wandb",
    "trackio",
    "mlflow",
    "comet_ml",
    "aim",
    "clearml",
    "dvclive",
    "swanlab",
)

ClassWeights = Annotated[
    tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False, min_length=2)
]
"""A YAML list of positive numbers, one for each label."""


class TrainConfig(Section):
    """Optimizer, schedule, evaluations and checkpoints of a training run."""

    num_train_epochs: float = Field(3, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps; overrides num_train_epochs."""
    batch_size: int = Field(32, ge=1)
    """Examples of one optimizer step over all processes, whatever the micro-batches are."""
    max_tokens_per_micro_batch: int | None = Field(None, ge=8)
    """Most tokens of a micro-batch. Default: from a memory formula, on a GPU from its free
    memory."""
    learning_rate: float = Field(5e-4, gt=0)
    """Peak learning rate."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay of the first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's decay of the second moment."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices. Biases and norms are not decayed."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Global gradient norm to clip to; 0 means no clipping."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Schedule of the learning rate over the optimizer steps."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the steps in which the rate rises from 0."""
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1)
    """Label smoothing of the training loss (Szegedy et al. 2016)."""
    class_weights: Literal["balanced"] | ClassWeights | None = None
    """Weight of each label in the training loss: balanced (rows / (labels * rows of the label)), or
    a list."""
    huber_delta: float | None = Field(None, gt=0)
    """For regression: Huber loss, linear from this error on, in standard deviations of the training
    labels. Default: squared error."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the head's and the adapter's initial values, the order of rows, and dropout."""
    eval_steps: int | None = Field(None, ge=1)
    """Optimizer steps between evaluations on validation. Default: once an epoch."""
    metric_for_best_model: Literal[
        "accuracy",
        "macro_f1",
        "mcc",
        "log_loss",
        "auroc",
        "ece",
        "micro_f1",
        "samples_f1",
        "subset_accuracy",
        "average_precision",
        "mae",
        "rmse",
        "r2",
        "pearson",
        "spearman",
    ] = "accuracy"
    """Validation metric that chooses the tensors to keep. Default: accuracy for single_label,
    average_precision for multi_label, mae for regression."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations without a better one."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which is slower and needs less memory."""
    save_steps: int | None = Field(None, ge=1)
    """Optimizer steps between checkpoints. Default: once an epoch. The last step and a signal to
    stop also save one."""
    save_total_limit: int = Field(2, ge=1)
    """Checkpoints to keep. All are removed when the run has finished."""
    resume: Literal["auto", "never", "always"] = "auto"
    """auto resumes from a checkpoint if there is one, never starts anew, always needs a
    checkpoint."""
    engine: Literal["auto", "fast", "stock"] = "auto"
    """Forward pass of the encoder. auto uses the fast one where it is exact; fast refuses to run
    elsewhere."""
    cuda_graphs: Literal["auto", "off"] = "auto"
    """Record the kernels of a step once and launch them together. auto does so on a CUDA device
    where it can."""
    report_to: Names = ()
    """Accelerate trackers. metrics.csv is always written."""

    @model_validator(mode="after")
    def _warmup_is_honoured(self) -> Self:
        if self.warmup_ratio and self.lr_scheduler_type == "constant":
            raise ValueError(
                "warmup_ratio has no effect with lr_scheduler_type constant; use "
                "constant_with_warmup"
            )
        return self

    @field_validator("class_weights", mode="before")
    @classmethod
    def _weights_are_positive(cls, weights: Any) -> Any:
        # Checked before pydantic's union, which reports one error for each of its members.
        if weights is None or weights == "balanced":
            return weights
        is_list = isinstance(weights, (list, tuple)) and len(weights) > 1
        if is_list and all(map(_is_positive_number, weights)):
            return weights
        hint = did_you_mean(weights, ["balanced"]) if isinstance(weights, str) else ""
        raise ValueError(
            f"found {weights!r}; allowed: balanced, or a list of positive numbers, one for each "
            f"label{hint}"
        )

    @field_validator("report_to")
    @classmethod
    def _trackers_exist(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in TRACKERS:
                allowed = ", ".join(TRACKERS)
                raise ValueError(
                    f"found {name!r}; allowed: {allowed}{did_you_mean(name, list(TRACKERS))}"
                )
        return names


def _is_positive_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf
