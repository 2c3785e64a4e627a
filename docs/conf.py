"""The site's configuration for Sphinx: `make docs`."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import generate  # noqa: E402

from lora_sentiment import __version__  # noqa: E402

project = "lora_sentiment"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "description"
html_theme = "furo"
html_title = f"lora_sentiment {version}"
html_copy_source = False
html_show_copyright = False


def move_links(app: Sphinx, docname: str, source: list[str]) -> None:
    """Let links to pages outside of docs/ lead to their copies."""
    source[0] = generate.move_links(source[0])


def refuse_external(app: Sphinx, exception: Exception | None) -> None:
    """Refuse pages that load a script, a style, a font or a picture from elsewhere.

    Raises:
        ExtensionError: Naming the page and the address.
    """
    if exception:
        return
    loading = r"<(?:script|img|iframe)[^>]*src=[\"'](?:https?:)?//[^\"']*"
    styles = r"<link[^>]*rel=[\"']stylesheet[\"'][^>]*href=[\"'](?:https?:)?//[^\"']*"
    in_styles = r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^\"')]*"
    external = re.compile(f"{loading}|{styles}|{in_styles}")
    for path in Path(app.outdir).rglob("*"):
        if path.suffix in (".html", ".css"):
            found = external.search(path.read_text(encoding="utf-8"))
            if found:
                raise ExtensionError(f"{path}: loads from elsewhere: {found[0]}")


def setup(app: Sphinx) -> None:
    """Write the generated pages before any page is read."""
    generate.generate()
    app.connect("source-read", move_links)
    app.connect("build-finished", refuse_external)
