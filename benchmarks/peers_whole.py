"""One whole run for benchmarks/peers.py --time-to: from the start of the process until validation is good enough.

    python benchmarks/peers_whole.py ours 0.88 model.name=local/minilm-l6-distilbert

All train what recipes/imdb_lora.yaml says, on the same carve of the same cleaned rows, cut at 256 tokens in the same
way, and are judged on the same validation rows every EVAL_STEPS steps, which counts. The last line printed is JSON.
"""

import json
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from lora_sentiment.errors import LoraSentimentError
from lora_sentiment.recipe.recipe import Recipe

ROOT = Path(__file__).parents[1]
EVAL_STEPS = 50
LENGTH = 256
"""Tokens at which a text is cut unless told otherwise."""
OVERRIDES = (
    f"model.max_length={LENGTH}",
    "data.validation_fraction=0.02",
    f"train.eval_steps={EVAL_STEPS}",
    "offline=error",
)
"""Of 25,000 rows 500 decide when a run is good enough."""


class Clock:
    """When the run began its steps, and what validation said last."""

    def __init__(self, target: float) -> None:
        self.target, self.start, self.accuracy, self.steps = target, 0.0, 0.0, 0

    def begin(self) -> None:
        """Note that the first step begins."""
        self.start = self.start or self.seconds

    @property
    def seconds(self) -> float:
        """Seconds since the process was started, interpreter and imports included."""
        return float(time.time() - psutil.Process().create_time())

    def is_reached(self, accuracy: float, *, step: int) -> bool:
        """Note what validation said, and return whether it is enough."""
        self.accuracy, self.steps = accuracy, step
        return accuracy >= self.target


class ReachedError(LoraSentimentError):
    """Ends a run of ours where validation is good enough."""


def main() -> None:
    """Run one variant."""
    variant, target, *overrides = sys.argv[1:]
    clock = Clock(float(target))
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.load(
            ROOT / "recipes/imdb_lora.yaml",
            [*OVERRIDES, *overrides, f"output.dir={json.dumps(folder + '/adapter')}"],
        )
        validation_rows = (run_ours if variant == "ours" else run_trainer)(
            recipe, clock, Path(folder), variant
        )
    import torch

    found = {
        "seconds": clock.seconds,
        "start_seconds": clock.start,
        "steps": clock.steps,
        "accuracy": clock.accuracy,
    }
    found |= {"reached": clock.accuracy >= clock.target, "validation_rows": validation_rows}
    print(json.dumps({**found, "threads": torch.get_num_threads()}))


def run_ours(recipe: Recipe, clock: Clock, _: Path, __: str) -> int:
    """Train as the main command does."""
    from unittest.mock import patch

    from accelerate import Accelerator

    from lora_sentiment import train as walk
    from lora_sentiment.training.loop import fit

    rows = 0

    def note(_: Accelerator, values: dict[str, float], *, step: int) -> None:
        if "eval_accuracy" in values and clock.is_reached(values["eval_accuracy"], step=step):
            raise ReachedError(f"validation is good enough after step {step}")

    def begin(*args: Any, **kwargs: Any) -> Any:
        nonlocal rows
        rows = len(kwargs["validation"])
        clock.begin()
        return fit(*args, **kwargs)

    with (
        patch.object(Accelerator, "log", note),
        patch.object(walk, "fit", begin),
        suppress(ReachedError),
    ):
        walk.train(recipe)
    return rows


def run_trainer(recipe: Recipe, clock: Clock, folder: Path, variant: str) -> int:
    """Train with transformers' Trainer and PEFT: D as tutorials have it, B as well as its flags allow."""
    import numpy as np
    import torch
    from peers_slice import as_features
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from lora_sentiment.data.batches import TextEncoder
    from lora_sentiment.data.rows import load_data
    from lora_sentiment.models.dtype import resolve_dtype
    from lora_sentiment.recipe.method import LoraMethod
    from lora_sentiment.training.optimizer import count_steps

    data, method, settings = load_data(recipe.data), recipe.method, recipe.train
    assert isinstance(method, LoraMethod)
    tokenizer: Any = AutoTokenizer.from_pretrained(recipe.model.name)
    encoded = [
        TextEncoder.of(
            tokenizer, max_length=recipe.model.max_length, truncation=recipe.model.truncation
        ).encode(rows)
        for rows in (data.train, data.validation)
    ]
    torch.manual_seed(settings.seed)
    tuned, is_cuda = variant == "B", torch.cuda.is_available()
    dtype = (
        resolve_dtype("auto", torch.device("cuda" if is_cuda else "cpu"))
        if tuned
        else torch.float32
    )
    plain: Any = AutoModelForSequenceClassification.from_pretrained(
        recipe.model.name, num_labels=len(data.labels), dtype=torch.float32
    )
    adapters = LoraConfig(
        task_type="SEQ_CLS",
        r=method.r,
        lora_alpha=method.lora_alpha,
        lora_dropout=0.0 if tuned else 0.1,
        target_modules=list(method.target_modules),
    )
    steps = count_steps(len(data.train), settings)

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            del args
            accuracy = given["metrics"]["eval_accuracy"]
            control.should_training_stop |= clock.is_reached(accuracy, step=state.global_step)

    flags: dict[str, Any] = {
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "group_by_length",
    }
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        max_steps=steps,
        warmup_steps=int(np.ceil(steps * settings.warmup_ratio)),
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        eval_strategy="steps",
        eval_steps=settings.eval_steps,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not is_cuda,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **(flags if tuned else {}),
    )
    train, validation = (as_features(rows, np.arange(len(rows))) for rows in encoded)
    Trainer(
        model=get_peft_model(plain, adapters),
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=measure_accuracy,
        callbacks=[Watch()],
    ).train()
    return len(validation)


def measure_accuracy(found: Any) -> dict[str, float]:
    """Return the Trainer's metric of logits and labels."""
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


if __name__ == "__main__":
    main()
