// Line charts: drawn when they come into sight, with the same numbers as a table.
"use strict";

const COLOURS = ["#2b7bd6", "#d9700f", "#1d9a62", "#9a5fd6", "#d0384f", "#12839a"];
const DASHES = [[], [7, 4], [2, 4], [9, 4, 2, 4], [12, 5], [4, 4]];
const MAX_TABLE_ROWS = 200;

// `chart`: title, note, x_label, unit ("share" or "number"), and lines of name, style, points [x, y] and, for a long line, smooth.
// `linesOf` makes the lines when they are needed.
function chartCard(chart, linesOf = () => chart.lines) {
  const box = element("figure", { class: "card chart" }, element("h3", {}, chart.title), chart.note ? element("p", { class: "note" }, chart.note) : null);
  // A page of a hundred charts opens at once.
  const sight = new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) fill(); }, { rootMargin: "200px" });
  const fill = () => {
    sight.disconnect();
    unfilled.delete(box);
    fillCard(box, chart, linesOf());
  };
  unfilled.set(box, fill);
  sight.observe(box);
  return box;
}

// Charts that wait to come into sight, and what draws them. On paper all are in sight.
const unfilled = new Map();
addEventListener("beforeprint", () => [...unfilled].forEach(([box, fill]) => { if (box.isConnected) fill(); }));

function fillCard(box, chart, lines) {
  if (!lines.length) { box.append(empty("Nothing was recorded.")); return; }
  const plot = element("div", { role: "img", "aria-label": `${chart.title}. ${lines.map((line) => `${line.name}: from ${chartNumber(line.points[0][1], chart.unit)} to ${chartNumber(line.points.at(-1)[1], chart.unit)}`).join("; ")}` });
  box.append(plot, numbersBelow(chart, lines));
  drawLines(plot, chart, lines);
}

const chartNumber = (value, unit) => (value === null || value === undefined ? "" : unit === "share" ? `${(100 * value).toFixed(1)} %` : shown(value));

const positions = (lines) => [...new Set(lines.flatMap((line) => line.points.map(([x]) => x)))].sort((a, b) => a - b);

function columnOf(points, xs) {
  const found = new Map(points);
  return xs.map((x) => found.get(x) ?? null);
}

function numbersBelow(chart, lines) {
  const xs = positions(lines), stride = Math.ceil(xs.length / MAX_TABLE_ROWS);
  const kept = xs.filter((_, index) => (xs.length - 1 - index) % stride === 0);
  const details = element("details", { "data-key": `table ${chart.title}` }, element("summary", {}, kept.length === xs.length ? "Table" : `Table (${kept.length} of ${xs.length} rows)`));
  details.addEventListener("toggle", () => {
    const columns = lines.map((line) => columnOf(line.points, kept));
    details.append(table([chart.x_label, ...lines.map((line) => line.name)], kept.map((x, row) => [shown(x), ...columns.map((column) => chartNumber(column[row], chart.unit))]), chart.title));
  }, { once: true });
  return details;
}

// A constant has a frame of its own: uPlot would give zero one from 0 to 100.
function numberRange(low, high) {
  return low === high ? [Math.min(0, low), Math.max(0, low) || 1] : window.uPlot.rangeNum(low, high, 0.1, true);
}

const rangeOf = (chart) => (_plot, low, high) => (chart.unit === "share" ? [0, 1] : chart.is_from_zero ? numberRange(Math.min(0, low), Math.max(0, high)) : numberRange(low, high));

function drawLines(plot, chart, lines) {
  const xs = positions(lines), few = xs.length < 60;
  const drawnOnes = lines.flatMap((line) => {
    const stroke = COLOURS[line.style % 6], dash = DASHES[line.style % 6];
    const own = { label: line.name, stroke, dash, width: 2, points: line.points };
    return line.smooth?.length ? [{ ...own, width: 1, alpha: 0.3 }, { ...own, label: `${line.name}, moving average`, points: line.smooth }] : [own];
  });
  const ink = getComputedStyle(document.body).color;
  const axis = { stroke: ink, grid: { stroke: "rgba(128,128,128,.2)" }, ticks: { stroke: "rgba(128,128,128,.3)" } };
  const percent = chart.unit === "share" ? { values: (_plot, marks) => marks.map((mark) => `${Math.round(100 * mark)} %`) } : {};
  const widthOf = (_plot, labels) => Math.max(62, 20 + 7 * Math.max(...(labels ?? []).map((label) => String(label).length), 0));
  const size = () => ({ width: Math.max(200, plot.clientWidth), height: 190 });
  const made = new window.uPlot({
    ...size(), cursor: { sync: { key: chart.x_label } },
    scales: { x: { time: false }, y: { range: rangeOf(chart) } }, axes: [axis, { ...axis, size: widthOf, ...percent }],
    series: [{ label: chart.x_label }, ...drawnOnes.map(({ points, ...series }) => ({
      ...series, spanGaps: true, points: { show: few }, value: (_plot, value) => chartNumber(value, chart.unit) || "--",
    }))],
  }, [xs, ...drawnOnes.map((line) => columnOf(line.points, xs))], plot);
  new ResizeObserver(() => made.setSize(size())).observe(plot);
}
