// The ledger as a heat map, and the rollouts of one problem side by side.
"use strict";

const PROBLEMS_AT_ONCE = 100;

function problems(data, options, open, redraw) {
  const levels = [...new Set(data.problems.map((problem) => problem.level))].filter(Boolean).sort();
  const found = data.problems.filter((problem) => problem.id.includes(options.filter) && (!options.level || problem.level === options.level)
    && (options.state === "all" || stateOf(problem) === options.state)).sort(ORDERS[options.order]);
  const change = (name) => (event) => { options[name] = event.target.value; options.limit = PROBLEMS_AT_ONCE; redraw(); };
  const choice = (name, label, values) => element("label", {}, `${label} `, element("select", { "data-key": name, onchange: change(name) },
    values.map(([value, text]) => element("option", { value, selected: options[name] === value }, text))));
  const shownNow = found.slice(0, options.limit);
  return [
    element("p", { class: "note" }, "One row per problem, one column per epoch. Left half of a cell: asked plainly; right half: through a template. The fuller the colour, the more of the rollouts were solved; grey: not asked so. Underlined: asked more than once in the epoch, all together; no cell: not asked. Arrow keys lead from cell to cell."),
    element("div", { class: "controls" },
      element("label", {}, "Find ", element("input", { type: "search", "data-key": "find", value: options.filter, onchange: change("filter"), placeholder: "part of an id" })),
      levels.length ? choice("level", "Level", [["", "all"], ...levels.map((level) => [level, level])]) : null,
      choice("state", "State", [["all", "all"], ["internalised", "internalised"], ["helped", "solved by a template only"], ["plain", "solved plainly"], ["unsolved", "never solved"], ["hurt", "solved plainly, failed with the template"]]),
      choice("order", "Order", [["id", "by id"], ["plain", "by plain success"], ["gain", "by gain of the template"]]),
      element("span", { class: "note" }, `${found.length} of ${data.problems.length} problems`)),
    data.problems.length ? heatMap(shownNow, data.epochs, open) : empty("No group is recorded yet."),
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

function heatMap(found, epochs, open) {
  const table = element("table", { class: "heat" },
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "problem"), ...epochs.map((epoch) => element("th", { scope: "col", "aria-label": `epoch ${epoch}`, title: `epoch ${epoch}` }, String(epoch))))),
    element("tbody", {}, found.map((problem) => problemRow(problem, epochs, open))));
  rove(table, "button");
  return element("div", { class: "table", role: "region", "aria-label": "Problems by epoch" }, table);
}

function problemRow(problem, epochs, open) {
  return element("tr", {},
    element("th", { scope: "row" }, element("button", { "data-key": `problem ${problem.id}`, title: problem.id, onclick: () => open(problem) }, problem.id), problem.is_internalised ? element("span", { class: "mark", title: "internalised: first solved through a template, later plainly" }, " ●") : null),
    epochs.map((epoch) => element("td", {}, epochCell(problem, epoch, open))));
}

function epochCell(problem, epoch, open) {
  const tries = problem.tries.filter(([, of]) => of === epoch);
  if (!tries.length) return null;
  const [plain, plainTries, templated, templatedTries] = triesOf({ tries });
  const words = `epoch ${epoch}, step${tries.length > 1 ? "s" : ""} ${tries.map(([step]) => step).join(", ")}: plain ${plain} of ${plainTries}, templated ${templated} of ${templatedTries}`;
  const cell = element("button", { class: tries.length > 1 ? "cell many" : "cell", "data-key": `cell ${epoch} ${problem.id}`, title: words, "aria-label": `${problem.id}, ${words}`, onclick: () => open(problem, epoch) });
  cell.style.background = `linear-gradient(90deg, ${halfColour("plain", plain, plainTries)} 50%, ${halfColour("templated", templated, templatedTries)} 50%)`;
  return cell;
}

// A cell has no parts: whatever the page opens above them restyles them all.
const halfColour = (name, solved, tries) => (tries ? `rgb(var(--${name}) / ${solved ? 0.25 + (0.75 * solved) / tries : 0.07})` : "var(--rule)");

