"use strict";
// Draws each .plot of the page from its data-chart, which charts.py writes. Dragging zooms into the
// steps; a double click shows all of them again.

const FONT = "12px system-ui, sans-serif";
const MAX_DOTS = 30;  // a line of more points has no dots
const color = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// At least three round numbers on a logarithmic axis, powers of ten where these are enough.
function logTicks(low, high) {
  const decades = [];
  for (let n = Math.floor(Math.log10(low)); n <= Math.log10(high); n++) decades.push(n);
  let ticks;
  for (const digits of [[1], [1, 3], [1, 2, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9]]) {
    ticks = decades.flatMap(n => digits.map(digit => Number(`${digit}e${n}`)));
    ticks = ticks.filter(tick => low <= tick && tick <= high);
    if (ticks.length >= 3) break;
  }
  return ticks;
}

// A number at an axis: 0.006, 3.5, 20,000, 150K, 1.5M.
function short(number) {
  const size = Math.abs(number);
  if (size > 0 && size < 1e-4) return Number(number.toPrecision(3)).toExponential();
  const notation = size >= 1e5 ? "compact" : "standard";
  return number.toLocaleString("en", {notation, maximumSignificantDigits: 6});
}

const isDots = ({kind}) => kind === "dots" || kind === "rings";

function seriesOptions({name, kind, color: number}, values, small) {
  const stroke = color(`--c${number}`);
  const count = values.filter(value => value !== null).length;
  const isLine = !isDots({kind});
  const showDots = !isLine || count === 1 || (count <= MAX_DOTS && kind === "line");
  return {
    label: name,
    stroke: kind === "faint" ? `color-mix(in srgb, ${stroke} 40%, transparent)` : stroke,
    width: small || kind === "faint" ? 1.5 : 2,
    paths: !isLine ? () => null : kind === "steps" ? uPlot.paths.stepped({align: 1}) : undefined,
    spanGaps: true,
    points: {
      show: showDots, size: isLine ? 6 : 8, stroke, width: kind === "rings" ? 1.5 : 0,
      fill: kind === "rings" ? color("--card") : stroke,
    },
  };
}

function yRange(spec) {
  return (u, low, high) => {
    if (spec.range) return spec.range;
    if (low === null) return [0, 1];
    const spread = high - low > 1e-9 * Math.abs(high) ? high - low : 0;  // else flat, but for noise
    const room = spread * 0.06 || Math.abs(high) * 0.1 || 1;
    return [spec.zero && low >= 0 ? 0 : low - 2 * room, high + room];  // below, for a mark's note
  };
}

function xRange(spec) {
  const xs = spec.data[0];
  return (u, low, high) => {
    if (spec.names.length) return [-0.5, spec.names.length - 0.5];
    if (low !== xs[0] || high !== xs[xs.length - 1]) return [low, high];  // zoomed in
    if (spec.log) return high > low ? [low / 1.1, high * 1.1] : [low / 2, high * 2];
    if (low > 0 && low < high / 5) low = 0;  // all charts of a run begin at the same step
    if (high === low) high = low + 1;
    const room = spec.series.some(isDots) ? 0.03 * (high - low) : 0;
    return [low && low - room, high + room];
  };
}

