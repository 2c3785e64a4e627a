"""Train on a csv of your own, and answer texts.

From the top of the repository: python examples/own_csv.py mine.csv message kind adapters/mine [key=value ...]
"""

import sys

from lora_sentiment import Recipe, load
from lora_sentiment.train import train

source, text_column, label_column, folder, *overrides = sys.argv[1:]
recipe = Recipe.load(
    "recipes/my_data.yaml",
    [
        f"data.source={source}",
        f"data.text_column={text_column}",
        f"data.label_column={label_column}",
        f"output.dir={folder}",
        *overrides,
    ],
)
run = train(recipe)
low, high = run.report["test"]["accuracy"]["low"], run.report["test"]["accuracy"]["high"]
print(f"{run.adapter}: test accuracy {low:.2f} to {high:.2f}")

for prediction in load(run.adapter).predict(["Where is my parcel?", "Thank you, all is well."]):
    print(prediction.label, f"{prediction.score:.2f}")
