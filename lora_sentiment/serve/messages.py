"""What the server is asked and what it answers, field by field: OpenAPI is made of these."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from lora_sentiment.errors import LoraSentimentError, did_you_mean
from lora_sentiment.recipe.section import Section
from lora_sentiment.serve.config import Limits

ErrorType = Literal[
    "Malformed", "Unauthorized", "NotFound", "MethodNotAllowed", "Timeout", "TooLarge", "UnsupportedMediaType",
    "Validation", "Overloaded", "Unhealthy", "Backend", "Deadline",
]  # fmt: skip
STATUSES: dict[ErrorType, int] = {
    "Malformed": 400,
    "Unauthorized": 401,
    "NotFound": 404,
    "MethodNotAllowed": 405,
    "Timeout": 408,
    "TooLarge": 413,
    "UnsupportedMediaType": 415,
    "Validation": 422,
    "Overloaded": 429,
    "Unhealthy": 503,
    "Backend": 503,
    "Deadline": 504,
}
"""What each kind of error is in HTTP."""
MALFORMED = "the body is not JSON in UTF-8"
SHOWN = 60
"""Characters of a key that an error shows."""


class RefusalError(LoraSentimentError):
    """A request is not answered as it asked to be.

    Attributes:
        kind: Of the error, which says its HTTP status.
        retry_after: Seconds after which the same request may be answered, or None.
    """

    def __init__(self, kind: ErrorType, sentence: str, *, retry_after: int | None = None) -> None:
        super().__init__(sentence)
        self.kind: ErrorType = kind
        self.retry_after = retry_after

    @property
    def status(self) -> int:
        """HTTP status."""
        return STATUSES[self.kind]


def _whole(text: str) -> str:
    if re.search("[\ud800-\udfff]", text):
        raise PydanticCustomError(
            "surrogate", "holds half of a surrogate pair, which is no text; send it as UTF-8"
        )
    return text


Text = Annotated[str, AfterValidator(_whole)]


class PredictRequest(Section):
    """Texts for one adapter."""

    texts: list[Text] = Field(
        min_length=1, examples=[["A lovely film.", "Dull, long and not worth a cent."]]
    )
    """Texts to label, each read as in training."""
    adapter: Text | None = Field(default=None, examples=["imdb_small"])
    """Which adapter answers; may be left out where one is loaded."""
    top_k: int = Field(default=1, ge=1)
    """How many of the likeliest labels to name; all, where there are fewer."""
    explain: bool = False
    """Whether to say what each word does to the score; the model is asked once more for each word."""


class TeiParameters(Section):
    """What Hugging Face's clients send beside the inputs: empty, or null where they were not told."""

    top_k: None = None
    """Not honoured: every label is answered."""
    function_to_apply: None = None
    """Not honoured: see `raw_scores`."""


class TeiRequest(Section):
    """The same in the words of text-embeddings-inference, whose clients may stay as they are."""

    inputs: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=1)]
        | Annotated[
            list[Annotated[list[Text], Field(min_length=1, max_length=1)]], Field(min_length=1)
        ]
    ) = Field(
        examples=["A lovely film.", [["A lovely film."], ["Dull, long and not worth a cent."]]]
    )
    """One text, or a batch of texts, each in a list of its own."""
    adapter: Text | None = None
    """Which adapter answers; may be left out where one is loaded."""
    truncate: bool | None = None
    """Whether a longer text is cut (true) or refused (false); the server's own rule where left out."""
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = None
    """What stays of a longer text: its first tokens (`Right`) or its last (`Left`); left out, as in training."""
    raw_scores: bool = False
    """Whether to answer logits in place of probabilities."""
    parameters: TeiParameters | None = None
    """As Hugging Face's clients send it; holds nothing that is honoured."""

    @field_validator("inputs", mode="before")
    @classmethod
    def _refuse_pairs(cls, value: Any) -> Any:
        rows = value if isinstance(value, list) else []
        if any(isinstance(row, list) and len(row) > 1 for row in (rows, *rows)) and not all(
            isinstance(row, list) and len(row) == 1 for row in rows
        ):
            raise PydanticCustomError(
                "pair",
                'a pair of texts; these models read one: send a batch as [["first text"], ["second text"]]',
            )
        return value

    @field_validator("parameters", mode="before")
    @classmethod
    def _refuse_parameters(cls, value: Any) -> Any:
        for key, setting in value.items() if isinstance(value, dict) else ():
            if setting is not None or key not in TeiParameters.model_fields:
                raise PydanticCustomError(
                    "parameter", "{key} is not honoured; leave it out", {"key": _show(key)}
                )
        return value


Asked = PredictRequest | TeiRequest


