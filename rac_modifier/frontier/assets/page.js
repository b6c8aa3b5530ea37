// The page: which rows are shown, which one is chosen, and everything that depends on it.
const $ = (id) => document.getElementById(id);
const STUDIES = JSON.parse($("data").textContent).studies;
const state = { study: 0, hidden: new Set(), find: "", bytes: "total", asked: "", chosen: "", problem: 0 };
let allTraces = null;

const study = () => STUDIES[state.study];
const groupsOf = () => [...new Set(study().rows.map((row) => row.group))];
const look = (group) => lookOf(group, groupsOf());
const rowOf = (label) => study().rows.find((row) => row.label === label);
const shown = () => study().rows.filter((row) =>
  !state.hidden.has(row.group) && row.label.toLowerCase().includes(state.find.toLowerCase()));
const benchmarksOf = () => [...new Set(study().rows.flatMap((row) => Object.keys(row.benchmarks)))];
const accuracyOf = (row, asked = state.asked) => (asked ? row.benchmarks[asked]?.accuracy : row.accuracy);
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
const small = (value) => (value < 0.001 && value > 0 ? value.toExponential(1) : value.toFixed(4));
const megabytes = (bytes) => (bytes / 1e6).toFixed(bytes < 1e8 ? 3 : 1);

// --- rows that are shown ---------------------------------------------------------------------------------------------
function drawGroups() {
  $("groups").replaceChildren(...groupsOf().map((group) => {
    const sign = make("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, markOf(look(group), 8, 8, 5));
    sign.style.cssText = "width: 0.9em; display: inline-block; vertical-align: -0.1em";
    const button = make("button", { type: "button", "aria-pressed": String(!state.hidden.has(group)), "data-group": group });
    button.append(sign, ` ${group}`);
    button.addEventListener("click", () => {
      if (!state.hidden.delete(group)) state.hidden.add(group);
      button.setAttribute("aria-pressed", String(!state.hidden.has(group)));
      drawRows();
    });
    return button;
  }));
}

function describe(row) {
  const lines = [row.label, `${megabytes(row.bytes.total)} MB in all, ${row.bytes.bits_per_weight.toFixed(2)} bits per weight`];
  if (row.accuracy) lines.push(`accuracy ${percent(row.accuracy[0])} (${percent(row.accuracy[1])} to ${percent(row.accuracy[2])})`);
  for (const [name, { accuracy }] of Object.entries(row.benchmarks)) lines.push(`${name} ${percent(accuracy[0])} (${percent(accuracy[1])} to ${percent(accuracy[2])})`);
  if (row.kl) lines.push(`KL ${small(row.kl[0])} nats per token, top-1 agreement ${percent(row.agreement[0], 2)}`);
  if (row.outside) lines.push(`KL outside of repetitions ${small(row.outside[0])}`);
  if (row.speed) lines.push(`${row.speed.toFixed(0)} tokens per second`);
  return `${lines.join("\n")}\n\n${row.recipe}`;
}

function events(element, row) {
  const choose = () => choosing(row.label);
  element.addEventListener("click", choose);
  element.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    choose();
    document.querySelector(`#charts [data-label="${CSS.escape(row.label)}"]`)?.focus();
  });
  const show = (x, y) => {
    const tip = $("tip");
    tip.textContent = describe(row);
    tip.hidden = false;
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - tip.offsetHeight - 8))}px`;
  };
  const hide = () => { $("tip").hidden = true; };
  element.addEventListener("pointermove", (event) => show(event.clientX, event.clientY));
  element.addEventListener("pointerleave", hide);
  element.addEventListener("focus", () => {
    const place = element.getBoundingClientRect();
    if (element.matches(":focus-visible")) show(place.right, place.bottom);
  });
  element.addEventListener("blur", hide);
}

function drawCharts() {
  const point = (row, x, [y, low, high]) => ({ x, y, low, high, row });
  const error = ([mean, stderr]) =>
    [Math.max(mean, 1e-9), ...(stderr === null ? [null, null] : [Math.max(mean - 1.96 * stderr, 1e-9), mean + 1.96 * stderr])];
  const axes = [["MB", "bytes", (row) => row.bytes[state.bytes] / 1e6, -1], ["tokens per second", "speed", (row) => row.speed, 1]];
  const figures = [];
  for (const [xLabel, name, x, better] of axes) {
    const rows = shown().filter((row) => x(row) !== null);
    const right = rows.filter((row) => accuracyOf(row)), apart = rows.filter((row) => row.kl);
    if (right.length) figures.push(chart(right.map((row) => point(row, x(row), accuracyOf(row))), {
      title: `Accuracy${state.asked && ` on ${state.asked}`} against ${name}`, xLabel, yLabel: "accuracy", format: (y) => percent(y, 0), within: [0, 1.001],
      better: [better, 1] }, look, state.chosen, events));
    if (apart.length) figures.push(chart(apart.map((row) => point(row, x(row), error(row.kl))), {
      title: `KL from the dense model against ${name}`, xLabel, yLabel: "KL in nats per token",
      format: (y) => String(Number(y.toPrecision(2))), log: true, better: [better, -1] }, look, state.chosen, events));
  }
  $("charts").replaceChildren(...figures, ...(figures.length ? [] : ["No row is shown."]));
}

const measured = (value) => value ? `${small(value[0])}${value[1] === null ? "" : ` ± ${small(value[1])}`}` : "-";
const COLUMNS = [
  ["row", (row) => row.label],
  ["MB", (row) => megabytes(row.bytes.total)],
  ["bits per weight", (row) => row.bytes.bits_per_weight.toFixed(2)],
  ["KL", (row) => measured(row.kl)],
  ["top-1", (row) => row.agreement ? percent(row.agreement[0], 2) : "-"],
  ["accuracy", (row) => row.accuracy ? percent(row.accuracy[0]) : "-"],
  ["95 %", (row) => row.accuracy ? `${(100 * row.accuracy[1]).toFixed(1)} to ${(100 * row.accuracy[2]).toFixed(1)}` : "-"],
  ["thinking", (row) => row.length.mean.toFixed(0)],
  ["cut", (row) => percent(row.length.cut)],
  ["tokens/s", (row) => row.speed ? row.speed.toFixed(0) : row.not_served ? "not served" : "-"],
  ["values", (row) => megabytes(row.bytes.values)],
  ["bitmask, offsets", (row) => megabytes(row.bytes.bitmask + row.bytes.offsets)],
  ["scales", (row) => megabytes(row.bytes.scales)],
  ["zero points, order", (row) => megabytes(row.bytes.zero_points + row.bytes.order)],
  ["head", (row) => megabytes(row.bytes.head)],
  ["embeddings", (row) => megabytes(row.bytes.embeddings)],
  ["other", (row) => megabytes(row.bytes.other)],
];

function drawTable() {
  const asked = benchmarksOf().map((name) => [name, (row) => accuracyOf(row, name) ? percent(accuracyOf(row, name)[0]) : "-"]);
  const outside = study().rows.some((row) => row.outside) ? [["KL outside of repetitions", (row) => measured(row.outside)]] : [];
  const columns = [...COLUMNS.slice(0, 4), ...outside, ...COLUMNS.slice(4, 7), ...asked, ...COLUMNS.slice(7)]
    .filter(([, value]) => study().rows.some((row) => value(row) !== "-"));
  const head = make("tr", {}, ...columns.map(([name]) => make("th", { scope: "col", text: name })));
  const body = shown().map((row) => {
    const button = make("button", { type: "button", text: row.label, title: row.not_served || "" });
    const cells = columns.slice(1).map(([, value]) => make("td", { text: value(row) }));
    const line = make("tr", { "data-label": row.label }, make("th", { scope: "row" }, button), ...cells);
    line.classList.toggle("chosen", row.label === state.chosen);
    line.addEventListener("click", () => choosing(row.label));
    return line;
  });
  $("rows").replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
}

function drawRows() {
  const focused = document.activeElement?.closest("#rows tr")?.dataset.label;
  drawCharts();
  drawTable();
  if (focused !== undefined) document.querySelector(`#rows tr[data-label="${CSS.escape(focused)}"] button`)?.focus();
}