// `tries`: all that the ledger has of the problem; `epoch`: the one to show, or undefined for the latest step that has rollouts.
// `load` gives the answer for other steps.
function problemPage(data, tries, epoch, load) {
  if (!data.steps.length) return [empty("The rollouts of this problem were not written, or not yet.")];
  const body = element("div");
  const choices = stepChoices(data.steps, tries);
  const show = (choice, { rollouts }) => body.replaceChildren(...choice.steps.flatMap((step) => ofStep(step, rollouts.filter((rollout) => rollout.step === step))));
  const chosen = (epoch === undefined ? null : choices.find((choice) => choice.epoch === epoch)) ?? choices.find((choice) => choice.steps.length === 1 && choice.steps[0] === data.steps.at(-1));
  show(chosen, data);
  const first = data.rollouts[0] ?? { question: "", answer: null };
  return [
    element("p", { class: "facts" }, [first.task, first.source, first.level].filter(Boolean).join(", ")),
    ...(data.rollouts.length ? [element("h3", {}, "Question"), element("pre", {}, first.question), element("h3", {}, "Answer"), element("pre", {}, first.answer ?? "(none)")] : []),
    element("div", { class: "controls" }, element("label", {}, "Show ", element("select", { onchange: async (event) => { const choice = choices[Number(event.target.value)]; show(choice, await load(choice.steps)); } },
      choices.map((choice, index) => element("option", { value: index, selected: choice === chosen }, choice.name))))),
    body,
  ];
}

// Returns what can be chosen of a problem, newest first: each epoch in which it was asked, and its steps where there are several.
function stepChoices(known, tries) {
  const epochOf = new Map(tries.map(([step, epoch]) => [step, epoch]));
  const steps = [...new Set([...epochOf.keys(), ...known])].sort((a, b) => b - a);
  return [...new Set(steps.map((step) => epochOf.get(step)))].flatMap((epoch) => {
    const own = steps.filter((step) => epochOf.get(step) === epoch);
    const single = own.map((step) => ({ name: epoch === undefined ? `step ${step}` : `epoch ${epoch}, step ${step}`, steps: [step], epoch: own.length > 1 ? undefined : epoch }));
    return own.length > 1 && epoch !== undefined ? [{ name: `epoch ${epoch}, steps ${own.join(", ")}`, steps: own, epoch }, ...single] : single;
  });
}

function ofStep(step, rollouts) {
  if (!rollouts.length) return [empty(`The rollouts of step ${step} are not here: they were not written, or only later steps of a problem are kept.`)];

  const side = (title, of) => element("section", {}, element("h2", {}, `${title} (${of.length})`), of.length ? of.map(rolloutCard) : empty("None in this step."));
  const templated = rollouts.filter((rollout) => rollout.is_templated);
  return [element("h3", {}, `Step ${step}`), element("div", { class: "sides" }, side("Asked plainly", rollouts.filter((rollout) => !rollout.is_templated)), side(templated.some((rollout) => rollout.is_demonstration) ? "Written by the teacher" : "Through a template", templated))];
}

function rolloutCard(rollout) {
  const verdict = rollout.reward === null ? "undecided" : rollout.is_solved ? "solved" : "failed";
  const facts = [`reward ${rollout.reward === null ? "none" : shown(rollout.reward)}`, `advantage ${shown(rollout.advantage)}`, `${rollout.num_response_tokens} tokens`, `ended by ${rollout.finish_reason}`, ...(rollout.is_demonstration ? [] : [`weights ${rollout.weight_versions.join(", ")}`])];
  return element("article", { class: "card" },
    element("p", { class: "facts" }, element("strong", { class: verdict }, verdict), ` · ${facts.join(" · ")}`),
    rollout.is_templated && !rollout.is_demonstration ? element("details", {}, element("summary", {}, "Template"), element("pre", {}, rollout.template)) : null,
    rollout.tokens ? whenInSight(element("pre", {}, rollout.response), () => tokenText(rollout)) : element("pre", {}, rollout.response),
    rollout.reason ? element("p", { class: "facts" }, rollout.reason) : null,
    rollout.feedback ? element("p", { class: "facts" }, rollout.feedback) : null);
}
