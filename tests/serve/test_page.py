"""The page in a real browser: headless Chromium, driven by Playwright, against a small server of the same interface.

The stand-in answers what a real server seldom does: 429, 413, labels that look like HTML.
"""

import csv
import io
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from lora_sentiment.tasks import find_task
from tests.serve import fake_pool
from tests.serve.fake_pool import make_classifier, running

PAGE = files("lora_sentiment.serve").joinpath("page")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
STARS = ["terrible", "poor", "fair", "good", "great"]
HOSTILE = "<img src=x onerror=document.title='run'><script>document.title='run'</script>"
WAIT = 20_000  # milliseconds, for a machine that does other work too


def make_adapter(name: str, labels: list[str]) -> dict[str, Any]:
    facts = {
        "method": "lora",
        "form": "low-rank",
        "num_parameters": 1000,
        "max_length": 256,
        "truncation": "head",
    }
    return {"name": name, "labels": labels, "sha256": "0" * 64, **facts}


def effect(word: str) -> float:
    return {"good": 0.25, "bad": -0.25, "dull,": -0.1}.get(word, 0.001)


def label_of(text: str, labels: list[str]) -> str:
    score = min(max(0.5 + sum(map(effect, text.split())), 0), 0.999)
    return labels[int(score * len(labels))]


class StandIn:
    """A server with the interface of ours, that a test can make answer anything.

    Attributes:
        adapters: What it says is loaded.
        key: What it asks for, or "".
        odd: Answers that come first, one for each prediction: (status, headers, body).
        most: Texts of a request; more are 413.
        refused: Texts that spoil a request, and the status of what is answered then.
        seconds: That a prediction takes.
        asked: Bodies of all predictions, in the order in which they came.
    """

    def __init__(self) -> None:
        self.reset()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                stand_in.get(self)

            def do_POST(self) -> None:
                stand_in.post(
                    self, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                )

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}/"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,))
        self.thread.start()

    def reset(self) -> None:
        self.adapters = [make_adapter("films", ["neg", "pos"]), make_adapter("stars", STARS)]
        self.key, self.most, self.seconds = "", 1000, 0.0
        self.odd: list[tuple[int, dict[str, str], Any]] = []
        self.refused: dict[str, int] = {}
        self.asked: list[dict[str, Any]] = []

    def stop(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def get(self, request: BaseHTTPRequestHandler) -> None:
        name = {"/": "index.html"}.get(request.path, request.path[1:])
        if name == "adapters":
            base = {"name": "bundled", "sha256": "0" * 64}
            self._send(
                request,
                *(self._locked(request) or (200, {}, {"base": base, "adapters": self.adapters})),
            )
        else:
            kind = {"html": "text/html; charset=utf-8", "css": "text/css", "js": "text/javascript"}[
                name.split(".")[1]
            ]
            self._send(request, 200, {"Content-Type": kind}, PAGE.joinpath(name).read_bytes())

    def post(self, request: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        time.sleep(self.seconds)
        if locked := self._locked(request):
            self._send(request, *locked)
            return
        self.asked.append(body)
        loaded = {adapter["name"]: adapter for adapter in self.adapters}
        if self.odd:
            self._send(request, *self.odd.pop(0))
        elif len(body["texts"]) > self.most:
            self._send(
                request,
                413,
                {},
                {"error": "the body is longer than allowed", "error_type": "TooLarge"},
            )
        elif spoilt := [text for text in body["texts"] if text in self.refused]:
            self._send(request, self.refused[spoilt[0]], {}, {"error": f"'{spoilt[0]}' is refused"})
        elif body["adapter"] not in loaded:
            error = f"adapter: '{body['adapter']}' is not loaded; there is {', '.join(loaded)}"
            self._send(request, 404, {}, {"error": error, "error_type": "NotFound"})
        else:
            labels = loaded[body["adapter"]]["labels"]
            found = [self._answer(text, labels, body) for text in body["texts"]]
            self._send(request, 200, {}, {"adapter": body["adapter"], "predictions": found})

    def _answer(self, text: str, labels: list[str], body: dict[str, Any]) -> dict[str, Any]:
        best = label_of(text, labels)
        rest = [
            {"label": label, "score": 0.1 / (len(labels) - 1)} for label in labels if label != best
        ]
        top = [{"label": best, "score": 0.9}, *rest][: body.get("top_k", 1)]
        words = text.split() if body.get("explain") else None
        effects = [effect(word) for word in words] if words else None
        label_set = None
        if "coverage" in body:
            label_set = labels[:2] if "dull" in text else [best]
        return {
            **top[0],
            "label_set": label_set,
            "is_certain": label_set and len(label_set) == 1,
            "top_k": top,
            "truncated": len(text) > 1000,
            "words": words,
            "effects": effects,
        }

    def _locked(self, request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], Any] | None:
        if self.key and request.headers["Authorization"] != f"Bearer {self.key}":
            return 401, {}, {"error": "this server needs its key", "error_type": "Unauthorized"}
        return None

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: Any
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        request.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
        for name, value in {**given, "Content-Security-Policy": POLICY}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(content)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs the Python package playwright"
    )
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs a browser: install the Debian package chromium")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def one_server() -> Iterator[StandIn]:
    server = StandIn()
    yield server
    server.stop()


