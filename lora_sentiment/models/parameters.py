"""Counts of parameters. Importing this file imports no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ParameterCounts:
    """The number of trained parameters, by place.

    Attributes:
        adapter: Trained in adapters beside the encoder.
        encoder: Trained in the encoder itself.
        head: Trained in the head.
        trainable: All trained parameters.
        base: Parameters of encoder and dense head. Full fine-tuning trains all of them.
        share: trainable / base.
    """

    adapter: int
    encoder: int
    head: int
    trainable: int
    base: int
    share: float

    def as_dict(self) -> dict[str, float]:
        """Return the counts as report.json holds them."""
        return asdict(self)

    def __str__(self) -> str:
        return show_parameters(self.as_dict())


def show_parameters(counts: Mapping[str, float]) -> str:
    """Return counts, as `ParameterCounts.as_dict` or report.json hold them, in one line."""
    names = [name for name in ("adapter", "encoder", "head") if counts[name]]
    parts = " + ".join(f"{counts[name]:,} {name}" for name in names)
    return (
        f"{parts} = {counts['trainable']:,} trainable ({counts['share']:.3%} of {counts['base']:,})"
    )
