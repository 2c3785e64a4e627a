"""`README.md` of an exported model: its files, how to use them, how they were checked. Nothing here imports torch."""

from lora_sentiment.adapter.merge_record import Stamp
from lora_sentiment.adapter.merged_card import make_metadata, say_reading, table_row
from lora_sentiment.adapter.onnx import PLAIN, QUANTISED


def make_exported_card(name: str, labels: tuple[str, ...], stamp: Stamp) -> str:
    """Return the README.md of a folder with ONNX files.

    Args:
        name: Folder or Hub name to load it by.
        labels: Label names in order.
        stamp: What its `config.json` holds.
    """
    metadata = make_metadata(stamp, library="transformers.js", tags=("onnx",))
    int8 = QUANTISED in stamp.files
    files = [file for file in ("onnx", "onnx-int8") if file in stamp.compared]
    rows = [
        table_row(file, part, stamp.compared[file][part], forms=("merged", "exported"))
        for file in files
        for part in ("probe", "validation")
    ]
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

{_usage(name, QUANTISED if int8 else PLAIN)}

{say_reading(stamp, other="another runtime")}

## The same answers as the merged model

Compared with the merged model after opening each file with ONNX Runtime on a CPU.

| file | compared on | largest difference of a logit | labels changed | accuracy of the merged model | of the file |
|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def _usage(name: str, file: str) -> str:
    dtype = "q8" if file == QUANTISED else "fp32"
    return f"""\
## Usage

In Python, without torch being imported (`pip install 'lora_sentiment[onnx]'`):

```python
import lora_sentiment

lora_sentiment.load("{name}/{file}").predict(["A lovely film."])
```

In JavaScript, with transformers.js:

```js
import {{ pipeline }} from "@huggingface/transformers";

const classify = await pipeline("text-classification", "{name}", {{ dtype: "{dtype}" }});
await classify("A lovely film.");
```"""
