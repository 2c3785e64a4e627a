"""Send a folder to the Hub: only verified files that this package wrote, and the model card."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lora_sentiment import bundled
from lora_sentiment.adapter.folder import Card, load_card
from lora_sentiment.adapter.merge_record import (
    LENGTH_CONFIG,
    TOKENIZER,
    MergeRecord,
    check_merge_record,
    read_merge_record,
)
from lora_sentiment.adapter.peft_file import PEFT_CONFIG
from lora_sentiment.adapter.predictions import PREDICTIONS
from lora_sentiment.adapter.report_page import REPORT_PAGE
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
    REPORT_PAGE,
    "card.json",
    "report.json",
    "recipe.yaml",
    "training.png",
    "confusion.png",
    "labels.png",
    "values.png",
}
MODEL_FILES = SHARED_FILES | {
    "config.json",
    LENGTH_CONFIG,
    "model.safetensors",
    "onnx/model.onnx",
    "onnx/model_quantized.onnx",
}
_FOLDERS = {"onnx"}
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_ADVICE = {
    401: "sign in with `hf auth login`, or set HF_TOKEN, with a token that may write",
    403: "the token may not write there; use one with write access to that owner, and check the "
    "owner's name",
    404: "there is no such owner, or the token may not see the repository",
    413: "a file is larger than the Hub takes",
    429: "asked too often; wait a few minutes and push again",
}


@dataclass(frozen=True)
class Pushed:
    """A folder that was sent to the Hub, or would be sent without `dry_run`.

    Attributes:
        files: Name and size in bytes of each file.
        card: The model card, which becomes README.md.
        url: Address of the repository.
        notes: What the sender should know, one sentence each.
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
        folder: A folder that this package wrote. An unknown file in it is refused, so that no text
            of a person leaves by accident.
        name: OWNER/NAME on the Hub. A new repository is made if there is none.
        private: Refuse a public repository, and make a new one private. Otherwise its owner's
            settings decide on a new one; the default is public.
        dry_run: Do everything, but do not ask the Hub.
        token: A token in place of the one that `hf auth login` stored.

    Raises:
        AdapterError: If the folder is none of these, holds other files, or was altered.
        ModelError: If the name is not valid, or the Hub refuses or cannot be reached.
    """
    _check_name(name)
    card = load_card(folder) if (folder / "card.json").is_file() else None
    if card:
        base = card.base.name
        files = _list_files(folder, ADAPTER_FILES, recorded=set(card.files))
        check_files(folder, card.files)
    else:
        record = _read_record(folder)
        base = record.base
        files = _list_files(folder, MODEL_FILES, recorded={*record.files, *TOKENIZER})
        check_merge_record(folder, record)
    readme = _make_readme(folder, name)
    contents: dict[str, Path | bytes] = {file: folder / file for file in files}
    contents["README.md"] = readme.encode()
    api = HfApi(token=token)
    if not dry_run:
        _send(api, name, contents, private=private)
    sizes = []
    for file, content in contents.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        sizes.append((file, size))
    notes = _make_notes(name, card, base, readme)
    return Pushed(sizes, readme, f"{api.endpoint}/{name}", notes)


def _check_name(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ModelError(
            f"{name!r} is no name on the Hub: {_one_line(error)}; give OWNER/NAME"
        ) from error
    if "/" not in name:
        raise ModelError(
            f"{name!r} names no owner; give OWNER/NAME, with your name or an organisation's"
        )


def _read_record(folder: Path) -> MergeRecord:
    """Return the record of a merged or exported model."""
    record = read_merge_record(folder) if (folder / "config.json").is_file() else None
    if record is None:
        raise AdapterError(
            f"{folder}: is nothing that this package made and verified: there is neither card.json "
            "(an adapter) nor a config.json with a lora_sentiment record (a merged or exported "
            "model); `hf upload` sends any folder"
        )
    return record


def _list_files(folder: Path, known: frozenset[str], *, recorded: set[str]) -> list[str]:
    """Return the names of a folder's files.

    Raises:
        AdapterError: If a file is unknown, or decides an answer and has no recorded hash.
    """
    names, unknown = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        # A linked folder is not walked, so it is refused by its own name.
        if name in _FOLDERS and path.is_dir() and not path.is_symlink():
            continue
        if name in known and path.is_file():
            names.append(name)
        else:
            unknown.append(name)
    if unknown:
        raise AdapterError(
            f"{folder}: holds {', '.join(unknown)}, which this package did not write and so does "
            "not send; move it elsewhere"
        )
    loose = [
        name
        for name in names
        if name.endswith((".safetensors", ".onnx", "tokenizer.json"))
        and name not in recorded
        and name != PREDICTIONS
    ]
    if loose:
        raise AdapterError(
            f"{folder}: {', '.join(loose)} was put in after it was saved (no hash of it is "
            "recorded)"
        )
    return names


def _make_readme(folder: Path, name: str) -> str:
    """Return the folder's model card, whose code loads the model by its name on the Hub.

    The card is not rendered anew, because a person may have edited it.
    """
    path = folder / "README.md"
    if not path.is_file():
        raise AdapterError(f"{path}: is missing; copy the whole folder")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path}: is no text in UTF-8: {error}") from error
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    own = {folder.resolve().name, str(folder)}
    if heading:
        own.add(heading[1])
    names = "|".join(map(re.escape, sorted(own, key=len, reverse=True)))
    use = re.compile(rf"""(?P<before>["']|lora-sentiment \w+ )(?:\./)?(?:{names})(?=["'\s/])""")
    text = _CODE.sub(lambda block: use.sub(lambda found: found["before"] + name, block[0]), text)
    # This package loads folders, so its examples download one first.
    download = f"hf download {name} --local-dir {name}"
    text = text.replace("```sh\nlora-sentiment", f"```sh\n{download}\nlora-sentiment")
    python = "```python\nimport lora_sentiment"
    return text.replace(python, f"```python\n# {download}\nimport lora_sentiment")


def _make_notes(name: str, card: Card | None, base: str, readme: str) -> list[str]:
    notes = []
    if not any(name in block for block in _CODE.findall(readme)):
        notes.append(f"README.md has no code that uses the model as {name}")
    if Path(base).is_absolute():
        who = "whoever loads the adapter names theirs with --base; " if card else ""
        notes.append(f"the base was a folder of this machine: {who}its path {base} is in the files")
    source = card.data.config.source if card else bundled.NAME
    if str(source) not in bundled.SOURCES and not is_on_hub(source):
        notes.append(
            f"the data were files of this machine: their paths {source} are in the files, but none "
            "of their text"
        )
    return notes


def _send(api: HfApi, name: str, contents: Mapping[str, Path | bytes], *, private: bool) -> None:
    """Make the repository if there is none, check its files, and send everything in one commit."""
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        repository = api.model_info(name)
        if private and not repository.private:
            raise ModelError(
                f"{name} is on the Hub already and is public, but --private was given; nothing was "
                "sent: make it private in its settings, or give another name"
            )
        held = {file.rfilename for file in repository.siblings or ()}
        stale = sorted((held & (ADAPTER_FILES | MODEL_FILES)) - set(contents))
        if stale:
            raise ModelError(
                f"{name} holds {', '.join(stale)} of another model, which would stay beside this "
                "one; nothing was sent: delete them there, or give another name"
            )
        # `upload_folder` may send several commits, and cannot send the changed README.md with them.
        operations = [CommitOperationAdd(file, content) for file, content in contents.items()]
        api.create_commit(
            name,
            operations,
            commit_message="Push from lora_sentiment",
            parent_commit=repository.sha,
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = _ADVICE.get(status) or _one_line(error.server_message or error)
        if status >= 500:
            advice = "push again later"
        raise ModelError(
            f"{name}: the Hub ({api.endpoint}) refused with status {status}: {advice}"
        ) from error
    except OfflineModeIsEnabled as error:
        raise ModelError(f"{name}: offline mode is on; unset HF_HUB_OFFLINE to push") from error
    except httpx2.HTTPError as error:
        raise ModelError(
            f"{name}: cannot reach {api.endpoint} ({_one_line(error)}); check the network, then "
            "push again"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{name}: could not be sent to {api.endpoint}: {_one_line(error)}"
        ) from error


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
