"""A recipe: YAML and `key=value` overrides, read into frozen sections with every fault in one report."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from lora_sentiment.errors import RecipeError, did_you_mean, show
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.method import METHODS, Method, why_not_quantised
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.output import OutputConfig
from lora_sentiment.recipe.section import Section
from lora_sentiment.recipe.train import TrainConfig
from lora_sentiment.recipe.yaml_reader import Dumper, parse_yaml


class Recipe(Section):
    """One experiment: data, base, method, training and output."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; by default the recipe file's stem."""
    offline: Literal["error", "bundled"] = "error"
    """Where no Hub answers and what it names is not in the cache: stop, or walk with the base and reviews that ship,
    writing to `<output.dir>-offline`."""
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

    @model_validator(mode="before")
    @classmethod
    def _method_defaults_to_lora(cls, values: Any) -> Any:
        # A discriminated union wants its tag spelled out; a recipe without one means LoRA.
        if isinstance(values, dict) and isinstance(method := values.get("method", {}), dict):
            return {**values, "method": {"kind": "lora", **method}}
        return values

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> "Recipe":
        """Read a recipe file and apply overrides.

        Args:
            path: YAML file.
            overrides: `key=value` pairs; the key is a dotted path, the value YAML.

        Raises:
            RecipeError: With every fault of file and overrides, one a line: file, key path, found, allowed.
        """
        path = Path(path)
        values = {"name": path.stem, **_read_yaml(path)}
        faults = []
        for override in overrides:
            try:
                _apply(values, override)
            except RecipeError as error:
                faults.append(str(error))
        try:
            recipe = cls.model_validate(values)
        except ValidationError as error:
            faults += [f"{path}: {fault}" for fault in _faults(error)]
        faults += [f"{path}: {fault}" for fault in _conflicts(values)]
        if faults:
            raise RecipeError("\n".join(faults))
        return recipe

    @property
    def folder(self) -> Path:
        """The adapter folder that a run of this recipe writes."""
        folder = Path(self.output.dir or f"adapters/{self.name}")
        try:
            return folder.expanduser()
        except RuntimeError as error:
            raise RecipeError(
                f"output.dir: found {show(str(folder))}; there is no such user's home here"
            ) from error

    def to_yaml(self) -> str:
        """Return the resolved recipe, defaults included, as YAML that `load` reads back equal."""
        return yaml.dump(
            self.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True
        )


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = did_you_mean(path.name, near) or (
            f"; recipes there: {', '.join(near)}" if near else ""
        )
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
            f"{path}: found {type(values).__name__}; a recipe is a mapping with data, model, method, train"
        )
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise RecipeError(
            f"override {show(override)}: expected key=value, such as train.learning_rate=1e-4"
        )
    *path, last = key.split(".")
    for part in path:
        inner = values.get(part)
        values[part] = dict(inner) if isinstance(inner, dict) else {}
        values = values[part]
    values[last] = parse_yaml(text, f"override {show(override)}")


def _faults(error: ValidationError) -> list[str]:
    """Turn pydantic's errors into lines of key path, what was found, what is allowed."""
    lines: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        # The union's own tags ('lora', 'str', 'literal[...]') stand in `loc` beside the keys a person wrote.
        key = ".".join(str(part) for part in item["loc"] if not _is_tag(str(part)))
        if item["loc"][:1] == ("method",) and len(item["loc"]) > 1 and item["loc"][1] in METHODS:
            key = ".".join(["method", *[str(p) for p in item["loc"][2:] if not _is_tag(str(p))]])
        lines.setdefault(key, []).append(_explain(item))
    return [
        f"{key}: ".removeprefix(": ") + " or ".join(dict.fromkeys(texts))
        for key, texts in lines.items()
    ]


def _is_tag(part: str) -> bool:
    return part in ("str", "int", "float", "bool") or part.startswith(
        ("dict[", "tuple[", "literal[", "function-")
    )


def _conflicts(values: dict[str, Any]) -> list[str]:
    """Return the faults that only two sections together make."""

    def stated(section: str, key: str) -> Any:
        found = values.get(section)
        return found.get(key) if isinstance(found, dict) else None

    kind = stated("method", "kind") or "lora"
    quantize = stated("model", "quantize") or "none"
    faults = []
    if quantize != "none" and (reason := _refusal(values.get("method") or {}, kind)):
        faults.append(f"model.quantize: {quantize} cannot be: {reason}; set model.quantize=none")
    if kind == "full" and stated("model", "head") in ("classifier", "low_rank"):
        faults.append("model.head: method full trains the whole head; set model.head=full")
    clashes = {
        f"method.kind={kind}": kind in ("adalora", "ia3", "vera"),
        "method.use_dora=true": stated("method", "use_dora") is True,
        f"model.quantize={quantize}": quantize != "none",
    }
    if stated("train", "engine") == "fast":
        faults += [
            f"train.engine: fast cannot run with {clash}; set train.engine=auto"
            for clash in clashes
            if clashes[clash]
        ]
    return faults


def _refusal(section: Any, kind: Any) -> str | None:
    """Return why the method of a recipe cannot be on a quantised base, as far as its section can be read."""
    try:
        method = TypeAdapter(Method).validate_python({**section, "kind": kind})
    except (ValidationError, TypeError):
        return None  # reported already, as a fault of the section itself
    return why_not_quantised(method)


def _explain(item: Any) -> str:
    """Say of one of pydantic's errors what was found and what is allowed."""
    found, context = item["input"], item.get("ctx", {})
    match item["type"]:
        case "extra_forbidden":
            name = str(item["loc"][-1])
            allowed = _keys_of(item["loc"])
            return f"unknown key{did_you_mean(name, allowed)} (allowed: {', '.join(allowed)})"
        case "missing":
            return "is missing; it has no default"
        case "value_error":
            return str(context["error"])
        case "union_tag_invalid":
            tags = context["expected_tags"].replace("'", "")
            hint = did_you_mean(str(context["tag"]), tags.split(", "))
            return f"found kind {show(context['tag'])}; allowed: {tags}{hint}"
        case "literal_error":
            allowed_values = re.findall(r"'([^']*)'", context["expected"])
            hint = did_you_mean(found, allowed_values) if isinstance(found, str) else ""
            return f"found {show(found)}; allowed: {', '.join(allowed_values)}{hint}"
        case _:
            return f"found {show(found)}; {item['msg'].replace('Input should be', 'allowed:')}"


def _keys_of(loc: tuple[int | str, ...]) -> list[str]:
    """Return the keys allowed beside the one at this place of pydantic's."""
    if len(loc) == 1:
        return list(Recipe.model_fields)
    if loc[0] == "method":
        return list(METHODS[str(loc[1])].model_fields)
    section = Recipe.model_fields[str(loc[0])].annotation
    assert isinstance(section, type)
    assert issubclass(section, BaseModel)
    return list(section.model_fields)


def make_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file, where `name` may be left out."""
    schema = Recipe.model_json_schema()
    schema["required"] = ["data", "model"]
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "lora_sentiment recipe"
    return schema
