// The response of a templated rollout by its tokens: what the template adds to each, and what the context ratio dropped.
"use strict";

const FULL_COLOUR_NATS = 3;

function tokenText(rollout) {
  const { lengths, shifts, kept } = rollout.tokens;
  const text = Array.from(rollout.response);
  let place = 0, numDropped = 0;
  const parts = lengths.map((length, index) => {
    const part = text.slice(place, place + length).join("");
    place += length;
    if (isDropped(kept[index])) numDropped += 1;
    return part ? token(part, index, shifts[index], kept[index]) : null;
  });
  const rest = text.slice(place).join("");
  const numbers = element("p", { class: "facts numbers", role: "status" }, "Point at a token, tap it or go to it with the arrow keys: its numbers stand here.");
  const box = element("pre", { class: "tokens", role: "group", "aria-label": "Response by tokens" }, parts, rest || null);
  rove(box, "span", (part) => { numbers.textContent = `${JSON.stringify(part.textContent)}: ${tokenNumbers(rollout, Number(part.dataset.token))}`; });
  return element("div", {},
    element("p", { class: "note" }, `Orange: likelier under the template, blue: less likely. Struck through: the context ratio took weight from it (${numDropped} of ${lengths.length} tokens).${rest ? ` Only the first ${lengths.length} tokens have numbers.` : ""}`),
    box, numbers);
}

const isDropped = (kept) => kept !== null && kept < 1;

function token(text, index, shift, kept) {
  const part = element("span", { "data-token": index, class: isDropped(kept) ? "dropped" : null }, text);
  if (shift !== null) part.style.background = `rgb(var(--${shift > 0 ? "templated" : "plain"}) / ${Math.min(1, Math.abs(shift) / FULL_COLOUR_NATS) * 0.55})`;
  return part;
}

function tokenNumbers(rollout, index) {
  const { sampling_logprobs: logprobs, shifts, kept: keptShares } = rollout.tokens;
  const under = logprobs[index], shift = shifts[index], kept = keptShares[index];
  if (shift === null) return "not measured";
  const plain = under === null ? "" : `log-prob ${shown(under)} under the template, ${shown(under - shift)} plainly; `;
  const weight = kept === null || kept === 1 ? "" : `; ${kept === 0 ? "dropped" : `weight ${shown(kept)}`}`;
  return `${plain}context ratio ${shown(Math.exp(-shift))}; advantage ${shown(rollout.advantage)}${weight}`;
}
