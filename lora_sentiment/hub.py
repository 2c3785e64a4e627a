"""The Hub's client: whether the Hub answers, and how to go on with the cache alone when it does not."""

import re
from dataclasses import dataclass

TIMEOUT = 10.0
"""Seconds that the Hub is given to answer once; its client would try six times for every file."""


@dataclass(frozen=True)
class Answer:
    """What came back from the Hub's address.

    Attributes:
        status: HTTP status; None where nothing answered.
        text: Status and reason, or what kept the request from being answered; logins are left out.
        mistaken: True where the address or the proxy's is wrong in itself, so that nothing could be asked.
    """

    status: int | None
    text: str
    mistaken: bool = False


def ask_hub(timeout: float = TIMEOUT) -> Answer:
    """Ask the Hub's address for its front page, once.

    Args:
        timeout: Seconds for each of connecting and answering.
    """
    from httpx2 import HTTPError, InvalidURL, UnsupportedProtocol
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return Answer(None, "offline mode is on (HF_HUB_OFFLINE)")
    try:
        found = get_session().head(constants.ENDPOINT, timeout=timeout)
    # The last two are how proxies fail that have no port number, no known scheme, or need a package for SOCKS.
    except (UnsupportedProtocol, InvalidURL, ValueError, ImportError) as error:
        return Answer(None, without_login(f"{type(error).__name__}: {error}"), mistaken=True)
    except (HTTPError, OSError) as error:
        return Answer(None, without_login(f"{type(error).__name__}: {error}"))
    return Answer(found.status_code, f"{found.status_code} {found.reason_phrase}".strip())


def rely_on_cache() -> None:
    """Keep the Hub's clients of this process from asking: each file would cost half a minute of retries."""
    import datasets
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def without_login(text: str) -> str:
    """Return an address or message without user names and passwords."""
    return re.sub(r"//\S*@", "//", text)
