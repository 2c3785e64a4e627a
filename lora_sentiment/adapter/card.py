"""Make the model cards of adapters, merged and exported models. Their texts are in `templates/`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from lora_sentiment import bundled
from lora_sentiment.adapter.folder import Card
from lora_sentiment.adapter.merge_record import MergeRecord
from lora_sentiment.adapter.onnx import INPUTS, PLAIN, QUANTISED, TYPES
from lora_sentiment.adapter.safe_files import read_bytes
from lora_sentiment.data.sources import is_on_hub
from lora_sentiment.errors import AdapterError, RecipeError, one_line
from lora_sentiment.evaluation.statistics import show_interval
from lora_sentiment.models.families import FAMILIES
from lora_sentiment.models.parameters import show_parameters
from lora_sentiment.recipe.data import FROM_PYTHON
from lora_sentiment.recipe.yaml_reader import parse_yaml
from lora_sentiment.tasks import Task
from lora_sentiment.training.report import report_roles, show_progress

SHOWN_LABELS = 20
"""Labels that a card names; `card.json` or `config.json` names all."""
NO_VALUE = {"value": None}
"""The interval of a metric that a role does not have."""
TORCH_SCORES = {"softmax": "logits.softmax(dim=0)", "sigmoid": "logits.sigmoid()", "none": "logits"}
NUMPY_SCORES = {
    "softmax": "np.exp(logits) / np.exp(logits).sum()",
    "sigmoid": "1 / (1 + np.exp(-logits))",
    "none": "logits",
}
JS_SCORES = {
    "softmax": "transformers.softmax(logits)",
    "sigmoid": "logits.map((logit) => 1 / (1 + Math.exp(-logit)))",
    "none": "logits",
}
"""Code that turns the logits of a text into scores, by the activation of a task."""
EXAMPLES = {False: '"A lovely film."', True: '("Is it good?", "Yes, very.")'}
"""Texts to answer in Python, by whether an input is a pair."""
STOCK_EXAMPLES = {
    False: '["A lovely film."]',
    True: '[{"text": "Is it good?", "text_pair": "Yes, very."}]',
}
"""Texts to answer with a stock pipeline, by whether an input is a pair."""
TEMPLATES = Path(__file__).parent / "templates"


def make_model_card(name: str, card: Card, report: Mapping[str, Any], *, is_peft: bool) -> str:
    """Return the model card of an adapter, with the Hub's metadata.

    Args:
        name: Name of the run.
        card: Content of `card.json`.
        report: Content of `report.json`.
        is_peft: Whether stock PEFT loads the folder.
    """
    name = one_line(name)
    train = report["train"]
    quantisation = ""
    if "quantisation" in report:
        quantisation = f"- base quantised: {report['quantisation']['verdict']}\n"
    return _fill(
        "adapter.md",
        metadata=_make_metadata(name, card, report, is_peft=is_peft),
        name=name,
        warning=f"> **{card.offline}.**\n\n" if card.offline else "",
        method=card.method.kind,
        base=card.base.name,
        revision=card.base.revision,
        base_sha256=card.base.base_sha256,
        source=card.data.config.source,
        repeats=_describe_repeating(card),
        max_length=card.max_length,
        truncation=card.truncation,
        results=_show_results(report),
        usage=_show_usage(name, card, is_peft=is_peft) + _describe_pairs(name, card),
        parameters=show_parameters(report["parameters"]),
        quantisation=quantisation,
        parent=_describe_parent(card, report),
        steps=f"{train['steps']:,}",
        best_step=f"{train['best_step']:,}",
        tokens=f"{train['tokens']:,}",
        seconds=f"{train['seconds']:,.0f}",
        tokens_per_second=f"{train['tokens_per_second']:,.0f}",
        engine=train["engine"],
        calibration=_describe_calibration(card),
        kind=card.task.kind.format(labels=_quote(card.labels)),
        limits=card.task.limits.format(labels=_quote(card.labels)),
        trust=card.task.trust,
        picture=card.task.picture_text,
        picture_file=card.task.picture,
    )


def read_metadata(folder: Path) -> ModelCardData:
    """Read the metadata of a folder's card. Without a card it is empty.

    Raises:
        AdapterError: If the metadata is malformed.
    """
    path = folder / "README.md"
    block = None
    if path.is_file():
        block = REGEX_YAML_BLOCK.search(read_bytes(path).decode("utf-8", "replace"))
    if block is None:
        return ModelCardData()
    try:
        values = parse_yaml(block.group(2), str(path))
        return ModelCardData(**(values or {}))
    except (RecipeError, TypeError, ValueError) as error:
        raise AdapterError(
            f"{path}: its metadata cannot be read: {error}; correct it, or remove the file"
        ) from error


def make_merged_card(
    name: str, labels: tuple[str, ...], record: MergeRecord, source: ModelCardData, *, task: Task
) -> str:
    """Return the model card of a merged model.

    Args:
        name: Folder or Hub name to load it by.
        labels: Label names in order.
        record: The record in its `config.json`.
        source: Metadata of the adapter's card, as `read_metadata` returns it.
        task: What the labels are.
    """
    targets = {
        "base": "the base as it was published",
        "dequantised": "the base as quantising had left it",
    }
    return _fill(
        "merged.md",
        **_describe_record(name, record, source, library="transformers"),
        name=name,
        example=STOCK_EXAMPLES[record.reads_pairs],
        kind=task.kind.format(labels=_quote(labels)),
        target=targets[record.into],
        dtype=record.dtype,
        reading=describe_reading(record, other="this pipeline"),
        reader=_show_reader(
            "read_merged_python.md", name, record, scores=TORCH_SCORES[task.activation]
        ),
        table=_show_compared(
            record,
            list(record.compared),
            form="merged into",
            accuracies={"adapter": "accuracy of the adapter", "merged": "of the merge"},
        ),
    )


def make_exported_card(
    name: str, labels: tuple[str, ...], record: MergeRecord, source: ModelCardData, *, task: Task
) -> str:
    """Return the model card of a folder with ONNX files.

    Args:
        name: Folder or Hub name to load it by.
        labels: Label names in order.
        record: The record in its `config.json`.
        source: Metadata of the merged model's card, as `read_metadata` returns it.
        task: What the labels are.
    """
    has_int8 = QUANTISED in record.files
    code = (
        {"file": QUANTISED, "js_dtype": "q8"} if has_int8 else {"file": PLAIN, "js_dtype": "fp32"}
    )
    javascript = _fill("use_exported_js.md", name=name, **code)
    if task.activation != "softmax":
        javascript += (
            "\nThis pipeline applies softmax to every model. The code below gives the scores of this "
            "one.\n"
        )
    if record.reads_pairs:
        javascript = "Pairs were not tried with transformers.js.\n"
    inputs = list(INPUTS)
    if record.reads_pairs and FAMILIES[record.model_type].token_types:
        inputs.append(TYPES)
    files = f"- `{PLAIN}`: fp32"
    if "onnx-int8-weights" in record.compared:
        files += (
            f"; `{QUANTISED}`: weights in 8 bits, computed in fp32. An answer does not depend on "
            "the other texts of its batch"
        )
    elif has_int8:
        files += (
            f"; `{QUANTISED}`: int8 weights and activations. It scales activations by the largest "
            "value in a batch, so an answer depends on the other texts of its batch"
        )
    return _fill(
        "exported.md",
        **_describe_record(name, record, source, library="transformers.js", tags=("onnx",)),
        name=name,
        kind=task.kind.format(labels=_quote(labels)),
        files=files,
        inputs=", ".join(f"`{name}`" for name in inputs[:-1]) + f" and `{inputs[-1]}`",
        example=EXAMPLES[record.reads_pairs],
        **code,
        javascript=javascript,
        reading=describe_reading(record, other="another runtime"),
        reader=_show_reader(
            "read_exported_python.md", name, record, scores=NUMPY_SCORES[task.activation], **code
        )
        + _show_reader(
            "read_exported_js.md", name, record, scores=JS_SCORES[task.activation], **code
        ),
        table=_show_compared(
            record,
            [form for form in record.compared if form.startswith("onnx")],
            form="file",
            accuracies={"merged": "accuracy of the merged model", "exported": "of the file"},
        ),
    )


def describe_reading(record: MergeRecord, *, other: str) -> str:
    """Describe how texts were read in training, and which of it another runtime does not do.

    Args:
        record: The record of a merged or exported model.
        other: The other runtime, such as "a stock pipeline".
    """
    text = f"A text is cut at {record.max_length} tokens"
    if record.reads_pairs:
        text = f"A pair of texts is cut at {record.max_length} tokens, the longer text first"
    if "head" in record.readings:
        text += (
            ", its first ones stay. Training kept the first quarter and the last three quarters: "
            f"{show_cost(record.readings['head'])}."
        )
    elif record.truncation == "head_tail":
        text += (
            f", as in training, which kept the first quarter and the last three quarters; {other} "
            "keeps the first tokens."
        )
    else:
        text += ", as in training."
    if record.cleaning_steps:
        text += " tokenizer.json cleans texts as training did, but for rare entities."
    elif record.clean:
        text += (
            f" Training also cleaned texts (HTML, control characters, blanks), which {other} does "
            "not."
        )
    if "stock" in record.readings:
        text += f" The cost of {other} on raw texts: {show_cost(record.readings['stock'])}."
    return text


def show_cost(cost: Mapping[str, Any]) -> str:
    """Show what another way of reading costs, as `compare_readings` returns it, or the reason."""
    if "reason" in cost:
        return str(cost["reason"])
    accuracy = ""
    if cost["accuracy_change"] is not None:
        accuracy = f", and accuracy changes by {100 * cost['accuracy_change']:.2f} points"
    return (
        f"{cost['changed']:,} of {cost['rows']:,} validation texts are read differently, "
        f"{cost['flips']:,} labels change{accuracy}"
    )


def _show_reader(template: str, name: str, record: MergeRecord, **code: str) -> str:
    """Return code that cuts a text as training did, where the usual code does not."""
    if record.reads_pairs:
        return ""
    room = first = record.max_length - 2
    if record.truncation == "head_tail":
        first = room // 4
    elif template != "read_exported_js.md":
        return ""
    return "\n" + _fill(template, name=name, first=first, room=room, **code)


def _fill(template: str, **values: object) -> str:
    return Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(values)


def _quote(labels: list[str] | tuple[str, ...]) -> str:
    """Return the first labels as code of Markdown, which no label can end, and how many follow."""
    quoted = []
    for label in labels[:SHOWN_LABELS]:
        text = one_line(label)
        # The longest run of backticks must be shorter than those around the code.
        runs = re.findall("`+", text)
        fence = "`" * (1 + max(map(len, runs), default=0))
        space = " " if text.startswith("`") or text.endswith("`") else ""
        quoted.append(f"{fence}{space}{text}{space}{fence}")
    if len(labels) > SHOWN_LABELS:
        quoted.append(f"and {len(labels) - SHOWN_LABELS:,} more")
    return ", ".join(quoted)


def _make_metadata(name: str, card: Card, report: Mapping[str, Any], *, is_peft: bool) -> str:
    """Return the Hub's metadata of an adapter, as YAML."""
    config = card.data.config
    dataset = None
    if is_on_hub(config.source):
        dataset = dataset_type = dataset_name = str(config.source)
    elif str(config.source) in bundled.SOURCES:
        # Somebody else may own a data set of this name on the Hub.
        name_of_folder = bundled.SOURCES[str(config.source)].name
        dataset_type = f"bundled-{name_of_folder}"
        dataset_name = f"the {name_of_folder} that ship with the package"
    elif config.source == FROM_PYTHON:
        dataset_type, dataset_name = "python-rows", FROM_PYTHON
    else:
        dataset_type, dataset_name = "local-files", "local files"
    # Validation chose the tensors and fitted the temperature. It is a result only if no other role
    # was judged.
    roles = report_roles(report)
    judged = [role for role in roles if role != "validation"] or roles
    results = []
    hub_metrics = card.task.hub_metrics
    for role in judged:
        for metric, interval in report[role].items():
            if metric not in hub_metrics or interval["value"] is None:
                continue
            result = EvalResult(
                task_type="text-classification",
                dataset_type=dataset_type,
                dataset_name=dataset_name,
                dataset_split=(config.splits or {}).get(role, role),
                metric_type=hub_metrics[metric],
                metric_name=metric,
                metric_value=round(interval["value"], 4),
            )
            results.append(result)
    return ModelCardData(
        model_name=name,
        base_model=card.base.name if card.base.revision else None,
        license=bundled.LICENSE if card.base.name == bundled.NAME else None,
        library_name="peft" if is_peft else "lora-sentiment",
        pipeline_tag="text-classification",
        tags=["text-classification", card.base.model_type, card.method.kind],
        datasets=[dataset] if dataset else None,
        metrics=sorted({result.metric_type for result in results}),
        eval_results=results,
    ).to_yaml()


