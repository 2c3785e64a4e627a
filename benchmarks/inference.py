"""One adapter in every form it can leave as, on the same test rows: makes benchmarks/inference.md.

    python benchmarks/inference.py adapters/imdb_lora
    python benchmarks/inference.py adapters/imdb_small --name inference_small --rows 2000
    python benchmarks/inference.py adapters/imdb_small --name inference_small --forms ONNX "ONNX int8"

The adapter is merged and exported into --cache, each verified as always. Then all forms answer the same rows, a chunk
at a time and one after another, in an order that turns from chunk to chunk: a chunk's times are of the same minutes,
and ratios are taken chunk by chunk. Every finished chunk is one line of benchmarks/inference.jsonl, so a killed script
goes on where it was; `--render` makes the table of what is finished. `--forms` answers further rows with a few forms,
for their accuracy. In a chunk that ONNX answers, which has fp32, the answers of other forms are compared with its own.

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
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from journal import Journal, Line

from lora_sentiment.adapter.export import export
from lora_sentiment.adapter.folder import load_card
from lora_sentiment.adapter.merge import merge
from lora_sentiment.adapter.onnx import PLAIN, QUANTISED
from lora_sentiment.classifier import Classifier, load
from lora_sentiment.data.rows import load_judged
from lora_sentiment.models.engine import Engine

ROOT = Path(__file__).parents[1]
REFERENCE, STOCK = "ONNX", "stock pipeline"
FORMS = (
    "adapter",
    "merged",
    REFERENCE,
    "ONNX int8",
    "ONNX int8 weights",
    "OpenVINO",
    STOCK,
)
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
        "--source", help="file with the rows, if they are not where the adapter says"
    )
    parser.add_argument("--rows", type=int, help="rows to answer; by default all")
    parser.add_argument(
        "--forms", nargs="+", choices=FORMS, help="by default all whose packages are installed"
    )
    parser.add_argument("--name", default="inference", help="name of the .jsonl and .md")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "adapters/inference", help="folder of the other forms"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks", help="folder of .jsonl and .md"
    )
    parser.add_argument(
        "--render", action="store_true", help="write the table of what is finished, measure nothing"
    )
    arguments = parser.parse_args()
    results = arguments.out / f"{arguments.name}.jsonl"
    journal = Journal(results, key=itemgetter("start"))
    if not arguments.render:
        card = load_card(arguments.adapter)
        config = card.data.config
        if arguments.source:
            files = {"train": arguments.source, arguments.split: arguments.source}
            config = config.model_copy(update={"source": files})
        rows, _ = load_judged(config, role=arguments.split, labels=tuple(card.labels))
        assert rows is not None
        # In an order of its own: files are often sorted by label.
        order = np.random.default_rng(0).permutation(len(rows))
        names = arguments.forms or [
            name for name in FORMS if name != "OpenVINO" or find_spec("openvino")
        ]
        sample = [rows.texts[i] for i in order[:64]]
        forms = make_forms(names, arguments.adapter, arguments.cache, sample)
        for start in range(0, min(len(rows), arguments.rows or len(rows)), arguments.chunk):
            if start in journal.lines:
                continue
            index = order[start : start + arguments.chunk]
            texts = [rows.texts[i] for i in index]
            journal.append(measure(forms, texts, rows.labels[index], start=start, of=len(rows)))
            print(json.dumps(journal.lines[start]), flush=True)
    if not journal.lines:
        sys.exit(f"{results}: nothing is finished; run it without --render")
    results.with_suffix(".md").write_text(
        render(list(journal.lines.values()), arguments), encoding="utf-8"
    )


def make_forms(
    names: list[str], adapter: Path, cache: Path, sample: list[str]
) -> dict[str, Answer]:
    """Merge and export what is not in the cache, and return what answers by form."""
    cache.mkdir(parents=True, exist_ok=True)
    merged, int8, int8_weights = cache / "merged", cache / "onnx", cache / "onnx-int8-weights"
    if not merged.is_dir():
        print(json.dumps(merge(adapter, merged).as_dict()), flush=True)
    for format, folder in (("onnx-int8", int8), ("onnx-int8-weights", int8_weights)):
        if not folder.is_dir():
            # This page says what int8 costs, whatever it is.
            done = export(merged, folder, format=format, max_drop=100)
            print(json.dumps(done.as_dict()), flush=True)
    paths = {
        "adapter": adapter,
        "merged": merged,
        REFERENCE: int8 / PLAIN,
        "ONNX int8": int8 / QUANTISED,
        "ONNX int8 weights": int8_weights / QUANTISED,
    }
    forms: dict[str, Answer] = {}
    for name in names:
        if name == "OpenVINO":
            forms[name] = open_in_openvino(load(paths[REFERENCE]), paths[REFERENCE]).probabilities
        elif name == STOCK:
            forms[name] = make_pipeline(merged, sample)
        else:
            forms[name] = load(paths[name]).probabilities
    return forms


def open_in_openvino(classifier: Classifier, path: Path) -> Classifier:
    """Return a classifier that reads texts as another one, and computes an ONNX file in OpenVINO."""
    import openvino

    compiled = openvino.Core().compile_model(
        path,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        },
    )

    def answer(input_ids: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        mask = np.ones_like(input_ids) if mask is None else mask
        return np.array(compiled({"input_ids": input_ids, "attention_mask": mask})["logits"])

    return replace(classifier, engine=Engine(answer, classifier.engine.max_tokens))


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
    """Let every form answer one chunk, and compare the answers with those of the reference."""
    names = list(forms)
    turn = start // len(texts) % len(names)
    seconds, found = {}, {}
    for name in names[turn:] + names[:turn]:
        began = time.perf_counter()
        found[name] = forms[name](texts)
        seconds[name] = time.perf_counter() - began
    figures: dict[str, dict[str, float]] = {}
    for name in names:
        given = found[name].argmax(axis=1)
        figures[name] = {"seconds": round(seconds[name], 3), "right": int((given == labels).sum())}
        if REFERENCE in found:
            reference = found[REFERENCE]
            figures[name]["flips"] = int((given != reference.argmax(axis=1)).sum())
            figures[name]["difference"] = float(np.abs(found[name] - reference).max())
    return {
        "start": start,
        "rows": len(texts),
        "of": of,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "forms": figures,
    }


def render(lines: list[Line], arguments: argparse.Namespace) -> str:
    """Return the page."""
    card = load_card(arguments.adapter)
    of = lines[0]["of"]
    libraries = ", ".join(
        f"{name} {version(name)}"
        for name in ("torch", "transformers", "onnxruntime", "openvino")
        if find_spec(name)
    )
    page = [
        f"# One adapter in every form: {arguments.adapter}",
        "",
        f"`python benchmarks/inference.py {arguments.adapter}`, {of:,} {arguments.split} rows of "
        f"`{card.data.config.source}`, base `{Path(card.base.name).name}`, at most {card.max_length} tokens a text "
        f"({card.truncation}; the stock pipeline knows `head` only). {lines[-1]['machine']}, {libraries}, "
        f"{lines[-1]['date']}. Chunks of {lines[0]['rows']:,} rows, all forms in turn on each; a ratio is the median "
        "over chunks that the stock pipeline answered too, in brackets the lowest and highest. ONNX has fp32.",
        "",
        "| form | rows | accuracy | texts/s | times the stock pipeline | other labels than ONNX | "
        "largest difference of a probability |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in FORMS:
        chunks = [line for line in lines if name in line["forms"]]
        if not chunks:
            continue
        done = sum(line["rows"] for line in chunks)
        own = [line["forms"][name] for line in chunks]
        compared = [form for form in own if "flips" in form]
        num_compared = sum(line["rows"] for line in chunks if "flips" in line["forms"][name])
        # Speed is of the chunks that all forms answered side by side.
        beside = [line for line in chunks if STOCK in line["forms"]]
        ratios = [
            line["forms"][STOCK]["seconds"] / line["forms"][name]["seconds"] for line in beside
        ]
        seconds = sum(line["forms"][name]["seconds"] for line in beside)
        page.append(
            f"| {name} | {done:,} | {sum(form['right'] for form in own) / done:.4f} "
            f"| {sum(line['rows'] for line in beside) / seconds:,.1f} "
            f"| {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] "
            f"| {sum(form['flips'] for form in compared):,} of {num_compared:,} "
            f"| {max(form['difference'] for form in compared):.1e} |"
        )
    return "\n".join(page) + "\n"


if __name__ == "__main__":
    main()
