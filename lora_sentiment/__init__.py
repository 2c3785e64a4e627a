"""Parameter-efficient fine-tuning (LoRA / QLoRA) of DistilBERT for sentiment and text classification.

    from lora_sentiment import load
    from lora_sentiment.recipe import Recipe
    from lora_sentiment.train import train
    from lora_sentiment.evaluate import evaluate

`load(folder).predict(["A lovely film."])` answers texts. The package itself exports nothing else:
`lora_sentiment.train` is the module that a launcher runs, and a name cannot be both a module and a function.
"""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_sentiment.classifier import load as load

__version__ = "0.1.0"

# Where a CPU has avx512_bf16, importing bitsandbytes advises a package that fetches code from the Hub and runs it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    # On first use: whoever only reads a recipe need not wait for a tokenizer library.
    if name == "load":
        from lora_sentiment.classifier import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
