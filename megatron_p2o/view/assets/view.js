// The page: which run and which view, and what of it has changed.
"use strict";

const POLL_MS = 2000;
const VIEWS = { overview: "Overview", curves: "Curves", steps: "Steps", problems: "Problems", templates: "Templates", engines: "Engines", memory: "Memory", settings: "Settings", warnings: "Warnings" };

const byId = (id) => document.getElementById(id);
const state = {
  runs: [], known: new Map(), filter: "", compared: new Set(),
  problems: { filter: "", level: "", state: "all", order: "id", limit: 100 }, rounds: { round: null, candidate: null }, timeline: { window: 30 },
};

// A page that is a file holds the answers to all questions, packed.
const packed = byId("frozen");
const frozen = packed ? unpacked(packed.textContent) : null;

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

// Returns the answer, and whether it differs from the last one to the same question. The answer is undefined when the file
// that the page is has been made without it.
async function ask(path) {
  if (frozen) return { data: (await frozen).answers[path], isNew: false };
  const response = await fetch(`api/${path}`);
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
  const tag = response.headers.get("ETag"), before = state.known.get(path);
  if (before && before.tag === tag) return { data: before.data, isNew: false };
  const data = await response.json();
  state.known.set(path, { tag, data });
  return { data, isNew: true };
}

function place() {
  const [view, number] = location.hash.slice(1).split("/");
  return { view: view in VIEWS ? view : "overview", number: Math.min(Number(number) || 0, Math.max(0, state.runs.length - 1)) };
}

async function needed(view, number) {
  const ofRun = (panel) => ask(`run/${number}/${panel}`);
  if (view === "curves") return Promise.all([...new Set([number, ...state.compared])].map(async (each) => {
    const { data, isNew } = await ask(`run/${each}/metrics`);
    return { data: { name: state.runs[each].name, metrics: data }, isNew };
  }));
  if (view === "steps") return Promise.all([ofRun("metrics"), ofRun("timeline")]);
  if (view === "memory") return [await ofRun("metrics")];
  if (view === "problems" || view === "warnings" || view === "engines") return [await ofRun(view)];
  if (view === "templates") return [await ofRun("rounds"), await ofRun("libraries")];
  if (view === "settings") return [await ask("settings")];
  return [await ask("report")];
}

function drawn(view, answers) {
  const data = answers.map((answer) => answer.data);
  switch (view) {
    case "curves": return [curveControls(), ...curves(data, state.filter)];
    case "steps": return steps(data[0], data[1], state.timeline, () => refresh(true));
    case "memory": return memory(data[0]);
    case "problems": return problems(data[0], state.problems, openProblem, () => refresh(true));
    case "templates": return [...rounds(data[0], state.rounds, () => refresh(true), openReflection), ...libraries(data[1])];
    case "engines": return engines(data[0]);
    case "settings": return settings(data[0]);
    case "warnings": return warnings(data[0]);
    default: return overview(state.runs, data[0]);
  }
}

function curveControls() {
  const { number } = place();
  return element("div", { class: "controls" },
    element("label", {}, "Find ", element("input", { type: "search", "data-key": "find", value: state.filter, placeholder: "part of a name", onchange: (event) => { state.filter = event.target.value.trim(); refresh(true); } })),
    state.runs.length > 1 ? element("fieldset", {}, element("legend", {}, "Compare with"), state.runs.map((run, each) => (each === number ? null : element("label", {}, element("input", {
      type: "checkbox", checked: state.compared.has(each), onchange: (event) => { event.target.checked ? state.compared.add(each) : state.compared.delete(each); refresh(true); } }), ` ${run.name} `)))) : null);
}

function settings(data) {
  if (!data.rows.length) return [empty("The runs have no setting that differs from the defaults, or have not written their settings yet.")];
  const view = table(["setting", "default", ...data.runs], data.rows.map((row) => [row.name, row.default, ...row.values]), "Settings");
  view.querySelectorAll("tbody tr").forEach((row, index) => row.classList.toggle("differs", data.rows[index].differs));
  return [element("p", { class: "note" }, "Settings that are not the default. Shaded: the runs differ. A preset changes several at once."), view];
}

function warnings(data) {
  if (!data.length) return [empty("The run has not warned of anything.")];
  return [table(["time", "where", "warning"], data.map((line) => [String(line.time).slice(0, 19).replace("T", " "), String(line.logger), element("span", {}, String(line.message))]), "Warnings")];
}

