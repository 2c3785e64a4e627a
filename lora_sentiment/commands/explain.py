"""Why a classifier answers as it does: its score with and without each word, in a terminal or on a page.

Importing this imports no torch.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any

from rich.text import Text

from lora_sentiment.classifier import Classifier
from lora_sentiment.data.cleaning import clean_text
from lora_sentiment.errors import DataError

LEVELS = 3
MARKED = 0.1
"""Share of the text's largest effect below which a word stays unmarked."""
# Blue and orange after Okabe and Ito 2008, "Color Universal Design": told apart by the colour-blind. Each colour stands
# with the text colour that it is read with, so that light and dark terminals show the same.
_STYLES = {
    "for": ("black on #cde8f8", "black on #9ad2f2", "bold black on #56b4e9"),
    "against": ("black on #f9e3b3", "black on #f2c766", "bold black on #e69f00"),
}


@dataclass(frozen=True)
class Explanation:
    """What each word of a text does to the score of the label that the text was given.

    Attributes:
        label: The likeliest label of the whole text.
        score: Its probability.
        words: What stands between blanks, in order.
        effects: One a word: the score with the word less the score without it. Above 0 the word speaks for the label,
            below 0 against it. They need not add up to anything.
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
    text: str,
    *,
    max_words: int = 512,
    stride: int | None = None,
    calibrated: bool = False,
) -> Explanation:
    """Leave out one word at a time and see what that does to the score (occlusion, Zeiler and Fergus 2014).

    Where the classifier cleans texts, the words are those of the cleaned text. The only word of a text is held against
    the empty text, which the model reads as [CLS] [SEP]. A word that was cut off a long text has the effect 0; leaving
    out another one lets what was cut move up, and its effect holds that too.

    Args:
        classifier: It is asked once, with one text more than there are words.
        text: At least one word.
        max_words: Most words of a text; time grows with the square of them.
        stride: As in `Classifier.predict`.
        calibrated: As in `Classifier.predict`.

    Raises:
        DataError: If the text has no word or too many.
        ModelError: As `Classifier.predict`.
    """
    if classifier.clean:
        # Once: what cleaning undoes, such as an escaped entity, a second time could undo further.
        text, classifier = clean_text(text, Counter()), replace(classifier, clean=False)
    found = find_words(text)
    if not 0 < len(found) <= max_words:
        raise DataError(
            f"explain: the text has {len(found):,} words; allowed: 1 to {max_words:,}, because the model is asked "
            "again without each; give a shorter part of it, or raise max_words"
        )
    scores = classifier.probabilities(
        [text, *leave_each_out(text, found)], stride=stride, calibrated=calibrated
    )
    best = int(scores[0].argmax())
    effects = scores[0, best] - scores[1:, best]
    return Explanation(
        classifier.labels[best],
        float(scores[0, best]),
        [word.group() for word in found],
        effects.tolist(),
    )


def find_words(text: str) -> list[re.Match[str]]:
    """Return where a text's words stand: what is between blanks."""
    return list(re.finditer(r"\S+", text))


def leave_each_out(text: str, words: Iterable[re.Match[str]]) -> Iterator[str]:
    """Yield the text without each of its words in turn."""
    return (text[: word.start()] + text[word.end() :] for word in words)


def to_rich(explanation: Explanation) -> Text:
    """Return an explanation for a terminal: the answer, the words, a legend.

    A marked word carries its effect as a signed number, so that nothing hangs on colour.
    """
    shown = Text(f"{_visible(explanation.label)} {explanation.score:.4f}\n", style="")
    for word, effect, level in _levels(explanation):
        if level:
            shown.append(f"{_visible(word)} {effect:+.2g}", style=_STYLES[_side(effect)][level - 1])
        else:
            shown.append(_visible(word))
        shown.append(" ")
    shown.right_crop()
    shown.append("\n")
    shown.append("+ for", style=_STYLES["for"][-1])
    shown.append(" ")
    shown.append("- against", style=_STYLES["against"][-1])
    shown.append(f" {_visible(explanation.label)}: {_LEGEND}")
    return shown


def to_html(explanations: Sequence[Explanation]) -> str:
    """Return one page that shows explanations: no script, nothing fetched, every text escaped.

    A marked word carries its effect as a signed number, and is underlined in full where it speaks for the label, in
    dashes where against it; any word shows its effect as a title.
    """
    articles = "\n".join(map(_article, explanations))
    return _PAGE.format(style=_STYLE, legend=escape(_LEGEND), articles=articles)


_LEGEND = f"how much its score falls (+) or rises (-) without the word; unmarked: under {MARKED:.0%} of the largest"
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>What each word does to the score</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>What each word does to the score</h1>
<p><mark class="for level-3">for <small>+</small></mark> <mark class="against level-3">against <small>-</small></mark>
the label: {legend}.</p>
{articles}
</main>
</body>
</html>
"""
_STYLE = """\
:root { color-scheme: light dark; }
body { margin: 0; font: 1.0625rem/1.9 system-ui, sans-serif; background: #fff; color: #1a1a1a; }
main { max-width: 42rem; margin: 0 auto; padding: 1rem; }
h1, h2 { font-size: 1.25rem; line-height: 1.3; overflow-wrap: anywhere; }
h2 { font-size: 1.0625rem; margin: 0; }
article { border-top: 1px solid #8888; padding: 1rem 0; }
article p { margin: .5rem 0 0; overflow-wrap: anywhere; }
mark { color: inherit; padding: .1em .25em; border-radius: .25em; }
small { font-variant-numeric: tabular-nums; }
.for { text-decoration: underline solid; }
.against { text-decoration: underline dashed; }
.level-3 { font-weight: bold; }
.for.level-1 { background: #cde8f8; } .for.level-2 { background: #9ad2f2; } .for.level-3 { background: #56b4e9; }
.against.level-1 { background: #f9e3b3; } .against.level-2 { background: #f2c766; }
.against.level-3 { background: #e69f00; }
@media (prefers-color-scheme: dark) {
body { background: #16181c; color: #e8e8e8; }
.for.level-1 { background: #17344a; } .for.level-2 { background: #1d4a6b; } .for.level-3 { background: #00609c; }
.against.level-1 { background: #42310b; } .against.level-2 { background: #5f450a; }
.against.level-3 { background: #7d5800; }
}
"""


def _article(explanation: Explanation) -> str:
    words = []
    for word, effect, level in _levels(explanation):
        text, number = escape(_visible(word)), f"{effect:+.2g}"
        if level:
            kind = f"{_side(effect)} level-{level}"
            words.append(
                f'<mark class="{kind}" title="{number}"><bdi>{text}</bdi> <small>{number}</small></mark>'
            )
        else:
            words.append(f'<span title="{number}">{text}</span>')
    heading = f"<h2><bdi>{escape(_visible(explanation.label))}</bdi> {explanation.score:.4f}</h2>"
    return f'<article>\n{heading}\n<p dir="auto">{" ".join(words)}</p>\n</article>'


def _levels(explanation: Explanation) -> list[tuple[str, float, int]]:
    """Return each word with its effect and how strongly to mark it: 0, not at all, to LEVELS."""
    largest = max(map(abs, explanation.effects))
    found = []
    for word, effect in zip(explanation.words, explanation.effects, strict=True):
        share = abs(effect) / largest if largest else 0.0
        found.append((word, effect, min(LEVELS, 1 + int(share * LEVELS)) if share >= MARKED else 0))
    return found


def _side(effect: float) -> str:
    return "for" if effect > 0 else "against"


def _visible(text: str) -> str:
    """Replace control characters: a text must not steer the terminal that shows it."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
