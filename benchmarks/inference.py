"""One adapter in every form it can leave as, on the same test rows: makes benchmarks/inference.md.

    python benchmarks/inference.py adapters/imdb_lora

The adapter is merged and exported into --cache, each verified as always. Then all forms answer the same rows, a chunk
at a time and one after another, in an order that turns from chunk to chunk: a chunk's times are of the same minutes,
and ratios are taken chunk by chunk. Every finished chunk is one line of benchmarks/inference.jsonl, so a killed script
goes on where it was; `--render` makes the table of what is finished.

The stock pipeline gets the merged folder and the texts as cleaned, with truncation on: it keeps the first tokens of a
longer text, and knows no other way. Its batch size is the faster of 1 and 16 on the first rows.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from journal import Journal, Line

from lora_sentiment.adapter.export import export
from lora_sentiment.adapter.folder import load_card
from lora_sentiment.adapter.merge import merge
from lora_sentiment.classifier import load
from lora_sentiment.data.rows import load_judged

ROOT = Path(__file__).parents[1]
FORMS = ("adapter", "merged", "ONNX", "ONNX int8", "stock pipeline")
Answer = Callable[[list[str]], np.ndarray]
"""From texts to probabilities: (num_texts, num_labels)."""


def main() -> None:
    """Measure the chunks that are missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "adapter", type=Path, help="adapter folder; its recorded test rows are read"
    )
    parser.add_argument("--split", default="test", help="judged role of the adapter's data")
    parser.add_argument("--chunk", type=int, default=1000, help="rows of a chunk")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "adapters/inference", help="folder of the other forms"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks", help="folder of inference.jsonl and .md"
    )
    parser.add_argument(
        "--render", action="store_true", help="write the table of what is finished, measure nothing"
    )
    arguments = parser.parse_args()
    journal = Journal(arguments.out / "inference.jsonl", key=itemgetter("start"))
    if not arguments.render:
        card = load_card(arguments.adapter)
        rows, _ = load_judged(card.data.config, role=arguments.split, labels=tuple(card.labels))
        assert rows is not None
        # In an order of its own: files are often sorted by label.
        order = np.random.default_rng(0).permutation(len(rows))
        forms = make_forms(arguments.adapter, arguments.cache, [rows.texts[i] for i in order[:64]])
        for start in range(0, len(rows), arguments.chunk):
            if start in journal.lines:
                continue
            index = order[start : start + arguments.chunk]
            texts = [rows.texts[i] for i in index]
            journal.append(measure(forms, texts, rows.labels[index], start=start, of=len(rows)))
            print(json.dumps(journal.lines[start]), flush=True)
    if not journal.lines:
        sys.exit(
            f"{arguments.out / 'inference.jsonl'}: nothing is finished; run it without --render"
        )
    (arguments.out / "inference.md").write_text(
        render(list(journal.lines.values()), arguments), encoding="utf-8"
    )


def make_forms(adapter: Path, cache: Path, sample: list[str]) -> dict[str, Answer]:
    """Merge and export what is not in the cache, and return what answers by form."""
    cache.mkdir(parents=True, exist_ok=True)
    merged, onnx = cache / "merged", cache / "onnx"
    if not merged.is_dir():
        print(json.dumps(merge(adapter, merged).as_dict()), flush=True)
    if not onnx.is_dir():
        print(json.dumps(export(adapter, onnx, format="onnx-int8").as_dict()), flush=True)
    paths = {
        "adapter": adapter,
        "merged": merged,
        "ONNX": onnx / "onnx/model.onnx",
        "ONNX int8": onnx / "onnx/model_quantized.onnx",
    }
    forms: dict[str, Answer] = {name: load(path).probabilities for name, path in paths.items()}
    forms["stock pipeline"] = make_pipeline(merged, sample)
    return forms


def make_pipeline(merged: Path, sample: list[str]) -> Answer:
    """Return what transformers' own pipeline answers, at the batch size that is faster on a sample."""
    from transformers import pipeline

    stock = pipeline("text-classification", model=str(merged))
    names = list(stock.model.config.label2id)

    def answer(texts: list[str], batch_size: int) -> np.ndarray:
        found = stock(texts, truncation=True, top_k=None, batch_size=batch_size)
        scores = [{entry["label"]: entry["score"] for entry in row} for row in found]
        return np.array([[row[name] for name in names] for row in scores])

    seconds = {}
    for batch_size in (1, 16):
        began = time.perf_counter()
        answer(sample, batch_size)
        seconds[batch_size] = time.perf_counter() - began
    best = min(seconds, key=lambda size: seconds[size])
    print(f"stock pipeline: {seconds} seconds for {len(sample)} texts by batch size", flush=True)
    return lambda texts: answer(texts, best)


def measure(
    forms: dict[str, Answer], texts: list[str], labels: np.ndarray, *, start: int, of: int
) -> dict[str, Any]:
    """Let every form answer one chunk; what the adapter answers is what the others are compared with."""
    turn = start // len(texts) % len(FORMS)
    seconds, found = {}, {}
    for name in FORMS[turn:] + FORMS[:turn]:
        began = time.perf_counter()
        found[name] = forms[name](texts)
        seconds[name] = time.perf_counter() - began
    reference = found["adapter"]
    return {
        "start": start,
        "rows": len(texts),
        "of": of,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "forms": {
            name: {
                "seconds": round(seconds[name], 3),
                "right": int((found[name].argmax(axis=1) == labels).sum()),
                "flips": int((found[name].argmax(axis=1) != reference.argmax(axis=1)).sum()),
                "difference": float(np.abs(found[name] - reference).max()),
            }
            for name in FORMS
        },
    }


def render(lines: list[Line], arguments: argparse.Namespace) -> str:
    """Return the page."""
    card = load_card(arguments.adapter)
    done, of = sum(line["rows"] for line in lines), lines[0]["of"]
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "onnxruntime")
    )
    page = [
        "# One adapter in every form",
        "",
        f"`python benchmarks/inference.py {arguments.adapter}`: {done:,} of the {of:,} {arguments.split} rows of "
        f"`{card.data.config.source}`, base `{Path(card.base.name).name}`, at most {card.max_length} tokens a text "
        f"({card.truncation}; the stock pipeline knows `head` only). {lines[-1]['machine']}, {libraries}, "
        f"{lines[-1]['date']}. Chunks of {lines[0]['rows']:,} rows, all forms in turn on each; a ratio is the median "
        "over chunks, in brackets the lowest and highest.",
        "",
        "| form | accuracy | texts/s | times the stock pipeline | other labels than the adapter | "
        "largest difference of a probability |",
        "|---|---|---|---|---|---|",
    ]
    for name in FORMS:
        own = [line["forms"][name] for line in lines]
        ratios = [
            line["forms"]["stock pipeline"]["seconds"] / line["forms"][name]["seconds"]
            for line in lines
        ]
        page.append(
            f"| {name} | {sum(form['right'] for form in own) / done:.4f} "
            f"| {done / sum(form['seconds'] for form in own):,.1f} "
            f"| {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] "
            f"| {sum(form['flips'] for form in own):,} | {max(form['difference'] for form in own):.1e} |"
        )
    return "\n".join(page) + "\n"


if __name__ == "__main__":
    main()
