"use strict";
// The charts, drawn by plotly.js. It reads some tags in text, so text from runs goes through `plain`.

const PALETTE = ["#0b62a8", "#d9730d", "#21825a", "#b3378f", "#7a5195", "#c0392b", "#168aad", "#8a6d1d", "#4d5766", "#e0879a"];
const FONT = {family: "system-ui, 'Segoe UI', Roboto, sans-serif", size: 12, color: "#1c2430"};
// By name, because plotly.js would add one that uploads the chart.
const CONFIG = {displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]]};
const GRID = {gridcolor: "#e8ebf0", linecolor: "#c9d0d9", zeroline: false, ticks: "outside", tickcolor: "#c9d0d9"};

function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function layout(changes) {
  return Object.assign({
    font: FONT, margin: {l: 58, r: 12, t: 10, b: 48}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    modebar: {bgcolor: "rgba(0,0,0,0)", color: "#9aa3af", activecolor: "#0b62a8"}, hovermode: "closest", hoverlabel: {bgcolor: "#fff", bordercolor: "#8b95a3", font: FONT, align: "left"},
    legend: {orientation: "h", x: 0, y: 1.02, yanchor: "bottom", itemsizing: "constant"},
  }, changes);
}

function draw(place, traces, design) {
  place.querySelector(".empty")?.remove();
  return Plotly.react(place, traces, layout({...design, width: place.clientWidth, height: place.clientHeight}), CONFIG);
}

function clear(place, sentence) {
  Plotly.purge(place);
  place.replaceChildren(element("p", {class: "empty"}, sentence));
}

// The lines that no other equals or beats in both and beats in one, smallest first; of equal ones the first.
function paretoFront(lines, accuracy) {
  const front = [];
  const order = lines.slice().sort((a, b) => a.bytes - b.bytes || b[accuracy] - a[accuracy]);
  for (const line of order) {
    if (!front.length || line[accuracy] > front[front.length - 1][accuracy]) front.push(line);
  }
  return front;
}

function hoverText(line, runs) {
  const names = line.runs.map((number) => runs[number].name);
  const value = (kind) => `${kind} ${line[kind].toFixed(2)} %`
    + (line[`${kind}_deviation`] === null ? "" : ` ± ${line[`${kind}_deviation`].toFixed(2)}`);
  return [
    `<b>${plain(line.method)} ${plain(line.student)}, ${plain(line.variant)}</b>`,
    names.length === 1 ? `run ${plain(names[0])}, seed ${line.seed}` : `${names.length} seeds: ${plain(names.slice(0, 4).join(", "))}`,
    line.settings ? plain(line.settings.length > 70 ? line.settings.slice(0, 69) + "…" : line.settings) : null,
    value("test"), value("validation"),
    size(line.bytes) + (line.quantizer === "none" ? "" : `, ${line.ratio.toFixed(1)}x smaller than fp32`),
  ].filter((part) => part).join("<br>");
}

function drawTradeoff(place, lines, fronts, state, colours, runs, choose) {
  if (!lines.length) return clear(place, "No variant to show: nothing matches the filter.");
  const traces = fronts.map((front, index) => ({
    x: front.map((line) => line.bytes), y: front.map((line) => line[state.accuracy]), mode: "lines", hoverinfo: "skip",
    line: {color: "#8b95a3", width: 1.5, dash: "dot", shape: "hv"}, name: "Pareto front", legendgroup: "front", showlegend: index === 0,
  }));
  for (const [category, colour] of colours) {
    const shown = lines.filter((line) => line[state.colour] === category);
    if (!shown.length) continue;
    const spread = shown.map((line) => line[`${state.accuracy}_deviation`] ?? 0);
    traces.push({
      x: shown.map((line) => line.bytes), y: shown.map((line) => line[state.accuracy]), mode: "markers", type: "scatter",
      name: plain(category || "none"), customdata: shown.map((line) => line.index),
      hovertext: shown.map((line) => hoverText(line, runs)), hoverinfo: "text",
      marker: {color: colour, size: shown.map((line) => line === state.chosen ? 15 : line.front ? 11 : 8),
        opacity: 0.85, line: {color: shown.map((line) => line === state.chosen ? "#1c2430" : "#fff"), width: shown.map((line) => line === state.chosen ? 2 : 1)}},
      error_y: {type: "data", array: spread, visible: spread.some((deviation) => deviation > 0), thickness: 1, width: 3, color: colour},
    });
  }
  const sizes = lines.map((line) => line.bytes);
  draw(place, traces, {
    xaxis: {...GRID, type: "log", title: {text: "size of the model file (logarithmic)"}, ...sizeTicks(Math.min(...sizes), Math.max(...sizes))},
    yaxis: {...GRID, title: {text: `${state.accuracy} accuracy, %`}, ticksuffix: " "},
    uirevision: state.view + state.accuracy,
  }).then(() => {
    place.removeAllListeners("plotly_click");
    place.on("plotly_click", (event) => choose(event.points[0].customdata));
  });
}

