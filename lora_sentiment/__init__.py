"""Parameter-efficient fine-tuning (LoRA / QLoRA) of DistilBERT for sentiment and text classification.

    from lora_sentiment.recipe import Recipe
    from lora_sentiment.train import train
    from lora_sentiment.evaluate import evaluate

The package itself exports nothing else: `lora_sentiment.train` is the module that a launcher runs, and a name cannot be
both a module and a function.
"""

__version__ = "0.1.0"
