"""Write the pages that are made at build time, into docs/generated.

Every recipe key from the JSON schema, every verb from its `--help`, and copies of the pages that
stand outside of docs/.
"""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from lora_sentiment.recipe.recipe import make_schema

DOCS = Path(__file__).parent
ROOT = DOCS.parent
GENERATED = DOCS / "generated"
COPIED = ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")
SEARCHED = ("SECURITY.md",)
"""Copies that the site's search finds. The others would crowd out the pages for readers."""
SECTION = "a section, see below"


def generate() -> None:
    """Write all pages anew."""
    shutil.rmtree(GENERATED, ignore_errors=True)
    (GENERATED / "benchmarks").mkdir(parents=True)
    copies = [ROOT / name for name in COPIED]
    copies += [*(ROOT / "benchmarks").glob("*.md"), *(ROOT / "benchmarks").glob("*.png")]
    for path in copies:
        shutil.copy(path, GENERATED / path.relative_to(ROOT))
    for path in GENERATED.rglob("*.md"):
        if path.name not in SEARCHED:
            text = path.read_text(encoding="utf-8")
            path.write_text(f"---\nnosearch: true\n---\n\n{text}", encoding="utf-8")
    (GENERATED / "keys.md").write_text(make_key_page(make_schema()), encoding="utf-8")
    (GENERATED / "commands.md").write_text(make_command_page(), encoding="utf-8")


def move_links(text: str) -> str:
    """Let links to pages outside of docs/ lead to their copies."""
    names = "|".join(COPIED)
    return re.sub(rf"\]\(\.\./({names}|benchmarks/[\w.]+)", r"](generated/\1", text)


def make_command_page() -> str:
    """Return each verb's `--help` as a page."""
    command = [sys.executable, "-m", "typer", "lora_sentiment.cli", "utils", "docs"]
    command += ["--name", "lora-sentiment", "--title", "Command line"]
    page = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return html.unescape(page)


def make_key_page(schema: dict[str, Any]) -> str:
    """Return every recipe key as a page with a table for each section.

    Args:
        schema: The JSON schema of a recipe.
    """
    lines = [
        "# Every recipe key",
        "",
        "This page is made from the JSON schema, which `lora-sentiment schema` prints.",
        "",
        "## Top level",
        "",
        *make_table(schema),
    ]
    for section in ("data", "model", "method", "train", "output"):
        value = schema["properties"][section]
        for part in find_parts(value, schema["$defs"]):
            kind = part["properties"].get("kind", {}).get("const")
            title = f"{section}, kind: {kind}" if kind else section
            lines += ["", f"## {title}", "", part["description"], "", *make_table(part)]
    return "\n".join(lines) + "\n"


def find_parts(value: dict[str, Any], parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the objects that a key's schema refers to."""
    names = re.findall(r'"\$ref": "#/\$defs/(\w+)"', json.dumps(value))
    return [parts[name] for name in dict.fromkeys(names)]


def make_table(part: dict[str, Any]) -> list[str]:
    """Return the keys of one object as lines of a Markdown table."""
    lines = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
    for key, value in part["properties"].items():
        kind = show_type(value)
        default = f"`{json.dumps(value.get('default'))}`"
        if key in part.get("required", ()):
            default = "required"
        elif kind == SECTION:
            default = "its own defaults"
        cells = [f"`{key}`", kind, default, value.get("description", "")]
        escaped = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
        lines.append(f"| {' | '.join(escaped)} |")
    return lines


def show_type(value: dict[str, Any]) -> str:
    """Return the values that a key takes, in words."""
    if "$ref" in value or "discriminator" in value:
        return SECTION
    if "anyOf" in value:
        return " or ".join(show_type(choice) for choice in value["anyOf"])
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    shown = value.get("type", "any")
    if shown == "array":
        shown = f"list of {show_type(value.get('items', {}))}"
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    for name, words in bounds.items():
        if name in value:
            shown += f", {words} {value[name]}"
    return shown
