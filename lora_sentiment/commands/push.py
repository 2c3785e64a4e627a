"""From a folder to the Hub: only files that this package wrote, verified, under a model card that names the Hub."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

# What the HTTP client below the Hub's raises without a network, whichever client that is.
from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lora_sentiment import bundled
from lora_sentiment.adapter.folder import Card, load_card
from lora_sentiment.adapter.merge_record import read_merge_record
from lora_sentiment.adapter.peft_file import PEFT_CONFIG
from lora_sentiment.adapter.predictions import PREDICTIONS
from lora_sentiment.adapter.safe_files import check_files
from lora_sentiment.adapter.weights import CHANGED_WEIGHTS, PEFT_WEIGHTS
from lora_sentiment.data.sources import is_on_hub
from lora_sentiment.errors import AdapterError, ModelError

SHARED_FILES = frozenset({"README.md", "tokenizer.json", "tokenizer_config.json"})
ADAPTER_FILES = SHARED_FILES | {
    PEFT_WEIGHTS,
    PEFT_CONFIG,
    CHANGED_WEIGHTS,
    PREDICTIONS,
    "card.json",
    "report.json",
    "recipe.yaml",
    "training.png",
    "confusion.png",
}
MODEL_FILES = SHARED_FILES | {
    "config.json",
    "model.safetensors",
    "onnx/model.onnx",
    "onnx/model_quantized.onnx",
}
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_ADVICE = {
    401: "sign in with `hf auth login`, or set HF_TOKEN, with a token that may write",
    403: "the token may not write there; use one with write access to that owner, and check the owner's name",
    404: "there is no such owner, or the token may not see the repository",
    413: "a file is larger than the Hub takes",
    429: "asked too often; wait a few minutes and push again",
}


@dataclass(frozen=True)
class Pushed:
    """What was sent to the Hub, or would have been.

    Attributes:
        files: Name and size in bytes of each.
        card: The model card, which goes as README.md.
        url: Where it stands.
        notes: What whoever sends it should know, one sentence each.
    """

    files: list[tuple[str, int]]
    card: str
    url: str
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON."""
        return asdict(self)


def push(
    folder: Path,
    name: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    token: str | None = None,
) -> Pushed:
    """Send an adapter, a merged or an exported model to the Hub, in one commit.

    Args:
        folder: One that this package wrote; a file in it that the package does not know is refused, so that no text
            of anyone leaves by accident.
        name: OWNER/NAME on the Hub; the repository is made where there is none.
        private: Refuse a repository that all can see, and make a new one private; otherwise a new one is what its
            owner's settings say, public by default.
        dry_run: Do everything but ask the Hub.
        token: Instead of the one that `hf auth login` stored.

    Raises:
        AdapterError: If the folder is none of these, holds other files, or was altered.
        ModelError: If the name is none, or the Hub refuses or cannot be reached.
    """
    _check_name(name)
    card = load_card(folder) if (folder / "card.json").is_file() else None
    recorded, base = (card.files, card.base.name) if card else _read_recorded(folder)
    files = _list_files(folder, ADAPTER_FILES if card else MODEL_FILES, recorded)
    check_files(folder, recorded)
    readme = _make_readme(folder, name)
    contents = {file: folder / file for file in files} | {"README.md": readme.encode()}
    api = HfApi(token=token)
    if not dry_run:
        _send(api, name, contents, private=private)
    sizes = [
        (file, len(c) if isinstance(c, bytes) else c.stat().st_size) for file, c in contents.items()
    ]
    return Pushed(sizes, readme, f"{api.endpoint}/{name}", _make_notes(name, card, base, readme))


