"""Bodies of requests and answers. FastAPI makes the OpenAPI document from these models."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lora_sentiment.errors import LoraSentimentError, did_you_mean
from lora_sentiment.recipe.section import Section

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
"""HTTP status of each kind of error."""
MALFORMED = "the body is not JSON"
OWN_FORM, TEI_FORM = "own", "tei"
"""Forms of a request to `/predict`."""
SINGLE, PAIR = "single", "pair"
"""Kinds of an input."""
SHOWN_KEY = 60
"""Characters of an unknown key that an error shows."""


class RefusalError(LoraSentimentError):
    """A request is refused.

    Attributes:
        kind: Kind of the error.
        headers: Further headers of the answer.
    """

    def __init__(
        self, kind: ErrorType, message: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.kind: ErrorType = kind
        self.headers = headers or {}

    @property
    def status(self) -> int:
        """HTTP status."""
        return STATUSES[self.kind]


def _refuse_surrogates(text: str) -> str:
    # JSON can escape half of a surrogate pair. No tokenizer takes it.
    if re.search("[\ud800-\udfff]", text):
        raise PydanticCustomError("surrogate", "holds half of a surrogate pair; send it as UTF-8")
    return text


Text = Annotated[str, AfterValidator(_refuse_surrogates)]


class RequestBody(Section):
    """A JSON object without unknown keys."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, body: Any) -> Any:
        """Stop at the first unknown key, because pydantic makes one error for each of them."""
        known = list(cls.model_fields)
        for key in body if isinstance(body, dict) else ():
            if key not in known:
                shown = key[:SHOWN_KEY]
                raise PydanticCustomError(
                    "unknown_key",
                    "unknown key {key}{hint} (allowed: {known})",
                    {
                        "key": ascii(shown),
                        "hint": did_you_mean(shown, known),
                        "known": ", ".join(known),
                    },
                )
        return body


class TextPair(RequestBody):
    """A pair of texts, in the words of Hugging Face."""

    text: Text
    """The first text, such as a question."""
    text_pair: Text
    """The second text, such as an answer."""


def _get_kind(item: Any) -> str:
    """Return the kind of an input: a text or a pair."""
    return PAIR if isinstance(item, dict | TextPair) else SINGLE


AnyText = Annotated[
    Annotated[Text, Tag(SINGLE)] | Annotated[TextPair, Tag(PAIR)], Discriminator(_get_kind)
]
"""A text, or a pair for an adapter that reads pairs."""


class PredictRequest(RequestBody):
    """Texts for one adapter."""

    texts: list[AnyText] = Field(
        min_length=1,
        fail_fast=True,
        examples=[["A lovely film.", "Dull, long and not worth a cent."]],
    )
    """Texts to label. Each is cleaned and cut as in training. For an adapter that reads pairs: pairs
    of `text` and `text_pair`."""
    adapter: Text | None = Field(default=None, examples=["imdb_small"])
    """Name of the adapter. May be left out if only one is loaded."""
    top_k: int = Field(default=1, ge=1)
    """Number of most likely labels to return. All are returned if there are fewer."""
    explain: bool = False
    """Whether to return the effect of each word on the score. The model runs once more for each
    word."""
    coverage: float | None = Field(default=None, gt=0, lt=1, examples=[0.95])
    """Probability with which the label set holds the right label. The scores are calibrated then.
    For adapters with `has_label_sets`."""


OneOrTwo = Annotated[list[Text], Field(min_length=1, max_length=2, fail_fast=True)]


class TeiRequest(RequestBody):
    """A request of text-embeddings-inference. docs/serving.md lists the differences from it."""

    inputs: Text | OneOrTwo | Annotated[list[OneOrTwo], Field(min_length=1, fail_fast=True)] = (
        Field(
            examples=["A lovely film.", [["A lovely film."], ["Dull, long and not worth a cent."]]]
        )
    )
    """One text, or a batch of texts, each in a list of its own. A list of two texts is a pair."""
    adapter: Text | None = None
    """Name of the adapter. May be left out if only one is loaded."""
    truncate: bool | None = None
    """Whether a longer text is cut (true) or refused (false). Default: the server's `on_long`."""
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = None
    """Which tokens of a longer text stay: the first (`Right`) or the last (`Left`). Default: as in
    training."""
    raw_scores: bool = False
    """Whether to return logits instead of probabilities."""


