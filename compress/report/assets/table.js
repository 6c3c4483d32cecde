"use strict";
// The table: columns, sorting, rows. Text reaches the page through textContent alone.

const LINES_AT_FIRST = 200;

// `sort` gives what a column is ordered by where that is not the value shown.
const COLUMNS = [
  {key: "name", heading: "run", text: true, only: "each"},
  {key: "data", heading: "data", text: true, optional: true},
  {key: "method", heading: "method", text: true},
  {key: "student", heading: "student", text: true},
  {key: "settings", heading: "settings", text: true, optional: true},
  {key: "seed", heading: "seed", only: "each", show: (line) => String(line.seed)},
  {key: "seed", heading: "seeds", only: "means", show: (line) => String(line.seed)},
  {key: "variant", heading: "variant", text: true, sort: (line) => `${line.quantizer} ${1000 + line.bits}`},
  {key: "test", heading: "test %", show: (line) => decimals(line.test, 2), deviation: "test_deviation"},
  {key: "validation", heading: "validation %", show: (line) => decimals(line.validation, 2), deviation: "validation_deviation"},
  {key: "change", heading: "change", title: "points of test accuracy against the float32 student",
    show: (line) => line.change === null ? "" : (line.change < 0 ? "" : "+") + decimals(line.change, 2)},
  {key: "agreement", heading: "same %", title: "test images that get the same class as from the float32 student",
    show: (line) => decimals(line.agreement, 2)},
  {key: "bytes", heading: "size", show: (line) => size(line.bytes)},
  {key: "ratio", heading: "smaller", show: (line) => line.ratio === null ? "" : `${decimals(line.ratio, 1)}x`},
  {key: "latency", heading: "ms", title: "one image through PyTorch on one thread", show: (line) => decimals(line.latency, 2)},
  {key: "front", heading: "front", title: "on the Pareto front of what is shown", sort: (line) => line.front ? 1 : 0},
];

function decimals(value, digits) {
  return value === null ? "" : value.toFixed(digits);
}

function size(bytes) {
  if (bytes < 1e3) return `${bytes} B`;
  return bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(2)} MB`;
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function distinct(lines, key) {
  return [...new Set(lines.map((line) => line[key]))];
}

function columnsOf(view, lines) {
  return COLUMNS.filter((column) =>
    (!column.only || column.only === view) && (!column.optional || distinct(lines, column.key).length > 1));
}

function sorted(lines, column, descending) {
  const value = column.sort || ((line) => line[column.key]);
  const order = descending ? -1 : 1;
  return lines.slice().sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    // What is not known comes last, whichever way.
    if (x === null || y === null) return (x === null) - (y === null);
    if (typeof x === "number") return order * (x - y);
    return order * String(x).localeCompare(String(y), "en", {numeric: true});
  });
}

function cell(column, line) {
  if (column.key === "front") {
    return element("td", {class: "front"}, line.front ? "●" : "");
  }
  if (column.text) return element("td", {class: "text", title: line[column.key]}, line[column.key]);
  const spread = column.deviation ? line[column.deviation] : null;
  return element("td", {class: "number"}, column.show(line),
    spread === null ? null : element("span", {class: "deviation"}, ` ± ${decimals(spread, 2)}`));
}

// Draws `lines`, of which `all` are those without the filter; `state` holds the choices, `act` what a click does.
function drawTable(table, lines, all, state, act) {
  const columns = columnsOf(state.view, all);
  const chosen = columns.find((column) => column.heading === state.sort.heading) || columns.find((each) => each.key === "test");
  const ordered = sorted(lines, chosen, state.sort.descending);
  const shown = state.everyLine ? ordered : ordered.slice(0, LINES_AT_FIRST);
  const head = element("tr", {}, ...columns.map((column) => {
    const direction = column === chosen ? (state.sort.descending ? "descending" : "ascending") : null;
    const arrow = direction === null ? "" : state.sort.descending ? " ▾" : " ▴";
    return element("th", {class: column.text ? null : "number", "aria-sort": direction, title: column.title, scope: "col"},
      element("button", {type: "button", onclick: () => act.sort(column)}, column.heading + arrow));
  }));
  const body = shown.map((line) => element("tr", {
    tabindex: 0,
    "aria-selected": line === state.chosen ? "true" : "false",
    onclick: () => act.choose(line),
    onkeydown: (event) => { if (event.key === "Enter") act.choose(line); },
  }, ...columns.map((column) => cell(column, line))));
  body.forEach((row, index) => { row.line = shown[index]; });
  if (!lines.length) {
    body.push(element("tr", {}, element("td", {colspan: columns.length, class: "empty"}, "No variant matches the filter.")));
  }
  table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
  const more = document.getElementById("more");
  more.hidden = shown.length === ordered.length;
  more.textContent = `Show all ${ordered.length.toLocaleString("en")} lines`;
}

function markChosen(table, chosen) {
  for (const row of table.tBodies[0].rows) row.setAttribute("aria-selected", String(row.line === chosen));
}
