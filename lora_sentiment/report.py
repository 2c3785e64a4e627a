"""`report.json`: the figures of a run, each with its interval, and what they cost."""

import sys
from collections.abc import Mapping
from typing import Any

import torch

from lora_sentiment.data.batches import Encoded
from lora_sentiment.data.rows import Counts
from lora_sentiment.evaluation.statistics import Interval
from lora_sentiment.model.parameters import ParameterCounts
from lora_sentiment.training.loop import History

SCHEMA = 1


def make_report(
    *,
    scores: Mapping[str, Mapping[str, Interval]],
    parameters: ParameterCounts,
    adapter_bytes: int,
    history: History,
    engine: str,
    counts: Mapping[str, Counts],
    encoded: Mapping[str, Encoded],
    seen_test_rows: int,
    peak_memory_bytes: int,
) -> dict[str, Any]:
    """Return the report of a finished run.

    Args:
        scores: Split to metric to value and interval.
        parameters: What was trained.
        adapter_bytes: Size of the saved tensors on disk.
        history: Steps and evaluations.
        engine: `fast`, or `stock` with the reason.
        counts: Split to what was done while it was read.
        encoded: Split to its token ids.
        seen_test_rows: Test rows whose text stands in train or validation too.
        peak_memory_bytes: Most memory held, in bytes.
    """
    return {
        "schema": SCHEMA,
        **{split: {name: interval.as_dict() for name, interval in found.items()} for split, found in scores.items()},
        "parameters": {**parameters.as_dict(), "adapter_bytes": adapter_bytes},
        "train": {
            "seconds": round(history.seconds, 3),
            "steps": len(history.steps),
            "best_step": history.best_step,
            "stopped_early": history.stopped_early,
            "tokens": history.tokens,
            "tokens_per_second": round(history.tokens / history.seconds, 1),
            "peak_memory_bytes": peak_memory_bytes,
            "engine": engine,
            "evaluations": [vars(point) for point in history.evaluations],
        },
        "data": {
            "seen_test_rows": seen_test_rows,
            **{split: found.as_dict() for split, found in counts.items()},
            "tokens": {
                split: {
                    "rows": len(rows),
                    "tokens": int(rows.offsets[-1]),
                    "truncated": rows.truncated,
                    "longest": int(rows.lengths.max()),
                }
                for split, rows in encoded.items()
            },
        },
    }


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: allocated on a CUDA device, resident in this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    # Linux counts kibibytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
