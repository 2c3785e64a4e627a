"""The Hub: ask it, work from the cache alone, and explain why it refuses a repository."""

import logging
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx2
from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_session,
    get_token,
    hf_hub_url,
    is_offline_mode,
    set_client_factory,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lora_sentiment.errors import did_you_mean

log = logging.getLogger("lora_sentiment")

TIMEOUT = 10.0
"""Seconds for each of connecting and answering. The Hub's clients retry each file for half a
minute."""
Kind = Literal["model", "dataset"]
# An unreadable certificate file is an OSError. A proxy setting without a port number, with an
# unknown scheme or for SOCKS without its package is one of the last two.
_NO_ANSWER = (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, ImportError)
_PROXY_REACHED_NOTHING = re.compile(r"5\d\d\b|Proxy Server could not connect")
_KNOWN_FILES = {"model": "config.json", "dataset": "README.md"}
"""A file that nearly every repository has. A gated repository lists its files, but refuses this
one."""


@dataclass(frozen=True)
class Answer:
    """The answer of the Hub's address.

    Attributes:
        status: HTTP status, or None without an answer.
        text: Status and reason, or why there is no answer. Logins are left out.
        mistaken: True if this machine's settings (address, proxy or certificates) are at fault, not
            the network.
    """

    status: int | None
    text: str
    mistaken: bool = False


_no_answer: Answer | None = None
"""The answer that made this process use the cache alone, or None."""


def is_hub_name(name: str) -> bool:
    """Return whether a base's name is a Hub name, not a folder on this machine."""
    return not name.startswith((".", "/", "~")) and not Path(name).is_dir()


def ask_hub(timeout: float = TIMEOUT) -> Answer:
    """Ask the Hub's address for its front page, once.

    Args:
        timeout: Seconds for each of connecting and answering.
    """
    if _no_answer is not None:
        return _no_answer
    if is_offline_mode():
        return Answer(None, "offline mode is on (HF_HUB_OFFLINE)")
    try:
        response = get_session().head(constants.ENDPOINT, timeout=timeout)
    except _NO_ANSWER as error:
        text = without_login(f"{type(error).__name__}: {error}")
        return Answer(None, text, mistaken=not _is_dead_network(error))
    return Answer(response.status_code, f"{response.status_code} {response.reason_phrase}".strip())


def use_cache_only(answer: Answer) -> None:
    """Let every request of the Hub's clients in this process fail at once: they use the cache then.

    Args:
        answer: Why. `ask_hub` repeats it from now on.
    """
    global _no_answer
    if is_offline_mode():
        return  # the clients use the cache alone already
    _no_answer = answer

    def refuse(_: httpx2.Request) -> httpx2.Response:
        raise OfflineModeIsEnabled(answer.text)

    # This client opens no connection. It reads neither proxies nor certificates, which may be at
    # fault.
    transport = httpx2.MockTransport(refuse)
    set_client_factory(lambda: httpx2.Client(transport=transport, trust_env=False))


def prepare_hub() -> None:
    """Ask the Hub once before its clients do. Without an answer, warn and use the cache alone."""
    if is_offline_mode() or _no_answer is not None:
        return
    answer = ask_hub()
    if answer.status is None:
        log.warning("no Hub answers (%s): only the cache is used", answer.text)
        use_cache_only(answer)


