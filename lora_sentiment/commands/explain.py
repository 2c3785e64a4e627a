"""Explain an answer: the score with and without each word, for a terminal or as a page.

This module imports no torch.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from rich.text import Text as RichText

from lora_sentiment.classifier import EMPTY_TEXT, Classifier, check_texts, clean_parts
from lora_sentiment.data.texts import Text, split_text
from lora_sentiment.errors import DataError, one_line

LEVELS = 3
MARKED = 0.1
"""Share of the text's largest effect below which a word is not marked."""
# Blue and orange after Okabe and Ito 2008, "Color Universal Design", which colour-blind people can
# tell apart. Each colour has its own text colour, so that light and dark terminals show the same.
_STYLES = {
    "for": ("black on #cde8f8", "black on #9ad2f2", "bold black on #56b4e9"),
    "against": ("black on #f9e3b3", "black on #f2c766", "bold black on #e69f00"),
}
_LEGEND = (
    f"how much its score falls (+) or rises (-) without the word; unmarked: under {MARKED:.0%} of "
    "the largest"
)
_PAGE = Path(__file__).with_name("explanation.html")


@dataclass(frozen=True)
class Explanation:
    """The effect of each word of a text on the score of the text's label.

    Attributes:
        label: The likeliest label of the whole text, or the name of a regression's value.
        score: Its probability, or the value.
        words: The words in order, separated by white space in the text.
        effects: One for each word: the score with the word minus the score without it. Above 0 the
            word speaks for the label, below 0 against it. The effects have no fixed sum.
    """

    label: str
    score: float
    words: list[str]
    effects: list[float]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON."""
        return asdict(self)


def explain(
    classifier: Classifier,
    text: Text,
    *,
    max_words: int = 512,
    stride: int | None = None,
    calibrated: bool = False,
) -> Explanation:
    """Measure each word's effect by leaving it out (occlusion, Zeiler and Fergus 2014).

    If the classifier cleans texts, the words are those of the cleaned text. The words of a pair are
    those of its first text, then those of its second. A text of one word is compared with the empty
    text, which the model reads as [CLS] [SEP]. A word that was cut off a
    long text has the effect 0. Without another word, cut words move up, and its effect includes
    them.

    Args:
        classifier: The model. It is asked once, with one text more than there are words.
        text: A text of at least one word, or a pair of texts for a model of pairs.
        max_words: Most words of a text. Time grows with their square.
        stride: As in `Classifier.predict`.
        calibrated: As in `Classifier.predict`.

    Raises:
        DataError: If the text has no token, no word or too many words.
        ModelError: As `Classifier.predict`.
    """
    (text,) = check_texts([text], reads_pairs=classifier.encoder.reads_pairs)
    if classifier.clean:
        # Only once: cleaning undoes escaped entities, and a second time could undo more.
        text, classifier = clean_parts(text), replace(classifier, clean=False)
    if classifier.is_empty(text):
        raise DataError(f"explain: {EMPTY_TEXT}")
    words = find_words(text)
    if not 0 < len(words) <= max_words:
        raise DataError(
            f"explain: the text has {len(words):,} words; allowed: 1 to {max_words:,}, because the "
            "model is asked again without each; give a shorter part of it, or raise max_words"
        )
    texts = [text, *leave_each_out(text)]
    scores = classifier.probabilities(texts, stride=stride, calibrated=calibrated)
    best = int(scores[0].argmax())
    effects = (scores[0, best] - scores[1:, best]).tolist()
    label, score = classifier.labels[best], float(scores[0, best])
    return Explanation(label, score, words, effects)


def find_words(text: Text) -> list[str]:
    """Return a text's words, which white space separates, or those of both texts of a pair."""
    words: list[str] = []
    for part in split_text(text):
        words += re.findall(r"\S+", part)
    return words


def leave_each_out(text: Text) -> Iterator[Text]:
    """Yield the text without each of its words in turn."""
    for side, part in enumerate(split_text(text)):
        for word in re.finditer(r"\S+", part):
            shorter = part[: word.start()] + part[word.end() :]
            if isinstance(text, str):
                yield shorter
            else:
                yield (shorter, text[1]) if side == 0 else (text[0], shorter)


def to_rich(explanation: Explanation) -> RichText:
    """Return an explanation for a terminal: the answer, the words, a legend.

    A marked word has its effect as a signed number, so that colour alone means nothing.
    """
    label = one_line(explanation.label)
    shown = RichText(f"{label} {explanation.score:.4f}\n")
    for number, (word, effect, level) in enumerate(_levels(explanation)):
        if number:
            shown.append(" ")
        if level:
            shown.append(f"{word} {effect:+.2g}", style=_STYLES[_side(effect)][level - 1])
        else:
            shown.append(word)
    shown.append("\n")
    shown.append("+ for", style=_STYLES["for"][-1])
    shown.append(" ")
    shown.append("- against", style=_STYLES["against"][-1])
    shown.append(f" {label}: {_LEGEND}")
    return shown


def to_html(explanations: Sequence[Explanation]) -> str:
    """Return one page of explanations. It has no script, fetches nothing and escapes every text.

    A marked word has its effect as a signed number. Its underline is solid for the label and dashed
    against it. Every word shows its effect as a title.
    """
    articles = []
    for explanation in explanations:
        words = []
        for word, effect, level in _levels(explanation):
            text, number = escape(word), f"{effect:+.2g}"
            if level:
                words.append(
                    f'<mark class="{_side(effect)} level-{level}" title="{number}">'
                    f"<bdi>{text}</bdi> <small>{number}</small></mark>"
                )
            else:
                words.append(f'<span title="{number}">{text}</span>')
        label = escape(one_line(explanation.label))
        articles.append(
            f"<article>\n<h2><bdi>{label}</bdi> {explanation.score:.4f}</h2>\n"
            f'<p dir="auto">{" ".join(words)}</p>\n</article>'
        )
    page = Template(_PAGE.read_text(encoding="utf-8"))
    return page.substitute(legend=escape(_LEGEND), articles="\n".join(articles))


def _levels(explanation: Explanation) -> list[tuple[str, float, int]]:
    """Return each word, its effect, and the strength of its mark: 0 for none, at most LEVELS."""
    largest = max(map(abs, explanation.effects))
    marked = []
    for word, effect in zip(explanation.words, explanation.effects, strict=True):
        share = abs(effect) / largest if largest else 0.0
        level = 0
        if share >= MARKED:
            level = min(LEVELS, 1 + int(share * LEVELS))
        marked.append((one_line(word), effect, level))
    return marked


def _side(effect: float) -> str:
    return "for" if effect > 0 else "against"