def _get_form(body: Any) -> str:
    """Return the form of a request to `/predict`."""
    return TEI_FORM if isinstance(body, dict) and "inputs" in body else OWN_FORM


AnyRequest = Annotated[
    Annotated[PredictRequest, Tag(OWN_FORM)] | Annotated[TeiRequest, Tag(TEI_FORM)],
    Discriminator(_get_form),
]


class HfParameters(RequestBody):
    """Parameters of Hugging Face's text classification."""

    top_k: int | None = Field(default=None, ge=1)
    """Number of most likely labels to return. Default: all."""
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None
    """Turns logits into scores. Default: that of the task."""


class HfRequest(RequestBody):
    """A request of Hugging Face's `InferenceClient`."""

    inputs: AnyText | Annotated[list[AnyText], Field(min_length=1, fail_fast=True)] = Field(
        examples=["A lovely film.", ["A lovely film.", "Dull, long and not worth a cent."]]
    )
    """One text, or a list of texts. For an adapter that reads pairs: pairs of `text` and
    `text_pair`."""
    parameters: HfParameters | None = None
    """Which scores to return."""


def explain_invalid_body(errors: Sequence[Mapping[str, Any]]) -> RefusalError:
    """Turn one error of pydantic into one sentence: the first, or that of half a surrogate pair.

    The sentence holds no value of the request, only the start of an unknown key.
    """
    # In `inputs`, errors of the types that do not fit come first.
    error = next((row for row in errors if row["type"] == "surrogate"), errors[0])
    kind = error["type"]
    # The place is: "body", the form at `/predict`, the keys and indices.
    keys = list(error["loc"][1:])
    if kind == "json_invalid" or (kind == "missing" and not keys):
        return RefusalError("Malformed", MALFORMED)
    form = keys.pop(0) if keys and keys[0] in (OWN_FORM, TEI_FORM) else None
    message = error["msg"]
    if not keys:
        if kind != "unknown_key":
            key = "texts" if form else "inputs"
            message = f'the body must be a JSON object, such as {{"{key}": ["A lovely film."]}}'
        return RefusalError("Validation", message)
    if keys[0] == "inputs":
        # The other keys are those of pydantic's types.
        del keys[1:]
        if kind != "surrogate":
            message = (
                'allowed: one text, or a pair {"text": "..", "text_pair": ".."}, or a list of these'
            )
            if form == TEI_FORM:
                message = (
                    'allowed: one text, or a pair ["..", ".."], or a batch of lists of one or two '
                    "texts"
                )
    elif keys[0] == "texts" and len(keys) > 2:
        # The third key is the kind of input.
        del keys[2]
        if keys[-1] not in TextPair.model_fields and kind not in ("surrogate", "unknown_key"):
            message = 'allowed: a text, or a pair {"text": "..", "text_pair": ".."}'
    place = str(keys[0])
    for key in keys[1:]:
        place += f"[{key}]"
    return RefusalError("Validation", f"{place}: {message}")


class Score(Section):
    """A label and its score."""

    label: str = Field(examples=["pos"])
    """Name of the label."""
    score: float = Field(examples=[0.9975])
    """Its probability, or its logit with `raw_scores` or `function_to_apply: none`."""


class NoLabel(Section):
    """The answer for a text without tokens."""

    label: None = None
    """Always null."""
    score: None = None
    """Always null."""
    error: str = Field(examples=["text is empty"])
    """Why there is no label: the tokenizer leaves no token of the text."""


class Prediction(Section):
    """The answer for one text."""

    label: str | None = Field(default=None, examples=["pos"])
    """The most likely of single labels. Null for other tasks."""
    score: float | None = Field(default=None, examples=[0.9975])
    """Its probability. Null for other tasks."""
    labels: list[str] | None = None
    """The labels of a multi-label adapter, of which there may be none. Null for other tasks."""
    value: float | None = None
    """The value of a regression. Null for other tasks."""
    label_set: list[str] | None = None
    """With `coverage`: the labels that cannot be ruled out, of which there may be none."""
    is_certain: bool | None = None
    """With `coverage`: whether the set holds exactly one label."""
    top_k: list[Score]
    """The most likely labels, best first; for a regression its value under its name."""
    truncated: bool
    """Whether the text was longer than the adapter reads, and was cut."""
    words: list[str] | None = None
    """With `explain`: the words of the text, in order. Words are separated by blanks."""
    effects: list[float] | None = None
    """With `explain`, for each word: the label's score with the word minus the score without it."""


