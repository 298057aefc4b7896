// All runs together: results, the paper's figures, what became of the problems, health, and what was spent.
"use strict";

function overview(runs, data) {
  const { header, rows } = data.overview;
  const progress = runs.map((run, number) => [
    element("span", {}, swatch(COLOURS[rows[number].style]), element("a", { href: `#curves/${number}` }, run.name)),
    run.seed === null ? "" : String(run.seed), run.step === null ? "" : String(run.step), run.epoch === null ? "" : String(run.epoch), ...rows[number].cells,
    duration(run.step_s), run.time ? `${run.time.slice(0, 19).replace("T", " ")} UTC` : "", String(run.num_warnings)]);
  return [
    ...part("Runs", "Accuracies are the latest evaluation of the run; training reward is its last step's mean.",
      table(["Run", "Seed", "Step", "Epoch", ...header.slice(1), "Last step took", "Last written", "Warnings"], progress, "Runs")),
    ...part("Training", "Reward and validation accuracy (Figure 3 of the paper).", chartsOf(data.training), data.by_source ? folded(data.by_source.caption, plainTable(data.by_source)) : null),
    ...part("Prompt effectiveness", "With and without template (Figure 4 of the paper).", chartsOf(data.effectiveness)),
    ...(data.rounds ? part("Evolution rounds", null, plainTable(data.rounds)) : []),
    ...(data.examples.length ? part("Examples", "The same problem asked plainly and through a template (Figure 5 of the paper).", data.examples.map(examplesOf)) : []),
    ...(data.ledger ? part("Hard-sample ledger", "Internalised: first solved only through a template, later solved plainly.", plainTable(data.ledger.table), data.ledger.internalised.map(internalisedOf)) : []),
    ...part("Health", "Engine/trainer mismatch, optimisation, and where rollouts go.", chartsOf(data.health), plainTable(data.failures)),
    ...(data.compute ? part("Compute", "What each run has spent on the steps that led to its policy. Sampled tokens leave prompts out. Tokens done again were sampled on steps that a kill undid.", plainTable(data.compute)) : []),
    ...(data.time ? part("Time", "Total seconds of each phase. A step contains others, and phases may overlap.", timeTable(data.time)) : []),
  ];
}

function part(title, note, ...content) {
  return [element("section", { class: "report", "aria-label": title }, element("h2", {}, title), note ? element("p", { class: "note" }, note) : null, content.flat())];
}

const plainTable = (data) => table(data.header, data.rows, data.caption);

const folded = (summary, ...content) => element("details", {}, element("summary", {}, summary), content);

const chartsOf = (charts) => element("div", { class: "charts" }, charts.map((chart) => chartCard({ ...chart, is_from_zero: true })));

function timeTable(data) {
  const bar = (share) => {
    const part = element("span");
    part.style.width = `${100 * share}%`;
    return element("div", { class: "share", "aria-hidden": "true" }, part);
  };
  return table(data.header, data.rows.map((row) => [row.name, ...row.phases.map((phase) => element("div", {}, phase.text, bar(phase.share)))]), "Seconds of each phase");
}

function internalisedOf(run) {
  return folded(`${run.name}: ${run.num_problems} problems internalised`, plainTable(run.table), run.num_left_out ? element("p", { class: "note" }, `and ${run.num_left_out} more`) : null);
}

function examplesOf(run) {
  return element("div", {}, element("h3", {}, run.name), run.examples.map((problem) => element("article", { class: "card" },
    element("h3", {}, ["Problem", problem.problem_id, problem.level, problem.is_internalised ? "internalised" : ""].filter(Boolean).join(" · ")),
    element("pre", {}, problem.question), element("p", {}, "Gold answer: ", element("code", {}, problem.gold)),
    element("div", { class: "sides" }, problem.answers.map(exampleAnswer)))));
}

function exampleAnswer(answer) {
  return element("div", {},
    element("p", { class: "facts" }, `${answer.label}: `, element("strong", { class: answer.is_correct ? "solved" : "failed" }, answer.is_correct ? "correct" : "not correct"), ` · ${answer.num_tokens} tokens`),
    answer.template ? element("pre", { class: "instruction" }, answer.template) : null, element("pre", {}, answer.text));
}

// The published templates as trees of who was reflected from whom.
function libraries(data) {
  if (!data.length) return [];
  return part("Published templates", "Each template below the one it was reflected from; words added to the parent are marked, dropped ones struck through. Score: mean reward on the development problems.",
    data.map((library, index) => element("details", { open: index === 0 }, element("summary", {}, `Library version ${library.version}: ${library.num_templates} templates`), templateTree(library.roots))));
}

function templateTree(nodes) {
  return element("ul", { class: "tree" }, nodes.map((node) => element("li", {},
    element("div", { class: node.score === null ? "card unpublished" : "card" },
      element("p", { class: "facts" }, element("strong", {}, `Template ${node.id}`), node.facts.map((fact) => ` · ${fact}`)),
      node.text.length ? element("pre", {}, node.text.map((span) => changedWords(span.kind, span.text))) : empty("Asks plainly.")),
    node.children.length ? templateTree(node.children) : null)));
}

const changedWords = (kind, text) => (kind === "added" ? element("ins", {}, text) : kind === "dropped" ? element("del", {}, text) : text);
