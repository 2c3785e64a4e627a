// The page of `lora-sentiment serve`. What comes from users, files and the server becomes text nodes, never HTML.

const $ = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString("en");

/** Return a new element; strings among its content become text nodes. */
function make(tag, className, ...content) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...content);
  return element;
}

/** Return a probability in per cent, never rounded to a certainty. */
function percent(share) {
  if (share == null) return "";
  if (share > 0.9995 && share < 1) return "> 99.9 %";
  return share < 0.0005 && share > 0 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
}

/** Return the answer of an adapter of any task as text: its label, its labels, or its value. */
function tell({ label, labels, value, error }) {
  if (error) return error;
  if (labels) return labels.join(", ") || "no label";
  return label ?? String(Number(value.toPrecision(4)));
}

/** Return what an adapter is asked: a text, or a pair where it reads pairs. */
function makeInput(adapter, text, pair) {
  return readsPairs(adapter) ? { text, text_pair: pair } : text;
}

function readsPairs(adapter) {
  return Boolean(adapters.get(adapter)?.reads_pairs);
}

/** Show an error, which screen readers say at once; "" takes it away. */
function fail(error) {
  $("error").textContent = error.message ?? error;
}

function refuse(fault) {
  throw new Error(fault);
}

/** Wait for what `start` begins, unless cancelled meanwhile. */
function wait(start, signal) {
  return new Promise((resolve, reject) => {
    start(resolve);
    signal?.addEventListener("abort", () => reject(signal.reason));
  });
}

// The server

let key = ""; // in memory only
let loaded = ""; // the last answer of GET /adapters
let adapters = new Map(); // by name

/** Ask the server, and the user for the API key where the server wants one. Throws the server's own sentence. */
async function ask(path, { body, signal } = {}) {
  for (;;) {
    const sent = key;
    const headers = { "Content-Type": "application/json", ...(sent && { Authorization: `Bearer ${sent}` }) };
    const request = { method: body ? "POST" : "GET", headers, body: JSON.stringify(body), signal, cache: "no-store" };
    const response = await fetch(path, request).catch((error) => {
      throw signal?.aborted ? error : new Error("The server does not answer. Is it still running?");
    });
    const answer = await response.json().catch(() => null);
    signal?.throwIfAborted();
    if (response.ok && answer) return answer;
    const { status, statusText } = response;
    const message = answer?.error ?? `The server answered ${status} ${statusText}`;
    const seconds = Math.max(1, Number(response.headers.get("Retry-After")) || 1);
    if (status !== 401) throw Object.assign(new Error(message), { status, seconds });
    if (key === sent) await newKey(message, signal);
  }
}

function newKey(message, signal) {
  fail(message);
  $("key-form").hidden = false;
  $("key").focus();
  return wait((done) => on($("key-form"), "submit", done, { once: true }), signal);
}

async function loadAdapters() {
  const answer = await ask("adapters");
  if (JSON.stringify(answer) === loaded) return; // an open list of choices must not close
  loaded = JSON.stringify(answer);
  adapters = new Map(answer.adapters.map((adapter) => [adapter.name, adapter]));
  const { size } = adapters;
  $("served").replaceChildren(`${size} adapter${size === 1 ? "" : "s"} on base `, make("bdi", "", answer.base.name));
  for (const select of [$("adapter"), $("other"), $("table-adapter")]) {
    const chosen = select.value; // stays when it is gone: no other may take its place unseen
    const names = [...new Set([...adapters.keys(), chosen])].filter(Boolean);
    const nothing = select === $("other") ? [new Option("nothing", "")] : [];
    select.replaceChildren(...nothing, ...names.map((name) => new Option(name, name, false, name === chosen)));
  }
  $("compare").hidden = size < 2;
  $("sets").hidden = $("table-sets").hidden = ![...adapters.values()].some((own) => own.has_label_sets);
  $("predict").disabled = $("start").disabled = size === 0;
  showLabels();
  fail(size ? "" : "No adapter is loaded yet.");
}

