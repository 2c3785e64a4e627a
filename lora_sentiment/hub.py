"""The Hub's client: whether the Hub answers, and how to go on with the cache alone when it does not."""

import logging
import re
import ssl
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("lora_sentiment")

TIMEOUT = 10.0
"""Seconds that the Hub is given to answer once; its client would try six times for every file."""


@dataclass(frozen=True)
class Answer:
    """What came back from the Hub's address.

    Attributes:
        status: HTTP status; None where nothing answered.
        text: Status and reason, or what kept the request from being answered; logins are left out.
        mistaken: True where not the network is at fault but what this machine is told of it: an address, a proxy that
            refuses, a certificate.
    """

    status: int | None
    text: str
    mistaken: bool = False


_unanswered: Answer | None = None
"""What made this process stop asking; None where it did not, so that only HF_HUB_OFFLINE can keep it from asking."""
_UNREACHED = re.compile(r"5\d\d\b|Proxy Server could not connect")
"""How a proxy says that it was asked well and did not reach the address."""


def is_hub_name(name: str) -> bool:
    """Return whether a base's name is one of the Hub rather than of a folder here."""
    return not name.startswith((".", "/", "~")) and not Path(name).is_dir()


def ask_hub(timeout: float = TIMEOUT) -> Answer:
    """Ask the Hub's address for its front page, once.

    Args:
        timeout: Seconds for each of connecting and answering.
    """
    from httpx2 import HTTPError, InvalidURL
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return _unanswered or Answer(None, "offline mode is on (HF_HUB_OFFLINE)")
    try:
        found = get_session().head(constants.ENDPOINT, timeout=timeout)
    # A file of certificates that is none is an OSError. The last two are how proxies fail that have no port number, no
    # known scheme, or need a package for SOCKS.
    except (HTTPError, InvalidURL, OSError, ValueError, ImportError) as error:
        text = without_login(f"{type(error).__name__}: {error}")
        return Answer(None, text, mistaken=not _is_dead_network(error))
    return Answer(found.status_code, f"{found.status_code} {found.reason_phrase}".strip())


def _is_dead_network(error: BaseException) -> bool:
    """Return whether a request failed because a connection did, or nothing came in time."""
    from httpx2 import NetworkError, ProxyError, RemoteProtocolError, TimeoutException

    if isinstance(error, ProxyError):
        return _UNREACHED.match(str(error)) is not None
    cause: BaseException | None = error
    while cause and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__
    # A certificate that is not trusted is an answer, if not the Hub's.
    return (
        isinstance(error, NetworkError | TimeoutException | RemoteProtocolError) and cause is None
    )


def rely_on_cache(answer: Answer) -> None:
    """Keep the Hub's clients of this process from asking: each file would cost half a minute of retries.

    Args:
        answer: Why; `ask_hub` says it again from now on.
    """
    global _unanswered
    import datasets
    from huggingface_hub import constants

    if not constants.is_offline_mode():
        _unanswered = answer
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def ask_or_rely_on_cache() -> None:
    """Ask the Hub before its clients do; where nothing answers, say so and go on with the cache alone."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return
    answer = ask_hub()
    if answer.status is None:
        log.warning("no Hub answers (%s): only what is in the cache is used", answer.text)
        rely_on_cache(answer)


def without_login(text: str) -> str:
    """Return an address or message without user names and passwords."""
    return re.sub(r"//\S*@", "//", text)
