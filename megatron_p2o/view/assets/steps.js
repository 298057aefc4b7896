// What the time of each step went into.
"use strict";

const PHASES = [["rollout", "#2b7bd6"], ["grade", "#7cc0f0"], ["score", "#b58ae6"], ["logprobs", "#6f86c9"], ["train", "#1d9a62"], ["refresh", "#d9700f"], ["evolution", "#d0384f"], ["evaluation", "#8a93a0"], ["save", "#b9a27f"]];
const MAX_SHOWN_STEPS = 100;

function steps(run) {
  const { steps: numbers, series } = run.metrics;
  const total = series["perf/step_s"];
  if (!total) return [empty("No step is recorded yet.")];
  const known = PHASES.filter(([name]) => `perf/${name}_s` in series);
  const rows = numbers.map((step, index) => ({ step, index })).filter(({ index }) => total[index] !== null).slice(-MAX_SHOWN_STEPS).reverse();
  const secondsOf = (index) => known.map(([name, colour]) => [name, colour, series[`perf/${name}_s`][index] ?? 0]);
  const sum = (index) => secondsOf(index).reduce((before, [, , seconds]) => before + seconds, 0);
  const longest = Math.max(...rows.map(({ index }) => sum(index)), 1e-9);
  return [
    element("p", { class: "note" }, `Seconds of each phase, newest step first${rows.length === MAX_SHOWN_STEPS ? ` (the latest ${MAX_SHOWN_STEPS})` : ""}. A round of evolution beside training has no phase of its own.`),
    element("ul", { class: "legend" }, known.map(([name, colour]) => element("li", {}, swatch(colour), name))),
    element("div", { class: "steps" }, rows.flatMap(({ step, index }) => [
      element("span", {}, `step ${step}`), phaseBar(secondsOf(index), longest), element("span", {}, duration(sum(index)))])),
  ];
}

function swatch(colour) {
  const mark = element("span", { class: "swatch" });
  mark.style.background = colour;
  return mark;
}

function phaseBar(phases, longest) {
  const words = phases.map(([name, , seconds]) => `${name} ${duration(seconds)}`).join(", ");
  return element("div", { class: "bar", role: "img", "aria-label": words, title: words }, phases.map(([, colour, seconds]) => {
    const part = element("span");
    part.style.width = `${(100 * seconds) / longest}%`;
    part.style.background = colour;
    return part;
  }));
}