@pytest.fixture
def server(one_server: StandIn) -> StandIn:
    one_server.reset()
    return one_server


@pytest.fixture
def make_page(browser: Any) -> Iterator[Any]:
    """A function that opens an address; after the test nothing may have left it, and nothing been complained of."""
    contexts, strays, faults = [], [], []

    def make(address: str, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on(
            "request",
            lambda r: (
                None if r.url.startswith((address, "blob:", "data:")) else strays.append(r.url)
            ),
        )
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console",
            lambda said: faults.append(said.text) if said.type in ("error", "warning") else None,
        )
        page.goto(address)
        return page

    yield make
    for context in contexts:
        context.close()
    assert strays == []
    # The browser itself notes every answer from 400 on; those that a test wanted are seen by the test.
    assert [fault for fault in faults if not fault.startswith("Failed to load resource")] == []


@pytest.fixture
def page(server: StandIn, make_page: Any) -> Any:
    found = make_page(server.address)
    found.wait_for_selector("#adapter option", state="attached")
    return found


def predict(page: Any, text: str) -> None:
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("button", name="Predict").click()
    page.wait_for_selector("#answers[aria-busy=false]", state="attached")


def wait_for_alert(page: Any, text: str) -> None:
    page.wait_for_function(
        "text => document.querySelector('[role=alert]').textContent.includes(text)", arg=text
    )


def choose(page: Any, name: str, content: bytes | str) -> None:
    content = content.encode() if isinstance(content, str) else content
    page.set_input_files("#file", {"name": name, "mimeType": "text/csv", "buffer": content})


def label(page: Any) -> None:
    page.get_by_role("button", name=re.compile("^(Label|Go on)$")).click()
    page.wait_for_selector("#table-status:text-matches('^(Done|Stopped)')")


def download(page: Any) -> tuple[str, bytes]:
    with page.expect_download() as found:
        page.get_by_role("button", name="Download").click()
    return found.value.suggested_filename, found.value.path().read_bytes()


def downloaded_rows(page: Any) -> list[list[str]]:
    return list(csv.reader(io.StringIO(download(page)[1].decode("utf-8-sig"), newline="")))


def test_the_page_is_small_and_self_contained():
    sources = {
        name: PAGE.joinpath(name).read_text(encoding="utf-8")
        for name in ("index.html", "page.css", "page.js")
    }
    assert sum(len(text.encode()) for text in sources.values()) < 35_000
    # 'http://www.w3.org/2000/svg' is the name of a language, which nothing fetches.
    joined = "".join(sources.values()).replace("http://www.w3.org/2000/svg", "")
    assert (
        re.findall(
            r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write| style=| on\w+=",
            joined,
        )
        == []
    )


