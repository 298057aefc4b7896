// What the engines are doing: requests, KV cache, speed, and the policy version that they serve.
"use strict";

function engines(data) {
  if (!data.engines.length) return [empty("The run has no logs of engines, or they are not to be read from here.")];
  const rows = data.engines.map((engine) => [
    engine.name, engine.running === null ? "not told yet" : engine.running, engine.waiting ?? "", engine.kv_share === null ? "" : `${shown(100 * engine.kv_share)} %`,
    engine.tokens_per_s ?? "", gib(engine.host_bytes), engine.time ?? ""]);
  return [
    element("p", { class: "facts" }, `Policy version ${data.version ?? 0}${data.restarts ? `; ${shown(data.restarts)} restarts in the run` : ""}`),
    table(["engine", "running", "waiting", "KV cache in use", "tokens/s", "host memory", "told at"], rows, "Engines"),
    element("p", { class: "note" }, "From the last lines of the engines' logs. An engine tells nothing while it has no requests: compare the time, which is that of its machine."),
  ];
}
