// The ledger as a heat map, and the rollouts of one problem side by side.
"use strict";

const PROBLEMS_AT_ONCE = 200;

function problems(data, options, open, redraw) {
  const levels = [...new Set(data.problems.map((problem) => problem.level))].filter(Boolean).sort();
  const found = data.problems.filter((problem) => problem.id.includes(options.filter) && (!options.level || problem.level === options.level)
    && (options.state === "all" || stateOf(problem) === options.state)).sort(ORDERS[options.order]);
  const change = (name) => (event) => { options[name] = event.target.value; options.limit = PROBLEMS_AT_ONCE; redraw(); };
  const choice = (name, label, values) => element("label", {}, `${label} `, element("select", { onchange: change(name) },
    values.map(([value, text]) => element("option", { value, selected: options[name] === value }, text))));
  const shownNow = found.slice(0, options.limit);
  const tries = Math.max(0, ...shownNow.map((problem) => problem.tries.length));
  return [
    element("p", { class: "note" }, "One row per problem, one cell per time it was asked. Left half: asked plainly; right half: through a template. The fuller the colour, the more of the rollouts were solved; grey: not asked so."),
    element("div", { class: "controls" },
      element("label", {}, "Find ", element("input", { type: "search", value: options.filter, onchange: change("filter"), placeholder: "part of an id" })),
      levels.length ? choice("level", "Level", [["", "all"], ...levels.map((level) => [level, level])]) : null,
      choice("state", "State", [["all", "all"], ["internalised", "internalised"], ["helped", "solved by a template only"], ["plain", "solved plainly"], ["unsolved", "never solved"], ["hurt", "solved plainly, failed with the template"]]),
      choice("order", "Order", [["id", "by id"], ["plain", "by plain success"], ["gain", "by gain of the template"]]),
      element("span", { class: "note" }, `${found.length} of ${data.problems.length} problems`)),
    data.problems.length ? element("div", { class: "table" }, element("table", { class: "heat" },
      element("thead", {}, element("tr", {}, element("th", {}, "problem"), ...Array.from({ length: tries }, (_, index) => element("th", { title: `time ${index + 1}` }, String(index + 1))))),
      element("tbody", {}, shownNow.map((problem) => problemRow(problem, open))))) : empty("No group is recorded yet."),
    found.length > options.limit ? element("button", { onclick: () => { options.limit += 5 * PROBLEMS_AT_ONCE; redraw(); } }, `Show more (${found.length - options.limit} left)`) : null,
  ];
}

const triesOf = (problem) => problem.tries.reduce(([ps, pt, ts, tt], [, , a, b, c, d]) => [ps + a, pt + b, ts + c, tt + d], [0, 0, 0, 0]);
const solvedShare = (solved, tries) => (tries ? solved / tries : -1);

function stateOf(problem) {
  const [plain, plainTries, templated, templatedTries] = triesOf(problem);
  if (problem.is_internalised) return "internalised";
  if (plain && templatedTries && !templated) return "hurt";
  if (plain) return "plain";
  if (templated) return "helped";
  return plainTries || templatedTries ? "unsolved" : "";
}

const ORDERS = {
  id: (a, b) => (a.id < b.id ? -1 : 1),
  plain: (a, b) => { const [p, q] = [triesOf(a), triesOf(b)]; return solvedShare(p[0], p[1]) - solvedShare(q[0], q[1]); },
  gain: (a, b) => { const gain = (s) => (s[1] && s[3] ? s[2] / s[3] - s[0] / s[1] : -2); return gain(triesOf(b)) - gain(triesOf(a)); },
};

function problemRow(problem, open) {
  return element("tr", {},
    element("th", { scope: "row" }, element("button", { onclick: () => open(problem.id) }, problem.id), problem.is_internalised ? element("span", { class: "mark", title: "internalised: first solved through a template, later plainly" }, " ●") : null),
    problem.tries.map(([step, epoch, plain, plainTries, templated, templatedTries]) => {
      const words = `step ${step}, epoch ${epoch}: plain ${plain} of ${plainTries}, templated ${templated} of ${templatedTries}`;
      const cell = element("button", { class: "cell", title: words, "aria-label": `${problem.id}, ${words}`, onclick: () => open(problem.id, step) }, halfCell("plain", plain, plainTries), halfCell("templated", templated, templatedTries));
      return element("td", {}, cell);
    }));
}

function halfCell(name, solved, tries) {
  const part = element("i");
  part.style.background = tries ? `rgb(var(--${name}) / ${solved ? 0.25 + (0.75 * solved) / tries : 0.07})` : "var(--rule)";
  return part;
}

function problemPage(data, step) {
  if (!data.rollouts.length) return [empty("The rollouts of this problem were not written, or not yet.")];
  const steps = [...new Set(data.rollouts.map((rollout) => rollout.step))].sort((a, b) => b - a);
  const first = data.rollouts[0];
  const body = element("div");
  const show = (wanted) => body.replaceChildren(...ofStep(data.rollouts.filter((rollout) => rollout.step === wanted)));
  const chosen = steps.includes(step) ? step : steps[0];
  const isElsewhere = step !== undefined && chosen !== step;
  show(chosen);
  return [
    element("p", { class: "facts" }, [first.task, first.source, first.level].filter(Boolean).join(", ")),
    element("h3", {}, "Question"), element("pre", {}, first.question),
    element("h3", {}, "Answer"), element("pre", {}, first.answer ?? "(none)"),
    element("div", { class: "controls" }, element("label", {}, "Step ", element("select", { onchange: (event) => show(Number(event.target.value)) },
      steps.map((number) => element("option", { value: number, selected: number === chosen }, String(number)))))),
    isElsewhere ? empty(`The rollouts of step ${step} are not here: they were not written, or only later steps of a problem are kept.`) : null,
    body,
  ];
}

function ofStep(rollouts) {
  const side = (title, of) => element("section", {}, element("h2", {}, `${title} (${of.length})`), of.length ? of.map(rolloutCard) : empty("None in this step."));
  const templated = rollouts.filter((rollout) => rollout.is_templated);
  return [element("div", { class: "sides" }, side("Asked plainly", rollouts.filter((rollout) => !rollout.is_templated)), side(templated.some((rollout) => rollout.is_demonstration) ? "Written by the teacher" : "Through a template", templated))];
}

function rolloutCard(rollout) {
  const verdict = rollout.reward === null ? "undecided" : rollout.is_solved ? "solved" : "failed";
  const facts = [`reward ${rollout.reward === null ? "none" : shown(rollout.reward)}`, `advantage ${shown(rollout.advantage)}`, `${rollout.num_response_tokens} tokens`, `ended by ${rollout.finish_reason}`, ...(rollout.is_demonstration ? [] : [`weights ${rollout.weight_versions.join(", ")}`])];
  return element("article", { class: "card" },
    element("p", { class: "facts" }, element("strong", { class: verdict }, verdict), ` · ${facts.join(" · ")}`),
    rollout.is_templated && !rollout.is_demonstration ? element("details", {}, element("summary", {}, "Template"), element("pre", {}, rollout.template)) : null,
    rollout.tokens ? tokenText(rollout) : element("pre", {}, rollout.response),
    rollout.reason ? element("p", { class: "facts" }, rollout.reason) : null,
    rollout.feedback ? element("p", { class: "facts" }, rollout.feedback) : null);
}