def test_a_text_gets_a_label_all_probabilities_and_the_words_that_drove_it(page):
    predict(page, "a good film so good and one dull, hour")
    card = page.locator(".answer")
    assert card.locator("h3").inner_text() == "films"
    assert card.locator(".verdict").inner_text().split() == ["pos", "90.0", "%"]
    assert card.locator(".bars li").all_inner_texts() == ["pos\n90.0 %", "neg\n10.0 %"]
    assert page.get_by_role("status").first.inner_text() == "films: pos, 90.0 %"
    marks = [
        (mark.get_attribute("class"), mark.inner_text())
        for mark in card.locator(".words mark").all()
    ]
    assert marks == [
        ("for level-3", "good\u00a0+0.25"),
        ("for level-3", "good\u00a0+0.25"),
        ("against level-2", "dull,\u00a0\u22120.1"),
    ]
    lines = "element => getComputedStyle(element).textDecorationStyle"
    assert card.locator(".words .for bdi").first.evaluate(lines) == "solid"
    assert card.locator(".words .against bdi").evaluate(lines) == "dashed"


def test_without_show_why_the_model_is_asked_once(page, server):
    page.get_by_label("Show why").uncheck()
    predict(page, "good")
    assert page.locator(".why").count() == 0
    assert server.asked == [{"texts": ["good"], "adapter": "films", "top_k": 2, "explain": False}]


def test_label_sets_are_asked_for_where_an_adapter_has_them(server, make_page):
    server.adapters[0]["has_label_sets"] = True
    page = make_page(server.address)
    page.get_by_label("Compare with").select_option("stars")
    page.locator("#coverage").select_option("0.95")
    page.get_by_label("Show why").uncheck()
    predict(page, "good but dull")
    one, other = page.locator(".answer").all()
    assert "Cannot be ruled out: neg, pos. The answer is uncertain" in one.inner_text()
    assert other.locator(".set").count() == 0
    asked = {body["adapter"]: body.get("coverage") for body in server.asked}
    assert asked == {"films": 0.95, "stars": None}  # both are asked at once, in any order
    assert len(server.asked) == 2
    choose(page, "a.csv", "t\ngood\ndull\n")
    page.locator("#table-coverage").select_option("0.9")
    assert "label, score, label_set, and is_certain" in page.locator("#table-status").inner_text()
    label(page)
    assert [row[3:] for row in downloaded_rows(page)] == [
        ["label_set", "is_certain"],
        ['["pos"]', "true"],
        ['["neg","pos"]', "false"],
    ]


def test_without_label_sets_nothing_offers_them(page):
    assert not page.locator("#coverage").is_visible()
    assert not page.locator("#table-coverage").is_visible()


def test_two_adapters_answer_side_by_side(page):
    page.get_by_label("Compare with").select_option("stars")
    assert page.locator("#other-labels").inner_text() == f"Labels of stars: {', '.join(STARS)}"
    predict(page, "good")
    one, other = page.locator(".answer").all()
    assert [card.locator("h3").inner_text() for card in (one, other)] == ["films", "stars"]
    assert other.locator(".bars li").count() == 5
    assert one.bounding_box()["y"] == other.bounding_box()["y"]
    assert (
        page.get_by_role("status").first.inner_text() == "films: pos, 90.0 %; stars: good, 90.0 %"
    )


def test_an_example_is_one_click_away(page):
    page.get_by_role("button", name="a mixed review").click()
    page.wait_for_selector(".why")
    assert page.get_by_label("Text", exact=True).input_value().startswith("Not half as good")


def test_a_csv_comes_back_with_label_and_score(page, server):
    rows = [
        [str(i), f'"{i}" is {("good", "bad")[i % 2]} film,\nor so', "=1+1"] for i in range(1100)
    ]
    file = io.StringIO()
    csv.writer(file).writerows([["id", "review, in full", "note"], *rows])
    choose(page, "reviews.csv", "\ufeff" + file.getvalue())
    assert (
        page.get_by_label("Column of texts").locator("option:checked").inner_text()
        == "review, in full"
    )
    label(page)
    assert page.locator("#table-status").inner_text() == "Done: 1,100 labelled."
    assert page.locator("#counts li").all_inner_texts() == [
        "pos\n550 (50.0 %)",
        "neg\n550 (50.0 %)",
    ]
    assert "1,100 cells begin with" in page.locator("#formulas").inner_text()
    name, content = download(page)
    assert name == "reviews-labelled.csv"
    expected = io.StringIO()
    answers = [[label_of(row[1], ["neg", "pos"]), "0.9"] for row in rows]
    added = [row + answer for row, answer in zip(rows, answers, strict=True)]
    csv.writer(expected).writerows([["id", "review, in full", "note", "label", "score"], *added])
    assert content.decode() == "\ufeff" + expected.getvalue()
    assert len(server.asked) == 18
    assert max(len(body["texts"]) for body in server.asked) == 64


