"""Time and peak memory of the data path by rows: makes benchmarks/scale.md.

    python benchmarks/scale.py

Tables of generated texts, the last ten times as long as the first, are each walked as `train` walks them, in a process
of its own, with no model: read, clean, check and carve; tokenise; count; plan one epoch; pad each of its micro-batches.
Each is walked twice: the second time token ids are in the cache.
"""

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lora_sentiment.data.tables import TableWriter

ROOT = Path(__file__).parents[1]
MOST_GROWTH = 0.1
"""Most that peak memory may grow where the rows grow tenfold."""
STAGES = ("read", "tokenise", "count", "plan", "batches")
BATCH_SIZE, MAX_LENGTH, MAX_TOKENS = 32, 512, 4096


def main() -> None:
    """Measure every format and size, write the table, and fail where memory grows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[20_000, 200_000], help="rows of each table"
    )
    parser.add_argument("--words", type=int, default=40, help="words of a text on average")
    parser.add_argument(
        "--formats", nargs="+", default=["csv", "parquet"], help="formats of the tables"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks", help="folder of scale.jsonl and scale.md"
    )
    parser.add_argument(
        "--walk", type=Path, help="walk this table in this process, and print what it took"
    )
    arguments = parser.parse_args()
    if arguments.walk:
        print(json.dumps(walk(arguments.walk)))
        return
    lines = []
    for line in measure(arguments.formats, arguments.rows, arguments.words):
        print(json.dumps(line), flush=True)
        lines.append(line)
    (arguments.out / "scale.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    (arguments.out / "scale.md").write_text(render(lines, arguments.words), encoding="utf-8")
    if any(growth > MOST_GROWTH for growth in growths(lines).values()):
        sys.exit("memory grows with rows")


def measure(formats: list[str], sizes: list[int], num_words: int) -> Iterator[dict[str, Any]]:
    """Walk every table twice in fresh processes; yield what each walk took."""
    versions = {name: version(name) for name in ("torch", "transformers", "tokenizers", "pyarrow")}
    for form in formats:
        for num_rows in sizes:
            with tempfile.TemporaryDirectory() as folder:
                path = make_table(Path(folder, f"rows.{form}"), num_rows, num_words)
                for cached in (False, True):
                    # One thread and one arena of malloc, so that memory does not depend on the machine's cores.
                    settings = {"HF_HOME": folder, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
                    command = [sys.executable, __file__, "--walk", str(path)]
                    done = subprocess.run(
                        command,
                        check=True,
                        stdout=subprocess.PIPE,
                        text=True,
                        env={**os.environ, **settings},
                    )
                    key = {
                        "format": form,
                        "cached": cached,
                        "mib": round(path.stat().st_size / 2**20, 1),
                    }
                    date = datetime.now(UTC).date().isoformat()
                    facts = {
                        "cores": os.cpu_count(),
                        "system": platform.system(),
                        "versions": versions,
                        "date": date,
                    }
                    yield {**key, **json.loads(done.stdout), **facts}


def make_table(path: Path, num_rows: int, num_words: int) -> Path:
    """Write a table of texts of random words of the bundled tokenizer, in two classes."""
    generator = np.random.default_rng(0)
    words = np.array(
        [word for word in load_tokenizer().get_vocab() if word.isalpha() and word.isascii()]
    )
    with TableWriter(path, columns=["text", "label"]) as writer:
        for start in range(0, num_rows, 10_000):
            lengths = generator.poisson(num_words, min(10_000, num_rows - start)) + 1
            texts = [
                " ".join(words[generator.integers(len(words), size=length)]) for length in lengths
            ]
            writer.write(
                {"text": texts, "label": [("bad", "good")[i % 2] for i in range(len(texts))]}
            )
    return path


def load_tokenizer() -> Any:
    """Return the tokenizer that ships."""
    from lora_sentiment.models.load import load_tokenizer as load
    from lora_sentiment.recipe.model import ModelConfig

    return load(ModelConfig(name="bundled"))


def walk(path: Path) -> dict[str, Any]:
    """Take a table from its file to padded micro-batches; return seconds and peak memory."""
    from lora_sentiment.data.batches import TextEncoder, cut, pad, plan_epoch
    from lora_sentiment.data.report import describe_seen
    from lora_sentiment.data.rows import load_data
    from lora_sentiment.recipe.data import DataConfig
    from lora_sentiment.train import train  # noqa: F401 - the memory is a run's, with all that it imports

    logging.getLogger("lora_sentiment").setLevel(logging.WARNING)
    tokenizer = load_tokenizer()
    baseline, clock, seconds, peaks = read_peak(), time.perf_counter(), {}, {}

    def mark(stage: str) -> None:
        nonlocal clock
        seconds[stage], peaks[stage] = round(time.perf_counter() - clock, 3), read_peak()
        clock = time.perf_counter()

    data = load_data(DataConfig(source=str(path)))
    fingerprint = data.train.fingerprint
    mark("read")
    roles = {"train": data.train, "validation": data.validation}
    settings = {"tokenizer": tokenizer, "max_length": MAX_LENGTH, "truncation": "head"}
    encoded = {role: TextEncoder.of(**settings).encode(rows) for role, rows in roles.items()}
    mark("tokenise")
    describe_seen(data, encoded, max_length=MAX_LENGTH)
    mark("count")
    lengths = encoded["train"].lengths
    steps = plan_epoch(lengths, batch_size=BATCH_SIZE, seed=0, epoch=0)
    mark("plan")
    padded = sum(
        pad(encoded["train"], part)[0].size
        for step in steps
        for part in cut(step, lengths, max_tokens=MAX_TOKENS)
    )
    mark("batches")
    return {
        "rows": sum(map(len, roles.values())),
        "tokens": sum(int(found.offsets[-1]) for found in encoded.values()),
        "padded_tokens": padded,
        "train_sha256": fingerprint,
        "seconds": seconds,
        "baseline_kib": baseline,
        "peaks_kib": peaks,
    }


def read_peak() -> int:
    """Return this process's peak resident memory in KiB, mapped pages included, as Linux tells it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def growths(lines: list[dict[str, Any]]) -> dict[tuple[str, bool], float]:
    """Return how far peak memory of the largest table is above that of the smallest, by format and cache."""
    found = {}
    for form, cached in sorted({(line["format"], line["cached"]) for line in lines}):
        own = [line for line in lines if (line["format"], line["cached"]) == (form, cached)]
        first, last = (pick(own, key=lambda line: line["rows"]) for pick in (min, max))
        found[form, cached] = last["peaks_kib"]["batches"] / first["peaks_kib"]["batches"] - 1
    return found


