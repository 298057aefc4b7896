// Elements from data. Text is only ever set as text: nothing that a run holds can become markup.
"use strict";

function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function drawing(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function table(header, rows, caption) {
  const cell = (content, tag, attributes = {}) => (typeof content === "number" ? element(tag, { ...attributes, class: "number" }, shown(content)) : element(tag, attributes, content));
  return element("div", { class: "table", tabindex: 0, role: "region", "aria-label": caption },
    element("table", {}, element("thead", {}, element("tr", {}, header.map((name) => cell(name, "th", { scope: "col" })))),
      element("tbody", {}, rows.map(([first, ...others]) => element("tr", {}, cell(first, "th", { scope: "row" }), others.map((each) => cell(each, "td")))))));
}

function shown(number) {
  if (number === null || number === undefined) return "";
  if (Number.isInteger(number)) return number.toLocaleString("en");
  const size = Math.abs(number);
  return size >= 1000 ? number.toLocaleString("en", { maximumFractionDigits: 0 }) : size >= 0.001 ? String(Number(number.toPrecision(4))) : number.toExponential(2);
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 60) return `${shown(Number(seconds.toPrecision(3)))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

function empty(sentence) {
  return element("p", { class: "note" }, sentence);
}