@pytest.mark.parametrize("num_labels", [20, 21, 1000])
def test_labels_that_are_left_out_are_counted(server, make_page, num_labels):
    names = [f"label {i}" for i in range(num_labels)]
    server.adapters = [make_adapter("many", names)]
    page = make_page(server.address)
    page.wait_for_selector("#adapter option", state="attached")
    predict(page, "good")
    others = page.get_by_text("other labels are less likely")
    assert others.all_inner_texts() == (
        [f"{num_labels - 20} other labels are less likely."] if num_labels > 20 else []
    )
    # Each text has another score, from 0 to 0.999 in steps of 0.05.
    texts = []
    for step in range(-10, 11):
        num_good = step % 2 + 2 * max(0, step)
        num_dull = (5 * num_good - step) // 2
        texts.append(" ".join(["good"] * num_good + ["dull,"] * num_dull + ["film"]))
    choose(page, "a.csv", "t\n" + "".join(f'"{text}"\n' for text in texts))
    label(page)
    num_found = len({label_of(text, names) for text in texts})
    counts = page.locator("#counts li").all_inner_texts()
    assert counts[20:] == ([f"and {num_found - 20} more"] if num_found > 20 else [])


TABLES = {
    "semicolon.csv": ('a;b\r\n1;"good; x"\r\n', 'a;b;label;score\r\n1;"good; x";pos;0.9\r\n'),
    "no_end.csv": ("a\ngood", "a,label,score\ngood,pos,0.9\n"),
    "blank_lines.csv": ("a,b\n\n1,good\n\n", "a,b,label,score\n1,good,pos,0.9\n"),
    "empty_cells.csv": ("a,b\n,\nx,bad\n", "a,b,label,score\n,,,\nx,bad,neg,0.9\n"),
    "quotes.csv": (
        'a,"b"\n"say ""bad ""x",5" disk\n',
        'a,b,label,score\n"say ""bad ""x","5"" disk",pos,0.9\n',
    ),
    "taken.csv": ("label,t\n1,good\n", "label,t,predicted_label,predicted_score\n1,good,pos,0.9\n"),
    "lines.txt": ('good, "x"\n\nbad', 'text,label,score\n"good, ""x""",pos,0.9\n,,\nbad,neg,0.9\n'),
    "unicode.csv": (
        "t\n\ufffd \u202egood \U0001f600\n",
        "t,label,score\n\ufffd \u202egood \U0001f600,pos,0.9\n",
    ),
}


def test_tables_of_all_kinds_keep_their_cells_and_their_form(page):
    for name, (content, expected) in TABLES.items():
        choose(page, name, content)
        page.wait_for_selector(f"#table-status:text('{name}')")
        label(page)
        assert page.locator("#progress").evaluate("bar => bar.value === bar.max")
        assert download(page)[1].decode() == expected


def test_another_column_can_be_chosen(page, server):
    choose(page, "a.csv", "long,short\na long text,good\n")
    page.get_by_label("Column of texts").select_option("short")
    label(page)
    assert server.asked[0]["texts"] == ["good"]
    page.get_by_label("Column of texts").select_option("long")
    assert page.get_by_role("button", name="Download").is_hidden()


REFUSED = [
    ("a.xlsx", b"PK", "a.xlsx: give a .csv with a header, or a .txt with one text a line."),
    ("a.csv", b"t\nna\xefve\n", "a.csv: cannot be read as UTF-8"),
    ("b.csv", b"", "b.csv: has no rows."),
    ("c.csv", b"t\n", "c.csv: has no rows."),
    ("d.csv", b"a,b\n1,2\n3\n", "d.csv: row 2 has 1 cells and the header 2"),
    ("e.csv", b'a,b\n1,"2\n', "Row 1: a quote opened in it is never closed."),
    ("f.csv", b'a,b\n1,"2"3\n', "Row 1: text follows a closing quote"),
    (
        "g.csv",
        b"a,b\r1,2\r",
        "Row 0: text follows a closing quote, or a carriage return stands alone.",
    ),
]