// --- the chosen row --------------------------------------------------------------------------------------------------
function choosing(label) {
  state.chosen = label;
  const row = rowOf(label);
  $("chosen").textContent = label;
  $("recipe").textContent = row.recipe + (row.paired ? `\n# ${row.paired}` : "")
    + Object.entries(row.benchmarks).map(([name, each]) => `\n# ${name} (${each.asked}): ${percent(each.accuracy[0])}, ${each.thinking.toFixed(0)} thinking tokens, ${percent(each.cut)} cut${each.paired ? `; ${each.paired}` : ""}`).join("")
    + (row.not_served ? `\n# not served: ${row.not_served}` : "");
  drawRows();
  drawLayers(row);
  drawLengths(row);
  drawProblems();
}

function map(row, part, title, shade) {
  const places = row.layers.map(([name, error, sparsity]) => {
    const [, block, kind] = /^.*?(\d+)\.(.+)$/.exec(name) ?? [null, "-", name];
    return { block, kind: kind.replace(/\d+/g, "*"), value: { error, sparsity }[part] };
  });
  const kinds = [...new Set(places.map((each) => each.kind))], blocks = [...new Set(places.map((each) => each.block))];
  const head = make("tr", {}, make("th", { text: "layer" }), ...kinds.map((kind) => make("th", { scope: "col", text: kind.split(".").pop(), title: kind })));
  const body = blocks.map((block) => make("tr", {}, make("th", { scope: "row", text: block }), ...kinds.map((kind) => {
    const found = places.filter((each) => each.block === block && each.kind === kind && each.value !== null);
    if (!found.length) return make("td", { text: "-" });
    const mean = found.reduce((sum, each) => sum + each.value, 0) / found.length;
    return make("td", { text: part === "sparsity" ? mean.toFixed(2) : mean.toPrecision(2), background: `rgb(213 94 0 / ${shade(mean).toFixed(2)})` });
  })));
  return make("figure", { class: "wide" }, make("figcaption", { text: title }), make("table", { class: "map" }, make("thead", {}, head), make("tbody", {}, ...body)));
}