def _describe_record(
    name: str,
    record: MergeRecord,
    source: ModelCardData,
    *,
    library: str,
    tags: tuple[str, ...] = (),
) -> dict[str, str]:
    """Return the values that the templates of a merged and of an exported model share."""
    is_local = record.base == bundled.NAME or Path(record.base).is_absolute()
    metadata = ModelCardData(
        model_name=name,
        base_model=None if is_local else record.base,
        license=source.license,
        datasets=source.datasets,
        metrics=source.metrics,
        eval_results=source.eval_results,
        library_name=library,
        pipeline_tag="text-classification",
        tags=["text-classification", record.model_type, *tags, record.method],
    )
    origin = _fill(
        "origin.md",
        method=record.method,
        adapter_sha256=record.adapter_sha256,
        base=record.base,
        base_sha256=record.base_sha256,
        results=_list_results(source),
    )
    return {
        "metadata": metadata.to_yaml(),
        "family": FAMILIES[record.model_type].name,
        "origin": origin.rstrip("\n"),
    }


def _list_results(source: ModelCardData) -> str:
    """Return the adapter's results as a sentence."""
    shown = []
    for result in source.eval_results or []:
        name = result.metric_name or result.metric_type
        split = result.dataset_split or "unnamed split"
        shown.append(
            f"{name} {result.metric_value} ({one_line(str(result.dataset_name))}, {split})"
        )
    return one_line("; ".join(shown)) or "not known"


