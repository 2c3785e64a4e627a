import html
import io
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from lora_sentiment.classifier import Classifier
from lora_sentiment.commands.explain import Explanation, explain, to_html, to_rich
from lora_sentiment.data.batches import TextEncoder
from lora_sentiment.errors import DataError, ModelError
from lora_sentiment.models.engine import Engine

WORDS = {
    "[PAD]": 0.0,
    "[UNK]": 0.0,
    "[CLS]": 0.5,
    "[SEP]": 0.0,
    "good": 2.0,
    "bad": -1.5,
    "film": 0.1,
    "<br": 0.3,
}
WEIGHTS = np.array(list(WORDS.values()))


class BagOfWords:
    """A bag of words: the logit of `positive` is the sum of the words' weights."""

    def __init__(self):
        self.num_rows = 0

    def __call__(self, input_ids, attention_mask):
        self.num_rows += len(input_ids)
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        total = (WEIGHTS[input_ids] * mask).sum(axis=1)
        return np.stack([np.zeros_like(total), total], axis=1).astype(np.float32)


def make(clean=False, max_length=32, temperature=None):
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    encoder = TextEncoder(tokenizer, 2, 3, 0, max_length, "head")
    return Classifier(
        labels=("negative", "positive"), encoder=encoder, engine=Engine(BagOfWords(), 1024), clean=clean,
        calibration=temperature and {"temperature": temperature}, sha256="0",
    )  # fmt: skip


def sigmoid(logit):
    return 1 / (1 + np.exp(-logit))


def shown(explanation, *, colour):
    file = io.StringIO()
    system = "truecolor" if colour else None
    Console(file=file, force_terminal=colour, color_system=system, width=1000).print(
        to_rich(explanation)
    )
    return file.getvalue()


def test_the_effect_of_a_word_is_the_score_with_it_less_the_score_without_it():
    found = explain(make(), "good  film\nbad good")
    assert found.label == "positive"
    assert found.score == pytest.approx(sigmoid(3.1))
    assert found.words == ["good", "film", "bad", "good"]
    without = [1.1, 3.0, 4.6, 1.1]
    assert found.effects == pytest.approx([sigmoid(3.1) - sigmoid(x) for x in without], abs=1e-6)
    assert found.effects[0] > 0 > found.effects[2]


def test_effects_are_those_of_the_label_that_the_text_was_given():
    found = explain(make(), "bad film")
    assert found.label == "negative"
    assert found.effects[0] == pytest.approx(sigmoid(0.9) - sigmoid(-0.6), abs=1e-6)


def test_score_and_label_are_those_of_predict():
    classifier = make(temperature=2.5)
    for options in ({}, {"calibrated": True}, {"stride": 1}):
        (predicted,) = classifier.predict(["good bad film"], **options)
        found = explain(classifier, "good bad film", **options)
        assert (found.label, found.score) == (
            predicted.label,
            pytest.approx(predicted.score, abs=1e-12),
        )


def test_the_only_word_is_held_against_the_empty_text():
    found = explain(make(), "good")
    assert found.effects == pytest.approx([sigmoid(2.5) - sigmoid(0.5)], abs=1e-6)


def test_the_model_is_asked_once_more_than_there_are_words():
    classifier = make()
    explain(classifier, "good bad film")
    assert classifier.engine.compute.num_rows == 4


@pytest.mark.parametrize("clean", [False, True])
def test_a_text_without_words_is_refused(clean):
    with pytest.raises(DataError, match="text is empty"):
        explain(make(clean), " \n\t")


def test_a_text_of_too_many_words_is_refused_and_not_cut():
    classifier = make()
    with pytest.raises(DataError, match=r"3 words; allowed: 1 to 2.*raise max_words"):
        explain(classifier, "good bad film", max_words=2)
    assert classifier.engine.compute.num_rows == 0
    assert len(explain(classifier, "good bad film", max_words=3).words) == 3


def test_words_that_were_cut_off_have_no_effect():
    found = explain(make(max_length=4), "film film good bad")
    assert found.effects[2:] == [0.0, 0.0]
    assert found.effects[0] < 0  # without it, `good` moves up


def test_words_are_those_of_the_cleaned_text_and_it_is_cleaned_once():
    found = explain(make(clean=True), "good<br />bad &amp;lt;br film")
    assert found.words == ["good", "bad", "&lt;br", "film"]
    assert found.score == pytest.approx(
        make(clean=True).predict(["good<br />bad &amp;lt;br film"])[0].score
    )
    assert explain(make(), "good<br />bad").words == ["good<br", "/>bad"]


def test_what_the_classifier_refuses_is_refused():
    with pytest.raises(ModelError, match="without a temperature"):
        explain(make(), "good", calibrated=True)


