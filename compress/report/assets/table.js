"use strict";
// The table: columns, sorting, rows. Text reaches the page through textContent alone.

const LINES_AT_FIRST = 200;

// The columns that say which variant a line is; those of the trade-off come with the data. `sort` gives what a column
// is ordered by where that is not the value shown.
const IDENTITY = [
  {key: "name", heading: "run", text: true, only: "single"},
  {key: "data", heading: "data", text: true, optional: true},
  {key: "method", heading: "method", text: true},
  {key: "student", heading: "student", text: true},
  {key: "settings", heading: "settings", text: true, optional: true},
  {key: "seed", heading: "seed", only: "single", show: String},
  {key: "seeds", heading: "seeds", only: "means", show: String},
  {key: "variant", heading: "variant", text: true, sort: (line) => `${line.quantizer} ${1000 + line.bits}`},
];
const FRONT = {key: "front", heading: "front", meaning: "on the Pareto front of what is shown", sort: (line) => line.front ? 1 : 0};

// A value of a column of the trade-off as it is printed, without the unit that the heading names.
function printed(column, value) {
  if (value === null) return "";
  const digits = {minimumFractionDigits: column.digits, maximumFractionDigits: column.digits};
  const rounded = Number((column.scale * value).toFixed(column.digits)) || 0; // no zero has a minus
  const sign = column.signed && rounded >= 0 ? "+" : "";
  const mark = column.below_one && rounded < 1 ? column.below_one : "";
  return sign + rounded.toLocaleString("en", digits) + column.suffix + mark;
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

function columnsOf(view, lines, figures) {
  return [...IDENTITY, ...figures, FRONT].filter((column) =>
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
  const value = line[column.key];
  if (column === FRONT) return element("td", {class: "number front"}, value ? "●" : "");
  if (column.text) return element("td", {class: "text", title: value}, value);
  if (column.show) return element("td", {class: "number"}, column.show(value));
  const deviation = column.deviation ? line[`${column.key}_deviation`] : null;
  return element("td", {class: "number"}, printed(column, value),
    deviation === null ? null : element("span", {class: "deviation"}, ` ± ${printed(column, deviation)}`));
}

// Draws `lines`, of which `all` are those without the filter; `figures` are the columns of the trade-off, `state` holds
// the choices, `act` what a click does.
function drawTable(table, lines, all, figures, state, act) {
  const columns = columnsOf(state.view, all, figures);
  const chosen = columns.find((column) => column.key === state.sort.key) || columns.find((column) => column.key === "test_accuracy");
  const ordered = sorted(lines, chosen, state.sort.descending);
  const shown = state.everyLine ? ordered : ordered.slice(0, LINES_AT_FIRST);
  const head = element("tr", {}, ...columns.map((column) => {
    const direction = column === chosen ? (state.sort.descending ? "descending" : "ascending") : null;
    const arrow = direction === null ? "" : state.sort.descending ? " ▾" : " ▴";
    return element("th", {class: column.text ? null : "number", "aria-sort": direction, title: column.meaning, scope: "col"},
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