// Circles the point of each series that has a mark, with its note beside it.
function drawMarks(u, spec) {
  const {ctx, bbox} = u;
  const ratio = devicePixelRatio;
  ctx.save();
  for (const {mark, note, color: number} of spec.series) {
    if (!mark) continue;
    const x = u.valToPos(mark[0], "x", true);
    const y = u.valToPos(mark[1], "y", true);
    if (x < bbox.left - 1 || x > bbox.left + bbox.width + 1) continue;  // zoomed away
    ctx.lineWidth = 2 * ratio;
    ctx.strokeStyle = color(`--c${number}`);
    ctx.fillStyle = color("--card");
    ctx.beginPath();
    ctx.arc(x, y, 6 * ratio, 0, 2 * Math.PI);
    ctx.fill();
    ctx.stroke();
    ctx.beginPath();
    ctx.arc(x, y, 3 * ratio, 0, 2 * Math.PI);
    ctx.fillStyle = ctx.strokeStyle;
    ctx.fill();
    if (!note) continue;
    const onRight = x > bbox.left + 0.6 * bbox.width;
    ctx.font = `600 ${13 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = onRight ? "right" : "left";
    ctx.textBaseline = "top";
    const place = [note, x + (onRight ? 8 : -8) * ratio, y + 10 * ratio];
    ctx.lineWidth = 4 * ratio;
    ctx.lineJoin = "round";
    ctx.strokeStyle = color("--card");
    ctx.strokeText(...place);
    ctx.fillStyle = color("--ink");
    ctx.fillText(...place);
  }
  ctx.restore();
}

// What is under the pointer, in words.
function showTip(u, spec, tip) {
  const {idx, idxs} = u.cursor;
  tip.hidden = idx == null;
  if (tip.hidden) return;
  const rounded = number => String(Number(number.toPrecision(3)));
  const fixed = (number, digits) => number.toLocaleString("en",
    {minimumFractionDigits: digits, maximumFractionDigits: digits});
  const value = y => spec.decimals === null ? rounded(y) : fixed(y, spec.decimals);
  const x = u.data[0][idx];
  const place = spec.log ? rounded(x) : x.toLocaleString("en", {maximumFractionDigits: 6});
  tip.textContent = spec.names.length ? spec.names[x] : `${spec.x} ${place}`;
  for (let i = spec.series.length - 1; i >= 0; i--) {
    const {name, kind, color: number} = spec.series[i];
    const values = u.data[i + 1];
    const y = values[idx] ?? values[idxs[i + 1]];  // there, or else near by
    if (y == null) continue;
    const line = document.createElement("span");
    line.className = `c${number} ${kind}`;
    line.textContent = (spec.series.length > 1 ? `${name} ` : "") + value(y);
    tip.append(line);
  }
  const left = u.over.offsetLeft + u.valToPos(x, "x");
  const onRight = left > u.width / 2;
  tip.style.left = onRight ? "" : `${left + 10}px`;
  tip.style.right = onRight ? `${u.width - left + 10}px` : "";
}

function drawChart(plot) {
  const spec = JSON.parse(plot.dataset.chart);
  const small = !plot.closest(".main");
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  const axis = {
    stroke: color("--soft"), font: FONT, ticks: {show: false},
    grid: {stroke: color("--line"), width: 1},
  };
  const whole = spec.data[0].every(Number.isInteger);
  const wholeSteps = Array.from({length: 16}, (_, n) => [1, 2, 5].map(m => m * 10 ** n)).flat();
  const u = new uPlot({
    width: plot.clientWidth,
    height: plot.clientHeight,
    padding: [10, 12, 0, 0],
    legend: {show: false},
    cursor: {y: false, hover: {skip: [null, undefined], prox: 12}, drag: {x: !spec.names.length}},
    scales: {
      x: {time: false, distr: spec.log ? 3 : 1, range: xRange(spec)},
      y: {range: yRange(spec)},
    },
    axes: [
      {
        ...axis, size: 28, gap: 6, space: small ? 60 : 80, grid: {show: false},
        ...(spec.log && {splits: (u, axis, low, high) => logTicks(low, high)}),
        ...(spec.names.length && {splits: spec.names.map((_, i) => i)}),
        ...(whole && {incrs: wholeSteps}),
        filter: (u, ticks) => ticks,
        values: (u, ticks) => ticks.map(x => x === null ? "" : spec.names[x] ?? short(x)),
      },
      {
        ...axis, gap: 6, space: small ? 30 : 44,
        size: (u, values) => 14 + 7 * Math.max(3, ...(values ?? []).map(text => text.length)),
        values: (u, ticks) => ticks.map(short),
      },
    ],
    series: [{}, ...spec.series.map((one, i) => seriesOptions(one, spec.data[i + 1], small))],
    drawOrder: ["axes", "series"],
    hooks: {draw: [u => drawMarks(u, spec)], setCursor: [u => showTip(u, spec, tip)]},
  }, spec.data, plot);
  plot.append(tip);
  return u;
}

const plots = [...document.querySelectorAll(".plot")];
let charts = plots.map(drawChart);
new ResizeObserver(() => charts.forEach((u, i) =>
  u.setSize({width: plots[i].clientWidth, height: plots[i].clientHeight}),
)).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  charts.forEach(u => u.destroy());
  plots.forEach(plot => plot.replaceChildren());
  charts = plots.map(drawChart);
});