def render(lines: list[dict[str, Any]], num_words: int) -> str:
    """Return the table as Markdown."""
    table = [
        "| format | token ids | rows | tokens | " + " | ".join(f"{stage}, s" for stage in STAGES)
        + " | all, s | µs a token | peak, MiB |",
        "|---|---|---:|---:|" + "---:|" * (len(STAGES) + 3),
    ]  # fmt: skip
    for line in lines:
        seconds = sum(line["seconds"].values())
        cells = [
            line["format"],
            "cached" if line["cached"] else "made",
            f"{line['rows']:,}",
            f"{line['tokens']:,}",
        ]
        cells += [f"{line['seconds'][stage]:.1f}" for stage in STAGES] + [f"{seconds:.1f}"]
        cells += [
            f"{seconds / line['tokens'] * 1e6:.2f}",
            f"{line['peaks_kib']['batches'] / 2**10:,.0f}",
        ]
        table.append("| " + " | ".join(cells) + " |")
    grown = [
        f"{form}, {'cached' if cached else 'made'} {growth:+.1%}"
        for (form, cached), growth in growths(lines).items()
    ]
    first = lines[0]
    versions = ", ".join(f"{name} {found}" for name, found in first["versions"].items())
    machine = f"Measured: {first['date']}, {first['system']}, {first['cores']} cores, {versions}."
    baseline = f"The imports alone hold {first['baseline_kib'] / 2**10:,.0f} MiB."
    notes = NOTES.format(words=num_words, batch=BATCH_SIZE, tokens=f"{MAX_TOKENS:,}")
    growth = f"Peak memory from the fewest rows to the most: {'; '.join(grown)}."
    return "\n".join(
        ["# Scale: the data path by rows", "", notes, *table, "", growth, baseline, machine, ""]
    )


NOTES = """\
`python benchmarks/scale.py` makes this. Tables of generated texts have {words} random words on average and two
classes. Each is walked as `train` walks it, in a process of its own, without a model. *read* streams the table,
cleans, checks and fingerprints it and carves validation. *tokenise* makes token ids with the bundled tokenizer, or
takes them from the cache that the walk before left. *count* makes the data report. *plan* orders one epoch in steps
of {batch}. *batches* pads all of its micro-batches of at most {tokens} tokens. Peak is resident memory (VmHWM),
mapped files included, of a process that has imported all that a run imports.
"""


if __name__ == "__main__":
    main()
