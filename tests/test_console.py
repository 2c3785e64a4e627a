"""Lines and progress bars on a terminal."""

import os
import pty
import subprocess
import sys
import termios

SCRIPT = """
import logging
from lora_sentiment.console import LogHandler, make_bar

log = logging.getLogger("lora_sentiment")
log.handlers = [LogHandler()]
log.setLevel(logging.INFO)
with make_bar(3, desc="training", unit="step", show=True) as bar:
    for step in range(1, 4):
        with make_bar(9000, desc="validation", unit="tok", show=True) as inner:
            inner.update(9000)
        log.info("step %d is done", step)
        bar.update()
log.info("saved")
"""


def show(written: str) -> list[str]:
    """Return the lines that a terminal shows."""
    lines, row, column = [""], 0, 0
    for part in written.replace("\x1b[A", "\x00"):
        if part == "\x00":
            row -= 1
        elif part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


def test_lines_stand_above_the_bars_and_a_full_inner_bar_goes():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=theirs) as script:
        os.close(theirs)
        written = b""
        while script.poll() is None or not written.endswith(b"saved\r\n"):
            try:
                written += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
    lines = [line for line in show(written.decode().replace("\r\n", "\n")) if line]
    assert script.returncode == 0
    assert lines[:3] == [f"step {step} is done" for step in (1, 2, 3)]
    assert lines[3].startswith("training: 100%")
    assert lines[4:] == ["saved"]


def test_in_a_log_file_each_bar_keeps_its_line_and_no_line_begins_with_blanks():
    done = subprocess.run([sys.executable, "-c", SCRIPT], stderr=subprocess.PIPE, check=True)
    written = done.stderr.decode()
    assert written.count("validation: 100%") == 3
    for line in ("step 1 is done", "step 2 is done", "step 3 is done", "saved"):
        assert line in written.split("\n"), written