function drawLayers(row) {
  if (!row.layers.length) {
    $("layers").replaceChildren(row.group === "dense" ? "The dense model." : "Nothing was pruned; upstream's modifiers record no error of layers.");
    return;
  }
  const logs = row.layers.map(([, error]) => Math.log10(Math.max(error ?? 1e-9, 1e-9)));
  const [low, high] = [Math.min(...logs), Math.max(...logs)];
  $("layers").replaceChildren(
    map(row, "error", "Relative error of the output", (value) => 0.08 + 0.6 * (Math.log10(Math.max(value, 1e-9)) - low) / (high - low || 1)),
    map(row, "sparsity", "Sparsity", (value) => 0.6 * value));
}

function drawLengths(row) {
  const dense = study().rows.find((each) => each.group === "dense").length, own = row.length;
  const line = (name, value) => make("tr", {}, make("th", { scope: "row", text: name }), make("td", { text: value(dense) }), make("td", { text: value(own) }));
  const head = make("tr", {}, make("th"), make("th", { scope: "col", text: "dense" }), make("th", { scope: "col", text: row.label }));
  $("lengths").replaceChildren(
    make("table", {}, make("thead", {}, head), make("tbody", {},
      line("mean, tokens", (length) => length.mean.toFixed(1)),
      ...["50", "90", "99"].map((part) => line(`${part}th percentile`, (length) => length.percentiles[part].toFixed(0))),
      line("cut at the cap", (length) => percent(length.cut)),
      line("cut while repeating themselves", (length) => length.repeating == null ? "not counted" : percent(length.repeating)))),
    histogram(dense.thinking, own.thinking, look(row.group).colour));
}

// --- answers side by side --------------------------------------------------------------------------------------------
const word = (trace) => [trace.correct === null ? "" : trace.correct ? "right" : "wrong", trace.finish === "stop" ? "finished" : "cut"].filter(Boolean).join(", ");

function pairs() {
  const traces = allTraces?.[state.study];
  if (!traces) return [];
  const own = traces.rows[state.chosen];
  return traces.dense.map((dense, i) => ({ dense, own: own?.[i] ?? null }));
}

const WHICH = {
  all: () => true,
  changed: ({ dense, own }) => own && dense.correct !== own.correct,
  lost: ({ dense, own }) => own && dense.correct && !own.correct,
  gained: ({ dense, own }) => own && !dense.correct && own.correct,
  cut: ({ own }) => own && own.finish !== "stop",
};

function drawProblems() {
  const found = pairs().map((pair, i) => ({ ...pair, i })).filter(WHICH[$("which").value]);
  $("problem").replaceChildren(...found.map(({ dense, own, i }) =>
    make("option", { value: i, text: `${i + 1}. ${dense.id.slice(0, 40)} (${word(dense)}${own ? ` | ${word(own)}` : ""})` })));
  if (!found.some(({ i }) => i === state.problem)) state.problem = found[0]?.i ?? -1;
  $("problem").value = state.problem;
  drawAnswers();
}

