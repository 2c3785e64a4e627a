"""Parameter-efficient fine-tuning (LoRA / QLoRA) of small encoders for text classification.

    from lora_sentiment import Recipe, evaluate, export, load, merge
    from lora_sentiment.train import train

`load(folder).predict(["A lovely film."])` answers texts. `train` is imported from its module: a
launcher runs `lora_sentiment.train`, and a name cannot be both a module and a function.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_sentiment.adapter.export import export as export
    from lora_sentiment.adapter.merge import merge as merge
    from lora_sentiment.classifier import load as load
    from lora_sentiment.commands.evaluate import evaluate as evaluate
    from lora_sentiment.recipe.recipe import Recipe as Recipe

__version__ = "0.1.0"

_MODULES = {
    "Recipe": "lora_sentiment.recipe.recipe",
    "evaluate": "lora_sentiment.commands.evaluate",
    "export": "lora_sentiment.adapter.export",
    "load": "lora_sentiment.classifier",
    "merge": "lora_sentiment.adapter.merge",
}
"""Where each name of the API stands. It is imported on first use, because torch takes seconds."""

# On a CPU with avx512_bf16, bitsandbytes advises at import to install a package that runs code from
# the Hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
