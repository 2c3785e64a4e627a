"""Train on a csv of your own, and answer texts.

From the top of the repository: python examples/own_csv.py mine.csv message kind adapters/mine [key=value ...]
"""

import argparse

from lora_sentiment import Recipe, load
from lora_sentiment.train import train

parser = argparse.ArgumentParser(description="Train on a csv of your own, and answer texts.")
parser.add_argument("csv")
parser.add_argument("text_column")
parser.add_argument("label_column")
parser.add_argument("folder", help="where the adapter goes")
parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
given = parser.parse_args()

recipe = Recipe.load(
    "recipes/my_data.yaml",
    [
        f"data.source={given.csv}",
        f"data.text_column={given.text_column}",
        f"data.label_column={given.label_column}",
        f"output.dir={given.folder}",
        *given.overrides,
    ],
)
run = train(recipe)
low, high = run.report["test"]["accuracy"]["low"], run.report["test"]["accuracy"]["high"]
print(f"{run.adapter}: test accuracy {low:.2f} to {high:.2f}")

for prediction in load(run.adapter).predict(["Where is my parcel?", "Thank you, all is well."]):
    print(prediction.label, f"{prediction.score:.2f}")
