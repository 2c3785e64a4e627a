"""Read a YAML file and `key=value` overrides into a recipe, with every fault in one report."""

import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import TypeAdapter, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from lora_sentiment.errors import RecipeError, did_you_mean, show
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.method import METHODS, Method, why_not_quantised
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.other_names import OTHER_NAMES
from lora_sentiment.recipe.output import OutputConfig
from lora_sentiment.recipe.section import Section
from lora_sentiment.recipe.train import METRICS, TrainConfig
from lora_sentiment.recipe.yaml_reader import Dumper, parse_yaml


class Recipe(Section):
    """One experiment: data, base, method, training and output."""

    name: str
    """Name of the run: letters, digits, `.`, `_` and `-`, of which the first is a letter or digit.
    By default it is made from the recipe file's name."""
    offline: Literal["error", "bundled"] = "error"
    """If no Hub answers and the cache lacks the files: `error` stops; `bundled` runs on the base
    and reviews that ship and writes to `<output.dir>-offline`."""
    data: DataConfig
    """Which texts and labels."""
    model: ModelConfig
    """Which base."""
    method: Method
    """What is trained."""
    train: TrainConfig = TrainConfig()
    """How it is trained."""
    output: OutputConfig = OutputConfig()
    """Where the adapter goes."""

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, name: str) -> str:
        if not name[:1].isalnum() or name != _make_name(name):
            hint = _make_name(name) or "my-recipe"
            raise ValueError(
                f"found {show(name)}; a name has letters, digits, '.', '_' and '-', and begins "
                f"with a letter or digit; write name: {hint}"
            )
        return name

    @model_validator(mode="wrap")
    @classmethod
    def _method_defaults_to_lora(cls, values: Any, validate: Callable[[Any], "Recipe"]) -> "Recipe":
        # pydantic chooses a method's class by `kind` and has no default for it.
        method = values.get("method", {}) if isinstance(values, dict) else None
        if not isinstance(method, dict) or "kind" in method:
            return validate(values)
        recipe = validate({**values, "method": {"kind": "lora", **method}})
        recipe.method.model_fields_set.discard("kind")
        return recipe

    @model_validator(mode="before")
    @classmethod
    def _metric_defaults_to_the_task(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("data"), dict):
            return values
        task = values["data"].get("task", "single_label")
        train = values.get("train") or {}
        if task in METRICS and isinstance(train, dict) and "metric_for_best_model" not in train:
            return {**values, "train": {**train, "metric_for_best_model": METRICS[task][0]}}
        return values

    @model_validator(mode="after")
    def _label_sets_need_unseen_rows(self) -> Self:
        if self.model.adapter is not None and self.data.calibration_fraction:
            raise ValueError(
                "data.calibration_fraction: label sets need rows that no training has seen, and "
                "the adapter of model.adapter may have learned from these; leave one of the two out"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> "Recipe":
        """Read a recipe file and apply overrides.

        Args:
            path: YAML file.
            overrides: `key=value` pairs; the key is a dotted path, the value YAML.

        Raises:
            RecipeError: With every fault of file and overrides, one a line: file, key path, value,
                allowed values.
        """
        path = Path(path)
        values = {"name": _make_name(path.stem) or path.stem, **_read_yaml(path)}
        faults = []
        for override in overrides:
            try:
                _apply(values, override)
            except RecipeError as error:
                faults.append(str(error))
        recipe = None
        try:
            recipe = cls.model_validate(values)
        except ValidationError as error:
            faults += [f"{path}: {fault}" for fault in _explain_faults(error, values)]
        faults += [f"{path}: {fault}" for fault in _find_conflicts(values)]
        if recipe is None or faults:
            raise RecipeError(*faults)
        return recipe

    @property
    def folder(self) -> Path:
        """The adapter folder that a run of this recipe writes."""
        folder = Path(self.output.dir or f"adapters/{self.name}")
        try:
            return folder.expanduser()
        except RuntimeError as error:
            raise RecipeError(
                f"output.dir: found {show(str(folder))}; this machine has no home folder of that "
                "user"
            ) from error

    def to_yaml(self) -> str:
        """Return the resolved recipe, defaults included, as YAML that `load` reads back equal."""
        values = self.model_dump(mode="json")
        return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def apply_overrides(path: Path, overrides: Iterable[str]) -> str:
    """Return a recipe file with overrides applied, as YAML without defaults and comments.

    Raises:
        RecipeError: If the file or an override is no YAML.
    """
    values = _read_yaml(path)
    for override in overrides:
        _apply(values, override)
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _make_name(text: str) -> str:
    """Return a text as the name of a run: `my recipe (2)` becomes `my-recipe-2`."""
    characters = []
    for character in unicodedata.normalize("NFC", text):
        # An identifier may hold the letters, marks and digits of every script.
        is_allowed = character in ".-" or f"_{character}".isidentifier()
        characters.append(character if is_allowed else " ")
    return "-".join("".join(characters).split()).lstrip("._-")


def make_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file, in which `name` is optional."""
    schema = Recipe.model_json_schema()
    schema["required"] = ["data", "model"]
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "lora_sentiment recipe"
    return schema


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        names = []
        if path.parent.is_dir():
            names = sorted(other.name for other in path.parent.glob("*.yaml"))
        hint = did_you_mean(path.name, names)
        if names and not hint:
            hint = f"; recipes there: {', '.join(names)}"
        raise RecipeError(f"{path}: no such recipe file{hint}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}: byte {error.start} is no UTF-8; save the recipe as UTF-8"
        ) from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path}: found {type(values).__name__}; a recipe is a mapping with data, model, "
            "method, train"
        )
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    """Set the value of an override in the values of a recipe."""
    where = f"override {show(override)}"
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise RecipeError(f"{where}: expected key=value, such as train.learning_rate=1e-4")
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        values[section] = dict(inner) if isinstance(inner, dict) else {}
        values = values[section]
    values[last] = parse_yaml(text, where)


def _explain_faults(error: ValidationError, values: dict[str, Any]) -> list[str]:
    """Turn pydantic's errors into lines of key path, value and allowed values."""
    explanations: dict[str, list[str]] = {}
    for fault in error.errors(include_url=False):
        texts = explanations.setdefault(_key_path(fault, values), [])
        text = _explain(fault)
        if text not in texts:
            texts.append(text)
    lines = []
    for key, texts in explanations.items():
        text = " or ".join(texts)
        lines.append(f"{key}: {text}" if key else text)
    return lines


def _key_path(fault: ErrorDetails, values: Any) -> str:
    """Return a path of keys of the file, without the union members in pydantic's path."""
    keys = []
    for part in fault["loc"]:
        is_key = isinstance(values, dict) and part in values
        is_index = isinstance(values, list) and isinstance(part, int)
        if is_key or is_index:
            values = values[part]
            keys.append(str(part))
    if fault["type"] == "missing":
        keys.append(str(fault["loc"][-1]))
    return ".".join(keys)


def _explain(fault: ErrorDetails) -> str:
    """Say which value one of pydantic's errors is about, and what is allowed."""
    value = fault["input"]
    context = fault.get("ctx", {})
    match fault["type"]:
        case "extra_forbidden":
            *where, key = map(str, fault["loc"])
            allowed = _allowed_keys(fault["loc"])
            hint = did_you_mean(key, allowed)
            if key in OTHER_NAMES:
                hint = f"; {OTHER_NAMES[key]}"
            elif len(where) == 2 and any(key in method.model_fields for method in METHODS.values()):
                kind = where[1]
                hint = f" of kind {kind}; 'method={{kind: {kind}}}' leaves the other keys out"
            return f"unknown key{hint} (allowed: {', '.join(allowed)})"
        case "missing":
            return "is missing; it has no default"
        case "value_error":
            return str(context["error"])
        case "union_tag_invalid":
            kinds = list(METHODS)
            hint = did_you_mean(str(context["tag"]), kinds)
            return f"found kind {show(context['tag'])}; allowed: {', '.join(kinds)}{hint}"
        case "literal_error":
            allowed = re.findall(r"'([^']*)'", context["expected"])
            hint = did_you_mean(value, allowed) if isinstance(value, str) else ""
            return f"found {show(value)}; allowed: {', '.join(allowed)}{hint}"
        case _:
            return f"found {show(value)}; {fault['msg'].replace('Input should be', 'allowed:')}"


def _allowed_keys(loc: tuple[int | str, ...]) -> list[str]:
    """Return the allowed keys at a path (key), (section, key) or (method, kind, key)."""
    if len(loc) == 1:
        return list(Recipe.model_fields)
    classes: dict[str, type[Section]] = {
        "data": DataConfig,
        "model": ModelConfig,
        "train": TrainConfig,
        "output": OutputConfig,
        **METHODS,
    }
    return list(classes[str(loc[-2])].model_fields)


def _find_conflicts(values: dict[str, Any]) -> list[str]:
    """Return the conflicts between sections, also if other values of the recipe are wrong."""
    sections = {}
    for name in ("data", "model", "method", "train"):
        section = values.get(name)
        sections[name] = section if isinstance(section, dict) else {}
    data, model, method, train = sections.values()
    kind = method.get("kind") or "lora"
    quantize = model.get("quantize") or "none"
    faults = _find_task_conflicts(data.get("task") or "single_label", train)
    if quantize != "none":
        reason = _why_not_quantised({**method, "kind": kind})
        if reason:
            faults.append(
                f"model.quantize: {quantize} cannot be used: {reason}; set model.quantize=none"
            )
    if data.get("text_pair_column") is not None and model.get("truncation") == "head_tail":
        faults.append(
            "model.truncation: head_tail keeps both ends of one text, and data.text_pair_column "
            "makes pairs, of which the longer text is cut at its end; set model.truncation=head"
        )
    if kind == "full" and model.get("head") in ("classifier", "low_rank"):
        faults.append("model.head: method full trains the whole head; set model.head=full")
    if train.get("engine") == "fast":
        stock_only = []
        if kind in ("adalora", "ia3", "vera"):
            stock_only.append(f"method.kind={kind}")
        if method.get("use_dora") is True:
            stock_only.append("method.use_dora=true")
        if quantize != "none":
            stock_only.append(f"model.quantize={quantize}")
        for setting in stock_only:
            faults.append(f"train.engine: fast cannot run with {setting}; set train.engine=auto")
    return faults


def _find_task_conflicts(task: Any, train: dict[str, Any]) -> list[str]:
    """Return the settings of training that do not fit the task."""
    faults: list[str] = []
    if task not in METRICS:
        return faults  # reported as a fault of the section itself
    metric = train.get("metric_for_best_model")
    if metric not in (None, *METRICS[task]) and any(metric in names for names in METRICS.values()):
        faults.append(
            f"train.metric_for_best_model: {metric} is no metric of data.task={task}; allowed: "
            f"{', '.join(METRICS[task])}"
        )
    if task == "regression":
        for key in ("class_weights", "label_smoothing_factor"):
            if train.get(key):
                faults.append(f"train.{key}: is for labels, and data.task=regression has numbers")
    elif train.get("huber_delta") is not None:
        faults.append(f"train.huber_delta: is for data.task=regression, not {task}")
    return faults


def _why_not_quantised(values: dict[str, Any]) -> str | None:
    try:
        method = TypeAdapter(Method).validate_python(values)
    except ValidationError:
        return None  # reported as a fault of the section itself
    return why_not_quantised(method)
