"""`README.md` of an exported model: its files, how to use them, how they were checked. Nothing here imports torch."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from lora_sentiment.adapter.onnx import PLAIN, QUANTISED
from lora_sentiment.adapter.stamp import Stamp


def make_exported_card(name: str, labels: tuple[str, ...], stamp: Stamp) -> str:
    """Return the README.md of a folder with ONNX files.

    Args:
        name: Folder or Hub name to load it by.
        labels: Label names in order.
        stamp: What its `config.json` holds.
    """
    metadata = ModelCardData(
        base_model=None if Path(stamp.base).is_absolute() else stamp.base,
        library_name="transformers.js",
        pipeline_tag="text-classification",
        tags=["text-classification", "distilbert", "onnx", stamp.method],
    ).to_yaml()
    int8 = QUANTISED in stamp.files
    files = [file for file in ("onnx", "onnx-int8") if file in stamp.compared]
    rows = [_table_row(file, part, stamp.compared[file][part]) for file in files for part in ("probe", "validation")]
    return f"""\
---
{metadata}
---

# {name}

A DistilBERT text classifier with the labels {", ".join(f"`{label}`" for label in labels)} as an ONNX graph with the
inputs `input_ids` and `attention_mask`, of any batch size and length, and the output `logits`.

- `{PLAIN}`: fp32{f"; `{QUANTISED}`: int8 weights, activations quantised as they come" if int8 else ""}
- adapter: method `{stamp.method}`, SHA-256 `{stamp.adapter_sha256}`
- base: `{stamp.base}`, encoder SHA-256 `{stamp.base_sha256}`
- `config.json` holds these hashes, how texts are read and the figures below, under `lora_sentiment`

## Usage

In Python, without torch being imported (`pip install 'lora_sentiment[onnx]'`):

```python
import lora_sentiment

lora_sentiment.load("{name}/{QUANTISED if int8 else PLAIN}").predict(["A lovely film."])
```

In JavaScript, with transformers.js:

```js
import {{ pipeline }} from "@huggingface/transformers";

const classify = await pipeline("text-classification", "{name}", {{ dtype: "{"q8" if int8 else "fp32"}" }});
await classify("A lovely film.");
```

{_reading(stamp)}

## The same answers as the merged model

Compared with the merged model after opening each file with ONNX Runtime on a CPU.

| file | compared on | largest difference of a logit | labels changed | accuracy of the merged model | of the file |
|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def _table_row(file: str, part: str, found: dict[str, Any]) -> str:
    if "reason" in found:
        return f"| {file} | {part}: none | | | | |"
    scores = [f"{found[key]:.4f}" if key in found else "" for key in ("accuracy_merged", "accuracy_exported")]
    difference = f"{found['max_difference']:.2g}"
    return f"| {file} | {part}, {found['rows']:,} rows | {difference} | {found['flips']} | {' | '.join(scores)} |"


def _reading(stamp: Stamp) -> str:
    """Say how texts were read in training, and what of it other runtimes do not do."""
    said = f"A text is cut at {stamp.max_length} tokens, as in training"
    if stamp.truncation == "head_tail":
        said = (
            f"Training kept the first quarter and last three quarters of a text over {stamp.max_length} tokens; other "
        )
        said += "runtimes than `lora_sentiment` keep its first tokens"
    if stamp.clean:
        said += "; training also cleaned texts (HTML, control characters, blanks), which other runtimes do not"
    return f"{said}."
