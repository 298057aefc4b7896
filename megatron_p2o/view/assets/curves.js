// Every metric as a curve over the steps; the runs that are shown share each chart.

import { element, empty } from "./dom.js";

const COLOURS = ["#2b7bd6", "#d9700f", "#1d9a62", "#9a5fd6", "#d0384f", "#12839a"];
const DASHES = [[], [7, 4], [2, 4], [9, 4, 2, 4], [12, 5], [4, 4]];

export function curves(runs, filter) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.metrics.series)))].sort();
  const wanted = keys.filter((key) => filter.split(/\s+/).every((word) => key.includes(word)));
  const areas = new Map();
  for (const key of wanted) {
    const area = key.split("/")[0];
    areas.set(area, [...(areas.get(area) ?? []), key]);
  }
  if (!wanted.length) return [empty(keys.length ? `No metric has "${filter}" in its name.` : "No step is recorded yet.")];
  return [...areas].map(([area, ofArea]) => element("section", { "aria-label": area },
    element("h2", {}, area), element("div", { class: "charts" }, ofArea.map((key) => chart(key, runs)))));
}

function chart(key, runs) {
  const box = element("figure", { class: "card", "data-metric": key }, element("h3", {}, key));
  if (key === "compute/gpu_h" && runs.every((run) => (run.metrics.series[key] ?? []).every((hours) => !hours))) {
    box.append(empty(runs.length > 1 ? "No GPU in these runs." : "No GPU in this run."));
    return box;
  }
  // Drawn when it comes into sight: a page of a hundred charts opens at once.
  new IntersectionObserver((entries, observer) => {
    if (entries.some((entry) => entry.isIntersecting)) {
      observer.disconnect();
      draw(box, key, runs);
    }
  }, { rootMargin: "200px" }).observe(box);
  box.style.minHeight = "15rem";
  return box;
}

// A constant has a frame of its own: uPlot would give zero one from 0 to 100.
function range(_plot, low, high) {
  return low === high ? [Math.min(0, low), Math.max(0, low) || 1] : window.uPlot.rangeNum(low, high, 0.1, true);
}

function draw(box, key, runs) {
  const lines = runs.filter((run) => key in run.metrics.series);
  const steps = [...new Set(lines.flatMap((run) => run.metrics.steps))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, index) => [step, index]));
  const columns = lines.map((run) => {
    const column = new Array(steps.length).fill(null);
    run.metrics.steps.forEach((step, index) => { column[place.get(step)] = run.metrics.series[key][index]; });
    return column;
  });
  const ink = getComputedStyle(document.body).color;
  const axis = { stroke: ink, grid: { stroke: "rgba(128,128,128,.2)" }, ticks: { stroke: "rgba(128,128,128,.3)" } };
  const few = steps.length < 60;
  const plot = new window.uPlot({
    width: Math.max(200, box.clientWidth - 28), height: 190, cursor: { sync: { key: "steps" } },
    scales: { x: { time: false }, y: { range } }, axes: [axis, { ...axis, size: 62 }],
    series: [{ label: "step" }, ...lines.map((run, index) => ({
      label: run.name, stroke: COLOURS[index % 6], dash: DASHES[index % 6], width: 2, spanGaps: true, points: { show: few },
    }))],
  }, [steps, ...columns], box);
  new ResizeObserver(() => plot.setSize({ width: Math.max(200, box.clientWidth - 28), height: 190 })).observe(box);
}
