// When the steps and rounds were, and what the time of each step went into.
"use strict";

const PHASES = [["rollout", "#2b7bd6"], ["grade", "#7cc0f0"], ["score", "#b58ae6"], ["logprobs", "#6f86c9"], ["train", "#1d9a62"], ["refresh", "#d9700f"], ["evolution", "#d0384f"], ["save", "#b9a27f"]];
const COLOUR_OF = Object.fromEntries(PHASES);
const MAX_SHOWN_STEPS = 100;
const WINDOWS = [10, 30, 100, 300];
const MAX_MARKS = 8;
const INTERVALS_S = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800, 2592000];

function steps(metrics, times, options, redraw) {
  return [...timeline(times, options, redraw), ...phaseBars(metrics)];
}

function timeline(times, options, redraw) {
  const shownOnes = times.steps.slice(-options.window);
  if (!shownOnes.length) return [];
  const begin = Math.min(...shownOnes.map((step) => firstSecond(step))), end = Math.max(...shownOnes.map((step) => step.end_s), begin + 1e-3);
  const rounds = times.rounds.map((round) => ({ ...round, last_s: round.end_s ?? end })).filter((round) => round.last_s > begin && round.begin_s < end);
  const libraries = times.libraries.filter(([time]) => time >= begin && time <= end);
  const percent = (time) => (100 * (Math.min(end, Math.max(begin, time)) - begin)) / (end - begin);
  const facts = element("p", { class: "facts numbers", role: "status" }, "Point at a step or a round, tap it or go to it with the arrow keys: its times stand here.");
  const lanes = element("div", { class: "timeline" },
    lane("", timeMarks(begin, end).map(({ time, text }) => at(element("span", { class: "tick" }, text), percent(time)))),
    lane("steps", shownOnes.map((step) => stepMoment(step, percent))),
    rounds.length ? lane("rounds", rounds.map((round) => roundMoment(round, shownOnes, percent))) : null,
    libraries.length ? lane("library", libraries.map(([time, version]) => at(element("span", { class: "tick" }, `▲ ${version}`), percent(time)))) : null);
  const box = element("div", { class: "table", role: "region", "aria-label": "Timeline of steps and rounds" }, lanes);
  requestAnimationFrame(() => { box.scrollLeft = box.scrollWidth; }); // the latest steps, where not all fit
  rove(lanes, ".moment", (moment) => { facts.textContent = moment.getAttribute("aria-label"); });
  return [
    element("h2", {}, "Timeline"),
    element("p", { class: "note" }, `Times are UTC. A step's phases stand in the order in which they run, each with all its seconds; what is left empty was not measured, such as evaluations and waiting. A round stands below the steps that went on beside it.`),
    element("div", { class: "controls" }, element("label", {}, "Show ", element("select", { "data-key": "window", onchange: (event) => { options.window = Number(event.target.value); redraw(); } },
      WINDOWS.map((number) => element("option", { value: number, selected: number === options.window }, `the latest ${number} steps`))))),
    legend(PHASES.filter(([name]) => shownOnes.some((step) => step.phases.some((phase) => phase.name === name)))),
    box, facts,
  ];
}

const firstSecond = (step) => Math.min(step.begin_s, ...step.phases.map((phase) => phase.begin_s));

function at(node, percent, width) {
  node.style.left = `${percent}%`;
  if (width !== undefined) node.style.width = `${width}%`;
  return node;
}

const lane = (name, parts) => element("div", { class: "lane" }, element("span", { class: "name" }, name), element("div", { class: "track" }, parts));

function stepMoment(step, percent) {
  const first = firstSecond(step), left = percent(first), width = percent(step.end_s) - left;
  const name = step.is_step ? `step ${step.step}` : `after step ${step.step}`;
  const words = `${name}: ${clockTime(step.begin_s, true)} to ${clockTime(step.end_s, true)}, ${duration(step.end_s - step.begin_s)}; ${step.phases.map((phase) => `${phase.name} ${duration(phase.end_s - phase.begin_s)}`).join(", ")}`;
  const box = at(element("span", { class: step.is_step ? "moment" : "moment between", role: "img", "aria-label": words, "data-key": name, title: words }), left, width);
  const total = Math.max(step.end_s - first, 1e-9);
  box.append(...step.phases.map((phase) => {
    const part = at(element("i"), (100 * (phase.begin_s - first)) / total, (100 * (phase.end_s - phase.begin_s)) / total);
    part.style.background = COLOUR_OF[phase.name];
    return part;
  }));
  if (step.is_step && width > 4) box.append(element("em", {}, String(step.step)));
  return box;
}

