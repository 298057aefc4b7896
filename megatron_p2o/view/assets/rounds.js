// Rounds of prompt evolution: who was reflected from whom, with what score, and what became of it.
"use strict";

function rounds(data, options, redraw, openReflection) {
  if (!data.length) return [empty("This run has no round of prompt evolution, or none yet.")];
  const round = data.find((candidate) => candidate.name === options.round) ?? data[0];
  const chosen = round.candidates.find((candidate) => candidate.id === options.candidate) ?? bestCandidate(round.candidates);
  const choose = (id) => { options.candidate = id; redraw(); };
  return [
    element("div", { class: "controls" }, element("label", {}, "Round ", element("select", { onchange: (event) => { options.round = event.target.value; options.candidate = null; redraw(); } },
      data.map((each) => element("option", { value: each.name, selected: each.name === round.name }, `${each.name}${each.ended_by ? "" : " (running)"}`))))),
    round.damage ? element("p", { class: "notice" }, round.damage) : null,
    element("p", { class: "facts" }, roundFacts(round)),
    element("p", { class: "facts" }, "Proposals by outcome: ", Object.entries(round.outcomes).map(([name, count]) => `${name} ${count}`).join(", ") || "none yet"),
    element("div", { class: "split" },
      element("div", {}, lineageGraph(round.candidates, chosen, choose), candidateList(round.candidates, chosen, choose)),
      element("div", {}, candidateCard(chosen, (proposal) => openReflection(round.name, proposal)))),
    element("details", {}, element("summary", {}, `Refused proposals (latest ${round.refusals.length})`),
      table(["proposal", "parent", "outcome", "text"], round.refusals.map((refusal) => [element("button", { onclick: () => openReflection(round.name, refusal.proposal) }, String(refusal.proposal)), String(refusal.parent), refusal.outcome, refusal.text]), "Refused proposals")),
  ];
}

function roundFacts(round) {
  const state = round.ended_by ? `library ${round.library_version}, ended by ${round.ended_by}` : "running, or ended early";
  const control = round.num_control_rollouts ? `, ${shown(round.num_control_rollouts)} plain ones for comparison` : "";
  return `${state}; ${shown(round.num_rollouts)} rollouts${control}, ${shown(round.num_tokens)} tokens, ${round.candidates.length} candidates, ${round.num_open_proposals} proposals under way`;
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
    element("button", { onclick: () => choose(candidate.id), "aria-pressed": String(candidate === chosen) }, String(candidate.id)),
    candidate.parent === null ? "" : String(candidate.parent), fate(candidate), Object.keys(candidate.scores).length, candidate.text.slice(0, 120) || "(asks plainly)"]), "Candidates, published ones first");
}

function candidateCard(candidate, openReflection) {
  const changes = candidate.changes.map(([kind, text]) => changedWords(kind, text));
  return element("article", { class: "card" },
    element("h3", {}, `Candidate ${candidate.id}`),
    element("p", { class: "facts" }, candidate.parent === null ? "The round began with it." : `Reflected from candidate ${candidate.parent} on ${candidate.minibatch.join(", ")}. Changes against it are marked.`),
    candidate.proposal === null ? null : element("button", { onclick: () => openReflection(candidate.proposal) }, "What reflection saw"),
    candidate.text || candidate.changes.length ? element("pre", {}, changes) : empty("It asks plainly."),
    table(["problem", "mean reward", "rollouts"], Object.entries(candidate.scores).sort((a, b) => b[1][0] - a[1][0]).map(([id, [mean, trials]]) => [id, mean, trials]), "Scores by problem"));
}

function reflectionPage(data) {
  if (!data) return [empty("Reflection has not answered to this proposal, or the journal was replaced.")];
  const read = data.prompt_tokens + data.completion_tokens;
  return [
    element("p", { class: "facts" }, `Parent: candidate ${data.parent}${read ? `; reflection read ${shown(data.prompt_tokens)} tokens and wrote ${shown(data.completion_tokens)}` : ""}`),
    element("h3", {}, "The instruction it was to improve"), data.parent_text ? element("pre", {}, data.parent_text) : empty("None: problems are asked plainly."),
    data.examples.map(shownTrial),
    element("h3", {}, data.refusal ? `It wrote, and was refused: ${data.refusal}` : "It wrote"), data.text ? element("pre", {}, data.text) : empty("Nothing."),
  ].flat();
}

function shownTrial(shownOne) {
  const verdict = shownOne.reward === null ? "The journal does not tell how the parent did." : `reward ${shown(shownOne.reward)}, ended by ${shownOne.finish_reason}`;
  return element("article", { class: "card" }, element("h3", {}, shownOne.problem_id), element("p", { class: "facts" }, verdict),
    shownOne.question === null ? null : element("pre", {}, shownOne.question), shownOne.response ? element("pre", {}, shownOne.response) : null,
    shownOne.feedback ? element("p", { class: "facts" }, shownOne.feedback) : null);
}
