"""`README.md` of an adapter folder: a model card with the Hub's metadata and an honest limits section."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lora_sentiment import bundled
from lora_sentiment.adapter.folder import Card
from lora_sentiment.data.sources import is_on_hub
from lora_sentiment.evaluation.statistics import show_interval
from lora_sentiment.models.parameters import show_parameters
from lora_sentiment.training.report import report_roles

_HUB_METRICS = {
    "accuracy": "accuracy",
    "macro_f1": "f1",
    "mcc": "matthews_correlation",
    "auroc": "roc_auc",
}


def make_model_card(name: str, card: Card, report: Mapping[str, Any], *, is_peft: bool) -> str:
    """Return the model card of an adapter.

    Args:
        name: Name of the run.
        card: What `card.json` holds.
        report: What `report.json` holds.
        is_peft: Whether stock PEFT loads the folder.
    """
    metadata = _metadata(name, card, report, is_peft=is_peft).to_yaml()
    sections = [
        _summary(name, card),
        _results(report),
        _usage(name, card, is_peft=is_peft),
        _training(card, report),
        _limits(card),
    ]
    return f"---\n{metadata}\n---\n\n" + "\n\n".join(sections) + "\n"


def _metadata(name: str, card: Card, report: Mapping[str, Any], *, is_peft: bool) -> ModelCardData:
    source = card.data.config.source
    dataset = str(source) if is_on_hub(source) else None
    # Not the Hub's data set of that name, which is not ours.
    ships = source == bundled.NAME
    files = (
        ("bundled-reviews", "the reviews that ship with the package")
        if ships
        else ("local-files", "local files")
    )
    roles = report_roles(report)
    # Validation chose the tensors and fitted the temperature, so it is a result only where nothing else is.
    judged = [role for role in roles if role != "validation"] or roles
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=dataset or files[0],
            dataset_name=dataset or files[1],
            dataset_split=(card.data.config.splits or {}).get(role, role),
            metric_type=_HUB_METRICS[metric],
            metric_name=metric,
            metric_value=round(interval["value"], 4),
        )
        for role in judged
        for metric, interval in report[role].items()
        if metric in _HUB_METRICS and interval["value"] is not None
    ]
    return ModelCardData(
        model_name=name,
        base_model=card.base.name if card.base.revision else None,
        library_name="peft" if is_peft else "lora-sentiment",
        pipeline_tag="text-classification",
        tags=["text-classification", "distilbert", card.method.kind],
        datasets=[dataset] if dataset else None,
        metrics=sorted({result.metric_type for result in results}),
        eval_results=results,
    )


def _summary(name: str, card: Card) -> str:
    labels = ", ".join(f"`{label}`" for label in card.labels)
    warning = f"> **{card.offline}.**\n\n" if card.offline else ""
    return (
        f"# {name}\n\n{warning}A text classifier with the labels {labels}: `{card.method.kind}` fine-tuning of "
        f"`{card.base.name}` on `{card.data.config.source}`, at most {card.max_length} tokens a text (truncation: "
        f"{card.truncation}). Made with `lora_sentiment`."
    )


def _results(report: Mapping[str, Any]) -> str:
    roles = report_roles(report)
    lines = [
        "## Results",
        "",
        "| metric | " + " | ".join(roles) + " |",
        "|---" * (len(roles) + 1) + "|",
    ]
    for metric in report[roles[0]]:
        lines.append(
            f"| {metric} | "
            + " | ".join(show_interval(report[role][metric]) for role in roles)
            + " |"
        )
    lines += [
        "",
        "Brackets hold 95 % bootstrap intervals over the rows of one run; validation chose the tensors, other rows "
        "chose nothing.",
    ]
    return "\n".join(lines)


def _usage(name: str, card: Card, *, is_peft: bool) -> str:
    own = f"## Use\n\n```sh\nlora-sentiment evaluate {name}  # this folder; checks the base by its hash\n```\n\n"
    if not is_peft:
        return (
            own
            + "`changed.safetensors` holds every trained tensor under stock transformers' own names."
        )
    bits = _bits(card)
    extra = f",\n    quantization_config=BitsAndBytesConfig({bits})," if bits else ""
    if card.base.name == bundled.NAME:
        return f"{own}{_usage_on_bundled_base(name, card, bits)}"
    return (
        f"{own}With stock PEFT (labels in order: {', '.join(card.labels)}):\n\n```python\nimport torch\n"
        "from peft import AutoPeftModelForSequenceClassification\nfrom transformers import AutoTokenizer"
        f"{', BitsAndBytesConfig' if bits else ''}\n\n"
        "model = AutoPeftModelForSequenceClassification.from_pretrained(\n"
        f'    "{name}", num_labels={len(card.labels)}, dtype=torch.float32{extra}\n)\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```'
    )


def _usage_on_bundled_base(name: str, card: Card, bits: str) -> str:
    """Return the same for a base that has no name on the Hub: stock PEFT is given its folder."""
    extra = f", quantization_config=BitsAndBytesConfig({bits})" if bits else ""
    return (
        f"With stock PEFT and the base's folder (labels in order: {', '.join(card.labels)}):\n\n```python\n"
        "from importlib.resources import files\n\nimport torch\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer"
        f"{', BitsAndBytesConfig' if bits else ''}\n\n"
        'base = str(files("lora_sentiment") / "bundled" / "base")  # in a clone: lora_sentiment/bundled/base\n'
        "model = AutoModelForSequenceClassification.from_pretrained(\n"
        f"    base, num_labels={len(card.labels)}, dtype=torch.float32{extra}\n)\n"
        f'model = PeftModel.from_pretrained(model, "{name}").eval()\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```'
    )


def _bits(card: Card) -> str:
    """Return the arguments that give stock transformers the quantised base of training; empty where it was not."""
    skip = 'llm_int8_skip_modules=["pre_classifier", "classifier"]'
    match card.base.quantize:
        case "none":
            return ""
        case "int8":
            return f"load_in_8bit=True, {skip}"
        case kind:
            double = f"bnb_4bit_use_double_quant={card.base.double_quant}"
            return f'load_in_4bit=True, bnb_4bit_quant_type="{kind}", {double}, {skip}'


def _training(card: Card, report: Mapping[str, Any]) -> str:
    train = report["train"]
    precision = (
        f"- base quantised: {report['quantisation']['verdict']}\n"
        if "quantisation" in report
        else ""
    )
    return (
        f"## Training\n\n- parameters: {show_parameters(report['parameters'])}\n{precision}"
        f"- {train['steps']:,} optimizer steps, kept: step {train['best_step']:,}; {train['tokens']:,} tokens in "
        f"{train['seconds']:,.0f} s ({train['tokens_per_second']:,.0f} tokens/s, {train['engine']} engine)\n"
        f"- base: `{card.base.name}`, revision `{card.base.revision}`, encoder SHA-256 `{card.base.base_sha256}`\n"
        "- `recipe.yaml` repeats the run; `card.json` holds versions, machine facts and the probe\n\n"
        "![training curve](training.png)\n\n![confusion matrix](confusion.png)"
    )


def _limits(card: Card) -> str:
    limits = (
        f"It knows the labels {', '.join(card.labels)} and no other; every text gets one of them, fitting or not.",
        f"A text longer than {card.max_length} tokens is cut ({card.truncation}); what was cut does not count.",
        "The figures hold for rows like those it was judged on; other topics, languages or lengths can be much worse.",
        "Its base and its data carry biases: names, dialects and groups of people can shift a score. Do not use it to "
        "decide about people.",
        _probabilities(card),
    )
    return "\n".join(["## Limits\n", *(f"- {limit}" for limit in limits)])


def _probabilities(card: Card) -> str:
    plain = "Probabilities are as the model gives them; `ece` above says how far to trust them"
    if card.calibration is None:
        return f"{plain}."
    return (
        f"{plain}. Divide the logits by the temperature {card.calibration['temperature']:.3f}, fitted on validation "
        "and kept in `card.json`, and they are the calibrated ones of `calibrated_log_loss` and `calibrated_ece`; on "
        "validation itself these flatter, and no decision changes."
    )
