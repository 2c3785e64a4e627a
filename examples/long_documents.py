"""Answer a text that is longer than the adapter reads.

From the top of the repository: python examples/long_documents.py adapters/imdb_small [FILE]
"""

import argparse
from pathlib import Path

from lora_sentiment import load

parser = argparse.ArgumentParser(description="Answer a text that is longer than the adapter reads.")
parser.add_argument("adapter")
parser.add_argument("file", nargs="?", type=Path, help="a text in UTF-8; by default one of ours")
given = parser.parse_args()

classifier = load(given.adapter)
text = "The plot is thin and the jokes are old. " * 60 + "And yet I loved every minute of it."
if given.file:
    text = given.file.read_text(encoding="utf-8")

# Cut as in training: of this adapter the first quarter and the last three quarters of its tokens.
(cut,) = classifier.predict([text])
# Read whole, in windows that share 64 tokens. Their probabilities are averaged.
(whole,) = classifier.predict([text], stride=64)
print("cut  ", cut.label, f"{cut.score:.2f}")
print("whole", whole.label, f"{whole.score:.2f}")
