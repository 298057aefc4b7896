// What the run's processes hold: host memory and GPU memory, now and at the peak, by kind, process and phase.
"use strict";

// Kind of process: what its metric of all together is called, and what it is. Host memory is resident: pages that processes share
// count in each.
const KINDS = {
  ranks: ["ranks_host", "train the policy: weights, optimizer and gradients where they are not on a GPU, and the weights staged for engines"],
  engines: ["engines_host", "sample: SGLang servers with their processes, reflection servers included; without a GPU also weights and KV cache"],
  graders: ["graders_host", "judge answers, in processes of their own"],
  evolution: ["evolution_host", "searches templates"],
  relays: ["relays_host", "read completions; on other nodes they are daemons that hold the weights for their engines"],
  agents: ["agents_host", "start the ranks of a node"],
};

const PEAKS = {
  rank_host_peak: "host memory of the rank that has held the most",
  rank_gpu_peak: "tensors on the GPU of the rank whose tensors have taken the most; engines, NCCL and the allocator's reserve are not in it",
  engine_host_peak: "host memory of the engine that has held the most, with all its processes",
};

const SINGLE = /^(rank|engine)_(\d+)_host$/;
const PHASE_PEAK = /^(?!rank_|engine_)(.+)_peak$/;
const MAX_LINES = 6;

function memory(metrics) {
  const names = Object.keys(metrics.series).map((key) => /^memory\/(.+)_bytes$/.exec(key)?.[1]).filter(Boolean);
  if (!names.length) return [empty("No step has told of memory yet.")];
  const column = (name) => metrics.series[`memory/${name}_bytes`] ?? [];
  const points = (name) => metrics.steps.map((step, index) => [step, column(name)[index]]).filter(([, bytes]) => bytes !== null && bytes !== undefined).map(([step, bytes]) => [step, bytes / GIB]);
  const lines = (found) => found.map(([title, name], style) => ({ name: title, style, points: points(name) })).filter((line) => line.points.length);
  const chart = (title, note, found) => (found.length ? chartCard({ title: `${title}, GiB`, note, x_label: "step", unit: "number", is_from_zero: true, lines: found }) : null);
  const singles = (kind) => names.filter((name) => SINGLE.exec(name)?.[1] === kind).sort((a, b) => SINGLE.exec(a)[2] - SINGLE.exec(b)[2]);
  const isOnGpu = column("rank_gpu_peak").some(Boolean);
  const phases = names.filter((name) => PHASE_PEAK.test(name)).map((name) => [PHASE_PEAK.exec(name)[1], name]);
  return [
    element("p", { class: "note" }, "Host memory is what is resident in a machine's memory, summed over all nodes; pages that processes share count in each. The GPU memory of engines is not measured: they reserve a share of it (weights and KV cache); how much of the cache is in use stands under Engines."),
    element("h2", {}, "By kind of process"),
    table(["processes", "host memory now", "highest", "what they do"], Object.entries(KINDS).filter(([, [name]]) => names.includes(name)).map(([kind, [name, meaning]]) => [kind, ...nowAndHighest(column(name)), meaning]), "Memory by kind of process"),
    element("h2", {}, "Peaks"),
    table(["peak", "so far", "of what"], Object.entries(PEAKS).filter(([name]) => names.includes(name)).map(([name, meaning]) => [name.replaceAll("_", " "), nowAndHighest(column(name))[1], meaning]), "Peaks of memory"),
    element("h2", {}, "By process"),
    table(["process", "host memory now", "highest"], ["rank", "engine"].flatMap((kind) => singles(kind).map((name) => [name.replace("_host", "").replace("_", " "), ...nowAndHighest(column(name))])), "Memory by process"),
    element("h2", {}, "Over the steps"),
    element("div", { class: "charts" },
      chart("Host memory by kind", "All processes of a kind together.", lines(Object.entries(KINDS).map(([kind, [name]]) => [kind, name]))),
      chart(`Peak of rank 0 by phase, ${isOnGpu ? "tensors on its GPU" : "host memory"}`, isOnGpu ? null : "There is no GPU: resident memory.", lines(phases.sort(([, a], [, b]) => Math.max(...column(b)) - Math.max(...column(a))).slice(0, MAX_LINES))),
      ...["rank", "engine"].map((kind) => chart(`Host memory by ${kind}`, singles(kind).length > MAX_LINES ? `The highest, the median and the lowest of ${singles(kind).length}.` : null, ofMany(singles(kind).map((name) => [name.replace("_host", "").replace("_", " "), name]), lines, points)))),
  ];
}

function nowAndHighest(column) {
  const told = column.filter((bytes) => bytes !== null);
  return told.length ? [gib(told.at(-1)), gib(Math.max(...told))] : ["", ""];
}

// Lines of a few processes; of many, what the highest, the middle and the lowest of them held at each step.
function ofMany(found, lines, points) {
  if (found.length <= MAX_LINES) return lines(found);
  const atStep = new Map();
  for (const [, name] of found) for (const [step, size] of points(name)) atStep.set(step, [...(atStep.get(step) ?? []), size]);
  const sorted = [...atStep].sort(([a], [b]) => a - b).map(([step, sizes]) => [step, sizes.sort((a, b) => a - b)]);
  const rank = { highest: (sizes) => sizes.at(-1), median: (sizes) => sizes[Math.floor(sizes.length / 2)], lowest: (sizes) => sizes[0] };
  return Object.entries(rank).map(([name, of], style) => ({ name, style, points: sorted.map(([step, sizes]) => [step, of(sizes)]) }));
}
