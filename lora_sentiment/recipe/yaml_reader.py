"""Read YAML 1.2's core schema, and write strings so that no reader takes them for something else."""

import re
from typing import Any

import yaml

from lora_sentiment.errors import RecipeError, show


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema, each key once, without aliases.

    PyYAML speaks 1.1, where `2e-4` is a string and a label named `no` is False.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own attribute

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # Lists of aliases of lists of aliases: a few hundred bytes that stand for more values than memory holds.
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()  # type: ignore[no-untyped-call]
            problem = f"*{alias.anchor} is an alias, and a recipe has none; write the value out, or put text in quotes"
            raise yaml.composer.ComposerError(None, None, problem, alias.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"key {show(key)} is no string"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                problem = f"key {show(key)} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes every string that 1.1 or 1.2 would read as something else; writes no alias, which `_Loader` refuses."""

    def ignore_aliases(self, _: Any) -> bool:
        """Write every value out."""
        return True


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    # PyYAML looks patterns up by the scalar's first character; an empty scalar has none and is looked up as ''.
    for _kind in (_Loader, Dumper):
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
        )
# 1.1 reads 010 as eight.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Loader.yaml_implicit_resolvers[""] = _Loader.yaml_implicit_resolvers["\0"]


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of some YAML, as a recipe's is read.

    Raises:
        RecipeError: If it is none, beginning with `where`.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader with fewer tags
    # The last four are how PyYAML fails at a tag whose value is of another kind, such as `!!bool maybe`.
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
        KeyError,
        AttributeError,
        TypeError,
        IndexError,
    ) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{where}:{line} is no valid YAML: {problem}") from None