def read_request(body: bytes, limits: Limits) -> Asked:
    """Read the body of a request.

    Keys and texts are counted before they are checked: an object for each fault of a million would take a minute.

    Raises:
        RefusalError: `Malformed` for what is no JSON, `TooLarge` for more texts than allowed, `Validation` for what is
            not in the schema; its sentence holds no text that was sent but the start of an unknown key.
    """
    try:
        value = json.loads(body.decode("utf-8-sig"))
    # Not UTF-8, no JSON, a number of too many digits; too many brackets.
    except (ValueError, RecursionError) as error:
        raise RefusalError("Malformed", MALFORMED) from error
    if not isinstance(value, dict):
        raise RefusalError(
            "Validation", 'the body must be a JSON object, such as {"texts": ["A lovely film."]}'
        )
    form, model = ("inputs", TeiRequest) if "inputs" in value else ("texts", PredictRequest)
    known = list(model.model_fields)
    for key in value:
        if key not in known:
            hint = did_you_mean(key[:SHOWN], known)
            raise RefusalError(
                "Validation",
                f"unknown key {_show(key)}{hint} (beside {form!r}: {', '.join(known)})",
            )
    texts = value.get(form)
    if isinstance(texts, list) and len(texts) > limits.max_texts:
        raise RefusalError(
            "TooLarge",
            f"{form}: found {len(texts):,}; allowed: at most {limits.max_texts:,} a request",
        )
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _explain(error) from error


def _explain(error: ValidationError) -> RefusalError:
    """Turn the first of pydantic's faults into a sentence."""
    fault = error.errors(include_url=False, include_input=False)[0]
    name, *where = fault["loc"]
    if name == "inputs" and fault["type"] not in ("pair", "surrogate"):
        return RefusalError(
            "Validation",
            'inputs: allowed: one text, or a batch as [["first text"], ["second text"]]',
        )
    place = "".join(f"[{part}]" for part in where if isinstance(part, int))
    return RefusalError("Validation", f"{name}{place}: {fault['msg']}")


def _show(key: str) -> str:
    return ascii(key[:SHOWN])


class Score(Section):
    """A label and how likely it is."""

    label: str = Field(examples=["pos"])
    """Name of the label."""
    score: float = Field(examples=[0.9975])
    """Its probability; its logit, where raw scores were asked for."""


class Prediction(Section):
    """What an adapter answers for one text."""

    label: str = Field(examples=["pos"])
    """The likeliest label."""
    score: float = Field(examples=[0.9975])
    """Its probability."""
    top_k: list[Score]
    """The likeliest labels, best first."""
    truncated: bool
    """Whether the text was longer than the adapter reads, and was cut."""
    words: list[str] | None = None
    """With `explain`: what stands between blanks, in order."""
    effects: list[float] | None = None
    """With `explain`: one a word, the label's score with the word less the score without it."""


class PredictResponse(Section):
    """The answers, in the order of the texts."""

    adapter: str = Field(examples=["imdb_small"])
    """Which adapter answered."""
    predictions: list[Prediction]
    """One a text."""


Predicted = PredictResponse | list[Score] | list[list[Score]]
"""Of texts; of one TEI input, every label best first; of a TEI batch, that for each."""


class BaseFacts(Section):
    """The base that all adapters share."""

    name: str = Field(examples=["bundled"])
    """Hub name or folder."""
    sha256: str
    """Hash of its encoder's tensors."""


class AdapterFacts(Section):
    """One adapter that is loaded."""

    name: str = Field(examples=["imdb_small"])
    """By which requests ask for it."""
    labels: list[str] = Field(examples=[["neg", "pos"]])
    """Label names in order."""
    method: str = Field(examples=["lora"])
    """What was trained."""
    form: str = Field(examples=["low-rank"])
    """`low-rank`: computed together with others; `merged`: in batches of its own."""
    num_parameters: int = Field(examples=[197_762])
    """Parameters that are its own."""
    max_length: int = Field(examples=[256])
    """Most tokens that it reads of a text, two of them for [CLS] and [SEP]."""
    truncation: str = Field(examples=["head_tail"])
    """Which tokens of a longer text stay."""
    sha256: str
    """Hash of what decides an answer."""


class AdaptersResponse(Section):
    """What is loaded."""

    base: BaseFacts
    """Shared by all."""
    adapters: list[AdapterFacts]
    """Sorted by name."""


class StatusResponse(Section):
    """That all is well."""

    status: Literal["ok"] = "ok"
    """Anything else is an error."""


class ErrorResponse(Section):
    """Why a request is not answered as it asked to be."""

    error: str = Field(examples=["texts: found 200; allowed: at most 128 a request"])
    """One sentence: what was found, what is allowed."""
    error_type: ErrorType
    """For programs."""