function showLabels() {
  for (const id of ["adapter", "other"]) {
    const { name, labels } = adapters.get($(id).value) ?? {};
    const shown = labels?.slice(0, MOST_LABELS).join(", ");
    $(`${id}-labels`).textContent = name ? `Labels of ${name}: ${shown}${labels.length > MOST_LABELS ? ", ..." : ""}` : "";
  }
  const pairs = ["adapter", "other"].some((id) => readsPairs($(id).value));
  Object.assign($("text-pair"), { hidden: !pairs, disabled: !pairs, required: pairs });
  $("examples").hidden = pairs;
}

/** Return the coverage that is chosen, as a part of a request, where the adapter has label sets. */
function takeCoverage(id, adapter) {
  const coverage = Number($(id).value);
  return coverage && adapters.get(adapter)?.has_label_sets ? { coverage } : {};
}

/** Do what a user asked for and show its error; where an adapter is gone, look what is loaded. */
async function attempt(work) {
  try {
    await work();
  } catch (error) {
    if (error.name === "AbortError") return;
    if (error.status === 404) await loadAdapters().catch(() => {}); // the first error is the one to show
    fail(error);
  }
}

// One text

const MOST_LABELS = 20;
let asked = new AbortController();

async function predict() {
  asked.abort(); // an older answer must not come after a newer one
  asked = new AbortController();
  const { signal } = asked;
  const text = $("text").value;
  const names = [...new Set([$("adapter").value, $("other").value])].filter(Boolean);
  fail("");
  $("answers").ariaBusy = "true";
  try {
    const answers = await Promise.all(names.map((name) => predictOne(text, name, false, signal)));
    const order = answers[0].top_k.map(({ label }) => label);
    const cards = answers.map((answer, i) => makeCard(names[i], answer, order));
    $("answers").replaceChildren(...cards);
    cards[0].querySelector(".bars").scrollIntoView({ block: "nearest" });
    $("said").textContent = answers.map((own, i) => `${names[i]}: ${[tell(own), percent(own.score)].filter(Boolean).join(", ")}`).join("; ");
    if (!$("explain").checked) return;
    const explained = await Promise.all(names.map((name) => predictOne(text, name, true, signal)));
    explained.forEach((answer, i) => answer.words && cards[i].append(makeWhy(answer)));
  } finally {
    if (!signal.aborted) $("answers").ariaBusy = "false";
  }
}

async function predictOne(text, adapter, explain, signal) {
  const body = { texts: [makeInput(adapter, text, $("text-pair").value)], adapter, top_k: Math.min(adapters.get(adapter)?.labels.length ?? 1, MOST_LABELS), explain, ...takeCoverage("coverage", adapter) };
  const start = performance.now();
  const { predictions } = await ask("predict", { body, signal });
  return { top_k: [], ...predictions[0], milliseconds: Math.round(performance.now() - start) };
}

function makeCard(adapter, answer, order) {
  const { label, labels, value, score, top_k, label_set, is_certain, truncated, milliseconds } = answer;
  const time = make("span", "soft number", `${count(milliseconds)} ms`);
  const head = make("header", "", make("h3", "", make("bdi", "", adapter)), time);
  const verdict = make("p", "verdict", make("bdi", "", tell(answer)), make("span", "number", percent(score)));
  // Two adapters with the same labels show them in the same order.
  const same = order.length === top_k.length && top_k.every((own) => order.includes(own.label));
  const shown = same ? order.map((first) => top_k.find((own) => own.label === first)) : top_k;
  const best = (own) => own.label === label || Boolean(labels?.includes(own.label));
  const bars = value == null ? shown.map((own) => makeBar(own.label, own.score, percent(own.score), best(own))) : [];
  const card = make("article", "card answer", head, verdict, make("ol", "bars", ...bars));
  const others = (adapters.get(adapter)?.labels.length ?? 0) - top_k.length;
  if (top_k.length && others > 0) card.append(make("p", "soft", `${count(others)} other labels are less likely.`));
  if (label_set) {
    const set = make("bdi", "", label_set.join(", ") || "no label");
    card.append(make("p", "set", "Cannot be ruled out: ", set, is_certain ? "." : ". The answer is uncertain: this is not one label."));
  }
  if (truncated) card.append(make("p", "soft", "The text is longer than this adapter reads, and was cut."));
  return card;
}

