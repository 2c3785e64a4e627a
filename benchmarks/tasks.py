"""Several labels and numbers beside what people would do without them: makes benchmarks/tasks.md.

    python benchmarks/tasks.py --base local/minilm-l6-distilbert [--data FOLDER]

Emotions: `recipes/emotions_multilabel.yaml` beside the base rate of each label and a one-vs-rest logistic regression on
tf-idf. Both choose thresholds on validation, and tf-idf its `C`. Stars of SST-5: `recipes/sst5_regression.yaml` beside
`recipes/sst5_lora.yaml`, whose five probabilities are decoded as the expected value. Differences are paired over the
judged rows. A run whose folder exists in --cache is not trained again.
"""

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from lora_sentiment.adapter.folder import load_card
from lora_sentiment.adapter.predictions import Predictions, load_predictions
from lora_sentiment.data.rows import Data, Rows, load_data, load_judged
from lora_sentiment.evaluation.statistics import show_interval
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.tasks import find_task
from lora_sentiment.train import train

ROOT = Path(__file__).parents[1]
EMOTIONS, STARS, CLASSES = "emotions_multilabel", "sst5_regression", "sst5_lora"
C_VALUES = (0.3, 1, 3, 10, 30)


def main() -> None:
    """Train what is missing, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, help="base of the SST-5 runs")
    parser.add_argument("--data", type=Path, help="folder with SST-5's {split}.parquet")
    parser.add_argument("--max-length", type=int, default=64, help="tokens a text of SST-5")
    parser.add_argument("--cache", type=Path, default=ROOT / "adapters/tasks")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of the page")
    arguments = parser.parse_args()
    sst5 = [f"model.name={arguments.base}", f"model.max_length={arguments.max_length}"]
    if arguments.data:
        roles = ("train", "validation", "test")
        files = {role: str(arguments.data / f"{role}.parquet") for role in roles}
        sst5 += [f"data.source={json.dumps(files)}", "data.splits=null"]
    for name, overrides in ((EMOTIONS, []), (STARS, sst5), (CLASSES, sst5)):
        folder = arguments.cache / name
        if not folder.is_dir():
            train(
                Recipe.load(
                    ROOT / f"recipes/{name}.yaml", [*overrides, f"output.dir={folder}"]
                ).model_copy(update={"offline": "error"})
            )
    page = [
        "# Several labels, and numbers",
        "",
        f"`python benchmarks/tasks.py --base {Path(arguments.base).name}`, seed 0, {platform.machine()}, "
        f"{os.cpu_count()} cores, {datetime.now(UTC).date().isoformat()}. 95 % bootstrap intervals over the "
        "judged rows.",
        "",
        *compare_emotions(arguments.cache / EMOTIONS),
        "",
        *compare_stars(arguments.cache / STARS, arguments.cache / CLASSES),
    ]
    (arguments.out / "tasks.md").write_text("\n".join(page) + "\n", encoding="utf-8")


def compare_emotions(folder: Path) -> list[str]:
    """Return the section of the recipe with several labels."""
    card = load_card(folder)
    task = find_task("multi_label")
    names = tuple(card.labels)
    data = load_data(card.data.config, labels=names)
    test, _ = load_judged(card.data.config, role="test", labels=names)
    own = load_predictions(folder)["test"]
    baseline, calibration = answer_by_tfidf(data, test)
    shares = data.train.labels.mean(axis=0)
    base_rate = 2 * own.labels.mean(axis=0) / (1 + own.labels.mean(axis=0))
    models = {
        EMOTIONS: (own.logits, card.calibration),
        "tf-idf, one-vs-rest logistic regression": (baseline, calibration),
    }
    metrics = ("macro_f1", "micro_f1", "average_precision")
    lines = [
        "## Emotions",
        "",
        f"The {len(own.labels)} test texts that ship, the bundled base. `always` gives every text every label.",
        "",
        "| model | macro F1 | micro F1 | average precision |",
        "|---|---|---|---|",
        f"| always | {base_rate.mean():.4f} | | {own.labels.mean():.4f} |",
    ]
    for name, (logits, fitted) in models.items():
        scores = task.score(logits, own.labels, names=names, calibration=fitted)
        cells = " | ".join(show_interval(scores[metric].as_dict()) for metric in metrics)
        lines.append(f"| {name} | {cells} |")
    difference, _ = task.compare_runs(*models.values(), own.labels)
    lines += [
        "",
        f"Macro F1 of the recipe minus that of tf-idf: {show_interval(difference.as_dict())}.",
        "",
        "| label | share of the training rows | F1, always | F1, recipe | F1, tf-idf |",
        "|---|---|---|---|---|",
    ]
    decided = [
        task.make_metric_scores(logits, own.labels, fitted)[:, 1]
        for logits, fitted in models.values()
    ]
    for i, name in enumerate(card.labels):
        cells = " | ".join(f"{f1(given[:, i], own.labels[:, i]):.3f}" for given in decided)
        lines.append(f"| {name} | {shares[i]:.3f} | {base_rate[i]:.3f} | {cells} |")
    return lines


def answer_by_tfidf(data: Data, test: Rows) -> tuple[NDArray, dict]:
    """Return the logits of tf-idf for the test rows, and the thresholds chosen on validation."""
    task = find_task("multi_label")
    vectoriser = TfidfVectorizer(sublinear_tf=True)
    train_features = vectoriser.fit_transform(data.train.texts)
    best, chosen = -1.0, None
    for strength in C_VALUES:
        model = OneVsRestClassifier(LogisticRegression(C=strength, max_iter=1000))
        model.fit(train_features, data.train.labels)
        logits = model.decision_function(vectoriser.transform(data.validation.texts))
        labels = data.validation.labels
        calibration, _ = task.calibrate(logits, labels, data.labels)
        scores = task.score(logits, labels, names=data.labels, calibration=calibration)
        found = scores["macro_f1"].value
        if found > best:
            best, chosen = found, (model, calibration)
    model, calibration = chosen
    return model.decision_function(vectoriser.transform(test.texts)), calibration


def compare_stars(numbers: Path, classes: Path) -> list[str]:
    """Return the section of SST-5 as numbers and as five classes."""
    task = find_task("regression")
    own, other = load_predictions(numbers)["test"], load_predictions(classes)["test"]
    if not np.array_equal(own.labels, other.labels):
        raise SystemExit(f"{numbers} and {classes} were judged on other rows")
    models = {STARS: own.logits, f"{CLASSES}, expected value": expect(other)}
    metrics = ("mae", "rmse", "spearman", "quadratic_kappa")
    card = load_card(numbers)
    lines = [
        "## SST-5 as numbers from 0 to 4",
        "",
        f"The {len(own.labels):,} test sentences, base `{Path(card.base.name).name}`, at most "
        f"{card.max_length} tokens.",
        "",
        "| recipe | MAE | RMSE | Spearman | quadratic kappa |",
        "|---|---|---|---|---|",
    ]
    for name, values in models.items():
        scores = task.score(values, own.labels, names=("value",), calibration=None)
        cells = " | ".join(show_interval(scores[metric].as_dict()) for metric in metrics)
        lines.append(f"| {name} | {cells} |")
    pairs = [(values, None) for values in models.values()]
    difference, p_value = task.compare_runs(pairs[0], pairs[1], own.labels)
    lines += [
        "",
        f"MAE of the first minus that of the second: {show_interval(difference.as_dict())}, "
        f"{task.test[1]} p = {p_value:.2g}.",
    ]
    return lines


def expect(predictions: Predictions) -> NDArray[np.float32]:
    """Return the expected value of the class: (num_rows, 1)."""
    probabilities = find_task("single_label").compute_scores(predictions.logits)
    values = probabilities @ np.arange(probabilities.shape[1])
    return values[:, None].astype(np.float32)


def f1(given: NDArray, labels: NDArray) -> float:
    """Return F1 of one label, 0 where nothing is right."""
    return 2 * float((given * labels).sum()) / max(1.0, float(given.sum() + labels.sum()))


if __name__ == "__main__":
    main()
