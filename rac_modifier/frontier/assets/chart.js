// Drawing: elements, marks, axes and the frontier. All text is set with textContent, so that none of it is read as markup.
"use strict";

const COLOURS = ["#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9"];
const KNOWN = ["sparse", "sparse + quantized", "dense quantized"];
const MARKS = ["circle", "square", "triangle", "diamond"];

function make(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "line", "path", "text", "rect", "circle"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "text") element.textContent = value;
    else if (key === "background") element.style.background = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function lookOf(group, groups) {
  if (group === "dense") return { colour: "currentColor", mark: "diamond" };
  const others = groups.filter((each) => each !== "dense" && !KNOWN.includes(each));
  const place = KNOWN.includes(group) ? KNOWN.indexOf(group) : KNOWN.length + others.indexOf(group);
  return { colour: COLOURS[place % COLOURS.length], mark: MARKS[place % MARKS.length] };
}

function markOf(look, x, y, size = 6) {
  const outline = { class: "mark", fill: look.colour, stroke: "none" };
  if (look.mark === "circle") return make("circle", { cx: x, cy: y, r: size, ...outline });
  const corners = {
    square: [[-1, -1], [1, -1], [1, 1], [-1, 1]],
    triangle: [[0, -1.2], [1.15, 0.9], [-1.15, 0.9]],
    diamond: [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]],
  }[look.mark];
  const path = corners.map(([dx, dy]) => `${x + dx * size * 0.9} ${y + dy * size * 0.9}`).join("L");
  return make("path", { d: `M${path}Z`, ...outline });
}

// From values to pixels, with values for the ticks. A logarithmic axis has ticks at 1, 2 and 5 times powers of ten.
function axis(values, log, from, to, within) {
  let low = Math.min(...values), high = Math.max(...values);
  const scale = log ? Math.log10 : (value) => value;
  const room = (scale(high) - scale(low)) * 0.08 || (log ? 0.1 : Math.abs(high) * 0.1 || 1);
  let start = scale(low) - room, end = scale(high) + room;
  if (within) [start, end] = [Math.max(start, within[0]), Math.min(end, within[1])];
  const place = (value) => from + ((scale(value) - start) / (end - start)) * (to - from);
  const ticks = [];
  if (log) {
    for (let power = Math.floor(start); power <= end; power++)
      for (const times of [1, 2, 5]) ticks.push(times * 10 ** power);
  } else {
    const raw = (end - start) / 5, unit = 10 ** Math.floor(Math.log10(raw));
    const step = unit * [1, 2, 5, 10].find((times) => times * unit >= raw);
    for (let value = Math.ceil(start / step) * step; value <= end + 1e-9; value += step) ticks.push(value);
  }
  const inside = ticks.filter((value) => scale(value) >= start && scale(value) <= end);
  return { place, ticks: inside.length > 8 ? inside.filter((value) => /^[1.0e+-]+$/.test(String(value))) : inside };
}

// The points that no other point beats: `x` and `y` are 1 where more is better and -1 where less is.
function frontier(points, x, y) {
  const beaten = (a) => points.some((b) =>
    (b.x - a.x) * x >= 0 && (b.y - a.y) * y >= 0 && ((b.x - a.x) * x > 0 || (b.y - a.y) * y > 0));
  return points.filter((point) => !beaten(point)).sort((a, b) => a.x - b.x);
}

// A label where it covers no mark and no other label; none where there is no such place (hover and table have it).
function nameBeside(label, x, y, taken, width) {
  const length = 6.6 * label.length;
  for (const [dx, dy] of [[9, -5], [-9, -5], [9, 13], [-9, 13], [9, -19], [-9, -19], [9, 27], [-9, 27]]) {
    const left = dx > 0 ? x + dx : x + dx - length, place = [left, y + dy - 10, left + length, y + dy + 2];
    if (place[0] < 50 || place[2] > width || place[1] < 0 || place[3] > 260) continue;
    if (taken.some((other) => place[0] < other[2] && other[0] < place[2] && place[1] < other[3] && other[1] < place[3])) continue;
    taken.push(place);
    return make("text", { class: "name", x: x + dx, y: y + dy, "text-anchor": dx > 0 ? "start" : "end", text: label });
  }
  return null;
}

