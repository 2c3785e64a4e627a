"""The training loss, as a sum over examples so that it does not depend on how a step was cut."""

import torch
from torch.nn import functional as F


def loss_sum(logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return the cross-entropy summed over examples, in fp32.

    Divided by the number of examples of the whole optimizer step it gives the step's mean however the step was cut:
    averaging the means of unequal micro-batches would not.

    Args:
        logits: Shape (num_rows, num_labels).
        labels: Shape (num_rows,).
        label_smoothing: Share of the target spread over all labels.
    """
    return F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=label_smoothing)
