"""Answers of older versions of transformers and PEFT: python old_versions.py MERGED ADAPTER.

Raw texts for the merged model and clean ones for the adapter are JSON on standard input.
"""

import json
import sys

import peft
import torch
import transformers

merged, adapter = sys.argv[1:]
asked = json.load(sys.stdin)
classify = transformers.pipeline("text-classification", merged, top_k=None)
stock = [classify([text], truncation=True)[0] for text in asked["raw"]]
model = peft.AutoPeftModelForSequenceClassification.from_pretrained(adapter).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
scores = []
for text in asked["clean"]:
    with torch.inference_mode():
        logits = model(**tokenizer(text, truncation=True, return_tensors="pt")).logits
    scores.append(logits[0].softmax(dim=0).tolist())
versions = [transformers.__version__, peft.__version__]
json.dump({"versions": versions, "merged": stock, "adapter": scores}, sys.stdout)
