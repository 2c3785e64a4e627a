"""Progress bars: lively on a terminal, a line now and then in a log file."""

import sys
from typing import Any

from tqdm.auto import tqdm

LOG_SECONDS = 15.0


def make_bar(total: int, *, desc: str, unit: str, show: bool) -> Any:
    """Return a tqdm bar on standard error.

    Args:
        total: Units in all.
        desc: What is going on.
        unit: What is counted; tokens are shown in thousands.
        show: False for processes that do not speak.
    """
    interval = 0.2 if sys.stderr.isatty() else LOG_SECONDS
    return tqdm(total=total, desc=desc, unit=unit, unit_scale=unit == "tok", disable=not show, mininterval=interval)