function makeBar(label, share, text, best) {
  const fill = make("span", "fill");
  fill.style.width = `${100 * share}%`;
  const number = make("span", "number", text);
  return make("li", best ? "best" : "", make("bdi", "", label), make("span", "track", fill), number);
}

const LEVELS = 3;
const MARKED = 0.1; // share of the largest effect below which a word stays unmarked, as in explain.py

function makeWhy({ top_k, value, words, effects }) {
  const { label } = top_k[0];
  const largest = effects.reduce((most, effect) => Math.max(most, Math.abs(effect)), 0);
  const line = make("p", "words");
  line.dir = "auto";
  words.forEach((word, i) => {
    const size = Math.abs(effects[i]);
    const number = `${effects[i] < 0 ? "\u2212" : "+"}${Number(size.toPrecision(2))}`;
    const level = largest && size / largest >= MARKED ? Math.min(LEVELS, 1 + Math.floor((size / largest) * LEVELS)) : 0;
    line.append(level ? makeMark(effects[i] > 0 ? "for" : "against", level, word, number) : word, " ");
  });
  const signs = [makeMark("for", 2, "for", "+"), " ", makeMark("against", 2, "against", "\u2212"), " "];
  const what = value == null ? "its probability" : "it";
  const rest = `: how far ${what} falls (+) or rises (\u2212) without the word; small effects are unmarked`;
  return make("div", "why", line, make("p", "soft", ...signs, make("bdi", "", label), rest));
}

function makeMark(side, level, word, number) {
  return make("mark", `${side} level-${level}`, make("bdi", "", word), "\u00a0", make("small", "number", number));
}

// A whole table

const MOST_TEXTS = 64; // of one request
const MOST_CHARACTERS = 50_000;
const PREVIEW = 5; // rows shown, and refused rows named
let table = null; // as openFile and startAnew make it
let running = null; // what cancels it
let opening = null; // the newest file, until rows are labelled

/** Return the rows of a csv, each a list of cells, after RFC 4180. */
function parseTable(text, separator) {
  const plain = new RegExp(`[^${separator}\\r\\n]*`, "y");
  const rows = [];
  for (let at = 0, cells = []; ; ) {
    if (text[at] === '"') {
      let end = text.indexOf('"', at + 1);
      while (end >= 0 && text[end + 1] === '"') end = text.indexOf('"', end + 2);
      if (end < 0) refuse(`Row ${rows.length}: a quote opened in it is never closed.`);
      cells.push(text.slice(at + 1, end).replaceAll('""', '"'));
      at = end + 1;
    } else {
      plain.lastIndex = at;
      cells.push(plain.exec(text)[0]);
      at = plain.lastIndex;
    }
    if (text[at] === separator) {
      at += 1;
      continue;
    }
    const newline = text.startsWith("\r\n", at) ? 2 : 1;
    if (newline === 1 && at < text.length && text[at] !== "\n") {
      refuse(`Row ${rows.length}: text follows a closing quote, or a carriage return stands alone.`);
    }
    rows.push(cells);
    cells = [];
    at += newline;
    if (at >= text.length) return rows;
  }
}

