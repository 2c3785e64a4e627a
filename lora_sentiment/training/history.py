"""What happened in a run: every step, every evaluation, every cut."""

from dataclasses import dataclass, field


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
        max_tokens: The micro-batch cut in padded tokens, as it is now.
        cuts: Every (step, new max_tokens) at which memory ran out.
        stopped_early: Whether patience ran out.
        resumed: The steps that the run went on after, having been stopped.
        changes: What differed then and was allowed, each as a sentence: the run is not bit for bit an unbroken one.
    """

    steps: list[TrainPoint] = field(default_factory=list)
    evaluations: list[EvalPoint] = field(default_factory=list)
    best_step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    max_tokens: int = 0
    cuts: list[tuple[int, int]] = field(default_factory=list)
    stopped_early: bool = False
    resumed: list[int] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
