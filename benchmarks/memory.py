"""The memory estimate beside measured peaks: makes benchmarks/memory.md.

    python benchmarks/memory.py --shape minilm

Every case is `estimate --probe` in a fresh process: the base is loaded, and two optimizer steps and an evaluation are
taken at one length. The base has random weights, so that nothing is fetched: memory does not depend on values.

Peak memory is resident memory beyond the baseline, which is the interpreter, the imports and one step of a toy model.
It is measured twice: with glibc told to give every freed buffer back at once, so that only what is in use counts, and
as a run holds it. Finished cases are lines of benchmarks/memory.jsonl and are not run
again; `--render` makes the table of what is finished.
"""

import argparse
import json
import platform
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

from journal import Journal

from lora_sentiment.commands.estimate import estimate
from lora_sentiment.commands.probe import probe
from lora_sentiment.models.memory import Memory
from lora_sentiment.recipe.recipe import Recipe

ROOT = Path(__file__).parents[1]
SHAPES: dict[str, dict[str, int]] = {
    "minilm": {"dim": 384, "hidden_dim": 1536},
    "distilbert-base": {},
}
LENGTHS = (128, 256, 512)
METHODS = {
    "full": ["method={kind: full}"],
    "full, stock engine": ["method={kind: full}", "train.engine=stock"],
    "LoRA": [],
    "LoRA, int8": ["model.quantize=int8"],
    "LoRA, nf4": ["model.quantize=nf4", "model.double_quant=true"],
}
BATCH_SIZE = 16


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="minilm", help="shape of the base")
    parser.add_argument(
        "--cases", nargs="*", choices=METHODS, default=list(METHODS), help="methods to measure"
    )
    parser.add_argument(
        "--render", action="store_true", help="write the table of what is finished, measure nothing"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/memory.jsonl")
    arguments = parser.parse_args()
    journal = Journal(arguments.results, key=itemgetter("shape", "case", "length"))
    if not arguments.render:
        with tempfile.TemporaryDirectory() as folder:
            base = make_base(Path(folder), SHAPES[arguments.shape])
            for case in arguments.cases:
                for length in LENGTHS:
                    key = {"shape": arguments.shape, "case": case, "length": length}
                    if tuple(key.values()) not in journal.lines:
                        journal.append(measure(key, base))
                        print(json.dumps(journal.lines[tuple(key.values())]), flush=True)
    (ROOT / "benchmarks/memory.md").write_text(
        render(list(journal.lines.values())), encoding="utf-8"
    )


def make_base(folder: Path, shape: dict[str, int]) -> Path:
    """Write a random base of a shape, and a tokenizer without words."""
    from transformers import DistilBertConfig, DistilBertModel, DistilBertTokenizerFast

    DistilBertModel(DistilBertConfig(**shape)).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    DistilBertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return folder


def measure(key: dict[str, Any], base: Path) -> dict[str, Any]:
    """Probe one case: what is in use, and what a run holds as it is."""
    recipe = make_recipe(key, base)
    in_use, resident = probe(recipe), probe(recipe, in_use=False)
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    return {
        **key,
        "rows": in_use.rows,
        "baseline": in_use.baseline,
        "in_use": in_use.measured,
        "resident": resident.measured,
        "libc": " ".join(platform.libc_ver()),
        "versions": versions,
        "date": datetime.now(UTC).date().isoformat(),
    }


def make_recipe(key: dict[str, Any], base: Path) -> Recipe:
    """Return the recipe of a case on a base."""
    path = base / "memory.yaml"
    path.write_text(
        f"data: {{source: none, labels: [a, b]}}\n"
        f"model: {{name: {base}, max_length: {key['length']}, dtype: float32}}\n"
        f"train: {{batch_size: {BATCH_SIZE}}}\n",
        encoding="utf-8",
    )
    return Recipe.load(path, METHODS[key["case"]])


def estimate_case(key: dict[str, Any]) -> Memory:
    """Return today's estimate of a case at its own length."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_type": "distilbert", **SHAPES[key["shape"]]}
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        return estimate(make_recipe(key, Path(folder))).cuts[-1].memory


def render(lines: list[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    table = [
        "| base | method | length | rows | estimate | measured | error | as a run holds it | kept free |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    order = list(METHODS)
    for line in sorted(
        lines, key=lambda line: (line["shape"], order.index(line["case"]), line["length"])
    ):
        memory = estimate_case(line)
        kept = (line["resident"] - line["in_use"]) / (memory.activations + memory.workspace)
        cells = [
            line["shape"],
            line["case"],
            line["length"],
            line["rows"],
            _mib(memory.peak),
            _mib(line["in_use"]),
        ]
        cells += [f"{memory.peak / line['in_use'] - 1:+.1%}", _mib(line["resident"]), f"{kept:.0%}"]
        table.append("| " + " | ".join(map(str, cells)) + " |")
    head = ["# Memory: the estimate beside measured peaks", "", NOTES, _environment(lines), ""]
    return "\n".join([*head, *table, ""])


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f}"


NOTES = """\
`python benchmarks/memory.py` makes this. Each case loads a random base of the named shape: minilm has 6 layers, 384
wide, distilbert-base 6 layers, 768 wide. It takes two optimizer steps of 16 texts and one evaluation, in fp32, in a
process of its own. LoRA is r=8 on q_lin and v_lin, nf4 with double quantisation; dropout is on; micro-batches are as
the recipe cuts them. MiB beyond the baseline, which is the interpreter, the imports and one step of a toy model.
Measured is what is in use at the peak: glibc was told to give freed buffers back at once. *As a run holds it* is the
same run without that; what glibc keeps free there is given over the size of activations and workspace. The quantised
cases and those named so run on transformers' own forward, the others on the fast one.
"""


def _environment(lines: list[dict[str, Any]]) -> str:
    found = sorted(
        {
            f"{line['date']}, {line['libc']}, "
            + ", ".join(f"{k} {v}" for k, v in line["versions"].items())
            for line in lines
        }
    )
    baselines = [line["baseline"] / 2**20 for line in lines] or [0]
    return f"Baseline {min(baselines):,.0f} to {max(baselines):,.0f} MiB. Measured: {'; '.join(found)}."


if __name__ == "__main__":
    main()
