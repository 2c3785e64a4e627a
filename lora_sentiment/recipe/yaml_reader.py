"""Read YAML 1.2's core schema, and write strings so that no reader takes them for another type."""

import re
import sys
from typing import Any

import yaml

from lora_sentiment.errors import RecipeError, show


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema, with string keys, each key once, and no aliases.

    PyYAML reads YAML 1.1, where `2e-4` is a string and a label named `no` is False.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own attribute

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # Nested aliases of lists can expand a few hundred bytes into more values than memory holds.
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()  # type: ignore[no-untyped-call]
            problem = f"*{alias.anchor} is an alias; write the value out, or put text in quotes"
            raise yaml.composer.ComposerError(None, None, problem, alias.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            problem = None
            if not isinstance(key, str):
                problem = f"key {show(key)} is no string"
            elif key in keys:
                problem = f"key {show(key)} stands twice"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 reads as another type, and writes no aliases."""

    def ignore_aliases(self, _: Any) -> bool:
        """Write every value out."""
        return True


_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _pattern, _first in (
    # PyYAML looks a pattern up by the first character of the scalar, which is '' for an empty
    # scalar.
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", "[-+]?[0-9]+", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    for _class in (_Loader, Dumper):
        _regexp = re.compile(f"^(?:{_pattern})$")
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _regexp, _first)
# YAML 1.1 reads 010 as eight.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        RecipeError: The text is no valid YAML. The message begins with `where`.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader with fewer tags
    # PyYAML raises the last five for a value that does not fit its tag or escape, such as `!!bool
    # maybe`.
    except (
        yaml.YAMLError,
        RecursionError,
        ValueError,
        OverflowError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{where}:{place} is no valid YAML: {problem}") from None


def show_yaml(value: Any) -> str:
    """Return a value as YAML on one line, which `parse_yaml` reads back equal."""
    text = yaml.dump(
        [value],
        Dumper=Dumper,
        default_flow_style=True,
        width=sys.maxsize,
        sort_keys=False,
        allow_unicode=True,
    )
    return text.strip()[1:-1]
