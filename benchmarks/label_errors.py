"""Wrong labels: how many `data --suspects` finds, and what training without them gives.

    python benchmarks/label_errors.py --rows NOISY.csv --test TEST.parquet --base FOLDER --work FOLDER

It makes benchmarks/label_errors.md. NOISY.csv has the columns `text`, `label` and `noisy_label`. Training reads the
last one. The true `label` only judges the suspects.
"""

import argparse
import logging
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lora_sentiment.adapter.predictions import load_predictions
from lora_sentiment.commands.suspects import LABEL_ERROR, find_suspects
from lora_sentiment.evaluation.statistics import Interval, percentile_interval, resample_weights
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.train import train

ROOT = Path(__file__).parents[1]
FRACTIONS = (0.1, 0.25, 0.5)


def main() -> None:
    """Find suspects, train with and without them, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes/ag_news_lora.yaml")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--test-rows", type=int, default=2000)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/label_errors.md")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    rows = pd.read_csv(arguments.rows)
    settings = [
        f"data.source={arguments.rows}",
        "data.label_column=noisy_label",
        "data.labels=['0', '1', '2', '3']",
        f"model.name={arguments.base}",
        "model.max_length=64",
        f"train.num_train_epochs={arguments.epochs}",
    ]
    recipe = Recipe.load(arguments.recipe, [*settings, f"output.dir={arguments.work}/found"])
    out = arguments.work / "suspects.csv"
    if not out.exists():
        find_suspects(recipe, out, num_folds=arguments.folds)
    suspects = pd.read_csv(out)
    found = suspects[suspects["reason"].str.startswith(LABEL_ERROR)].sort_values("score")
    is_wrong = (rows["label"] != rows["noisy_label"]).to_numpy()
    lines = describe_found(found, is_wrong, rows)

    kept = rows.drop(index=found["row"] - 1)
    table = pd.read_parquet(arguments.test).rename(columns={"label": "noisy_label"})
    table = table.sample(arguments.test_rows, random_state=0)
    variants = {
        "all rows": rows[["text", "noisy_label"]],
        "without the suspects": kept[["text", "noisy_label"]],
    }
    answers: dict[str, list[Any]] = {name: [] for name in variants}
    for seed in range(arguments.seeds):
        for name, part in variants.items():
            folder = arguments.work / f"{name.replace(' ', '-')}-{seed}"
            run = Recipe.load(
                arguments.recipe, [*settings, f"output.dir={folder}", f"train.seed={seed}"]
            )
            if not folder.exists():
                train(run, data={"train": part, "test": table})
            own = load_predictions(folder)["test"]
            answers[name].append(own.logits.argmax(axis=1) == own.labels)
    is_right = {name: np.stack(own) for name, own in answers.items()}
    lines += describe_trained(is_right, {name: len(part) for name, part in variants.items()})
    settings_shown = " ".join(settings[1:3] + settings[4:])
    head = [
        "# Wrong labels",
        "",
        "    python benchmarks/label_errors.py --rows NOISY.csv \\",
        "        --test TEST.parquet \\",
        "        --base local/minilm-l6-distilbert --work FOLDER",
        "",
        f"{len(rows):,} rows of NoisyAG-News, {is_wrong.sum():,} of them ({is_wrong.mean():.1%}) with",
        f"a wrong label. `recipes/ag_news_lora.yaml` with `{settings_shown}`",
        f"on `{Path(arguments.base).name}`, {arguments.folds} folds. Judged on {len(table):,} test rows",
        f"of AG News. {describe_machine()}",
        "",
    ]
    arguments.out.write_text("\n".join([*head, *lines, ""]), encoding="utf-8")
    print(arguments.out.read_text(encoding="utf-8"))


def describe_found(found: pd.DataFrame, is_wrong: Any, rows: pd.DataFrame) -> list[str]:
    """Return the table of precision and recall, and how often the likely label is the true one."""
    of_found = is_wrong[found["row"] - 1]
    is_mended = (rows["label"].to_numpy()[found["row"] - 1] == found["likely"].to_numpy())[of_found]
    lines = ["| suspects | rows | precision | recall |", "|---|---|---|---|"]
    counts = [round(fraction * len(found)) for fraction in FRACTIONS]
    for count in (*counts, len(found)):
        which = "all" if count == len(found) else "with the lowest scores"
        right = of_found[:count]
        low, high = wilson(right.sum(), count)
        recall = wilson(right.sum(), is_wrong.sum())
        lines.append(
            f"| {which} | {count:,} | {right.mean():.3f} [{low:.3f}, {high:.3f}] "
            f"| {right.sum() / is_wrong.sum():.3f} [{recall[0]:.3f}, {recall[1]:.3f}] |"
        )
    lines += [
        "",
        f"Any row is wrong with a chance of {is_wrong.mean():.3f}. Of the {len(is_mended):,} suspects",
        f"that are wrong, {is_mended.mean():.3f} have the true label as likely label. Intervals are",
        "Wilson's, 95 %.",
        "",
    ]
    return lines


def wilson(num_right: float, num_rows: int) -> tuple[float, float]:
    """Return the 95 % interval of a share: Wilson (1927)."""
    from scipy.stats import binomtest

    ends = binomtest(int(num_right), int(num_rows)).proportion_ci(method="wilson")
    return float(ends.low), float(ends.high)


def describe_trained(is_right: dict[str, Any], num_rows: dict[str, int]) -> list[str]:
    """Return the table of accuracies, each paired with that of all rows."""
    first = next(iter(is_right.values()))
    lines = [
        "| trained on | rows | accuracy of each seed | mean | minus all rows, paired |",
        "|---|---|---|---|---|",
    ]
    for name, own in is_right.items():
        seeds = ", ".join(f"{value:.4f}" for value in own.mean(axis=1))
        difference = paired(own.mean(axis=0) - first.mean(axis=0))
        shown = f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
        shown = "" if own is first else shown
        lines.append(f"| {name} | {num_rows[name]:,} | {seeds} | {own.mean():.4f} | {shown} |")
    lines += [
        "",
        "Each run carves its validation rows out of its own rows, with their wrong labels. The",
        "interval is a bootstrap over the test rows of the mean of the seeds, 95 %. It does not hold",
        "what other seeds change.",
    ]
    return lines


def paired(difference: Any) -> Interval:
    """Return the mean of a difference with its bootstrap interval over the rows."""
    chunks = resample_weights(len(difference), num_resamples=1000, seed=0)
    resampled = np.concatenate([weights @ difference for weights in chunks]) / len(difference)
    return percentile_interval(float(difference.mean()), resampled, confidence=0.95)


def describe_machine() -> str:
    """Return the processor of this machine, as Linux names it."""
    path = Path("/proc/cpuinfo")
    found = platform.processor()
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                found = line.partition(":")[2].strip()
                break
    return f"Machine: {found}."


if __name__ == "__main__":
    main()
