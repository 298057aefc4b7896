// The response of a templated rollout by its tokens: what the template adds to each, and what the context ratio dropped.
"use strict";

const FULL_COLOUR_NATS = 3;

function tokenText(rollout) {
  const { lengths, sampling_logprobs: under, shifts, kept } = rollout.tokens;
  const text = Array.from(rollout.response);
  let place = 0, numDropped = 0;
  const parts = lengths.map((length, index) => {
    const part = text.slice(place, place + length).join("");
    place += length;
    if (kept[index] !== null && kept[index] < 1) numDropped += 1;
    return part ? token(part, { under: under[index], shift: shifts[index], kept: kept[index], advantage: rollout.advantage }) : null;
  });
  const rest = text.slice(place).join("");
  return element("div", {},
    element("p", { class: "note" }, `Orange: likelier under the template, blue: less likely. Struck through: the context ratio took weight from it (${numDropped} of ${lengths.length} tokens). Point at a token for its numbers.${rest ? ` Only the first ${lengths.length} tokens have them.` : ""}`),
    element("pre", { class: "tokens" }, parts, rest || null));
}

function token(text, numbers) {
  const { shift, kept } = numbers;
  const part = element("span", { title: words(numbers), class: kept !== null && kept < 1 ? "dropped" : null }, text);
  if (shift !== null) part.style.background = `rgb(var(--${shift > 0 ? "templated" : "plain"}) / ${Math.min(1, Math.abs(shift) / FULL_COLOUR_NATS) * 0.55})`;
  return part;
}

function words({ under, shift, kept, advantage }) {
  if (shift === null) return "not measured";
  const plain = under === null ? "" : `log-prob ${shown(under)} under the template, ${shown(under - shift)} plainly; `;
  const weight = kept === null || kept === 1 ? "" : `; ${kept === 0 ? "dropped" : `weight ${shown(kept)}`}`;
  return `${plain}context ratio ${shown(Math.exp(-shift))}; advantage ${shown(advantage)}${weight}`;
}