// One chart. Points: {x, y, low, high, row}; options: title, xLabel, yLabel, format, log, within, better: [x, y].
function chart(points, options, look, chosen, events) {
  const [width, height, left, bottom, top, right] = [460, 300, 58, 42, 10, 16];
  const box = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": options.title });
  // An interval that reaches zero would take a logarithmic axis down without end, so a tenth of the value is its lowest end.
  const least = (point) => options.log ? Math.max(point.low, point.y / 10) : point.low;
  const ys = points.flatMap((point) => point.low === null ? [point.y] : [point.y, least(point), point.high]);
  const horizontal = axis(points.map((point) => point.x), false, left, width - right);
  const vertical = axis(ys, options.log, height - bottom, top, options.within);
  for (const value of vertical.ticks) {
    const y = vertical.place(value);
    box.append(make("line", { class: "grid", x1: left, x2: width - right, y1: y, y2: y }));
    box.append(make("text", { x: left - 6, y: y + 4, "text-anchor": "end", text: options.format(value) }));
  }
  for (const value of horizontal.ticks) {
    const x = horizontal.place(value);
    box.append(make("line", { class: "axis", x1: x, x2: x, y1: height - bottom, y2: height - bottom + 4 }));
    box.append(make("text", { x, y: height - bottom + 17, "text-anchor": "middle", text: short(value) }));
  }
  box.append(make("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  box.append(make("text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle", text: options.xLabel }));
  const taken = points.map((point) => {
    const [x, y] = [horizontal.place(point.x), vertical.place(point.y)];
    return [x - 7, y - 7, x + 7, y + 7];
  });
  const front = frontier(points, ...options.better);
  const path = front.map((point) => `${horizontal.place(point.x)} ${vertical.place(point.y)}`).join("L");
  if (front.length > 1) box.append(make("path", { class: "front", d: `M${path}` }));
  for (const point of points) {
    const [x, y] = [horizontal.place(point.x), vertical.place(point.y)];
    const name = `${point.row.label}: ${options.xLabel} ${short(point.x)}, ${options.yLabel} ${options.format(point.y)}`;
    const group = make("g", { class: "point", tabindex: 0, role: "button", "aria-label": name, "data-label": point.row.label });
    if (point.row.label === chosen) group.classList.add("chosen");
    if (point.low !== null && point.high !== null) {
      group.append(make("line", { class: "bar", x1: x, x2: x, y1: vertical.place(least(point)), y2: vertical.place(point.high) }));
    }
    group.append(markOf(look(point.row.group), x, y));
    const label = nameBeside(point.row.label, x, y, taken, width);
    if (label) group.append(label);
    events(group, point.row);
    box.append(group);
  }
  return make("figure", {}, make("figcaption", { text: options.title }), box);
}

function short(value) {
  return Math.abs(value) >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(3)));
}

// How many answers have which length: bars of the chosen row, an outline for the dense model.
function histogram(dense, own, colour) {
  const [width, height, left, bottom, count] = [460, 200, 36, 36, 20];
  const most = Math.max(1, ...dense, ...own), step = most / count;
  const counted = (lengths) => {
    const bins = new Array(count).fill(0);
    for (const length of lengths) bins[Math.min(count - 1, Math.floor(length / step))]++;
    return bins;
  };
  const [a, b] = [counted(dense), counted(own)], high = Math.max(1, ...a, ...b);
  const label = "How many answers have which thinking length; the outline is the dense model";
  const box = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const x = (bin) => left + (bin / count) * (width - left - 8), y = (n) => 8 + (1 - n / high) * (height - bottom - 8);
  b.forEach((n, bin) => box.append(make("rect", {
    x: x(bin) + 1, width: x(1) - x(0) - 2, y: y(n), height: y(0) - y(n), fill: colour, opacity: 0.75 })));
  const outline = a.map((n, bin) => `${x(bin)} ${y(n)}L${x(bin + 1)} ${y(n)}`).join("L");
  box.append(make("path", { d: `M${x(0)} ${y(0)}L${outline}L${x(count)} ${y(0)}`, fill: "none", stroke: "currentColor" }));
  for (const part of [0, 0.25, 0.5, 0.75, 1])
    box.append(make("text", { x: x(part * count), y: height - 20, "text-anchor": "middle", text: short(part * most) }));
  box.append(make("text", { x: left - 4, y: y(high) + 8, "text-anchor": "end", text: high }));
  box.append(make("text", { x: (left + width) / 2, y: height - 3, "text-anchor": "middle", text: "thinking tokens per answer" }));
  return box;
}
