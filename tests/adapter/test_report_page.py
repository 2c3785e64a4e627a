"""The report page: what it shows, what it never holds, and how it looks to a browser."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lora_sentiment.adapter.folder import Card, load_card
from lora_sentiment.adapter.report_page import NUM_ERRORS, make_report_page
from lora_sentiment.data.batches import Encoded
from lora_sentiment.tasks.label_sets import fit_label_scores
from lora_sentiment.tasks.scores import softmax

SAVED = Path(__file__).parents[1] / "saved"
HOSTILE = "<img src=x onerror=alert(1)>$name</table>"
NUM_ROWS = 120


class Tables(HTMLParser):
    """Collects the captions, and the cells of each row, of a page whose tags are balanced."""

    def __init__(self):
        super().__init__()
        self.open, self.rows, self.captions = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "bdi":
            self.rows[-1].append(data)
        if self.open and self.open[-1] == "caption":
            self.captions.append(data)


def make_card(task="single_label", labels=("neg", HOSTILE), calibration=None):
    facts = load_card(SAVED / "lora").model_dump(by_alias=True)
    facts |= {"labels": list(labels), "calibration": calibration}
    facts["data"]["config"] |= {"task": task, "labels": None}
    return Card.model_validate(facts)


def make_encoded(labels):
    """Rows of 3 to 42 tokens."""
    lengths = np.arange(len(labels)) % 40 + 3
    offsets = np.append(0, lengths.cumsum())
    ids = np.zeros(offsets[-1], dtype=np.int32)
    return Encoded(ids, offsets, labels, truncated=0, pad_token_id=0)


def make_example():
    """Rows of two labels of which every tenth is answered wrongly, the later the more confidently."""
    labels = np.arange(NUM_ROWS) % 2
    sizes = np.linspace(1, 3, NUM_ROWS, dtype=np.float32)
    signs = np.where(np.arange(NUM_ROWS) % 10, 1, -1) * (2 * labels - 1)
    logits = np.stack([-sizes * signs, sizes * signs], axis=1).astype(np.float32)
    label_scores = fit_label_scores(softmax(logits, temperature=1.5), labels)
    calibration = {"temperature": 1.5, "label_scores": label_scores}
    return make_card(calibration=calibration), labels, logits


def render(card, labels, logits, **options):
    scores = card.task.score(logits, labels, names=card.labels, calibration=card.calibration)
    numbers = np.arange(1, len(labels) + 1) * 10
    options = {"pictures": {}, **options}
    return make_report_page(
        HOSTILE,
        card,
        "test",
        logits,
        make_encoded(labels),
        numbers,
        scores={"test": scores},
        **options,
    )


def read(page):
    tables = Tables()
    tables.feed(page)
    assert tables.open == []
    return tables


def test_the_page_shows_metrics_slices_label_sets_and_errors_by_row_number():
    page = render(*make_example(), data=["a < b"])
    tables = read(page)
    rows = {cells[0]: cells for cells in tables.rows if cells}
    assert tables.captions == [
        "Metrics with 95 % intervals",
        "Answers by their score",
        "What sets hold on test",
        "Above its highest coverage, a label stands in every set",
        "Share right by length",
        "Share right by label",
        "Rows of test",
    ]
    assert rows["accuracy"][1].startswith("0.9000 [")
    by_label = [cells for cells in tables.rows if len(cells) == 3 and cells[1] == "60"]
    assert by_label[-2:] == [
        ["neg", "60", "0.8000 [0.6822, 0.8817]"],
        [HOSTILE, "60", "1.0000 [0.9398, 1.0000]"],
    ]
    for percent in (80, 90, 95):
        assert float(rows[f"{percent}%"][1].rstrip("%")) >= percent, "calibrated on these rows"
    assert ["neg", "60", "0.984"] in tables.rows
    assert "12 of 120 rows are answered wrongly" in page
    wrong = [cells for cells in tables.rows if len(cells) == 4 and cells[1] == "neg"]
    assert [cells[0] for cells in wrong] == [f"{number:,}" for number in range(1110, 0, -100)]
    assert wrong[0][2].startswith(f"{HOSTILE} 0.9")
    assert "a &lt; b" in page
    assert "What is not promised" in page


def test_rows_of_one_length_are_one_slice():
    card, labels, logits = make_example()
    tables = read(render(card, labels[:1], logits[:1]))
    assert [cells[:2] for cells in tables.rows if "tokens" in "".join(cells[:1])][-1:] == [
        ["3 to 3 tokens", "1"]
    ]


def test_the_page_loads_nothing_runs_nothing_and_escapes_everything(tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"PNG")
    pictures = {"curve": picture, "none": tmp_path / "b"}
    page = render(*make_example(), texts=[HOSTILE] * NUM_ROWS, pictures=pictures, data=[HOSTILE])
    assert "default-src 'none'" in page
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:image/png;base64,UE5H"]
    assert "<script" not in page
    assert HOSTILE not in page
    assert "&lt;img src=x" in page


def test_texts_stand_on_the_page_only_when_they_are_given():
    texts = [f"text number {i}" for i in range(NUM_ROWS)]
    assert "text number" not in render(*make_example())
    shown = render(*make_example(), texts=texts)
    assert "text number 110" in shown
    assert "text number 111" not in shown, "this row is right"


@pytest.mark.parametrize(
    ("task", "labels", "truth", "logits"),
    [
        ("multi_label", ("a", "b"), np.eye(2)[np.arange(80) % 2], np.full((80, 2), 1.0)),
        ("regression", ("stars",), np.arange(80) % 5.0, np.full((80, 1), 2.0)),
    ],
)
def test_every_task_has_a_page(task, labels, truth, logits):
    card = make_card(task, labels)
    page = render(card, truth, logits.astype(np.float32))
    rows = [cells for cells in read(page).rows if len(cells) == 4]
    assert len(rows) == NUM_ERRORS
    shown = {cells[1] for cells in rows}
    assert shown <= ({"a", "b"} if task == "multi_label" else {f"{i}.0" for i in range(5)})
    assert (
        "Share right by label" in page if task == "multi_label" else "Mean absolute error" in page
    )


def test_many_labels_show_the_worst_slices():
    names = [f"label{i:03}" for i in range(60)]
    truth = np.arange(240) % 60
    logits = np.eye(60, dtype=np.float32)[np.where(truth < 5, 59, truth)]
    page = render(make_card(labels=names), truth, logits)
    rows = [cells for cells in read(page).rows if len(cells) == 3 and cells[0] in names]
    assert [cells[0] for cells in rows[:5]] == names[:5]
    assert len(rows) == 40
    assert "the lowest 40" in page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_page_and_axe_finds_no_fault(tmp_path, scheme):
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs the Python package playwright"
    )
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="needs axe-playwright-python"
    ).Axe()
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs a browser: install the Debian package chromium")
    path = tmp_path / "report.html"
    path.write_text(render(*make_example(), texts=["a" * 500] * NUM_ROWS), encoding="utf-8")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium, args=("--no-sandbox", "--disable-gpu")
        )
        context = browser.new_context(
            viewport={"width": 360, "height": 740}, color_scheme=scheme, bypass_csp=True
        )
        page = context.new_page()
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        found = axe.run(page).response["violations"]
        browser.close()
    assert [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in found] == []
