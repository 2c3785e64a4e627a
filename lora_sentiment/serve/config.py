"""Settings of a server: the address, the adapters and the limits."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, model_validator

from lora_sentiment.errors import RecipeError, did_you_mean
from lora_sentiment.recipe.section import Section

MIN_KEY_LENGTH = 16
"""Characters of the shortest key. A shorter one can be guessed over a network."""
Seconds = Annotated[float, Field(gt=0, le=3600)]


class Limits(Section):
    """Limits for one client, and for all clients together."""

    max_body_bytes: int = Field(default=2**20, ge=1024)
    """Bytes of a request's body."""
    max_texts: int = Field(default=128, ge=1)
    """Texts of a request."""
    on_long: Literal["truncate", "refuse"] = "truncate"
    """Treatment of a text with more tokens than its adapter reads: cut as in training, or
    refused."""
    max_explained_words: int = Field(default=256, ge=1)
    """Words of an explained text. The model runs once more for each word."""
    max_queue_tokens: int = Field(default=131_072, ge=512)
    """Tokens that wait to be computed, over all requests."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Tokens that are computed together, over all adapters."""
    batch_wait_ms: float = Field(default=3.0, ge=0, le=60_000)
    """Milliseconds that the first text of a batch waits for others."""
    deadline_seconds: Seconds = 30.0
    """Seconds from a request's last byte to its answer."""
    header_seconds: Seconds = 10.0
    """Seconds that a connection may stay open without a whole request header, or with an answer
    that is not read."""
    body_seconds: Seconds = 10.0
    """Seconds that a body may take to arrive."""
    max_requests: int = Field(default=128, ge=1)
    """Predictions in progress, including those whose body is still arriving."""
    max_connections: int = Field(default=512, ge=1)
    """Open connections. Further ones are closed without an answer."""
    stop_seconds: Seconds = 30.0
    """Seconds that a stopping server takes to answer the queued requests."""


class ServeConfig(Section):
    """Settings of one server."""

    adapters: tuple[Path, ...] = ()
    """Adapter folders."""
    watch: Path | None = None
    """A folder. The finished adapter folders in it are served as long as they are there."""
    host: str = "127.0.0.1"
    """Address to listen on. Any address but loopback needs a key."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on. 0 takes a free one."""
    base: str | None = None
    """Hub name or folder of the base, instead of the one that the first adapter names."""
    dtype: str = "auto"
    """Compute dtype: auto, float32, bfloat16 or float16."""
    api_key: SecretStr | None = None
    """Key that a request must send as `Authorization: Bearer KEY`."""
    no_api_key: bool = False
    """Whether the server may listen on any address without a key."""
    access_log: bool = True
    """Whether each request is logged: method, route, status, time."""
    limits: Limits = Limits()
    """Limits."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.adapters and self.watch is None:
            raise ValueError("name adapter folders, or a folder to --watch")
        if self.api_key and self.no_api_key:
            raise ValueError("found both --api-key-file and --no-api-key; remove one of them")
        return self


def make_config(
    limits: list[str], *, api_key_file: Path | None = None, **values: Any
) -> ServeConfig:
    """Make the settings from command-line options.

    Args:
        limits: `NAME=VALUE` for each limit that differs from its default.
        api_key_file: A file that holds the key.
        values: Fields of `ServeConfig`.

    Raises:
        RecipeError: For a limit or value that is not allowed, or a file that holds no key.
    """
    names = list(Limits.model_fields)
    given = {}
    for limit in limits:
        name, equals, value = limit.partition("=")
        if not equals or name not in names:
            raise RecipeError(
                f"serve: --limit {limit!r}: expected NAME=VALUE{did_you_mean(name, names)} (names: "
                f"{', '.join(names)})"
            )
        given[name] = value
    if api_key_file:
        values["api_key"] = read_key(api_key_file)
    try:
        # Not strict: the values are strings.
        return ServeConfig(limits=Limits.model_validate(given, strict=False), **values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        place = [str(name) for name in first["loc"]]
        raise RecipeError(": ".join(["serve", *place, message])) from error


def show_limits() -> str:
    """Return the limits and their defaults for the command line's help."""
    limits = [f"{name}={field.default}" for name, field in Limits.model_fields.items()]
    return f"Set a limit. May be given several times. Defaults: {', '.join(limits)}"


def read_key(path: Path) -> SecretStr:
    """Read a bearer key: one line of printable ASCII without blanks.

    Raises:
        RecipeError: If the file cannot be read, or does not hold such a line.
    """
    try:
        text = path.read_text(encoding="ascii").strip("\r\n")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"--api-key-file: {path}: cannot be read: holds more than ASCII"
        ) from error
    except OSError as error:
        raise RecipeError(f"--api-key-file: {path}: cannot be read: {error.strerror}") from error
    # Printable ASCII without the blank lies between "!" and "~".
    if len(text) < MIN_KEY_LENGTH or min(text) < "!" or max(text) > "~":
        raise RecipeError(
            f"--api-key-file: {path}: needs one line of {MIN_KEY_LENGTH} or more printable "
            "characters without blanks, as `openssl rand -hex 32` prints"
        )
    return SecretStr(text)