def explain_refusal(*, key: str, name: str, kind: Kind, revision: str | None) -> str | None:
    """Ask the Hub for one file of a repository, and say why it is refused and what to do.

    `datasets` hides the Hub's own error, so the Hub is asked again.

    Args:
        key: The recipe key of the repository: `data.source` or `model.name`.
        name: Name on the Hub.
        kind: Kind of the repository.
        revision: Branch, tag or commit; None for the newest.

    Returns:
        One line that begins with the name, or None if the Hub gives the repository.
    """
    address = without_login(constants.ENDPOINT)
    try:
        url = hf_hub_url(name, _KNOWN_FILES[kind], repo_type=kind, revision=revision)
        commit = get_hf_file_metadata(url, timeout=TIMEOUT).commit_hash
    except (EntryNotFoundError, HFValidationError):
        return None
    except HfHubHTTPError as error:
        status = f"{error.response.status_code} {error.response.reason_phrase}".strip()
        if error.server_message:
            status += f" ({' '.join(error.server_message.split())})"
        advice = _advise(error, key=key, name=name, kind=kind, revision=revision)
        return f"{name!r}: {address} answered {status}: {advice}"
    except _NO_ANSWER as error:
        # In offline mode the error is a sentence of the client, or of `use_cache_only`.
        offline = isinstance(error, OfflineModeIsEnabled)
        reason = ask_hub().text if offline else without_login(f"{type(error).__name__}: {error}")
        instead = "name a folder" if kind == "model" else "name files"
        return (
            f"{name!r}: no Hub answers at {address} ({reason}), and it is not in the cache; "
            f"connect, set HF_ENDPOINT to a mirror, or {instead}{_suggest_cached(name, kind)}"
        )
    if commit:
        return None
    return (
        f"{name!r}: {address} answered, but not as the Hub does: a network's login page, a proxy "
        "or another server stands there; log in to the network, or correct HF_ENDPOINT"
    )


def innermost(error: BaseException) -> str:
    """Return the first line of the message of an error's first cause."""
    while error.__cause__:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return without_login(lines[0] if lines else type(error).__name__)


def without_login(text: str) -> str:
    """Return an address or message without user names and passwords."""
    return re.sub(r"//\S*@", "//", text)


def _is_dead_network(error: BaseException) -> bool:
    """Return whether the network made a request fail, not this machine's settings."""
    if isinstance(error, httpx2.ProxyError):
        return _PROXY_REACHED_NOTHING.match(str(error)) is not None
    # A certificate that is not trusted is an answer, but not the Hub's.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return False
        cause = cause.__cause__
    dead = (httpx2.NetworkError, httpx2.TimeoutException, httpx2.RemoteProtocolError)
    return isinstance(error, dead)


def _advise(error: HfHubHTTPError, *, key: str, name: str, kind: Kind, revision: str | None) -> str:
    """Say what to do about a refusal."""
    prefix = "datasets/" if kind == "dataset" else ""
    page = f"{without_login(constants.ENDPOINT)}/{prefix}{name}"
    login = "use another token" if get_token() else "log in (hf auth login, or HF_TOKEN)"
    status = error.response.status_code
    if isinstance(error, RevisionNotFoundError):
        section = key.partition(".")[0]
        return f"it has no revision {revision!r}; correct {section}.revision"
    if isinstance(error, GatedRepoError):
        return f"it is gated; ask for access at {page}, then {login}"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        noun = "data set" if kind == "dataset" else "model"
        advice = f"check the name, or {login}{_suggest_cached(name, kind)}"
        return f"there is no {noun} of this name, or it is private; {advice}"
    if status == 403:
        return f"you may not read it; ask its owner, or {login}"
    if status == 429 or status >= 500:
        return "the Hub is busy or down; try again later, or set HF_ENDPOINT to a mirror"
    return f"look at {page}"


def _suggest_cached(name: str, kind: Kind) -> str:
    """Return `; did you mean ..?` for the closest name in the cache, or an empty string."""
    folders = Path(constants.HF_HUB_CACHE).glob(f"{kind}s--*")
    cached = sorted(
        folder.name.removeprefix(f"{kind}s--").replace("--", "/", 1) for folder in folders
    )
    # A name without its owner, as `imdb` for `stanfordnlp/imdb`, is not close in letters.
    same_end = [other for other in cached if other.rpartition("/")[2] == name.rpartition("/")[2]]
    hint = did_you_mean(name, same_end or cached)
    if not hint and same_end:
        hint = f"; did you mean {same_end[0]!r}?"
    return f"{hint} (that is in the cache)" if hint else ""
