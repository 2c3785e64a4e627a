"""Train one recipe in a folder of its own, without rows to judge: a run of a sweep, or a fold."""

import gc
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sentiment.errors import AdapterError, TrainingError
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.output import OutputConfig
from lora_sentiment.recipe.recipe import Recipe

if TYPE_CHECKING:
    from lora_sentiment.data.rows import Data
    from lora_sentiment.training.history import EvalPoint

# Late imports: a command that is refused needs no torch.


def leave_out_judged(config: DataConfig) -> DataConfig:
    """Return a `data` section with the same train and validation rows, and none to judge.

    A Hub data set is asked for the names of its splits. No row is read.

    Raises:
        DataError: If the source cannot be found.
    """
    from lora_sentiment.data.sources import find_source, is_on_hub
    from lora_sentiment.hub import prepare_hub

    if is_on_hub(config.source):
        prepare_hub()
    source = find_source(config)
    if not source.judged:
        return config
    kept = [role for role in source.roles if role not in source.judged]
    # Without a judged role, test_fraction would now carve a test split out of train.
    update: dict[str, Any] = {"test_fraction": 0.0, "max_test_rows": None}
    if source.hub:
        update["splits"] = {role: source.hub_splits[role] for role in kept}
    elif isinstance(config.source, dict):
        update["source"] = {role: config.source[role] for role in kept}
    else:  # the bundled reviews: one name for a file of each role
        update["source"] = {role: str(source.files[role][0]) for role in kept}
    return config.model_copy(update=update)


def is_finished(run: Recipe) -> bool:
    """Return whether a run finished earlier.

    Args:
        run: The recipe. Where its rows are Python's, its `data` went through `mark_as_given`.

    Raises:
        AdapterError: If its folder holds something else.
    """
    from lora_sentiment.commands.estimate import resolve_recipe

    if not run.folder.exists():
        return False
    if (run.folder / "report.json").is_file() and (run.folder / "recipe.yaml").is_file():
        ran = Recipe.load(run.folder / "recipe.yaml")
        wanted = resolve_recipe(run)
        ignored = {"output", "offline"}  # `train_run` replaces `offline`
        if ran.model_dump(exclude=ignored) == wanted.model_dump(exclude=ignored):
            return True
    raise AdapterError(
        f"{run.folder}: holds something else than this run; move it away, or delete it"
    )


def find_fingerprints(run: Recipe) -> dict[str, str]:
    """Read the rows of a run; return their fingerprints, named as in `read_result`.

    Raises:
        DataError: As `load_data`.
    """
    from lora_sentiment.adapter.parent import choose_labels
    from lora_sentiment.data.rows import load_data

    data = load_data(run.data, labels=choose_labels(run))
    return {
        "train_sha256": data.train.fingerprint,
        "validation_sha256": data.validation.fingerprint,
    }


def train_rows(recipe: Recipe, data: "Data", folder: Path, *, needed: str = "report.json") -> bool:
    """Train a recipe on rows that were read, unless it did so earlier and left a file.

    Every process of a launch calls this.

    Args:
        recipe: The recipe.
        data: The rows.
        folder: The run's own folder.
        needed: Name of the file.

    Returns:
        Whether it was trained now.

    Raises:
        LoraSentimentError: As `is_finished` and `train`.
    """
    from lora_sentiment.data.sources import mark_as_given
    from lora_sentiment.training.processes import join_launch, run_on_main

    # The name tells the run from one on other rows.
    parts = [data.train, data.validation, data.carved_test]
    names = [recipe.name, *(rows.fingerprint[:8] for rows in parts if rows)]
    config = mark_as_given(data.config)
    update = {
        "name": "-".join(names),
        "data": config,
        "offline": "error",
        "output": OutputConfig(dir=str(folder), overwrite=True),
    }
    run = recipe.model_copy(update=update)
    join_launch()
    if run_on_main(lambda: is_finished(run) and (folder / needed).exists()):
        return False
    train_run(run, data=replace(data, config=config))
    return True


def train_run(
    run: Recipe,
    *,
    data: "Data | None" = None,
    on_evaluation: "Callable[[Sequence[EvalPoint]], None] | None" = None,
) -> None:
    """Train a run, which leaves its adapter folder. A stopped run resumes from its checkpoint.

    Every process of a launch calls this. The launch stays, so that another run can follow.

    Args:
        run: The recipe, in a folder of its own.
        data: Its rows, in the place of `data.source`. Without them no row is judged.
        on_evaluation: As `train` takes it.

    Raises:
        LoraSentimentError: As `train`, and where memory ran out.
    """
    from lora_sentiment.train import train
    from lora_sentiment.training.checkpoint import list_checkpoints
    from lora_sentiment.training.processes import join_launch, run_on_main
    from lora_sentiment.training.report import reset_peak_memory
    from lora_sentiment.training.run_folder import name_run_folder
    from lora_sentiment.training.signals import is_out_of_memory

    gc.collect()  # the model of the run before is in reference cycles, and memory is needed

    def clear() -> None:
        run_folder = name_run_folder(run)
        if run_folder.exists() and not list_checkpoints(run_folder):
            # `train` refuses such a folder, because it may hold a finished adapter.
            shutil.rmtree(run_folder)

    reset_peak_memory(join_launch().device)
    run_on_main(clear)
    try:
        # Bundled data must not decide on a recipe for other data.
        train(
            run.model_copy(update={"offline": "error"}),
            data=data,
            # A split that was carved out of train must not be looked at either.
            judge=data is not None,
            on_evaluation=on_evaluation,
            end_launch=False,
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(f"memory ran out: {error}") from error


def read_result(folder: Path) -> dict[str, Any]:
    """Read the figures of a finished run from its adapter folder.

    Returns:
        validation: Metric to value and 95 % interval, as in report.json.
        train_sha256: Fingerprint of the training rows.
        validation_sha256: Fingerprint of the validation rows.
        best_step: The optimizer step whose tensors were kept.
        seconds: Time of training.

    Raises:
        AdapterError: If they cannot be read.
    """
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        return {
            "validation": report["validation"],
            "train_sha256": card["data"]["train_sha256"],
            "validation_sha256": card["data"]["validation_sha256"],
            "best_step": report["train"]["best_step"],
            "seconds": report["train"]["seconds"],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder}: its figures cannot be read ({error}); delete it to run it again"
        ) from error