function roundMoment(round, shownSteps, percent) {
  const beside = shownSteps.filter((step) => round.is_beside && step.is_step && step.end_s > round.begin_s && step.begin_s < round.last_s).map((step) => step.step);
  const where = !round.is_beside ? "training waited for it" : beside.length ? `beside steps ${beside[0]} to ${beside.at(-1)}` : "beside none of these steps";
  const until = round.end_s === null ? "has not ended" : `to ${clockTime(round.end_s, true)}, ${duration(round.end_s - round.begin_s)}`;
  const words = `round ${round.epoch}: ${clockTime(round.begin_s, true)} ${until}; ${where}`;
  const left = percent(round.begin_s), width = percent(round.last_s) - left;
  const box = at(element("span", { class: round.end_s === null ? "moment round open" : "moment round", role: "img", "aria-label": words, "data-key": `round ${round.epoch}`, title: words }), left, width);
  box.append(element("em", {}, String(round.epoch)));
  return box;
}

function timeMarks(begin, end) {
  const interval = INTERVALS_S.find((each) => (end - begin) / each <= MAX_MARKS) ?? (end - begin) / MAX_MARKS;
  const first = Math.ceil(begin / interval - 1e-6);
  const marks = [];
  for (let number = first; number * interval <= end; number += 1) marks.push(number * interval);
  return marks.map((time, index) => ({ time, text: interval >= 86400 ? dayOf(time) : `${index === 0 || dayOf(time) !== dayOf(marks[index - 1]) ? `${dayOf(time)} ` : ""}${clockTime(time, interval < 60, interval < 1)}` }));
}

const dayOf = (time) => new Date(1000 * time).toISOString().slice(5, 10);
const clockTime = (time, withSeconds, withTenths) => new Date(Math.round(1000 * time)).toISOString().slice(11, withTenths ? 21 : withSeconds ? 19 : 16);

function phaseBars(metrics) {
  const { steps: numbers, series } = metrics;
  const total = series["perf/step_s"];
  if (!total) return [empty("No step is recorded yet.")];
  const known = PHASES.filter(([name]) => `perf/${name}_s` in series);
  const rows = numbers.map((step, index) => ({ step, index })).filter(({ index }) => total[index] !== null).slice(-MAX_SHOWN_STEPS).reverse();
  const secondsOf = (index) => known.map(([name, colour]) => [name, colour, series[`perf/${name}_s`][index] ?? 0]);
  const sum = (index) => secondsOf(index).reduce((before, [, , seconds]) => before + seconds, 0);
  const longest = Math.max(...rows.map(({ index }) => sum(index)), 1e-9);
  return [
    element("h2", {}, "Seconds of each phase"),
    element("p", { class: "note" }, `Newest step first${rows.length === MAX_SHOWN_STEPS ? ` (the latest ${MAX_SHOWN_STEPS})` : ""}.`),
    legend(known),
    element("div", { class: "steps" }, rows.flatMap(({ step, index }) => [
      element("span", {}, `step ${step}`), phaseBar(secondsOf(index), longest), element("span", {}, duration(sum(index)))])),
  ];
}

const legend = (phases) => element("ul", { class: "legend" }, phases.map(([name, colour]) => element("li", {}, swatch(colour), name)));

function swatch(colour) {
  const mark = element("span", { class: "swatch" });
  mark.style.background = colour;
  return mark;
}

function phaseBar(phases, longest) {
  const words = phases.map(([name, , seconds]) => `${name} ${duration(seconds)}`).join(", ");
  return element("div", { class: "bar", role: "img", "aria-label": words, title: words }, phases.filter(([, , seconds]) => seconds > 0).map(([, colour, seconds]) => {
    const part = element("span");
    part.style.width = `${(100 * seconds) / longest}%`;
    part.style.background = colour;
    return part;
  }));
}
