"""What a sweep gains: 20 trials on 4,000 rows of SST-2, then its choice beside the recipe's own values.

Both are trained with three seeds and judged once on test, paired. Start it again and it goes on where it was.

python benchmarks/sweep.py --base FOLDER --data FOLDER
"""

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from methods import machine
from methods_table import compare_rows

from lora_sentiment.adapter.predictions import load_predictions
from lora_sentiment.commands.sweep import make_columns, sweep
from lora_sentiment.evaluation.statistics import show_interval
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.train import train

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes/sst2_lora.yaml"
AXES = (
    "train.learning_rate=log(1e-4, 1e-2)",
    "method.r=[2, 4, 8, 16]",
    "train.warmup_ratio=uniform(0, 0.2)",
)
SEEDS = (1, 2, 3)


def main() -> None:
    """Search, train what is missing, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", required=True, help="folder or name of the base")
    parser.add_argument(
        "--data", required=True, type=Path, help="folder with SST-2's parquet files"
    )
    parser.add_argument("--rows", type=int, default=4000, help="rows of train")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "local/sweep", help="folder of the runs"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/sweep.md")
    arguments = parser.parse_args()
    files = {"train": "train", "dev": "validation", "test": "test"}
    source = {role: str(arguments.data / f"{name}.parquet") for role, name in files.items()}
    common = [
        f"data.source={json.dumps(source)}",
        "data.splits=null",
        f"data.max_train_rows={arguments.rows}",
        f"model.name={arguments.base}",
        f"model.max_length={arguments.max_length}",
        "train.eval_steps=50",
        f"output.dir={arguments.work}/adapter",
    ]
    arguments.work.mkdir(parents=True, exist_ok=True)
    best = arguments.work / "best.yaml"
    done = sweep(RECIPE, [*common, *AXES], num_trials=arguments.trials, write=best)
    defaults = train_seeds(Recipe.load(RECIPE, common), arguments.work / "defaults")
    chosen = train_seeds(Recipe.load(best), arguments.work / "chosen")
    arguments.out.write_text(render(arguments, done, defaults, chosen), encoding="utf-8")


def train_seeds(recipe: Recipe, folder: Path) -> npt.NDArray[np.bool_]:
    """Train a recipe with each seed, unless that is done; return what is right on test: (num_seeds, num_rows)."""
    right = []
    for seed in SEEDS:
        place = folder.with_name(f"{folder.name}-{seed}")
        if not (place / "report.json").is_file():
            settings = recipe.train.model_copy(update={"seed": seed})
            output = recipe.output.model_copy(update={"dir": str(place)})
            train(recipe.model_copy(update={"train": settings, "output": output}))
        test = load_predictions(place)["test"]
        right.append(test.logits.argmax(axis=1) == test.labels)
    return np.array(right)


def render(
    arguments: argparse.Namespace,
    done: dict,
    defaults: npt.NDArray[np.bool_],
    chosen: npt.NDArray[np.bool_],
) -> str:
    """Return the page."""
    facts = machine()
    states = [row["state"] for row in done["rows"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    lines = [
        "# A sweep beside the recipe's own values",
        "",
        f"`python benchmarks/sweep.py --base FOLDER --data FOLDER --rows {arguments.rows} --trials {arguments.trials}",
        f"--max-length {arguments.max_length}`, with {Path(arguments.base).name}. {facts['machine']}, {facts['date']}.",
        "",
        f"`sweep` on `recipes/sst2_lora.yaml` with `{'`, `'.join(AXES)}`: {len(states)} trials, {counts}.",
        f"Its choice is `{json.dumps(done['best']['values'])}`.",
        "",
        f"Both were trained with the seeds {', '.join(map(str, SEEDS))} and judged once on the",
        f"{defaults.shape[1]:,} rows of test. The difference is paired over rows and seeds, with a 95 %",
        "bootstrap interval.",
        "",
        "| | accuracy of each seed | mean |",
        "|---|---|---|",
    ]
    for name, right in (("the recipe's values", defaults), ("the sweep's choice", chosen)):
        each = ", ".join(f"{accuracy:.4f}" for accuracy in right.mean(axis=1))
        lines.append(f"| {name} | {each} | {right.mean():.4f} |")
    difference = show_interval(compare_rows(chosen, defaults).as_dict())
    lines += ["", f"The sweep's choice less the recipe's values: {difference}.", ""]
    columns = make_columns(done)
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for cells in zip(*columns.values(), strict=True):
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
