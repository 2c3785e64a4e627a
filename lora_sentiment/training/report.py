"""`report.json`: the metrics of a run with their intervals, and its costs."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sentiment.evaluation.metric import show_metric
from lora_sentiment.evaluation.statistics import show_interval
from lora_sentiment.recipe.data import REPORT_BLOCKS

if TYPE_CHECKING:  # `compare` and `--help` need `report_roles` and load no torch
    import torch

    from lora_sentiment.data.report import DataReport
    from lora_sentiment.evaluation.statistics import Interval
    from lora_sentiment.models.parameters import ParameterCounts
    from lora_sentiment.models.quantisation import Quantisation
    from lora_sentiment.training.history import EvalPoint, History

SCHEMA = 1


def make_report(
    *,
    scores: Mapping[str, Mapping[str, "Interval"]],
    parameters: "ParameterCounts",
    adapter_bytes: int,
    history: "History",
    engine: str,
    data: "DataReport",
    quantisation: "Quantisation | None",
    offline: str | None,
    peak_memory_bytes: int,
    parent: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Make the report of a finished run.

    Args:
        scores: Role to metric to value and interval.
        parameters: Counts of the trained parameters.
        adapter_bytes: Size of the saved tensors on disk.
        history: Steps and evaluations.
        engine: `fast`, or `stock` with the reason.
        data: The data report of every role.
        quantisation: Savings and costs of a quantised base; None without one.
        offline: The sentence of `resolve_offline`, or None.
        peak_memory_bytes: Peak memory, in bytes.
        parent: The adapter that the training went on from, and its answers; None without one.
    """
    report: dict[str, Any] = {"schema": SCHEMA}
    for role, metrics in scores.items():
        report[role] = {name: interval.as_dict() for name, interval in metrics.items()}
    report["parameters"] = {**parameters.as_dict(), "adapter_bytes": adapter_bytes}
    report["train"] = {
        "seconds": round(history.seconds, 3),
        "steps": len(history.steps),
        "best_step": history.best_step,
        "stopped_early": history.stopped_early,
        "resumed": history.resumed,
        "changes": history.changes,
        "cuts": [list(cut) for cut in history.cuts],
        "tokens": history.tokens,
        "tokens_per_second": round(history.tokens / history.seconds, 1),
        "peak_memory_bytes": peak_memory_bytes,
        "engine": engine,
        "evaluations": [_describe_evaluation(point) for point in history.evaluations],
    }
    if quantisation:
        report["quantisation"] = quantisation.as_dict()
    if parent:
        report["parent"] = dict(parent)
    if offline:
        report["offline"] = offline
    report["data"] = data
    return report


def _describe_evaluation(point: "EvalPoint") -> dict[str, Any]:
    return {
        "step": point.step,
        "epoch": point.epoch,
        **point.scores,
        "metric": point.metric,
        "best": point.best,
    }


def show_progress(compared: Mapping[str, Any]) -> str:
    """Return the comparison of a role with the parent, as `compare_with_parent` made it, as a line."""
    if "difference" not in compared:
        return "no row has a label of the adapter before"
    metric = compared["difference"]["metric"]
    before, after = (compared[key][metric]["value"] for key in ("before", "after"))
    test, p = list(compared["difference"].items())[-1]
    difference = show_interval(compared["difference"])
    return (
        f"{compared['rows']:,} rows, {show_metric(metric)} {before:.4f} before and {after:.4f} now: "
        f"difference {difference}, {test} p = {p:.2g}"
    )


def report_roles(report: Mapping[str, Any]) -> list[str]:
    """Return the roles that a report has metrics of: validation first, then the others in order."""
    roles = [key for key in report if key not in REPORT_BLOCKS]
    return sorted(roles, key=lambda role: role != "validation")


def peak_memory(device: "torch.device") -> int:
    """Return the peak memory in bytes: allocated on a CUDA device, resident memory elsewhere."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # On Linux, getrusage starts from the peak of the parent process.
        return int(status.read_text(encoding="ascii").split("VmHWM:")[1].split()[0]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak_memory(device: "torch.device") -> None:
    """Reset the peak to the memory held now, on CUDA and Linux. Others cannot reset it."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").is_file():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM
