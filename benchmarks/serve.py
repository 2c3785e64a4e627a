"""Many adapters in one stream, against PEFT's mixed batches and one merged model: makes benchmarks/serve.md.

    python benchmarks/serve.py [--base FOLDER]

64 adapters of random weights on q_lin and v_lin, ranks 4 to 16: a set with 2 to 20 labels each, and one with 5 labels
each. The second is there because PEFT's `adapter_names` needs equal heads. Every round answers the same texts, each
by the next adapter, in every form in turn; ratios are taken round by round. All forms get token ids and give logits:

- ours, 2 to 20 labels / ours, 5 labels: `Pool.compute`.
- ours, merged: one adapter merged into the base, every text by that one.
- PEFT, our batches: `adapter_names` with rows sorted by length and cut as ours.
- PEFT, as they come: `adapter_names` with batches of 32 in the order of arrival, padded to the longest.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from lora_sentiment import bundled
from lora_sentiment.adapter.merge import merge
from lora_sentiment.classifier import load
from lora_sentiment.data.batches import Encoded, cut, pad
from lora_sentiment.models.engine import compute_logits
from lora_sentiment.models.token_limits import inference_tokens
from lora_sentiment.recipe.method import LoraMethod
from lora_sentiment.serve.pool import Pool, load_pool

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.random_adapters import name_labels, save_random  # noqa: E402

RANKS = (4, 8, 12, 16)
NUM_LABELS = 5
ARRIVAL_BATCH = 32
Answer = Callable[[], list[np.ndarray]]


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default=bundled.NAME, help="folder of a base, or `bundled`")
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--texts", type=int, default=256, help="texts of a round")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of the longest text")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks", help="folder of serve.jsonl and serve.md"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        forms, facts = make_forms(Path(place), arguments)
        order = list(forms)
        rounds = []
        for turn in range(arguments.rounds):
            seconds = {}
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                began = time.perf_counter()
                forms[name]()
                seconds[name] = time.perf_counter() - began
            rounds.append(seconds)
            print(json.dumps(seconds), flush=True)
    facts |= {
        "base": arguments.base,
        "texts": arguments.texts,
        "adapters": arguments.adapters,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, float32",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "rounds": rounds,
    }
    with (arguments.out / "serve.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")
    lines = [json.loads(line) for line in (arguments.out / "serve.jsonl").read_text().splitlines()]
    (arguments.out / "serve.md").write_text(render(lines), encoding="utf-8")


def make_adapter(folder: Path, seed: int, num_labels: int, arguments: argparse.Namespace) -> Path:
    """Save the adapter of this seed and return its folder; its rank goes by the seed."""
    method, labels = LoraMethod(r=RANKS[seed % len(RANKS)]), name_labels(num_labels)
    save_random(
        folder, arguments.base, method, labels=labels, seed=seed, max_length=arguments.max_length
    )
    return folder


def make_forms(
    place: Path, arguments: argparse.Namespace
) -> tuple[dict[str, Answer], dict[str, Any]]:
    """Make adapters and return what answers by form, after holding every form's answers against ours."""
    own, equal = (
        [
            make_adapter(place / name / f"adapter-{i}", i, count(i), arguments)
            for i in range(arguments.adapters)
        ]
        for name, count in (("own", lambda i: 2 + i % 19), ("equal", lambda _: NUM_LABELS))
    )
    mixed, same = (
        load_pool(folders, watch=None, base=None, dtype="float32") for folders in (own, equal)
    )
    merge(equal[0], place / "merged")
    single = load(place / "merged", dtype="float32")
    encoded = make_texts(arguments, same)
    names = [f"adapter-{i % arguments.adapters}" for i in range(len(encoded))]
    stock = load_peft(arguments.base, equal)
    sorted_batches = cut(
        np.arange(len(encoded)), encoded.lengths, max_tokens=inference_tokens("cpu")
    )
    arrival = [
        np.arange(start, min(start + ARRIVAL_BATCH, len(encoded)))
        for start in range(0, len(encoded), ARRIVAL_BATCH)
    ]
    forms: dict[str, Answer] = {
        "ours, 2 to 20 labels": lambda: mixed.compute(
            [mixed.adapters[name] for name in names], encoded
        ),
        "ours, 5 labels": lambda: same.compute([same.adapters[name] for name in names], encoded),
        "ours, merged": lambda: list(compute_logits(single.engine, encoded)),
        "PEFT, our batches": lambda: ask_peft(stock, encoded, names, sorted_batches),
        "PEFT, as they come": lambda: ask_peft(stock, encoded, names, arrival),
    }
    ours = forms["ours, 5 labels"]()
    for name in ("PEFT, our batches", "PEFT, as they come"):
        np.testing.assert_allclose(np.stack(forms[name]()), np.stack(ours), atol=1e-4)
    facts = {
        "tokens": int(encoded.lengths.sum()),
        "base_bytes": 4 * sum(p.numel() for p in mixed._forward.encoder.parameters()),
        "adapter_bytes": sum(adapter.part.num_bytes for adapter in mixed.adapters.values()),  # type: ignore[union-attr]
    }
    return forms, facts


def make_texts(arguments: argparse.Namespace, pool: Pool) -> Encoded:
    """Return the reviews that ship, over and over, each from another word on, so that lengths differ."""
    reviews = [
        json.loads(line)["text"].split()
        for line in (bundled.REVIEWS / "train.jsonl").open(encoding="utf-8")
    ]
    generator = np.random.default_rng(0)
    texts = []
    for i in range(arguments.texts):
        words = [
            word
            for j in range(int(generator.integers(1, 4)))
            for word in reviews[(i + 7 * j) % len(reviews)]
        ]
        texts.append(" ".join(words[int(generator.integers(0, 5)) :]))
    encoder = next(iter(pool.adapters.values())).encoder
    return encoder.pack([encoder.frame(encoder.truncate(ids)) for ids in encoder.tokenise(texts)])


def load_peft(base: str, folders: list[Path]) -> PeftModel:
    """Load every adapter into one PEFT model."""
    path = bundled.BASE if base == bundled.NAME else base
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=NUM_LABELS, dtype=torch.float32
    )
    stock = PeftModel.from_pretrained(model, folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        stock.load_adapter(folder, adapter_name=folder.name)
    return stock.eval()


def ask_peft(
    stock: PeftModel, encoded: Encoded, names: list[str], batches: list[np.ndarray]
) -> list[np.ndarray]:
    """Answer rows in batches, each row by the adapter of its name."""
    found: dict[int, np.ndarray] = {}
    for index in batches:
        input_ids, mask, _ = pad(encoded, index)
        with torch.inference_mode():
            logits = stock(
                input_ids=torch.from_numpy(input_ids),
                attention_mask=None if mask is None else torch.from_numpy(mask),
                adapter_names=[names[row] for row in index],
            ).logits
        found.update(zip(index.tolist(), logits.numpy(), strict=True))
    return [found[row] for row in range(len(encoded))]


def render(lines: list[dict[str, Any]]) -> str:
    """Return the page: one table a measurement."""
    page = [
        "# Many adapters in one stream",
        "",
        *__doc__.split("\n\n", 2)[2].strip().splitlines(),
        "",
    ]
    for line in lines:
        versions = ", ".join(f"{name} {found}" for name, found in line["versions"].items())
        page += [
            f"## Base `{Path(line['base']).name}`",
            "",
            f"{line['adapters']} adapters, {line['texts']} texts ({line['tokens']:,} tokens) a round, "
            f"{len(line['rounds'])} rounds; {line['machine']}, {versions}, {line['date']}. A ratio is the median over "
            f"rounds, in brackets the lowest and highest. Memory: base {line['base_bytes'] / 1e6:.1f} MB, the "
            f"{line['adapters']} adapters {line['adapter_bytes'] / 1e6:.1f} MB with their heads.",
            "",
            "| form | texts/s | times PEFT, our batches | times PEFT, as they come | share of ours, merged |",
            "|---|---|---|---|---|",
        ]
        for name in line["rounds"][0]:
            cells = [
                ratio(line["rounds"], other, name)
                for other in ("PEFT, our batches", "PEFT, as they come", "ours, merged")
            ]
            seconds = statistics.median(found[name] for found in line["rounds"])
            page.append(f"| {name} | {line['texts'] / seconds:,.0f} | {' | '.join(cells)} |")
        page.append("")
    return "\n".join(page)


def ratio(rounds: list[dict[str, float]], other: str, name: str) -> str:
    """Return how many times faster than another form: median [lowest, highest]."""
    found = [seconds[other] / seconds[name] for seconds in rounds]
    return f"{statistics.median(found):.2f} [{min(found):.2f}, {max(found):.2f}]"


if __name__ == "__main__":
    main()
