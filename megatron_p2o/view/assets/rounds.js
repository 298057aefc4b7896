// Rounds of prompt evolution: who was reflected from whom, with what score, and what became of it.
"use strict";

function rounds(data, options, redraw, openReflection) {
  if (!data.length) return [empty("This run has no round of prompt evolution, or none yet.")];
  const round = data.find((candidate) => candidate.name === options.round) ?? data[0];
  const chosen = round.candidates.find((candidate) => candidate.id === options.candidate) ?? bestCandidate(round.candidates);
  const choose = (id) => { options.candidate = id; redraw(); };
  return [
    element("div", { class: "controls" }, element("label", {}, "Round ", element("select", { "data-key": "round", onchange: (event) => { options.round = event.target.value; options.candidate = null; redraw(); } },
      data.map((each) => element("option", { value: each.name, selected: each.name === round.name }, `${each.name}${each.ended_by ? "" : " (running)"}`))))),
    round.damage ? element("p", { class: "notice" }, round.damage) : null,
    element("p", { class: "facts" }, roundFacts(round)),
    element("p", { class: "facts" }, "Proposals by outcome: ", Object.entries(round.outcomes).map(([name, count]) => `${name} ${count}`).join(", ") || "none yet"),
    budget(round), lineagesAtWork(round, choose), price(round.price),
    element("div", { class: "split" },
      element("div", {}, lineageGraph(round.candidates, chosen, choose), candidateList(round.candidates, chosen, choose)),
      element("div", {}, candidateCard(chosen, lineOf(chosen, round.candidates), choose, (proposal) => openReflection(round.name, proposal)))),
    element("details", { "data-key": "refused" }, element("summary", {}, `Refused proposals (latest ${round.refusals.length})`),
      table(["proposal", "parent", "outcome", "text"], round.refusals.map((refusal) => [element("button", { "data-key": `refusal ${refusal.proposal}`, onclick: () => openReflection(round.name, refusal.proposal) }, String(refusal.proposal)), String(refusal.parent), refusal.outcome, refusal.text]), "Refused proposals")),
  ];
}

function roundFacts(round) {
  const state = round.ended_by ? `library ${round.library_version}, ended by ${round.ended_by}` : "running, or ended early";
  const control = round.num_control_rollouts ? `${shown(round.num_control_rollouts)} plain rollouts for comparison, ` : "";
  return `${state}; ${control}${shown(round.num_tokens)} tokens, ${round.candidates.length} candidates`;
}

// What the round has spent of what it may.
function budget(round) {
  const { num_rollouts: spent, max_rollouts: allowed } = round;
  if (allowed === null) return element("p", { class: "facts" }, `Budget: ${shown(spent)} rollouts spent. How many it may spend is not in its journal: lock-step rules count iterations, and early journals do not tell.`);
  return element("p", { class: "facts" }, `Budget: ${shown(spent)} of ${shown(allowed)} rollouts spent `, element("progress", { value: Math.min(spent, allowed), max: allowed, "aria-label": "Rollouts spent" }));
}

// The proposals under way. A lineage works on one at a time.
function lineagesAtWork(round, choose) {
  const { lineages, num_lineages: number } = round;
  if (round.ended_by) return lineages.length ? element("p", { class: "facts" }, `${lineages.length} proposals were under way when it ended.`) : null;
  const idle = Number.isInteger(number) && number > lineages.length ? ` The other ${number - lineages.length} of ${number} wait for new scores, or the round has just begun or ended.` : "";
  return element("div", {},
    element("p", { class: "facts" }, `Lineages at work: ${lineages.length}.${idle}`),
    lineages.length ? table(["proposal", "parent", "now", "candidate"], lineages.map((lineage) => [String(lineage.proposal), candidateButton(lineage.parent, choose, "work on"), lineage.stage,
      lineage.candidate === null ? "" : candidateButton(lineage.candidate, choose, "became")]), "Lineages at work") : null);
}

const candidateButton = (id, choose, place) => element("button", { "data-key": `${place} ${id}`, onclick: () => choose(id) }, String(id));

// What the round takes from training.
function price({ waited_s: waited, steps, prices, slowdowns }) {
  if (waited !== null) return element("p", { class: "facts" }, `Price: training waited ${duration(waited)} for it.`);
  const lines = [["price", prices], ["slowdown of training's decode steps", slowdowns]].map(([name, values], style) => ({
    name, style, points: steps.map((step, index) => [step, values[index]]).filter(([, value]) => value !== null) })).filter((line) => line.points.length);
  if (!lines.length) return element("p", { class: "facts" }, "Price: no step beside it has told yet.");
  const latest = lines[0].name === "price" ? `${shown(lines[0].points.at(-1)[1])} at step ${lines[0].points.at(-1)[0]}` : "not known: it has not had an engine to itself";
  return element("details", { "data-key": "price" }, element("summary", {}, `Price: ${latest}`),
    chartCard({ title: "What the round takes from training", note: "Price: 1 is what it costs when training waits for it, 0 is free. Slowdown: share by which its requests lengthen training's decode steps. Over the steps beside it.", x_label: "step", unit: "number", is_from_zero: true, lines }));
}

// Published ones first: they won on the development problems, where a late candidate has only a few scores.
const byMerit = (a, b) => b.is_published - a.is_published || (b.mean_score ?? -1) - (a.mean_score ?? -1) || a.id - b.id;
const bestCandidate = (candidates) => [...candidates].sort(byMerit)[0];