// 1, 2, 5, 10 ... from a little below `low` to a little above `high`, with units.
function sizeTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)) - 1; power <= Math.log10(high) + 1; power += 1) {
    for (const digit of [1, 2, 5]) ticks.push(digit * 10 ** power);
  }
  const unit = (value) => value < 1e3 ? `${+value.toPrecision(1)} B` : value < 1e6 ? `${+(value / 1e3).toPrecision(1)} kB`
    : value < 1e9 ? `${+(value / 1e6).toPrecision(1)} MB` : `${+(value / 1e9).toPrecision(1)} GB`;
  const margin = Math.max(low === high ? 0.3 : 0.06, 0.05 * Math.log10(high / low));
  return {tickvals: ticks, ticktext: ticks.map(unit), range: [Math.log10(low) - margin, Math.log10(high) + margin]};
}

// The runs `numbers` as one trace, one after the other with gaps, so that hundreds of runs stay quick.
function curve(numbers, metric, runs, about) {
  const [x, y, hovertext] = [[], [], []];
  for (const number of numbers) {
    const [epochs, values] = runs[number].curves[metric] || [[], []];
    const head = `<b>${plain(about(number))}</b>, seed ${runs[number].seed}<br>run ${plain(runs[number].name)}`;
    for (let index = 0; index < epochs.length; index += 1) {
      x.push(epochs[index] + 1);
      y.push(values[index]);
      hovertext.push(`${head}<br>epoch ${epochs[index] + 1}: ${values[index]}`);
    }
    if (epochs.length) {
      x.push(null);
      y.push(null);
      hovertext.push("");
    }
  }
  return {x, y, hovertext, hoverinfo: "text", mode: x.length > 1000 ? "lines" : "lines+markers", marker: {size: 4}, connectgaps: false};
}

function drawCurves(place, lines, metric, colours, state, runs) {
  const owner = new Map();
  for (const line of lines) for (const number of line.runs) owner.set(number, line);
  const about = (number) => `${owner.get(number).method} ${owner.get(number).student}`;
  const traces = [...colours].map(([category, colour]) => {
    const numbers = [...owner.keys()].filter((number) => owner.get(number)[state.colour] === category);
    return {...curve(numbers, metric, runs, about), line: {color: colour, width: 1.5}, opacity: 0.7, name: plain(category || "none")};
  });
  if (state.chosen) {
    traces.push({...curve(state.chosen.runs, metric, runs, about), line: {color: "#1c2430", width: 2.5}, name: "chosen"});
  }
  const drawn = traces.filter((trace) => trace.x.length);
  if (!drawn.length) {
    return clear(place, lines.length ? "These runs kept no metrics.csv, so there is no course to draw." : "Nothing matches the filter.");
  }
  const last = drawn.flatMap((trace) => trace.x).reduce((a, b) => Math.max(a, b), 1);
  return draw(place, drawn, {
    showlegend: true, yaxis: {...GRID, title: {text: plain(metric)}, automargin: true},
    xaxis: {...GRID, title: {text: "epochs"}, ...(last <= 15 ? {dtick: 1} : {})},
  });
}

function drawLayers(place, layers) {
  if (!layers) return clear(place, "No layers to show: choose a quantized variant in the table or the chart.");
  const [names, bits, errors] = layers;
  const labels = names.map(plain);
  const [x, ticks] = [labels.map((_, index) => index), {tickvals: labels.map((_, index) => index), ticktext: labels}];
  const measured = errors.some((error) => error !== null && error > 0);
  const traces = [{type: "bar", x, y: bits, marker: {color: "#0b62a8"}, name: "bits", hoverinfo: "text",
    hovertext: labels.map((label, index) => `${label}: ${bits[index]} bits`)}];
  const axis = {...GRID, ...ticks, tickangle: -60, automargin: true, ticks: ""};
  const design = {bargap: 0.25, showlegend: false, xaxis: {...axis}, yaxis: {...GRID, title: {text: "bits"}, rangemode: "tozero", dtick: Math.max(...bits) > 8 ? 4 : 2}};
  if (measured) {
    traces.push({type: "scatter", mode: "lines+markers", x, y: errors.map((error) => error > 0 ? 100 * error : null), yaxis: "y2",
      line: {color: "#d9730d", width: 1}, marker: {size: 6}, name: "error", hoverinfo: "text",
      hovertext: labels.map((label, index) => errors[index] === null ? label : `${label}: error ${(100 * errors[index]).toPrecision(3)} %`)});
    Object.assign(design, {
      yaxis: {...design.yaxis, domain: [0, 0.44]},
      yaxis2: {...GRID, domain: [0.54, 1], title: {text: "error, %"}, rangemode: "tozero", anchor: "x"},
    });
  }
  return draw(place, traces, design);
}