def test_a_file_that_cannot_be_read_is_refused_in_one_sentence(page):
    for name, content, sentence in REFUSED:
        choose(page, name, content)
        wait_for_alert(page, sentence)
        assert page.locator("#table").is_hidden()


def test_a_dropped_file_is_taken_and_does_not_replace_the_page(page):
    page.evaluate("""() => {
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File(["t\\ngood\\n"], "dropped.csv"));
        for (const kind of ["dragover", "drop"]) {
            const event = new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true });
            if (document.body.dispatchEvent(event)) throw new Error(`${kind} was left to the browser`);
        }
    }""")
    page.wait_for_selector("#table-status:text('dropped.csv: 1 rows')")


DELAY = """() => {
    const read = Blob.prototype.arrayBuffer;
    Blob.prototype.arrayBuffer = async function () {
        if (this.name === "slow.csv") await new Promise((done) => { window.goOn = done; });
        const bytes = await read.call(this);
        if (this.name === "slow.csv") setTimeout(() => { window.read = true; }); // after the page had its turn
        return bytes;
    };
}"""


def test_a_file_read_while_rows_are_labelled_is_refused_in_words(page, server):
    page.evaluate(DELAY)
    server.seconds = 0.5
    choose(page, "old.csv", "t\n" + "good\n" * 70)
    page.wait_for_selector("#table-status:text('old.csv: 70 rows')")
    choose(page, "slow.csv", "t\n" + "bad\n" * 70)
    page.get_by_role("button", name="Label").click()
    page.evaluate("goOn()")
    wait_for_alert(
        page, "slow.csv: not opened while rows are labelled; choose it again after that."
    )
    page.wait_for_selector("#table-status:text('Done: 70 labelled.')")
    assert {tuple(row) for row in downloaded_rows(page)[1:]} == {("good", "pos", "0.9")}
    assert {text for body in server.asked for text in body["texts"]} == {"good"}


def test_of_two_files_the_newest_is_taken_however_long_the_other_is_read(page):
    page.evaluate(DELAY)
    choose(page, "slow.csv", b"na\xefve")
    choose(page, "new.csv", "t\ngood\n")
    page.wait_for_selector("#table-status:text('new.csv: 1 rows')")
    page.evaluate("goOn()")
    page.wait_for_function("() => window.read")
    assert page.locator("#table-status").inner_text().startswith("new.csv: 1 rows")
    assert page.locator("[role=alert]").inner_text() == ""


WATCH_RATE = """() => {
    window.rates = [];
    const rate = document.querySelector("#rate");
    const note = () => rates.push(rate.innerText);
    new MutationObserver(note).observe(rate, { childList: true, characterData: true, subtree: true });
}"""


