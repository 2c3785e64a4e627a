"""Why a base or a data set could not be had from the Hub: what was asked, what answered, what to do."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from lora_sentiment.errors import did_you_mean
from lora_sentiment.hub import TIMEOUT, ask_hub, without_login

Kind = Literal["model", "dataset"]
_FILES = {"model": "config.json", "dataset": "README.md"}
"""A file that nearly every repository has: to ask for it tells a gated one, which the list of files does not."""
_NOUNS = {"model": "model", "dataset": "data set"}


@dataclass(frozen=True)
class _Answer:
    """What the Hub said of one repository.

    Attributes:
        status: HTTP status; None where nothing answered.
        code: The Hub's own word for the fault, such as `RepoNotFound`; may be empty.
        text: Status, reason and message, or what kept the request from being answered.
        commit: Of the repository; empty where none was named, as the Hub does with every file that it gives.
    """

    status: int | None
    code: str
    text: str
    commit: str = ""


def explain_refusal(*, key: str, name: str, kind: Kind, revision: str | None) -> str | None:
    """Ask the Hub once more, plainly, and say what it answers and what to do; None where it gives what is asked for.

    The clients' own errors tell a status from a dead connection only by their wording, which changes.

    Args:
        key: The recipe's key that names it: `data.source` or `model.name`.
        name: Name on the Hub.
        kind: What it is the name of.
        revision: Branch, tag or commit; None for the newest.
    """
    from huggingface_hub import constants

    found = _ask(name, kind, revision)
    gives = found.status is not None and found.status < 400
    if found.code == "EntryNotFound" or (gives and found.commit):
        return None
    asked = f"{key} {name!r}: "
    address = without_login(constants.ENDPOINT)
    if gives:
        return (
            f"{asked}{address} answered {found.text}, but not as the Hub does: a network's login page, a proxy or "
            f"another server stands there; log in to the network, or mend HF_ENDPOINT"
        )
    if found.status is None:
        instead = "name a folder" if kind == "model" else "name files"
        return (
            f"{asked}no Hub answers at {address} ({found.text}), and it is not in the cache; connect, set HF_ENDPOINT "
            f"to a mirror, or {instead}{_near(name, kind)}"
        )
    return f"{asked}{address} answered {found.text}: {_advice(found, key=key, name=name, kind=kind, revision=revision)}"


def innermost(error: BaseException) -> str:
    """Return the first line of the message of what an error comes from, which names the fault most closely."""
    while error.__cause__:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return without_login(lines[0] if lines else type(error).__name__)


def _ask(name: str, kind: Kind, revision: str | None) -> _Answer:
    from httpx2 import HTTPError, InvalidURL
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    if constants.is_offline_mode():
        return _Answer(None, "", ask_hub().text)
    prefix = "datasets/" if kind == "dataset" else ""
    path = f"{prefix}{quote(name)}/resolve/{quote(revision or 'main', safe='')}/{_FILES[kind]}"
    try:
        found = get_session().head(
            f"{constants.ENDPOINT}/{path}", headers=build_hf_headers(), timeout=TIMEOUT
        )
    except (HTTPError, InvalidURL, OSError, ValueError, ImportError) as error:
        return _Answer(None, "", without_login(f"{type(error).__name__}: {error}"))
    message = found.headers.get("X-Error-Message", "")
    text = " ".join(f"{found.status_code} {found.reason_phrase}".split()) + (
        f" ({message})" if message else ""
    )
    # A file may lie elsewhere, where nobody knows of commits: then the Hub named it when it sent us there.
    named = (answer.headers.get("X-Repo-Commit") for answer in (found, *found.history))
    return _Answer(
        found.status_code,
        found.headers.get("X-Error-Code", ""),
        text,
        next(filter(None, named), ""),
    )


def _advice(found: _Answer, *, key: str, name: str, kind: Kind, revision: str | None) -> str:
    from huggingface_hub import constants, get_token

    page = f"{without_login(constants.ENDPOINT)}/{'datasets/' if kind == 'dataset' else ''}{name}"
    login = "use another token" if get_token() else "log in (hf auth login, or HF_TOKEN)"
    if found.code == "RevisionNotFound":
        return f"it has no revision {revision!r}; mend {key.partition('.')[0]}.revision"
    if found.code == "GatedRepo":
        return f"it is gated; ask for access at {page}, then {login}"
    if found.status == 401 and found.code != "RepoNotFound":
        return f"it is private, or there is none of this name; check the name, or {login}{_near(name, kind)}"
    if found.status in (401, 404):
        what = _NOUNS[kind]
        return f"there is no {what} of this name, or it is private; check the name, or {login}{_near(name, kind)}"
    if found.status == 403:
        return f"you may not read it; ask its owner, or {login}"
    if found.status == 429 or (found.status or 0) >= 500:
        return "the Hub is busy or down; try again later, or set HF_ENDPOINT to a mirror"
    return f"look at {page}"


def _near(name: str, kind: Kind) -> str:
    """Return `; did you mean ..?` for the cached name that is closest."""
    known = sorted(_cached_names(kind))
    # Names that lost their owner, as `imdb` of `stanfordnlp/imdb`, are far from it in letters.
    same = [other for other in known if other.rpartition("/")[2] == name.rpartition("/")[2]]
    hint = did_you_mean(name, same or known) or (f"; did you mean {same[0]!r}?" if same else "")
    return hint and f"{hint} (that is in the cache)"


def _cached_names(kind: Kind) -> Iterator[str]:
    from huggingface_hub import constants

    for folder in Path(constants.HF_HUB_CACHE).glob(f"{kind}s--*"):
        yield folder.name.removeprefix(f"{kind}s--").replace("--", "/", 1)