EXPLANATION = Explanation("positive", 0.9, ["a", "good", "dull", "film"], [0.001, 0.4, -0.2, 0.05])


def test_json_holds_plain_values():
    assert EXPLANATION.as_dict() == {
        "label": "positive", "score": 0.9, "words": ["a", "good", "dull", "film"], "effects": [0.001, 0.4, -0.2, 0.05]
    }  # fmt: skip


def test_the_terminal_shows_signed_numbers_without_colour():
    answer, text, legend = shown(EXPLANATION, colour=False).splitlines()
    assert answer == "positive 0.9000"
    assert text == "a good +0.4 dull -0.2 film +0.05"
    assert legend.startswith("+ for - against positive: ")
    assert "under 10% of the largest" in legend


def test_the_terminal_colours_for_and_against_by_strength():
    styles = {
        str(to_rich(EXPLANATION))[span.start : span.end]: str(span.style)
        for span in to_rich(EXPLANATION).spans
    }
    assert styles["good +0.4"] == styles["+ for"]
    assert styles["dull -0.2"] != styles["- against"]  # half as strong as the strongest
    turned = to_rich(Explanation("positive", 0.9, ["dull"], [-0.4]))
    assert str(turned.spans[0].style) == styles["- against"]
    assert (
        len({styles[name] for name in ("good +0.4", "dull -0.2", "film +0.05", "- against")}) == 4
    )
    assert not any(name.startswith("a") for name in styles)
    assert "\x1b[" in shown(EXPLANATION, colour=True)


def test_a_text_cannot_steer_the_terminal_or_the_page():
    rude = Explanation(
        "pos\x1b[2J", 0.9, ["\x1b]0;title\x07", "\x9b31m", "[bold]x[/bold]"], [0.5, 0.0, 0.1]
    )
    for page in (shown(rude, colour=False), to_html([rude])):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", page)
    assert "[bold]x[/bold]" in shown(rude, colour=False)


def test_no_effect_at_all_marks_nothing():
    flat = Explanation("positive", 0.5, ["a", "b"], [0.0, 0.0])
    assert shown(flat, colour=False).splitlines()[1] == "a b"
    assert "<mark" not in to_html([flat]).split("<article>")[1]


def test_the_page_shows_every_word_its_side_and_its_number():
    page = to_html([EXPLANATION, Explanation("negative", 0.8, ["bad"], [0.3])])
    assert page.count("<article>") == 2
    assert (
        '<mark class="for level-3" title="+0.4"><bdi>good</bdi> <small>+0.4</small></mark>' in page
    )
    assert (
        '<mark class="against level-2" title="-0.2"><bdi>dull</bdi> <small>-0.2</small></mark>'
        in page
    )
    assert '<span title="+0.001">a</span>' in page
    assert "<h2><bdi>negative</bdi> 0.8000</h2>" in page


def test_the_page_escapes_texts_and_labels():
    nasty = '<script>alert("x")</script>&amp;'
    page = to_html([Explanation(nasty, 0.9, [nasty, f'"{nasty}'], [0.4, 0.0])])
    assert "<script" not in page
    assert page.count(html.escape(nasty)) == 3
    assert "{" in to_html([Explanation("x", 0.9, ["{style}"], [0.1])]).split("<article>")[1]


def test_the_page_stands_alone_and_fits_phones_and_dark_rooms():
    page = to_html([EXPLANATION])
    assert page.startswith("<!doctype html>\n<html lang=")
    for part in (
        'name="viewport"',
        "prefers-color-scheme: dark",
        "default-src 'none'",
        'charset="utf-8"',
        "<title>",
    ):
        assert part in page
    assert not re.search(r"<script|<link|<img|https?:|url\(|@import|\son\w+=", page)
    # Not by colour alone.
    assert "underline solid" in page
    assert "underline dashed" in page


def luminance(colour):
    if len(colour) == 3:
        colour = "".join(2 * digit for digit in colour)
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_marked_word_can_be_read_in_light_and_dark():
    """WCAG 2.2 asks for a contrast of 4.5 to 1."""
    light, dark = to_html([EXPLANATION]).split("prefers-color-scheme: dark")
    for part in (light, dark):
        text = luminance(re.search(r"[^-]color: #([0-9a-f]+)", part)[1])
        backgrounds = re.findall(r"background: #([0-9a-f]+)", part)
        assert len(backgrounds) == 7
        for background in map(luminance, backgrounds):
            assert (max(text, background) + 0.05) / (min(text, background) + 0.05) >= 4.5


def test_importing_and_explaining_need_no_torch():
    code = "import sys, lora_sentiment.commands.explain; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