/** Read a file into `table`. */
async function openFile(file) {
  const { name } = file;
  fail("");
  opening = running ? null : file;
  const check = () => opening ?? refuse(`${name}: not opened while rows are labelled; choose it again after that.`);
  check();
  if (!/\.(csv|txt)$/i.test(name)) refuse(`${name}: give a .csv with a header, or a .txt with one text a line.`);
  const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  const whole = await file.arrayBuffer().then((bytes) => decoder.decode(bytes)).catch(() => null);
  if (check() !== file) return; // another was chosen meanwhile
  if (whole === null) refuse(`${name}: cannot be read as UTF-8; save it as that.`);
  const mark = whole.startsWith("\ufeff") ? "\ufeff" : "";
  const text = whole.slice(mark.length);
  const first = text.split("\n", 1)[0];
  const separator = first.includes(";") && !first.includes(",") ? ";" : ",";
  const newline = first.endsWith("\r") ? "\r\n" : "\n";
  const lines = () => ["text", ...text.replace(/\r?\n$/, "").split(/\r?\n/)].map((line) => [line]);
  let rows = /csv$/i.test(name) ? parseTable(text, separator) : lines();
  if (rows[0].length > 1) rows = rows.filter((cells) => cells.length > 1 || cells[0]); // a blank line is no row
  const header = rows.shift();
  const odd = rows.findIndex((cells) => cells.length !== header.length);
  const found = `${name}: row ${odd + 1} has ${rows[odd]?.length} cells and the header ${header.length}`;
  if (odd >= 0) refuse(`${found}; a cell that holds "${separator}" needs quotes.`);
  if (!rows.length) refuse(`${name}: has no rows.`);
  table = { name, header, rows, separator, newline, mark };
  const lengths = header.map((_, i) => rows.slice(0, 100).reduce((sum, cells) => sum + cells[i].length, 0));
  const longest = [...lengths.keys()].sort((one, other) => lengths[other] - lengths[one]); // texts are long
  for (const [id, chosen] of [["column", longest[0]], ["pair-column", longest[1] ?? longest[0]]]) {
    $(id).replaceChildren(...header.map((title, i) => new Option(title || `column ${i + 1}`, i)));
    $(id).value = chosen;
  }
  $("table").hidden = false;
  startAnew();
}

/** Forget the answers: the file, the column or the adapter is another. */
function startAnew() {
  let prefix = "";
  const { answer_columns: answers = ["label", "score"] } = adapters.get($("table-adapter").value) ?? {};
  $("pair-field").hidden = !readsPairs($("table-adapter").value);
  const sets = takeCoverage("table-coverage", $("table-adapter").value).coverage ? ["label_set", "is_certain"] : [];
  const own = [...answers, ...sets];
  while (own.some((title) => table.header.includes(prefix + title))) prefix += "predicted_";
  const titles = own.map((title) => prefix + title);
  Object.assign(table, { own, titles, answers: [], refused: [], next: 0, cut: 0, sums: new Map() });
  const [size, added] = [count(table.rows.length), new Intl.ListFormat("en").format(titles)];
  $("table-status").textContent = `${table.name}: ${size} rows; gets the columns ${added}.`;
  $("formulas").textContent = $("rate").textContent = "";
  $("progress").hidden = true;
  showRunning(false);
  showRows();
}

function showRows() {
  const shown = table.rows.slice(0, PREVIEW).map((cells, i) => {
    const { score } = table.answers[i] ?? {};
    const label = table.answers[i] ? tell(table.answers[i]) : "";
    const clip = make("bdi", "clip", cells[$("column").value].slice(0, 300));
    const number = make("td", "number", percent(score));
    return make("tr", "", make("td", "", clip), make("td", "", make("bdi", "", label)), number);
  });
  $("preview").tBodies[0].replaceChildren(...shown);
  const sums = [...table.sums].sort(([, one], [, other]) => other - one);
  const total = sums.reduce((sum, [, number]) => sum + number, 0);
  const text = (number) => `${count(number)} (${percent(number / total)})`;
  const bars = sums.slice(0, MOST_LABELS).map(([label, number]) => makeBar(label, number / total, text(number), true));
  if (sums.length > MOST_LABELS) bars.push(make("li", "soft", `and ${count(sums.length - MOST_LABELS)} more`));
  $("counts").replaceChildren(...bars);
}

