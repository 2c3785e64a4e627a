"""What a server may be told: where it listens, what it serves, and every limit that it keeps."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, model_validator

from lora_sentiment.errors import RecipeError, did_you_mean
from lora_sentiment.recipe.section import Section

MIN_KEY_LENGTH = 16
"""Characters of the shortest key: what is shorter can be guessed over a network."""
Seconds = Annotated[float, Field(gt=0, le=3600)]


class Limits(Section):
    """What one client, or all of them together, may ask for."""

    max_body_bytes: int = Field(default=2**20, ge=1024)
    """Bytes of a request's body."""
    max_texts: int = Field(default=128, ge=1)
    """Texts of a request."""
    on_long: Literal["truncate", "refuse"] = "truncate"
    """What is done with a text of more tokens than its adapter reads: cut as in training and told, or refused."""
    max_explained_texts: int = Field(default=4, ge=1)
    """Texts of a request that asks for explanations."""
    max_explained_words: int = Field(default=256, ge=1)
    """Words of an explained text: the model is asked once more for each."""
    max_explained_characters: int = Field(default=10_000, ge=1)
    """Characters of an explained text: it is read again for each of its words."""
    max_reread_characters: int = Field(default=2**21, ge=1)
    """Characters read for the explanations of a request: each text once, and again without each of its words."""
    max_reading_characters: int = Field(default=2**22, ge=1)
    """Characters that wait to be tokenised, over all requests; one request alone may be longer."""
    max_queue_tokens: int = Field(default=131_072, ge=512)
    """Tokens that wait to be computed, over all requests."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Tokens that are computed together, over all adapters."""
    batch_wait_ms: float = Field(default=3.0, ge=0, le=60_000)
    """Milliseconds that the first text of a batch waits for others."""
    deadline_seconds: Seconds = 30.0
    """Seconds from a request's last byte to its answer."""
    header_seconds: Seconds = 10.0
    """Seconds that a connection may stay open without a whole request header, or with an answer that is not read."""
    body_seconds: Seconds = 10.0
    """Seconds that a body may take to arrive."""
    max_requests: int = Field(default=128, ge=1)
    """Predictions under way at once, those whose body is still arriving among them."""
    max_connections: int = Field(default=512, ge=1)
    """Connections open at once; further ones are closed without an answer."""
    stop_seconds: Seconds = 30.0
    """Seconds that a stopping server takes to finish what is queued."""
    watch_seconds: Seconds = 2.0
    """Seconds between two looks at the watched folder."""


class ServeConfig(Section):
    """One server."""

    adapters: tuple[Path, ...] = ()
    """Adapter folders."""
    watch: Path | None = None
    """A folder whose finished adapter folders are served as long as they are there."""
    host: str = "127.0.0.1"
    """Address to listen on; any but loopback needs a key."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    base: str | None = None
    """Where to find the base, if not where the first adapter says."""
    dtype: str = "auto"
    """Compute dtype: auto, float32, bfloat16 or float16."""
    api_key: SecretStr | None = None
    """What a request must bring as `Authorization: Bearer ...`."""
    no_api_key: bool = False
    """Whether any address may be listened on without a key."""
    access_log: bool = True
    """Whether each request is logged: method, route, status, time."""
    limits: Limits = Limits()
    """What may be asked for."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.adapters and self.watch is None:
            raise ValueError("name adapter folders, or a folder to --watch")
        if self.api_key and self.no_api_key:
            raise ValueError("found both --api-key-file and --no-api-key; leave one out")
        return self


def make_config(
    limits: list[str], *, api_key_file: Path | None = None, **values: Any
) -> ServeConfig:
    """Check what the command line was given.

    Args:
        limits: `NAME=VALUE`, one for each limit that differs from its default.
        api_key_file: A file that holds the key.
        values: Fields of `ServeConfig`.

    Raises:
        RecipeError: For a limit or value that is not allowed, or a file that holds no key.
    """
    given: dict[str, object] = {}
    for limit in limits:
        name, equals, value = limit.partition("=")
        if not equals or name not in Limits.model_fields:
            known = list(Limits.model_fields)
            raise RecipeError(
                f"serve: --limit {limit!r}: expected NAME=VALUE{did_you_mean(name, known)} (names: {', '.join(known)})"
            )
        given[name] = value
    try:
        found = Limits.model_validate(given, strict=False)
        return ServeConfig(
            **values, api_key=read_key(api_key_file) if api_key_file else None, limits=found
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = f"{first['loc'][0]}: " if first["loc"] else ""
        raise RecipeError(f"serve: {where}{first['msg'].removeprefix('Value error, ')}") from error


def show_limits() -> str:
    """Return the limits with their defaults, for the command line's help."""
    return "A limit other than its default; may be given again. " + ", ".join(
        f"{name}={field.default}" for name, field in Limits.model_fields.items()
    )


def read_key(path: Path) -> SecretStr:
    """Read a bearer key: one line of printable ASCII without blanks.

    Raises:
        RecipeError: If there is no such file, or it holds no such line.
    """
    try:
        text = path.read_text(encoding="ascii").strip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "holds more than ASCII"
        raise RecipeError(f"--api-key-file: {path}: cannot be read: {reason}") from error
    if len(text) < MIN_KEY_LENGTH or any(not "!" <= letter <= "~" for letter in text):
        raise RecipeError(
            f"--api-key-file: {path}: needs one line of {MIN_KEY_LENGTH} or more printable characters without blanks, "
            "such as `openssl rand -hex 32` gives"
        )
    return SecretStr(text)
