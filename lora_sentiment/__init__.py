"""Parameter-efficient fine-tuning (LoRA / QLoRA) of DistilBERT for sentiment and text classification."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_sentiment.evaluate import evaluate
    from lora_sentiment.recipe import Recipe
    from lora_sentiment.train import Run, train

__version__ = "0.1.0"
__all__ = ["Recipe", "Run", "evaluate", "train"]

_HOMES = {"Recipe": "recipe", "Run": "train", "evaluate": "evaluate", "train": "train"}


def __getattr__(name: str) -> Any:
    # `import torch` takes seconds: nothing heavy loads before it is asked for.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"lora_sentiment.{_HOMES[name]}"), name)
