"""Write the adapters that tests/test_saved.py loads. Run by hand, and never by a test:

    python -m tests.saved.make

The folders show that adapters of older versions still load and answer. So this writes only folders that do not exist
yet, and their answers in expected.json. To add a case, add it to RECIPES and run this. Never write an old folder again.
"""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import numpy as np
import torch
from numpy.typing import NDArray

import lora_sentiment
from lora_sentiment.adapter.export import export
from lora_sentiment.adapter.merge import merge
from lora_sentiment.classifier import Classifier, load
from lora_sentiment.cleaning import clean_text
from lora_sentiment.data.rows import Rows
from lora_sentiment.files import write_json
from lora_sentiment.models.engine import compute_logits
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.train import train
from tests.conftest import save_tiny_base, toy_rows, write_csv

SAVED = Path(__file__).resolve().parent
BASE = SAVED / "base"
EXPECTED = SAVED / "expected.json"
# An adapter records the full path of its base. This path is the same on every machine, and no base stays there.
WORK = Path("/tmp/lora_sentiment-saved")
KEPT = {
    "adapter_config.json", "adapter_model.safetensors", "card.json", "changed.safetensors", "config.json",
    "model.onnx", "model.safetensors", "recipe.yaml", "tokenizer.json",
}  # fmt: skip
# The record of `merged` and `onnx` has layout 1, that of `merged_2` has layout 2.
WHOLE = ("merged", "onnx", "merged_2")
COMMON = """\
data: {source: train.csv}
model: {name: ./base, max_length: 16, dtype: float32}
method: {r: 4, lora_alpha: 8}
train: {max_steps: 3, batch_size: 16, learning_rate: 3e-2, lr_scheduler_type: constant}
output: {dir: adapter}
"""
RECIPES = {
    "lora": [],
    "lora_all_linear": [
        "method.target_modules=all-linear",
        "method.use_rslora=true",
        # The first key that matches counts. One key is a name, the other a regular expression.
        "method.rank_pattern={v_lin: 2, '.*layer.1.*lin1': 6}",
        "method.alpha_pattern={q_lin: 3, '.*layer.0.*': 16}",
    ],
    "lora_regex": [r"method.target_modules='.*\.layer\.1\..*\.(q_lin|lin2)'"],
    "lora_layers": ["method.layers_to_transform=[1]", "method.target_modules=[lin1, k_lin]"],
    "lora_dropout": ["method.lora_dropout=0.1"],
    "lora_plus": ["method.loraplus_lr_ratio=4"],
    "dora": ["method.use_dora=true"],
    "pissa": ["method.init_lora_weights=pissa", "method.use_rslora=true"],
    "olora": ["method.init_lora_weights=olora", "method.rank_pattern={v_lin: 2}"],
    "adalora": [
        "method={kind: adalora, init_r: 6, target_r: 3, target_modules: [q_lin, k_lin, out_lin]}"
    ],
    "ia3": ["method={kind: ia3}"],
    "vera": ["method={kind: vera, r: 16, target_modules: all-linear}"],
    "unfreeze_layers": ["method={kind: unfreeze, last_layers: 1}"],
    "unfreeze_patterns": [
        "method={kind: unfreeze, patterns: ['*.bias', 'transformer.layer.0.attention.*']}"
    ],
    "head": ["method={kind: head}"],
    "full": ["method={kind: full}"],
    "head_classifier": ["model.head=classifier"],
    "head_low_rank": ["model.head=low_rank", "model.head_r=4"],
    "int8": ["model.quantize=int8"],
    "nf4": ["model.quantize=nf4", "model.double_quant=true"],
    "fp4": ["model.quantize=fp4"],
    "bfloat16": ["model.dtype=bfloat16"],
    "head_tail": ["model.truncation=head_tail", "data.clean=false"],
}
TEXTS = [
    "a good film",
    "the plot was dull, and the place cold.",
    "It was REALLY lovely!",
    "weak",
    "quite a superb book, so warm.",
    "an app of awful ads",
    "so so poor<br />the meal<br />",  # cleaned, unless the recipe says otherwise
    "zebra quince jukebox",
    # More than 16 tokens, and cut.
    "the film was good and the book was fine and the meal was great and it really was a poor place, so cold, so bad",
    "naïve  café?",
]


def compute(classifier: Classifier, texts: list[str]) -> NDArray[np.float32]:
    """Compute the logits of texts, in the way that `predict` reads them: (num_texts, num_labels)."""
    read = [clean_text(text, Counter()) for text in texts] if classifier.clean else texts
    rows = Rows(read, np.zeros(len(read), dtype=np.int64), np.arange(len(read)))
    return compute_logits(classifier.engine, classifier.encoder.encode(rows))


def open_saved(name: str, folder: Path) -> Classifier:
    """Load a saved folder. The base of an adapter is given, since its recorded path leads nowhere."""
    if name == "onnx":
        return load(folder)
    if name.startswith("merged"):
        return load(folder, dtype="float32")
    return load(folder, base=str(BASE), dtype="float32")


def write(name: str, out: Path) -> None:
    """Write one folder, and remove from it what loading does without."""
    if name.startswith("merged"):
        merge(SAVED / "lora", out, base="./base")
    elif name == "onnx":
        export(SAVED / "lora", out, format="onnx", base="./base")
    else:
        Path(f"{name}.yaml").write_text(COMMON, encoding="utf-8")
        recipe = Recipe.load(f"{name}.yaml", RECIPES[name])
        shutil.move(train(recipe).adapter, out)
    kept = KEPT | {"tokenizer_config.json"} if name in WHOLE else KEPT
    for path in out.rglob("*"):
        if path.is_file() and path.name not in kept:
            path.unlink()


def main() -> None:
    """Write the folders that do not exist yet."""
    torch.set_num_threads(1)
    if not BASE.is_dir():
        save_tiny_base(BASE)
    WORK.mkdir()
    try:
        os.chdir(WORK)
        shutil.copytree(BASE, "base")
        write_csv(Path("train.csv"), toy_rows(120))
        expected = (
            json.loads(EXPECTED.read_text(encoding="utf-8"))
            if EXPECTED.is_file()
            else {"texts": TEXTS}
        )
        for name in (*RECIPES, *WHOLE):
            if (SAVED / name).exists():
                continue
            write(name, SAVED / name)
            classifier = open_saved(name, SAVED / name)
            expected[name] = {
                "version": lora_sentiment.__version__,
                "labels": list(classifier.labels),
                "logits": [
                    [round(float(value), 7) for value in row]
                    for row in compute(classifier, expected["texts"])
                ],
            }
            write_json(EXPECTED, expected)
    finally:
        shutil.rmtree(WORK)


if __name__ == "__main__":
    main()
