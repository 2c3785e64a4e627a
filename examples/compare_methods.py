"""Train one recipe with several methods, and compare them.

From the top of the repository: python examples/compare_methods.py RECIPE OUT [key=value ...]
"""

import argparse
from pathlib import Path

from lora_sentiment import Recipe
from lora_sentiment.commands.compare import compare, to_markdown
from lora_sentiment.train import train

METHODS = {
    "lora": ["method={kind: lora, r: 8, target_modules: all-linear}"],
    "lora_low_rank_head": [
        "method={kind: lora, r: 8, target_modules: all-linear}",
        "model.head=low_rank",
    ],
    "head": ["method={kind: head}"],
    "full": ["method={kind: full}", "train.learning_rate=2e-4"],
}

parser = argparse.ArgumentParser(
    description="Train one recipe with several methods, and compare them."
)
parser.add_argument("recipe")
parser.add_argument("out", type=Path, help="folder for the adapters")
parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
given = parser.parse_args()

folders = []
for name, settings in METHODS.items():
    folder = given.out / name
    settings = [*settings, f"name={name}", f"output.dir={folder}", *given.overrides]
    train(Recipe.load(given.recipe, settings))
    folders.append(folder)
print(to_markdown(compare(folders)))