function answerOf(title, trace, nodes) {
  return make("figure", {}, make("figcaption", { text: `${title}: ${word(trace)}, ${trace.tokens} tokens` }), make("div", { class: "answer", tabindex: 0 }, ...nodes));
}

function drawAnswers() {
  const options = [...$("problem").options], at = options.findIndex((option) => option.value === String(state.problem));
  $("place").textContent = options.length ? `${at + 1} of ${options.length}` : "no problem of this kind";
  $("previous").disabled = at <= 0;
  $("next").disabled = at < 0 || at === options.length - 1;
  const pair = pairs()[state.problem];
  if (!pair || at < 0) {
    $("question").textContent = "";
    $("answers").replaceChildren();
    return;
  }
  const { dense, own } = pair;
  $("question").textContent = `${dense.question}${dense.answer ? `\nAnswer: ${dense.answer}` : ""}`;
  const characters = Array.from(dense.text);
  let start = 0;
  const tokens = dense.pieces.map((length, i) => {
    const text = characters.slice(start, (start += length)).join("");
    const level = own ? parseInt(own.kl[i] ?? "0", 36) : 0;
    if (own && i === own.same_tokens) return make("mark", { text, title: "the answers differ from here on" });
    if (!level) return document.createTextNode(text);
    return make("span", { text, title: `KL about ${(0.001 * 10 ** ((level - 1) * 4 / 34)).toPrecision(1)}`, background: `rgb(213 94 0 / ${(0.85 * level / 35).toFixed(2)})` });
  });
  const panes = [answerOf("dense", dense, tokens)];
  if (own) {
    const text = Array.from(own.text), same = own.same_characters;
    const differs = own.same_tokens < own.tokens || own.same_tokens < dense.tokens;
    const rest = differs ? [make("mark", { text: text.slice(same, same + 1).join("") || "(ends here)" }), text.slice(same + 1).join("")] : [];
    panes.push(answerOf(state.chosen, own, [text.slice(0, same).join(""), ...rest]));
  }
  $("answers").replaceChildren(...panes);
}

function step(by) {
  const options = [...$("problem").options], at = options.findIndex((option) => option.value === String(state.problem));
  const next = options[at + by];
  if (!next) return;
  state.problem = Number(next.value);
  $("problem").value = next.value;
  drawAnswers();
}

async function unpack() {
  const packed = Uint8Array.from(atob($("traces").textContent.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// --- start -----------------------------------------------------------------------------------------------------------
function drawStudy() {
  state.hidden.clear();
  state.asked = "";
  const names = benchmarksOf(), held = study().rows.some((row) => row.accuracy);
  $("asked").replaceChildren(...["", ...names].map((name) => make("option", { value: name, text: name || "the held-out problems" })));
  $("asked-choice").hidden = !names.length;
  if (!held && names.length) $("asked").value = state.asked = names[0];
  $("about").textContent = study().about;
  drawGroups();
  choosing((study().rows.find((row) => row.group !== "dense") ?? study().rows[0]).label);
}

STUDIES.forEach((each, i) => $("study").append(make("option", { value: i, text: each.name })));
$("study-choice").hidden = STUDIES.length < 2;
$("study").addEventListener("change", () => { state.study = Number($("study").value); state.problem = 0; drawStudy(); });
$("find").addEventListener("input", () => { state.find = $("find").value; drawRows(); });
document.querySelectorAll("input[name=bytes]").forEach((input) => input.addEventListener("change", () => { state.bytes = input.value; drawRows(); }));
$("asked").addEventListener("change", () => { state.asked = $("asked").value; drawRows(); });
$("which").addEventListener("change", drawProblems);
$("problem").addEventListener("change", () => { state.problem = Number($("problem").value); drawAnswers(); });
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
document.addEventListener("keydown", (event) => {
  if (event.target.matches?.("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "n") step(1);
  if (event.key === "p") step(-1);
});
drawStudy();
unpack().then((traces) => { allTraces = traces; drawProblems(); document.body.dataset.ready = "yes"; },
  (error) => { $("place").textContent = `The answers cannot be unpacked by this browser (${error.name}).`; });
