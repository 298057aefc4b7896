// Every metric as a curve over the steps; the runs that are shown share each chart.
"use strict";

// What a run is watched for; the other areas follow by name.
const FIRST_AREAS = ["eval", "rollout", "train", "template"];

function inOrder(areas) {
  const others = [...areas.keys()].filter((area) => !FIRST_AREAS.includes(area)).sort();
  return [...FIRST_AREAS, ...others].filter((area) => areas.has(area)).map((area) => [area, areas.get(area)]);
}

function curves(runs, filter) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.metrics.series)))].sort();
  const wanted = keys.filter((key) => filter.split(/\s+/).every((word) => key.includes(word)));
  const areas = new Map();
  for (const key of wanted) {
    const area = key.split("/")[0];
    areas.set(area, [...(areas.get(area) ?? []), key]);
  }
  if (!wanted.length) return [empty(keys.length ? `No metric has "${filter}" in its name.` : "No step is recorded yet.")];
  return inOrder(areas).map(([area, ofArea]) => element("section", { "aria-label": area },
    element("h2", {}, area), element("div", { class: "charts" }, ofArea.map((key) => metricCard(key, runs)))));
}

function metricCard(key, runs) {
  if (key === "compute/gpu_h" && runs.every((run) => (run.metrics.series[key] ?? []).every((hours) => !hours))) {
    return element("figure", { class: "card", "data-metric": key }, element("h3", {}, key), empty(runs.length > 1 ? "No GPU in these runs." : "No GPU in this run."));
  }
  const card = chartCard({ title: key, x_label: "step", unit: "number" }, () => runs.filter((run) => key in run.metrics.series).map((run, style) => ({
    name: run.name, style, points: run.metrics.steps.map((step, index) => [step, run.metrics.series[key][index]]).filter(([, value]) => value !== null),
  })));
  card.dataset.metric = key;
  return card;
}