def test_429_is_waited_out_and_nothing_is_lost(page, server):
    busy = {"error": "the queue is full", "error_type": "Overloaded"}
    server.odd = [
        (429, {"Retry-After": "1"}, busy),
        (429, {"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}, busy),
    ]
    choose(page, "a.csv", "t\n" + "good\n" * 200)
    page.evaluate(WATCH_RATE)
    page.get_by_role("button", name="Label").click()
    page.wait_for_selector("#table-status:text('Done: 200 labelled.')")
    assert "the queue is full Going on in 1 s." in page.evaluate("rates")
    assert [row[1] for row in downloaded_rows(page)[1:]] == ["pos"] * 200


def test_what_is_too_large_together_is_asked_in_smaller_parts(page, server):
    server.most = 10
    choose(page, "a.csv", "t\n" + "good\n" * 100)
    label(page)
    assert page.locator("#table-status").inner_text() == "Done: 100 labelled."
    assert [len(body["texts"]) for body in server.asked] == [64, 32, 16, *[8] * 12, 4]


def test_a_row_that_is_refused_alone_is_passed_over_and_named(page, server):
    server.refused = {"long": 413, "odd": 422}
    texts = ["good"] * 100
    texts[6], texts[40] = "long", "odd"
    choose(page, "a.csv", "\n".join(["t", *texts]))
    label(page)
    named = "Row 7: 'long' is refused. Row 41: 'odd' is refused."
    assert page.locator("#table-status").inner_text() == (
        f"Done: 98 labelled. 2 refused by the server, without a label. {named}"
    )
    expected = [[text, *(["pos", "0.9"] if text == "good" else ["", ""])] for text in texts]
    assert downloaded_rows(page)[1:] == expected
    assert len(server.asked[-1]["texts"]) == 59  # the rest goes on in large parts
    assert page.locator("[role=alert]").inner_text() == ""


def test_an_error_stops_a_table_and_it_goes_on_from_there(page, server):
    answer = {
        "adapter": "films",
        "predictions": [{"label": "pos", "score": 0.9, "top_k": [], "truncated": False}] * 64,
    }
    server.odd = [
        (200, {}, answer),
        (503, {}, {"error": "this server is stopping", "error_type": "Unhealthy"}),
    ]
    choose(page, "a.csv", "t\n" + "good\n" * 100)
    label(page)
    wait_for_alert(page, "Rows 65 to 100: this server is stopping")
    assert (
        page.locator("#table-status").inner_text() == "Stopped after 64 of 100 rows: 64 labelled."
    )
    assert [row[1] for row in downloaded_rows(page)[1:]] == ["pos"] * 64 + [""] * 36
    page.get_by_role("button", name="Go on").click()
    page.wait_for_selector("#table-status:text('Done: 100 labelled.')")
    assert [len(body["texts"]) for body in server.asked] == [64, 36, 36]
    assert page.locator("[role=alert]").inner_text() == ""


def test_a_table_can_be_cancelled_and_gone_on_with(page, server):
    server.seconds = 0.5
    choose(page, "a.csv", "t\n" + "good\n" * 400)
    page.get_by_role("button", name="Label").click()
    page.wait_for_selector("#counts li")
    assert page.get_by_label("Column of texts").is_disabled()
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_selector("#table-status:text('Stopped after')")
    assert page.evaluate("document.activeElement.textContent") == "Go on"
    server.seconds = 0.0
    label(page)
    page.wait_for_selector("#table-status:text('Done: 400 labelled.')")
    assert len(downloaded_rows(page)) == 401


def test_an_adapter_that_is_gone_is_not_replaced_unseen(page, server):
    page.get_by_label("Compare with").wait_for()
    server.adapters = [make_adapter("new", ["a", "b"])]
    predict(page, "good")
    wait_for_alert(page, "adapter: 'films' is not loaded; there is new")
    assert page.locator("#adapter option").all_inner_texts() == ["new", "films"]
    assert page.locator("#adapter").input_value() == "films"


def test_texts_labels_names_and_cells_are_never_read_as_html(server, make_page):
    server.adapters = [
        make_adapter(HOSTILE, [HOSTILE, "</script>"]),
        make_adapter("=1+1", ["a", "b"]),
    ]
    page = make_page(server.address)
    page.get_by_label("Compare with").select_option("=1+1")
    predict(page, f"bad {HOSTILE}")
    assert page.locator(".verdict bdi").first.inner_text() == HOSTILE
    assert HOSTILE in page.locator(".words").first.inner_text().replace("\u00a0", " ")
    choose(page, "<b>.csv", f'"{HOSTILE}"\nbad {HOSTILE}\n')
    label(page)
    assert page.locator("#preview td").first.inner_text() == f"bad {HOSTILE}"
    assert downloaded_rows(page) == [
        [HOSTILE, "label", "score"],
        [f"bad {HOSTILE}", HOSTILE, "0.9"],
    ]
    server.odd = [(422, {}, {"error": HOSTILE})]
    predict(page, "good")
    wait_for_alert(page, HOSTILE)
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1
    assert page.title() == "lora_sentiment"


def test_a_key_is_asked_for_and_kept_in_memory_only(server, make_page):
    server.key = "correct"
    page = make_page(server.address)
    wait_for_alert(page, "this server needs its key")
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("wrong")
    with page.expect_response("**/adapters"):
        page.keyboard.press("Enter")
    wait_for_alert(page, "this server needs its key")
    page.get_by_label("API key").fill("correct")
    page.keyboard.press("Enter")
    page.wait_for_selector("#adapter option", state="attached")
    assert page.get_by_label("API key").is_hidden()
    assert page.locator("[role=alert]").inner_text() == ""
    server.key = "changed"
    page.get_by_label("Text", exact=True).fill("good")
    page.get_by_role("button", name="Predict").click()
    page.get_by_label("API key").fill("changed")
    page.keyboard.press("Enter")
    page.wait_for_selector(".why")  # what was asked is answered, without asking again
    assert page.evaluate("[document.cookie, localStorage.length, sessionStorage.length]") == [
        "",
        0,
        0,
    ]
    page.reload()
    wait_for_alert(page, "this server needs its key")


def test_an_error_is_shown_in_the_servers_words(page, server):
    refused = (422, {}, {"error": "texts[0]: too long", "error_type": "Validation"})
    server.odd = [refused, (502, {"Content-Type": "text/html"}, b"<h1>no</h1>")]
    for sentence in ("texts[0]: too long", "The server answered 502 Bad Gateway"):
        predict(page, "good")
        wait_for_alert(page, sentence)
    predict(page, "good")
    assert page.locator("[role=alert]").inner_text() == ""


def test_what_cannot_be_explained_is_predicted_all_the_same(page, server):
    predict(page, "good")
    server.odd = [(200, {}, {"predictions": [server._answer("bad", ["neg", "pos"], {"top_k": 2})]}),
                  (422, {}, {"error": "texts[0]: found 9,000 words", "error_type": "Validation"})]  # fmt: skip
    predict(page, "bad")
    wait_for_alert(page, "found 9,000 words")
    assert page.locator(".verdict bdi").inner_text() == "neg"


def test_a_server_that_is_gone_is_said_to_be(page):
    page.route("**/predict", lambda route: route.abort())
    predict(page, "good")
    wait_for_alert(page, "The server does not answer. Is it still running?")


@pytest.fixture
def our_server(toy_adapter: Path) -> Iterator[str]:
    """The address of a real server with the toy's adapter."""
    from lora_sentiment.serve.pool import load_pool

    with running(load_pool([toy_adapter], watch=None, base=None, dtype="float32")) as server:
        yield f"{server.address}/"


def test_our_own_server_and_the_page_fit_together(our_server, toy_adapter, make_page):
    from lora_sentiment import load
    from lora_sentiment.commands.explain import explain

    classifier = load(toy_adapter)
    texts = [
        f"the {word} film {i}, so it was" for i in range(50) for word in ("lovely", "awful", "")
    ]
    page = make_page(our_server)
    predict(page, texts[0])
    expected = explain(classifier, texts[0])
    assert page.locator(".verdict").inner_text().split() == [
        expected.label,
        f"{expected.score:.1%}"[:-1],
        "%",
    ]
    largest = max(range(len(expected.words)), key=lambda i: abs(expected.effects[i]))
    assert expected.words[largest] in page.locator(".words .level-3 bdi").all_inner_texts()
    file = io.StringIO()
    csv.writer(file).writerows([["t"], *([text] for text in texts)])
    choose(page, "a.csv", file.getvalue())
    label(page)
    labels = [prediction.label for prediction in classifier.predict(texts)]
    assert [row[:2] for row in downloaded_rows(page)[1:]] == [
        list(row) for row in zip(texts, labels, strict=True)
    ]


def make_fake(name: str, labels: Any, **options: Any) -> Any:
    return fake_pool.make_adapter(name, labels, **options)


EVERY_TASK = {
    "one": make_fake("one", ["no", "yes"]),
    "many": make_fake(
        "many",
        "xyz",
        task=find_task("multi_label"),
        calibration={"thresholds": [0.2, 0.5, 0.8]},
    ),
    "value": make_fake("value", ["stars"], task=find_task("regression")),
    "answers": make_fake("answers", ["no", "yes"], reads_pairs=True),
}


@pytest.mark.parametrize("name", EVERY_TASK)
def test_the_page_shows_the_answer_of_every_task_and_of_a_pair(name, make_page):
    adapter = EVERY_TASK[name]
    pairs = [("a good film", "the bad film"), ("bad film", "good"), ("the", "a film")]
    texts = pairs if adapter.encoder.reads_pairs else [first for first, _ in pairs]
    expected = make_classifier(adapter).predict(texts)
    told = []
    for row in expected:
        value = None if row.value is None else f"{row.value:.4g}"
        told.append(row.label or value or ", ".join(row.labels or []) or "no label")
    with running(fake_pool.FakePool(*EVERY_TASK.values())) as server:
        page = make_page(f"{server.address}/")
        page.wait_for_selector("#adapter option", state="attached")
        page.locator("#adapter").select_option(name)
        second = page.get_by_label("Second text", exact=True)
        assert second.is_visible() == adapter.encoder.reads_pairs
        if adapter.encoder.reads_pairs:
            second.fill(pairs[0][1])
        predict(page, pairs[0][0])
        assert page.locator(".verdict bdi").inner_text() == told[0]
        words = " ".join(pairs[0] if adapter.encoder.reads_pairs else pairs[0][:1])
        assert page.locator(".words").inner_text().split()[0] == words.split()[0]
        choose(page, "a.csv", "q,a\n" + "".join(f"{first},{second}\n" for first, second in pairs))
        page.locator("#table-adapter").select_option(name)
        page.locator("#column").select_option("0")
        if adapter.encoder.reads_pairs:
            page.locator("#pair-column").select_option("1")
        label(page)
        shown = page.locator("#preview tbody td:nth-child(2)").all_inner_texts()
        header, *rows = downloaded_rows(page)
    assert shown == told
    assert header[2:] == list(adapter.task.answer_columns)
    for row, own in zip(rows, expected, strict=True):
        cells = adapter.task.to_columns(adapter.task.get_answer(own))
        assert row[2] == str(cells[0]).replace('", "', '","') or float(row[2]) == cells[0]


def test_everything_works_with_the_keyboard_alone(page):
    page.on("filechooser", lambda _: None)  # takes effect a while after it is asked for
    page.keyboard.press("Tab")
    page.keyboard.type("a good film")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".why")
    order = []
    for _ in range(8):
        page.keyboard.press("Tab")
        order.append(
            page.evaluate("document.activeElement.id || document.activeElement.textContent")
        )
    examples = ["a mixed review", "a warm one", "a message"]
    assert order == [*examples, "adapter", "other", "explain", "predict", "file"]
    assert (
        page.locator("#drop").evaluate("element => getComputedStyle(element).outlineStyle")
        == "solid"
    )
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(
        {"name": "a.csv", "mimeType": "text/csv", "buffer": b"id,t\n1,good film\n"}
    )
    page.wait_for_selector("#preview tbody tr")
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "start"
    page.keyboard.press("Enter")
    page.wait_for_selector("#table-status:text('Done')")
    with page.expect_download() as found:
        page.keyboard.press("Enter")  # the focus went where the work goes on
    assert found.value.suggested_filename == "a-labelled.csv"


PHONE = {"viewport": {"width": 360, "height": 740}}


@pytest.mark.parametrize("options", [{"color_scheme": "dark"}, PHONE], ids=["dark", "phone"])
def test_axe_finds_no_serious_fault(server, make_page, options):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="needs axe-playwright-python"
    ).Axe()
    server.adapters[0]["has_label_sets"] = True
    page = make_page(server.address, reduced_motion="reduce", **options)
    page.locator("#coverage").select_option("0.95")
    page.get_by_label("Compare with").select_option("stars")
    predict(page, "a good film, so good, and bad and dull, too")
    choose(page, "a.csv", "t\n-good\nbad\n")
    label(page)
    server.key = "key"
    page.get_by_role("button", name="Predict").click()
    page.get_by_label("API key").wait_for()
    found = axe.run(page).response["violations"]
    assert [
        (fault["id"], fault["impact"], [node["html"] for node in fault["nodes"]]) for fault in found
    ] == []


def test_a_phone_shows_everything_without_scrolling_sideways(server, make_page):
    server.adapters[0]["name"] = "a-very-long-name-of-an-adapter-" * 4
    page = make_page(server.address, **PHONE)
    predict(page, "good " + "a" * 500)
    choose(page, "a.csv", "t\n" + "a" * 500 + "\n")
    label(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_less_motion_is_honoured(server, make_page):
    page = make_page(server.address, reduced_motion="reduce")
    predict(page, "good")
    duration = "bar => getComputedStyle(bar).transitionDuration"
    assert page.locator(".fill").first.evaluate(duration) == "0s"
