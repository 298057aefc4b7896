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
  if (Number.isInteger(number)) return (number + 0).toLocaleString("en"); // 0, not -0
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

// Returns `node`, which gives its place to what `make` returns when it is about to come into sight: a hundred long responses open at once.
function whenInSight(node, make) {
  const sight = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    sight.disconnect();
    node.replaceWith(make());
  }, { root: document.getElementById("details"), rootMargin: "50%" });
  sight.observe(node);
  return node;
}

// Makes one stop of the Tab key of all elements in `box` that `selector` finds. Arrow keys, Home and End lead from one to another.
// `tell` is given the one that has the focus, is pointed at or is tapped.
function rove(box, selector, tell = () => {}) {
  const items = () => [...box.querySelectorAll(selector)];
  let current = null;
  const take = (item) => {
    if (current) current.tabIndex = -1;
    current = item;
    current.tabIndex = 0;
  };
  items().forEach((item) => { if (item.tabIndex >= 0) item.tabIndex = -1; });
  if (box.querySelector(selector)) take(box.querySelector(selector));
  const on = (name, act) => box.addEventListener(name, (event) => {
    const item = event.target.closest(selector);
    if (item && box.contains(item)) act(item, event);
  });
  on("focusin", (item) => { take(item); tell(item); });
  on("mouseover", (item) => tell(item));
  on("click", (item) => { take(item); item.focus({ preventScroll: true }); });
  on("keydown", (item, event) => {
    const next = neighbour(items(), item, event.key);
    if (!next) return;
    event.preventDefault();
    take(next);
    next.focus();
  });
}

function neighbour(items, item, key) {
  const index = items.indexOf(item);
  switch (key) {
    case "ArrowRight": return items[index + 1];
    case "ArrowLeft": return items[index - 1];
    case "Home": return items[0];
    case "End": return items.at(-1);
    case "ArrowDown": return inNextLine(items, item, 1);
    case "ArrowUp": return inNextLine(items, item, -1);
    default: return undefined;
  }
}

// Returns what stands closest in the nearest line below (direction 1) or above (-1).
function inNextLine(items, item, direction) {
  const boxOf = (each) => each.getClientRects()[0] ?? each.getBoundingClientRect();
  const from = boxOf(item);
  const beyond = items.map((each) => ({ each, box: boxOf(each) })).filter(({ box }) => direction * (box.top - from.top) > from.height / 2);
  const nearest = Math.min(...beyond.map(({ box }) => Math.abs(box.top - from.top)));
  const line = beyond.filter(({ box }) => Math.abs(box.top - from.top) < nearest + from.height / 2);
  return line.sort((a, b) => Math.abs(a.box.left - from.left) - Math.abs(b.box.left - from.left))[0]?.each;
}

const GIB = 2 ** 30;

const gib = (bytes) => (bytes === null || bytes === undefined ? "" : `${shown(bytes / GIB)} GiB`);
