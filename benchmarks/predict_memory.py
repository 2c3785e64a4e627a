"""Peak memory of `predict` by rows: a file ten times as long must not take more.

    python benchmarks/predict_memory.py

Parquet files of generated reviews, each one row group as most writers leave it, are predicted to parquet in processes
of their own. A classifier without an encoder judges them: words are looked up and added, so that the time goes into
reading and writing, and torch's memory does not hide theirs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from lora_sentiment.classifier import Classifier
from lora_sentiment.commands.predict import predict_file
from lora_sentiment.data.batches import TextEncoder
from lora_sentiment.models.engine import Engine

WORDS = [f"word{number}" for number in range(5000)]


def main() -> None:
    """Print each size's peak, and how far the last is above the first; fail past 10 %."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[20_000, 200_000], help="rows of each file"
    )
    parser.add_argument("--words", type=int, default=40, help="words of a text on average")
    parser.add_argument("--rows-per-part", type=int, default=10_000)
    parser.add_argument(
        "--file", type=Path, help="predict this file in this process, and print its own peak"
    )
    arguments = parser.parse_args()
    if arguments.file:
        print(json.dumps(predict(arguments.file, arguments.rows_per_part)))
        return
    peaks = []
    for num_rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = make_file(Path(folder, "in.parquet"), num_rows, arguments.words)
            command = [
                sys.executable,
                __file__,
                "--file",
                str(path),
                "--rows-per-part",
                str(arguments.rows_per_part),
            ]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        line = json.loads(done.stdout)
        print(json.dumps(line), flush=True)
        peaks.append(line["peak_mib"])
    print(f"{peaks[-1] / peaks[0] - 1:+.1%}")
    if peaks[-1] > 1.1 * peaks[0]:
        sys.exit("memory grows with rows")


def make_file(path: Path, num_rows: int, num_words: int) -> Path:
    """Write a parquet file of numbered texts, as one row group."""
    generator = np.random.default_rng(0)
    words = np.array(WORDS)
    texts = [
        " ".join(words[generator.integers(len(words), size=n)])
        for n in generator.poisson(num_words, num_rows)
    ]
    pq.write_table(pa.table({"id": range(num_rows), "text": texts}), path, row_group_size=num_rows)
    return path


def predict(path: Path, rows_per_part: int) -> dict[str, Any]:
    """Predict a file, and return what it took."""
    summary = predict_file(
        make_classifier(),
        input=path,
        output=path.with_name("out.parquet"),
        rows_per_part=rows_per_part,
        progress=False,
    )
    return {
        "rows": summary.rows,
        "input_mib": round(path.stat().st_size / 2**20, 1),
        "parts": summary.parts,
        "seconds": round(summary.seconds, 1),
        "peak_mib": round(read_peak() / 2**10, 1),
    }


def read_peak() -> int:
    """Return this process's peak resident memory in KiB, as Linux tells it.

    getrusage would count its parent's memory too, at the time of the fork.
    """
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def make_classifier() -> Classifier:
    """Return a classifier that adds up a weight of each word."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    weights = np.random.default_rng(1).standard_normal((len(words), 2)).astype(np.float32)
    weights[0] = 0

    def engine(input_ids: NDArray[np.int64], _: NDArray[np.int64] | None) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = weights[input_ids].sum(axis=1)
        return logits

    encoder = TextEncoder(tokenizer, 2, 3, 0, max_length=512, truncation="head")
    return Classifier(
        ("negative", "positive"),
        encoder,
        Engine(engine, 1024),
        clean=False,
        calibration=None,
        sha256="none",
    )


if __name__ == "__main__":
    main()