// `epoch`: undefined shows the latest step that has rollouts. A page that is a file holds all that it has of a problem in one answer.
async function openProblem({ id, tries }, epoch) {
  const address = `run/${place().number}/problem?id=${encodeURIComponent(id)}`;
  const load = async (steps) => (await ask(frozen ? address : `${address}&steps=${steps.join(",")}`)).data;
  const data = await load(tries.filter(([, of]) => of === epoch).map(([step]) => step));
  show(id, data === undefined ? leftOut() : problemPage(data, tries, epoch, load));
}

async function openReflection(round, proposal) {
  const { data } = await ask(`run/${place().number}/reflection?round=${encodeURIComponent(round)}&proposal=${proposal}`);
  show(`Round ${round}, proposal ${proposal}`, data === undefined ? leftOut() : reflectionPage(data));
}

const leftOut = () => [empty("This file holds a sample, and this is not in it. p2o view shows all that the run's folder has.")];

function show(title, content) {
  const dialog = byId("details");
  dialog.replaceChildren(element("button", { class: "close", onclick: () => dialog.close() }, "Close"), element("h2", { id: "details-title" }, title), ...content.filter(Boolean));
  if (!dialog.open) dialog.showModal();
}

function drawFrame(view, number) {
  const tabs = byId("tabs");
  tabs.replaceChildren(...Object.entries(VIEWS).map(([name, title]) => element("a", { href: `#${name}/${number}`, "aria-current": name === view ? "page" : null }, title)));
  const select = byId("run");
  const names = state.runs.map((run) => run.name).join("\n");
  if (select.dataset.names !== names) {
    select.dataset.names = names;
    select.replaceChildren(...state.runs.map((run, each) => element("option", { value: each }, run.name)));
  }
  select.value = String(number);
  document.title = `P2O: ${[...new Set(state.runs.map((run) => run.arm))].join(", ")}`;
  const told = view === "overview" ? state.runs : state.runs.slice(number, number + 1);
  const tell = (id, sentences) => {
    byId(id).hidden = !sentences.length;
    byId(id).replaceChildren(...sentences.map((sentence) => element("li", {}, sentence)));
  };
  tell("damages", told.flatMap((run) => run.damages));
  tell("left-out", told.flatMap((run) => run.left_out ?? []));
}

const keyOf = (node) => node?.dataset?.key;
const withKey = (content, key) => [...content.querySelectorAll("[data-key]")].find((node) => keyOf(node) === key);

// What the person has done to a view that its data does not tell: where the focus is, what is typed, what is folded out.
function kept(content) {
  const focused = content.contains(document.activeElement) ? document.activeElement : null;
  return { key: keyOf(focused), typed: focused?.type === "search" ? focused.value : null, open: [...content.querySelectorAll("details[open][data-key]")].map(keyOf) };
}

function restore(content, { key, typed, open }) {
  for (const each of open) { const folded = withKey(content, each); if (folded) folded.open = true; }
  const node = key === undefined ? null : withKey(content, key);
  if (!node) return;
  if (typed !== null) node.value = typed;
  node.focus({ preventScroll: true });
}

let shownPlace = "", isBusy = false, isWanted = false;

async function refresh(isForced = false) {
  if (isBusy) { isWanted = isWanted || isForced; return; }
  isBusy = true;
  try {
    const { data, isNew } = await ask("runs");
    state.runs = data;
    const { view, number } = place(), here = `${view}/${number}`;
    const answers = await needed(view, number);
    const isChanged = isForced || here !== shownPlace || answers.some((answer) => answer.isNew) || (view === "overview" && isNew);
    if (isNew || here !== shownPlace) drawFrame(view, number);
    if (isChanged) {
      const was = kept(byId("content"));
      unfilled.clear();
      byId("content").replaceChildren(...drawn(view, answers).filter(Boolean));
      if (here === shownPlace) restore(byId("content"), was);
      shownPlace = here;
    }
    const run = state.runs[number];
    byId("status").textContent = run ? (run.is_finished ? "finished" : run.step === null ? "no step yet" : `step ${run.step}`) : "no run";
  } catch (error) {
    byId("status").textContent = frozen ? `This page cannot be shown: ${error.message}` : `Not up to date: ${error.message}. Is p2o view still running?`;
  } finally {
    isBusy = false;
    if (isWanted) { isWanted = false; refresh(true); }
  }
}

byId("run").addEventListener("change", (event) => { state.rounds = { round: null, candidate: null }; location.hash = `#${place().view}/${event.target.value}`; });
addEventListener("hashchange", () => refresh());
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
if (!frozen) setInterval(() => { if (!document.hidden) refresh(); }, POLL_MS);
refresh();
