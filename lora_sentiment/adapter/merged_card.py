"""`README.md` of a merged model: what was merged, how to use it, and how it was checked. Nothing here imports torch."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from lora_sentiment import bundled
from lora_sentiment.adapter.merge_record import Stamp


def make_merged_card(name: str, labels: tuple[str, ...], stamp: Stamp) -> str:
    """Return the README.md of a merged model.

    Args:
        name: Folder or Hub name to load it by.
        labels: Label names in order.
        stamp: What its `config.json` holds.
    """
    metadata = make_metadata(stamp, library="transformers")
    target = (
        "the base as quantising had left it"
        if stamp.into == "dequantised"
        else "the base as it was published"
    )
    rows = [
        table_row(into, part, found, forms=("adapter", "merged"))
        for into, parts in stamp.compared.items()
        for part, found in parts.items()
    ]
    return f"""\
---
{metadata}
---

# {name}

A DistilBERT text classifier with the labels {", ".join(f"`{label}`" for label in labels)}: an adapter merged in fp32
into {target}, stored as {stamp.dtype}.

- adapter: method `{stamp.method}`, SHA-256 `{stamp.adapter_sha256}`
- base: `{stamp.base}`, encoder SHA-256 `{stamp.base_sha256}`
- `config.json` holds these hashes, how texts are read and the figures below, under `lora_sentiment`

## Usage

```python
from transformers import pipeline

classify = pipeline("text-classification", "{name}")
classify(["A lovely film."], truncation=True)
```

{say_reading(stamp, other="this pipeline")}

## The same answers as the adapter

Compared with the unmerged adapter after reloading it with plain transformers.

| merged into | compared on | largest difference of a logit | labels changed | accuracy of the adapter | of the merge |
|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def make_metadata(stamp: Stamp, *, library: str, tags: tuple[str, ...] = ()) -> str:
    """Return the Hub's metadata of a model that holds an adapter, as YAML."""
    return ModelCardData(
        base_model=None
        if stamp.base == bundled.NAME or Path(stamp.base).is_absolute()
        else stamp.base,
        library_name=library,
        pipeline_tag="text-classification",
        tags=["text-classification", "distilbert", *tags, stamp.method],
    ).to_yaml()


def table_row(form: str, part: str, found: dict[str, Any], *, forms: tuple[str, str]) -> str:
    """Return one comparison as a row of a README's table, with the accuracies of both `forms`."""
    if "reason" in found:
        return f"| {form} | {part}: none | | | | |"
    difference = (
        "not finite" if found["max_difference"] is None else f"{found['max_difference']:.2g}"
    )
    scores = [f"{found[key]:.4f}" if (key := f"accuracy_{name}") in found else "" for name in forms]
    return f"| {form} | {part}, {found['rows']:,} rows | {difference} | {found['flips']} | {' | '.join(scores)} |"


def say_reading(stamp: Stamp, *, other: str) -> str:
    """Say how texts were read in training, and what of it `other` does not do."""
    said = f"A text is cut at {stamp.max_length} tokens, as in training"
    if stamp.truncation == "head_tail":
        said += f", which kept the first quarter and the last three quarters; {other} keeps the first tokens"
    if stamp.clean:
        said += f"; training also cleaned texts (HTML, control characters, blanks), which {other} does not"
    return f"{said}."
