// Controls, the chosen row, and its answers. Vega draws the charts. Text is set with textContent.
"use strict";

const WORDS = { right: "right", wrong: "wrong", reached: "truncated, had the answer", looping: "truncated, looping", going: "truncated, still going" };
const WHICH = {
  all: () => true,
  changed: ({ dense, own }) => own && dense.correct !== own.correct,
  lost: ({ dense, own }) => own && dense.correct && !own.correct,
  gained: ({ dense, own }) => own && !dense.correct && own.correct,
  looping: ({ own }) => own && own.loop !== null,
  truncated: ({ own }) => own && own.finish !== "stop",
};

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "background") element.style.background = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

const endingOf = (trace) => WORDS[trace.kind] ?? (trace.finish === "stop" ? "finished" : "truncated");

// The text of an answer, cut at places (indices of characters); `look` returns the element of a part.
function answer(title, trace, places, look) {
  const characters = Array.from(trace.text);
  const cuts = [...new Set([0, ...places, ...(trace.loop === null ? [] : [trace.loop]), characters.length])].sort((a, b) => a - b);
  const nodes = [];
  for (let i = 0; i < cuts.length; i++) {
    if (cuts[i] === trace.loop) nodes.push(make("mark", { class: "loop" }, "loop"));
    const text = characters.slice(cuts[i], cuts[i + 1]).join("");
    if (text) nodes.push(look(cuts[i], text));
  }
  const caption = make("figcaption", {}, `${title}: ${endingOf(trace)}, ${trace.tokens} tokens`);
  return make("figure", {}, caption, make("div", { class: "answer", tabindex: 0 }, ...nodes));
}

const differs = (text) => make("mark", { title: "the answers differ from here on" }, text);

function densePane(dense, own) {
  const starts = [0];
  for (const length of dense.pieces) starts.push(starts.at(-1) + length);
  const token = new Map(dense.pieces.map((length, i) => [starts[i], i]).filter(([, i]) => dense.pieces[i]));
  return answer("dense", dense, starts, (start, text) => {
    const i = token.get(start), level = parseInt(own?.kl[i] ?? "0", 36);
    if (own && i === own.same_tokens) return differs(text);
    if (!level) return document.createTextNode(text);
    const kl = (0.001 * 10 ** ((level - 1) * 4 / 34)).toPrecision(1);
    return make("span", { title: `KL about ${kl}`, background: `rgb(213 94 0 / ${(0.85 * level / 35).toFixed(2)})` }, text);
  });
}

function ownPane(label, dense, own) {
  const same = own.same_characters, equal = own.same_tokens === own.tokens && own.same_tokens === dense.tokens;
  const pane = answer(label, own, equal ? [] : [same, same + 1],
    (start, text) => !equal && start === same ? differs(text) : document.createTextNode(text));
  if (!equal && own.same_tokens === own.tokens) pane.lastChild.append(differs("(ends here)"));
  return pane;
}

// The viewer of a study; returns what shows a row, and a problem.
function viewer(section, traces) {
  const $ = (name) => section.querySelector(`.${name}`);
  let label = "";
  const pairs = () => traces.dense.map((dense, i) => ({ dense, own: traces.rows[label]?.[i] ?? null, i }));
  function draw() {
    const options = $("problem").options, at = $("problem").selectedIndex;
    $("previous").disabled = at <= 0;
    $("next").disabled = at < 0 || at === options.length - 1;
    const pair = pairs()[$("problem").value];
    $("question").textContent = pair ? `${pair.dense.question}${pair.dense.answer ? `\nAnswer: ${pair.dense.answer}` : ""}` : "";
    $("answers").replaceChildren(...(!pair ? [] : [densePane(pair.dense, pair.own), ...(pair.own ? [ownPane(label, pair.dense, pair.own)] : [])]));
  }
  function list(problem = $("problem").value) {
    $("problem").replaceChildren(...pairs().filter(WHICH[$("which").value]).map(({ dense, own, i }) =>
      make("option", { value: i }, `${i + 1}. ${dense.id.slice(0, 40)} (${endingOf(dense)}${own ? ` | ${endingOf(own)}` : ""})`)));
    $("problem").value = problem;
    if ($("problem").selectedIndex < 0) $("problem").selectedIndex = 0;
    draw();
  }
  const step = (by) => { $("problem").selectedIndex += by; draw(); };
  $("which").addEventListener("change", () => list());
  $("problem").addEventListener("change", draw);
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  return { row(chosen) { label = chosen; list(); }, problem(i) { $("which").value = "all"; list(i); } };
}

async function study(section, { charts, row, traces }) {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const options = {
    ast: true, renderer: "svg", logLevel: 1, defaultStyle: false, tooltip: { disableDefaultStyle: true }, theme: dark ? "dark" : undefined,
    actions: { export: true, source: false, compiled: false, editor: false }, config: { background: null },
  };
  const places = [...section.querySelectorAll(".charts figure > div")];
  const views = await Promise.all(places.map(async (place, i) => (await vegaEmbed(place, charts[i], options)).view));
  const answers = viewer(section, traces);
  function set(signal, value) {
    for (const view of views) view.signal(signal, value).runAsync();
    if (signal !== "row") return;
    section.querySelector("[data-signal=row]").value = value;
    for (const row of section.querySelectorAll("tr")) row.classList.toggle("chosen", row.dataset.label === value);
    for (const recipe of section.querySelectorAll("pre")) recipe.hidden = recipe.dataset.label !== value;
    answers.row(value);
  }
  for (const control of section.querySelectorAll("[data-signal]")) {
    control.addEventListener("input", () => set(control.dataset.signal, control.value));
    control.parentElement.hidden = control.options?.length < 2;
  }
  for (const row of section.querySelectorAll("tr[data-label]")) row.addEventListener("click", () => set("row", row.dataset.label));
  for (const view of views) view.addEventListener("click", (event, item) => {
    if (item?.datum?.problem !== undefined) answers.problem(item.datum.problem);
    else if (item?.datum?.label !== undefined) set("row", item.datum.label);
  });
  set("row", row);
}

async function open() {
  const packed = Uint8Array.from(atob(document.getElementById("data").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const studies = JSON.parse(await new Response(stream).text());
  await Promise.all([...document.querySelectorAll(".study")].map((section, i) => study(section, studies[i])));
  document.body.dataset.ready = "yes";
}
open();