function lineageGraph(candidates, chosen, choose) {
  const width = 640, height = 300, place = new Map();
  candidates.forEach((candidate, index) => {
    place.set(candidate.id, [30 + ((width - 50) * index) / Math.max(1, candidates.length - 1), height - 30 - (height - 60) * (candidate.mean_score ?? 0)]);
  });
  const edges = candidates.filter((candidate) => place.has(candidate.parent)).map((candidate) => {
    const [x1, y1] = place.get(candidate.parent), [x2, y2] = place.get(candidate.id);
    return drawing("line", { x1, y1, x2, y2 });
  });
  const dots = candidates.map((candidate) => {
    const [cx, cy] = place.get(candidate.id);
    return drawing("circle", { cx, cy, r: 6, class: [candidate.disqualified ? "out" : candidate.is_published ? "won" : "", candidate === chosen ? "chosen" : ""].join(" "), onclick: () => choose(candidate.id) }, drawing("title", {}, `${candidate.id}: ${fate(candidate)}`));
  });
  const marks = [0, 0.5, 1].map((score) => drawing("text", { x: 0, y: height - 26 - (height - 60) * score }, String(score)));
  return drawing("svg", { class: "lineage", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Candidates in order of birth by mean score; a line leads from each to its parent. The list below says the same." }, edges, dots, marks);
}

const fate = (candidate) => [candidate.mean_score === null ? "no score" : shown(candidate.mean_score), candidate.is_published ? "published" : "", candidate.disqualified].filter(Boolean).join(", ");

function candidateList(candidates, chosen, choose) {
  const rows = [...candidates].sort(byMerit);
  return table(["candidate", "parent", "mean score", "problems", "text"], rows.map((candidate) => [
    element("button", { "data-key": `candidate ${candidate.id}`, onclick: () => choose(candidate.id), "aria-pressed": String(candidate === chosen) }, String(candidate.id)),
    candidate.parent === null ? "" : String(candidate.parent), fate(candidate), Object.keys(candidate.scores).length, candidate.text.slice(0, 120) || "(asks plainly)"]), "Candidates, published ones first");
}

// Returns a candidate with its ancestors, the oldest first.
function lineOf(candidate, candidates) {
  const known = new Map(candidates.map((each) => [each.id, each])), line = [];
  for (let each = candidate; each && !line.includes(each); each = known.get(each.parent)) line.unshift(each);
  return line;
}

function candidateCard(candidate, line, choose, openReflection) {
  const changes = candidate.changes.map(([kind, text]) => changedWords(kind, text));
  return element("article", { class: "card" },
    element("h3", {}, `Candidate ${candidate.id}`),
    element("p", { class: "facts" }, candidate.parent === null ? "The round began with it." : `Reflected from candidate ${candidate.parent} on ${candidate.minibatch.join(", ")}. Changes against it are marked.`),
    line.length > 1 ? element("p", { class: "facts" }, "Line: ", line.flatMap((each, index) => [index ? " → " : "", each === candidate ? element("strong", {}, String(each.id)) : candidateButton(each.id, choose, "ancestor"), each.mean_score === null ? "" : ` (${shown(each.mean_score)})`])) : null,
    candidate.proposal === null ? null : element("button", { "data-key": "reflection", onclick: () => openReflection(candidate.proposal) }, "What reflection saw"),
    candidate.text || candidate.changes.length ? element("pre", {}, changes) : empty("It asks plainly."),
    table(["problem", "mean reward", "rollouts"], Object.entries(candidate.scores).sort((a, b) => b[1][0] - a[1][0]).map(([id, [mean, trials]]) => [id, mean, trials]), "Scores by problem"));
}

function reflectionPage(data) {
  if (!data) return [empty("Reflection has not answered to this proposal, or the journal was replaced.")];
  const read = data.prompt_tokens + data.completion_tokens;
  return [
    element("p", { class: "facts" }, `Parent: candidate ${data.parent}${read ? `; reflection read ${shown(data.prompt_tokens)} tokens and wrote ${shown(data.completion_tokens)}` : ""}`),
    element("h3", {}, data.refusal ? `Its template was refused: ${data.refusal}` : "The template it wrote"), data.text ? element("pre", {}, data.text) : empty("None."),
    element("h3", {}, "The message it was sent"), data.prompt ? element("pre", {}, data.prompt) : empty(unsent(data.backend)),
    data.reply ? [element("h3", {}, "Its reply"), element("pre", {}, data.reply)] : null,
    element("h3", {}, "The instruction it was to improve"), data.parent_text ? element("pre", {}, data.parent_text) : empty("None: problems are asked plainly."),
    element("h3", {}, "How that did"), data.examples.map(shownTrial),
  ].flat();
}

function unsent(backend) {
  if (backend === "phrasebook") return "None: a phrasebook wrote the template, and no language model was asked.";
  if (backend === "openai" || backend === "self") return "It is not in the journal: the run was made by an earlier version, which kept none, or the request was not answered. Below is what it was made of.";
  return "It is not in the journal: the code that reflects in this run has not noted one. It may set request.usage.prompt. Below is what it was given.";
}

function shownTrial(shownOne) {
  const verdict = shownOne.reward === null ? "The journal does not tell how the parent did." : `reward ${shown(shownOne.reward)}, ended by ${shownOne.finish_reason}`;
  return element("article", { class: "card" }, element("h3", {}, shownOne.problem_id), element("p", { class: "facts" }, verdict),
    shownOne.question === null ? null : element("pre", {}, shownOne.question), shownOne.response ? element("pre", {}, shownOne.response) : null,
    shownOne.feedback ? element("p", { class: "facts" }, shownOne.feedback) : null);
}