def _make_table(heading: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heading, *rows)]
    lines.insert(1, "|---" * len(heading) + "|")
    return "\n".join(lines)


def _show_results(report: Mapping[str, Any]) -> str:
    roles = report_roles(report)
    rows = []
    for metric in report[roles[0]]:
        name, slash, label = metric.partition("/")
        # A label may hold the character that ends a cell.
        shown = f"{name} of {_quote([label])}".replace("|", "\\|") if slash else name
        cells = [show_interval(report[role].get(metric, NO_VALUE)) for role in roles]
        rows.append([shown, *cells])
    return _make_table(["metric", *roles], rows)


def _show_compared(
    record: MergeRecord, forms: list[str], *, form: str, accuracies: dict[str, str]
) -> str:
    """Return a table with a row for each form and each part that was compared.

    Args:
        record: The record with the figures.
        forms: The forms to show.
        form: Heading of their names.
        accuracies: Name of a form in the figures to the heading of its accuracy.
    """
    heading = [form, "compared on", "largest difference of a logit", "labels changed"]
    rows = []
    for name in forms:
        for part, figures in record.compared[name].items():
            if not isinstance(figures, Mapping):
                continue
            if "reason" in figures:
                rows.append([name, f"{part}: none", "", "", "", ""])
                continue
            difference = "not finite"
            if figures["max_difference"] is not None:
                difference = f"{figures['max_difference']:.2g}"
            row = [name, f"{part}, {figures['rows']:,} rows", difference, str(figures["flips"])]
            for judged in accuracies:
                accuracy = figures.get(f"accuracy_{judged}")
                row.append("" if accuracy is None else f"{accuracy:.4f}")
            rows.append(row)
    return _make_table([*heading, *accuracies.values()], rows)