/** Return the numbers of the next rows with a text in each column, as many as one request takes. */
function nextRows(table, columns, most) {
  const chosen = [];
  let characters = 0;
  for (let i = table.next; i < table.rows.length && chosen.length < most; i += 1) {
    const texts = columns.map((column) => table.rows[i][column]);
    if (!texts.every((text) => text.trim())) continue;
    characters += texts.join("").length;
    if (chosen.length && characters > MOST_CHARACTERS) break;
    chosen.push(i);
  }
  return chosen;
}

/** Label what has no label yet; `table` stays the one that was begun with. */
async function labelRows(table, signal) {
  const adapter = $("table-adapter").value;
  const columns = [$("column").value, ...(readsPairs(adapter) ? [$("pair-column").value] : [])];
  const [start, first] = [performance.now(), table.next];
  const show = () => {
    const speed = Math.round((1000 * (table.next - first)) / (performance.now() - start));
    $("rate").textContent = `${count(table.next)} of ${count(table.rows.length)} rows, ${count(speed)} rows/s`;
    $("progress").value = table.next;
    showRows();
  };
  let most = MOST_TEXTS;
  for (let chosen; (chosen = nextRows(table, columns, most)).length; ) {
    const texts = chosen.map((i) => makeInput(adapter, ...columns.map((column) => table.rows[i][column])));
    try {
      keep(table, chosen, await ask("predict", { body: { texts, adapter, ...takeCoverage("table-coverage", adapter) }, signal }));
    } catch (error) {
      const { status, message, seconds } = error;
      if (status === 429) {
        $("rate").textContent = `${message} Going on in ${seconds} s.`;
        await wait((done) => setTimeout(done, 1000 * seconds), signal);
      } else if ([413, 422, 504].includes(status) && chosen.length > 1) {
        most = Math.ceil(chosen.length / 2); // too much together, or one of them refused: fewer at a time
      } else if ([413, 422].includes(status)) {
        table.refused.push(`Row ${count(chosen[0] + 1)}: ${message}.`);
        table.next = chosen[0] + 1;
        most = MOST_TEXTS; // it was made small to find this row
      } else {
        if (status) error.message = `Rows ${count(chosen[0] + 1)} to ${count(chosen.at(-1) + 1)}: ${message}`;
        throw error;
      }
    }
    show();
  }
  table.next = table.rows.length;
  show();
}

function keep(table, chosen, { predictions }) {
  predictions.forEach((prediction, k) => {
    if (prediction.error) return;
    table.answers[chosen[k]] = prediction;
    for (const label of prediction.labels ?? [prediction.label].filter(Boolean)) {
      table.sums.set(label, (table.sums.get(label) ?? 0) + 1);
    }
    table.cut += prediction.truncated;
  });
  table.next = chosen.at(-1) + 1;
}

async function runTable() {
  running = new AbortController();
  opening = null;
  fail("");
  showRunning(true);
  Object.assign($("progress"), { max: table.rows.length, value: table.next, hidden: false });
  $("table-status").textContent = `Labelling ${count(table.rows.length)} rows.`;
  try {
    await labelRows(table, running.signal);
  } finally {
    running = null;
    showRunning(false);
    showOutcome();
  }
}

function showRunning(on) {
  const focused = [$("start"), $("cancel")].includes(document.activeElement);
  for (const id of ["file", "column", "pair-column", "table-adapter", "table-coverage"]) $(id).disabled = on;
  $("cancel").hidden = !on;
  $("download").hidden = on || !table.next;
  $("start").hidden = on || table.next >= table.rows.length;
  $("start").textContent = table.next ? "Go on" : "Label";
  // The focus must not be lost with its button.
  if (focused) ["cancel", "start", "download"].map($).find((button) => !button.hidden).focus();
}