class PredictResponse(Section):
    """The answers, in the order of the texts."""

    adapter: str = Field(examples=["imdb_small"])
    """Name of the adapter that answered."""
    predictions: list[Prediction | NoLabel]
    """One for each text. A text without tokens, such as blanks, has no label."""


Scores = list[Score] | list[NoLabel]
"""Every label, best first; for a text without tokens, one entry without a label."""
AnyResponse = PredictResponse | Scores | list[Scores]
"""For `texts`; for one TEI input; for a TEI batch and at `POST /`: a list for each text."""


class BaseFacts(Section):
    """The base that all adapters share."""

    name: str = Field(examples=["bundled"])
    """Hub name or folder."""
    sha256: str
    """Hash of its encoder's tensors."""


class AdapterFacts(Section):
    """One loaded adapter."""

    name: str = Field(examples=["imdb_small"])
    """Name that requests use."""
    task: str = Field(examples=["single_label"])
    """`single_label`, `multi_label` or `regression`."""
    answer_columns: list[str] = Field(examples=[["label", "score"]])
    """Names of the columns that hold its answer in a table."""
    labels: list[str] = Field(examples=[["neg", "pos"]])
    """Label names in order."""
    method: str = Field(examples=["lora"])
    """Training method."""
    form: str = Field(examples=["low-rank"])
    """`low-rank`: computed together with others; `merged`: computed in batches of its own."""
    num_parameters: int = Field(examples=[197_762])
    """Number of its own parameters."""
    max_length: int = Field(examples=[256])
    """Most tokens of a text that it reads, including [CLS] and [SEP]."""
    truncation: str = Field(examples=["head_tail"])
    """Which tokens of a longer text stay."""
    reads_pairs: bool = Field(examples=[False])
    """Whether an input is a pair of texts."""
    has_label_sets: bool
    """Whether requests may name a `coverage`."""
    sha256: str
    """Hash of everything that decides an answer."""


class AdaptersResponse(Section):
    """The base and the loaded adapters."""

    base: BaseFacts
    """Shared by all adapters."""
    adapters: list[AdapterFacts]
    """Sorted by name."""


class ClassifierFacts(Section):
    """Labels of a classifier."""

    id2label: dict[str, str] = Field(examples=[{"0": "neg", "1": "pos"}])
    """Label name of each logit."""
    label2id: dict[str, int] = Field(examples=[{"neg": 0, "pos": 1}])
    """Logit of each label name."""


class InfoResponse(Section):
    """One adapter and the limits, with the keys of text-embeddings-inference."""

    model_id: str = Field(examples=["imdb_small"])
    """Name of the adapter."""
    model_sha: str
    """Hash of everything that decides an answer."""
    model_dtype: str = Field(examples=["float32"])
    """Compute dtype."""
    served_model_name: str = Field(examples=["imdb_small"])
    """Name of the adapter."""
    model_type: dict[Literal["classifier"], ClassifierFacts]
    """Its labels."""
    max_concurrent_requests: int = Field(examples=[128])
    """Most predictions in progress."""
    max_input_length: int = Field(examples=[256])
    """Most tokens of a text that the adapter reads, including [CLS] and [SEP]."""
    max_batch_tokens: int = Field(examples=[8192])
    """Tokens that are computed together."""
    max_batch_requests: None = None
    """Always null: a batch is bounded by its tokens."""
    max_client_batch_size: int = Field(examples=[128])
    """Most texts of a request."""
    auto_truncate: bool
    """Whether a longer text is cut rather than refused."""
    tokenization_workers: int = Field(examples=[2])
    """Threads that tokenise."""
    version: str = Field(examples=["0.1.0"])
    """Version of lora_sentiment."""
    sha: None = None
    """Always null."""
    docker_label: None = None
    """Always null."""


class StatusResponse(Section):
    """The answer of a check that succeeded."""

    status: Literal["ok"] = "ok"
    """Always `ok`. A failed check is an error."""


class ErrorResponse(Section):
    """The reason why a request was refused."""

    error: str = Field(examples=["texts: found 200; allowed: at most 128 in a request"])
    """One sentence: what was found, and what is allowed."""
    error_type: ErrorType
    """The kind of error, for programs."""
