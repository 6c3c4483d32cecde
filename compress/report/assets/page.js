"use strict";
// Choices of the reader, and what follows from them for the cards, the details, the table and the charts.

(() => {
  const content = JSON.parse(document.getElementById("content").textContent);
  const runs = content.runs;
  const percent = (share) => share === null ? null : 100 * share;
  const read = (rows) => rows.map((row, index) => {
    const line = Object.fromEntries(content.keys.map((key, place) => [key, row[place]]));
    Object.assign(line, {index, front: false, name: runs[line.runs[0]].name, seed: runs[line.runs[0]].seed});
    for (const kind of ["test", "validation"]) {  // of the charts, in percent
      line[kind] = percent(line[`${kind}_accuracy`]);
      line[`${kind}_deviation`] = percent(line[`${kind}_accuracy_deviation`]);
    }
    const names = line.runs.map((number) => runs[number].name);
    const text = [line.data, line.method, line.student, line.teacher, line.settings, line.variant, ...names];
    const coded = line.variant.includes("bits/weight");
    line.words = text.join(" ").toLowerCase() + (coded ? "" : ` ${line.bits}-bit-wide`);
    line.width = line.bits === 32 ? "float" : coded ? "coded" : `${line.bits} bit`;
    return line;
  });
  const lines = {means: read(content.means), single: read(content.single)};
  const severalSeeds = lines.means.some((line) => line.runs.length > 1);
  const FILTERS = {data: "all data", method: "all methods", student: "all students", teacher: "all teachers",
    settings: "all settings", quantizer: "all quantizers", width: "all widths"};
  // Accuracies on different data do not compare, so the page begins with the data of the most runs.
  const start = () => ({view: severalSeeds ? "means" : "single", accuracy: "test", colour: firstColour(), search: "",
    filters: {data: commonest(lines.single, "data")},
    sort: {key: "test_accuracy", descending: true}, everyLine: false, chosen: null, run: 0, metric: null});
  const place = (id) => document.getElementById(id);
  let state = start();
  let timer = null;
  let again = null;  // draws the charts of what is shown already, for another choice

  function commonest(of, key) {
    const values = distinct(of, key);
    const count = (value) => of.filter((line) => line[key] === value).length;
    return values.length < 2 ? null : values.reduce((a, b) => count(b) > count(a) ? b : a);
  }

  function firstColour() {
    return ["method", "student", "settings", "quantizer"].find((key) => distinct(lines.single, key).length > 1) || "method";
  }

  function matching() {
    // "2 bit" is one word, which not every name with a 2 in it has.
    const words = state.search.toLowerCase().replace(/(^|\s)(\d+)\s*bits?(?=\s|$)/g, " $2-bit-wide ").split(/\s+/).filter((word) => word);
    return lines[state.view].filter((line) =>
      Object.entries(state.filters).every(([key, value]) => value === null || line[key] === value) &&
      words.every((word) => line.words.includes(word.endsWith("-bit-wide") ? ` ${word}` : word)));
  }

  function colours() {
    return new Map(distinct(lines.single, state.colour).sort((a, b) => a.localeCompare(b, "en", {numeric: true}))
      .map((category, index) => [category, PALETTE[index % PALETTE.length]]));
  }

  function redraw() {
    const shown = matching();
    const fronts = distinct(shown, "data").map((data) => paretoFront(shown.filter((line) => line.data === data), state.accuracy));
    for (const line of lines[state.view]) line.front = false;
    for (const line of fronts.flat()) line.front = true;
    const picks = choices(shown);
    if (!shown.includes(state.chosen)) {
      state.chosen = picks.smallest || picks.best || shown[0] || null;
      state.run = 0;
    }
    drawCards(shown, picks);
    drawTable(place("table"), shown, lines[state.view], content.columns, state, {choose, sort});
    drawCharts(shown, fronts);
    place("tradeoff-note").textContent = state.accuracy === "test"
      ? "To choose a model, switch to validation: the best of many on the test set is partly luck."
      : "Choose here, and report the test accuracy of what was chosen.";
    const all = lines[state.view].length;
    place("count").textContent = `${shown.length.toLocaleString("en")} of ${all.toLocaleString("en")} variants`;
    press();
  }

  function drawCharts(shown, fronts) {
    drawDetails();  // first, because the chart beside it takes its height
    drawTradeoff(place("tradeoff"), shown, fronts, state, colours(), runs, (index) => choose(lines[state.view][index]));
    drawMetrics(shown);
    again = () => drawCharts(shown, fronts);
  }

  // The most accurate, and the smallest within a point of it; of several data sets neither means anything.
  function choices(shown) {
    if (distinct(shown, "data").length !== 1) return {best: null, smallest: null};
    const better = (a, b) => b[state.accuracy] > a[state.accuracy] || (b[state.accuracy] === a[state.accuracy] && b.bytes < a.bytes);
    const best = shown.reduce((a, b) => better(a, b) ? b : a);
    const near = shown.filter((line) => line[state.accuracy] >= best[state.accuracy] - 1);
    const smallest = near.reduce((a, b) => b.bytes < a.bytes || (b.bytes === a.bytes && better(a, b)) ? b : a);
    return {best, smallest};
  }

  function drawCards(shown, {best, smallest}) {
    const card = (heading, line, value, below) => element(line ? "button" : "div",
      {class: "card", type: line ? "button" : null, onclick: () => line && choose(line)},
      element("span", {}, heading), element("strong", {}, value), element("span", {title: below}, below));
    const what = (line) => `${line.method} ${line.student}, ${line.variant}` + (line.settings ? ` (${line.settings})` : "");
    const none = shown.length ? "filter to one data set to compare" : "nothing matches the filter";
    const count = new Set(shown.flatMap((line) => line.runs)).size;
    const seeds = severalSeeds ? (state.view === "means" ? "mean and deviation over seeds" : "every seed by itself") : "one seed each";
    const by = `${state.accuracy} accuracy`;
    place("cards").replaceChildren(
      card("Shown", null, `${count.toLocaleString("en")} run${count === 1 ? "" : "s"}`, seeds),
      best ? card(`Highest ${by}`, best, `${best[state.accuracy].toFixed(2)} % at ${size(best.bytes)}`, what(best))
        : card(`Highest ${by}`, null, "–", none),
      smallest ? card("Smallest within one point of it", smallest, `${smallest[state.accuracy].toFixed(2)} % at ${size(smallest.bytes)}`, what(smallest))
        : card("Smallest within one point of it", null, "–", none));
  }

  function drawMetrics(shown) {
    const names = [...new Set(shown.flatMap((line) => line.runs).flatMap((number) => Object.keys(runs[number].curves)))].sort();
    if (!names.includes(state.metric)) state.metric = names.includes("val/accuracy") ? "val/accuracy" : names[0] || null;
    fill(place("metric"), names.map((name) => [name, name]), state.metric);
    drawCurves(place("curves"), shown, state.metric, colours(), state, runs);
  }

  function drawDetails() {
    const line = state.chosen;
    const details = place("details");
    if (!line) {
      details.replaceChildren(element("p", {class: "empty"}, "Choose a variant in the table or the chart."));
      place("layers-note").textContent = "";
      drawLayers(place("layers"), null);
      return;
    }
    const run = runs[line.runs[state.run]];
    const single = lines.single.find((other) => other.runs[0] === line.runs[state.run] && other.file === line.file) || line;
    const facts = [["test accuracy", `${single.test.toFixed(2)} %`],
      ["validation accuracy", `${single.validation.toFixed(2)} %`], ["size", size(single.bytes)], ...run.facts];
    details.replaceChildren(...[
      element("h2", {}, `${line.method} ${line.student}, ${line.variant}`),
      element("h3", {}, run.name),
      line.runs.length > 1 ? element("div", {class: "seeds", role: "group", "aria-label": "Seed"}, ...line.runs.map((number, index) =>
        element("button", {type: "button", "aria-pressed": String(index === state.run), onclick: () => { state.run = index; drawDetails(); }},
          `seed ${runs[number].seed}`))) : null,
      element("dl", {}, ...facts.filter(([, value]) => value !== null).flatMap(([key, value]) =>
        [element("dt", {}, key), element("dd", {}, value)])),
      element("div", {class: "links"}, ...run.links.map(([name, target]) =>
        element("a", {href: target, title: name}, name.replace(/^models\//, "")))),
      element("code", {title: "what was typed"}, run.command),
    ].filter((part) => part));
    place("layers-note").textContent = `${line.method} ${line.student}, ${line.variant}, ${run.name}`;
    drawLayers(place("layers"), run.layers[line.file]);
  }

  function choose(line) {
    state.chosen = line;
    state.run = 0;
    markChosen(place("table"), line);
    again();
  }

  function sort(column) {
    const same = state.sort.key === column.key;
    state.sort = {key: column.key, descending: same ? !state.sort.descending : !column.text};
    redraw();
  }

  function fill(select, options, value) {
    select.replaceChildren(...options.map(([key, label], index) => element("option", {value: index, selected: key === value}, label)));
    select.disabled = options.length < 2;
  }

  function buttons(id, key, options) {
    place(id).replaceChildren(...options.map(([value, label]) =>
      element("button", {type: "button", "data-value": value, onclick: () => { state[key] = value; redraw(); }}, label)));
  }

  function press() {
    for (const [id, key] of [["views", "view"], ["accuracies", "accuracy"]]) {
      for (const button of place(id).children) button.setAttribute("aria-pressed", String(button.dataset.value === state[key]));
    }
  }

  function build() {
    buttons("views", "view", [["means", "Means over seeds"], ["single", "Every run"]]);
    buttons("accuracies", "accuracy", [["test", "Test"], ["validation", "Validation"]]);
    const selects = Object.entries(FILTERS).map(([key, all]) => {
      const values = distinct(lines.single, key).sort((a, b) => a.localeCompare(b, "en", {numeric: true}));
      if (values.length < 2) return null;
      const select = element("select", {"data-key": key, "aria-label": key});
      fill(select, [[null, all], ...values.map((value) => [value, value || "none"])], state.filters[key] ?? null);
      select.addEventListener("change", () => { state.filters[key] = select.selectedIndex ? values[select.selectedIndex - 1] : null; redraw(); });
      return select;
    });
    place("filters").replaceChildren(...selects.filter((select) => select));
    const keys = ["method", "student", "settings", "quantizer", "width", "data"].filter((key) => key === state.colour || distinct(lines.single, key).length > 1);
    fill(place("colour"), keys.map((key) => [key, key]), state.colour);
    place("colour").onchange = () => { state.colour = keys[place("colour").selectedIndex]; redraw(); };
    place("metric").onchange = () => { state.metric = place("metric").selectedOptions[0].textContent; redraw(); };
    place("search").value = "";
    place("search").oninput = () => {
      clearTimeout(timer);
      timer = setTimeout(() => { state.search = place("search").value; redraw(); }, 120);
    };
    place("more").onclick = () => { state.everyLine = true; redraw(); };
    window.onresize = () => {
      clearTimeout(timer);
      timer = setTimeout(() => again(), 120);
    };
    place("reset").onclick = () => { state = start(); build(); redraw(); };
  }

  build();
  redraw();
})();