function showOutcome() {
  const { rows, answers, refused, next, cut } = table;
  const labelled = answers.filter(Boolean).length;
  const part = next < rows.length ? `Stopped after ${count(next)} of ${count(rows.length)} rows` : "Done";
  const say = (number, words) => (number ? `${count(number)} ${words}` : "");
  const said = [
    `${part}: ${count(labelled)} labelled.`,
    say(next - labelled - refused.length, "have no text, and no label."),
    say(cut, "texts are longer than the adapter reads, and were cut."),
    say(refused.length, "refused by the server, without a label."),
    ...refused.slice(0, PREVIEW),
  ];
  $("table-status").textContent = said.filter(Boolean).join(" ");
  // A cell is written as it is: what it would do in a spreadsheet program, only its owner can judge.
  const risky = (cell) => /^[=+\-@\t\r]/.test(cell) && Number.isNaN(Number(cell));
  const advice = "a spreadsheet program may run them; import them as text.";
  const number = labelledRows().flat().filter(risky).length;
  $("formulas").textContent = say(number, `cells begin with = + - or @: ${advice}`);
}

function labelledRows() {
  const write = (cell) => (Array.isArray(cell) ? JSON.stringify(cell) : String(cell ?? ""));
  const own = (i) => table.own.map((title) => write(table.answers[i]?.[title]));
  return [[...table.header, ...table.titles], ...table.rows.map((cells, i) => [...cells, ...own(i)])];
}

function download() {
  const { name, separator, newline, mark } = table;
  const special = new RegExp(`["\\r\\n${separator}]`);
  const write = (cell) => (special.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell);
  const written = labelledRows().map((cells) => cells.map(write).join(separator) + newline);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([mark, ...written], { type: "text/csv" }));
  link.download = name.replace(/\.\w+$/, "-labelled.csv");
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// What a user does

const on = (target, ...what) => target.addEventListener(...what);
const take = (files) => files.length && attempt(() => openFile(files[0]));
const isFile = (event) => event.dataTransfer.types.includes("Files");

on($("key-form"), "submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  $("key").value = "";
  $("key-form").hidden = true;
  fail("");
});
on($("ask"), "submit", (event) => {
  event.preventDefault();
  attempt(predict);
});
on($("ask"), "change", showLabels);
on($("text"), "keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit($("predict"));
});
on($("examples"), "click", ({ target }) => {
  if (!target.dataset.text) return;
  $("text").value = target.dataset.text;
  $("ask").requestSubmit($("predict"));
});
on($("start"), "click", () => attempt(runTable));
on($("cancel"), "click", () => running.abort());
on($("download"), "click", download);
on($("column"), "change", startAnew);
on($("pair-column"), "change", startAnew);
on($("table-adapter"), "change", startAnew);
on($("table-coverage"), "change", startAnew);
on($("file"), "change", ({ target }) => {
  take([...target.files]);
  target.value = ""; // so that the same file can be chosen again
});
on(window, "dragover", (event) => {
  if (!isFile(event)) return;
  event.preventDefault(); // a file dropped beside must not replace the page
  $("drop").classList.add("over");
});
on(window, "dragleave", ({ relatedTarget }) => relatedTarget ?? $("drop").classList.remove("over"));
on(window, "drop", (event) => {
  if (!isFile(event)) return;
  event.preventDefault();
  $("drop").classList.remove("over");
  take([...event.dataTransfer.files]);
});
on(window, "focus", () => $("key-form").hidden && attempt(loadAdapters)); // adapters come and go
on(window, "beforeunload", (event) => running && event.preventDefault());

$("table-coverage").append(...$("coverage").cloneNode(true).children);
attempt(loadAdapters);