def _show_usage(name: str, card: Card, *, is_peft: bool) -> str:
    if not is_peft:
        return (
            "`changed.safetensors` holds every trained tensor under stock transformers' own names."
        )
    is_bundled = card.base.name == bundled.NAME
    quantisation = _show_quantisation(card)
    if quantisation and is_bundled:
        quantisation = f", {quantisation}"
    elif quantisation:
        quantisation = f",\n    {quantisation},"
    usage = _fill(
        "use_bundled_base.md" if is_bundled else "use_stock_peft.md",
        name=name,
        labels=_quote(card.labels),
        num_labels=len(card.labels),
        classes="AutoTokenizer, BitsAndBytesConfig" if quantisation else "AutoTokenizer",
        quantisation=quantisation,
    )
    return usage.rstrip("\n")


def _describe_pairs(name: str, card: Card) -> str:
    if not card.reads_pairs:
        return ""
    return (
        "\n\nAn input is a pair of texts, as `tokenizer(text, text_pair, truncation=True)` joins it: "
        f'`lora_sentiment.load("{name}").predict([{EXAMPLES[True]}])`.'
    )


def _show_quantisation(card: Card) -> str:
    """Return the argument that makes stock transformers quantise the base, or an empty string."""
    if card.base.quantize == "none":
        return ""
    head = FAMILIES[card.base.model_type].head
    skip = f"llm_int8_skip_modules={json.dumps(head)}"
    if card.base.quantize == "int8":
        return f"quantization_config=BitsAndBytesConfig(load_in_8bit=True, {skip})"
    double = f"bnb_4bit_use_double_quant={card.base.double_quant}"
    return (
        "quantization_config=BitsAndBytesConfig(load_in_4bit=True, "
        f'bnb_4bit_quant_type="{card.base.quantize}", {double}, {skip})'
    )


def _describe_repeating(card: Card) -> str:
    if card.data.config.source != FROM_PYTHON:
        return "`recipe.yaml` repeats the run"
    return (
        "the rows came from Python and are not stored; `recipe.yaml` repeats the run with the same "
        f"rows (SHA-256 of train `{card.data.train_sha256}`, of validation "
        f"`{card.data.validation_sha256}`)"
    )


def _describe_parent(card: Card, report: Mapping[str, Any]) -> str:
    """Return what the training went on from and what it changed, as a line of a list."""
    if card.parent_sha256 is None:
        return ""
    text = f"- went on from the adapter with SHA-256 `{card.parent_sha256}`"
    for role, compared in report.get("parent", {}).items():
        if isinstance(compared, Mapping):
            text += f"; {role}: {show_progress(compared)}"
    return f"{text}\n"


def _describe_calibration(card: Card) -> str:
    if card.calibration is None:
        return ""
    task = card.task
    return task.describe_calibration(card.calibration, card.labels)