def _check_name(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ModelError(
            f"{name!r} is no name on the Hub: {_one_line(error)}; give OWNER/NAME"
        ) from error
    if "/" not in name:
        raise ModelError(
            f"{name!r} names no owner; give OWNER/NAME, OWNER being you or an organisation"
        )


def _read_recorded(folder: Path) -> tuple[dict[str, str], str]:
    """Return the recorded hashes and the base's name of a merged or exported model."""
    record = read_merge_record(folder) if (folder / "config.json").is_file() else None
    if record is None:
        raise AdapterError(
            f"{folder}: is nothing that this package made and verified: there is neither card.json (an adapter) nor a "
            "config.json with a lora_sentiment record (a merged or exported model); `hf upload` sends any folder"
        )
    return record.files, record.base


def _list_files(folder: Path, known: frozenset[str], recorded: Mapping[str, str]) -> list[str]:
    """Return the names of a folder's files, all of them known and all that decide an answer recorded."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    # A folder is sent by its files; one that is linked to is not walked, so it is refused by its own name.
    folders = {str(parent) for name in known for parent in Path(name).parents} - {"."}
    names = [
        name
        for name, path in paths.items()
        if not (name in folders and path.is_dir() and not path.is_symlink())
    ]
    if unknown := [name for name in names if name not in known or not paths[name].is_file()]:
        raise AdapterError(
            f"{folder}: holds {', '.join(unknown)}, which this package did not write and so does not send; move "
            f"{'it' if len(unknown) == 1 else 'them'} elsewhere"
        )
    decisive = [
        name
        for name in names
        if name.endswith((".safetensors", ".onnx")) or name == "tokenizer.json"
    ]
    if loose := [name for name in decisive if name not in recorded and name != PREDICTIONS]:
        raise AdapterError(
            f"{folder}: {', '.join(loose)} was put in after it was saved (no hash of it is recorded)"
        )
    return names


def _make_readme(folder: Path, name: str) -> str:
    """Return the folder's model card with its name on the Hub wherever code loads the model; the rest stays.

    It is not rendered anew: what was written into it by hand would be lost.
    """
    path = folder / "README.md"
    if not path.is_file():
        raise AdapterError(f"{path}: is missing; copy the whole folder")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path}: is no text in UTF-8: {error}") from error
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    own = {folder.resolve().name, str(folder), *([heading[1]] if heading else [])}
    names = "|".join(map(re.escape, sorted(own, key=len, reverse=True)))
    use = re.compile(rf"""(?P<before>["']|lora-sentiment \w+ )(?:{names})(?=["'\s/])""")
    text = _CODE.sub(lambda block: use.sub(lambda found: found["before"] + name, block[0]), text)
    # This package itself loads folders.
    for fence, own_use, comment in (
        ("```sh\n", "lora-sentiment", ""),
        ("```python\n", "import lora_sentiment", "# "),
    ):
        text = text.replace(
            fence + own_use, f"{fence}{comment}hf download {name} --local-dir {name}\n{own_use}"
        )
    return text


def _make_notes(name: str, card: Card | None, base: str, readme: str) -> list[str]:
    notes = []
    if not any(name in block for block in _CODE.findall(readme)):
        notes.append(f"README.md has no code that uses the model as {name}")
    if Path(base).is_absolute():
        who = "whoever loads the adapter names theirs with --base; " if card else ""
        notes.append(f"the base was a folder of this machine: {who}its path {base} is told")
    source = card.data.config.source if card else ""
    if card and source != bundled.NAME and not is_on_hub(source):
        notes.append(
            f"the data were files of this machine: their paths {source} are told, none of their text"
        )
    return notes


def _send(api: HfApi, name: str, contents: Mapping[str, Path | bytes], *, private: bool) -> None:
    """Make the repository where there is none, look at what it holds, and send everything in one commit."""
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        found = api.model_info(name)
        if private and not found.private:
            raise ModelError(
                f"{name} is on the Hub already and all can see it, but private was asked; nothing was sent: make it "
                "private in its settings, or give another name"
            )
        held = {file.rfilename for file in found.siblings or ()}
        if stale := sorted((held & (ADAPTER_FILES | MODEL_FILES)) - set(contents)):
            raise ModelError(
                f"{name} holds {', '.join(stale)} of another model, which would stay beside this one; nothing was "
                "sent: delete them there, or give another name"
            )
        # Not upload_folder: that may send a folder in several commits, and takes names for patterns.
        operations = [CommitOperationAdd(file, content) for file, content in contents.items()]
        api.create_commit(
            name, operations, commit_message="Push from lora_sentiment", parent_commit=found.sha
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = _ADVICE.get(
            status,
            "push again later" if status >= 500 else _one_line(error.server_message or error),
        )
        raise ModelError(
            f"{name}: the Hub ({api.endpoint}) refused with status {status}: {advice}"
        ) from error
    except OfflineModeIsEnabled as error:
        raise ModelError(f"{name}: offline mode is on; unset HF_HUB_OFFLINE to push") from error
    except NetworkError as error:
        raise ModelError(
            f"{name}: cannot reach {api.endpoint} ({_one_line(error)}); check the network, then push again"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{name}: could not be sent to {api.endpoint}: {_one_line(error)}"
        ) from error


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
