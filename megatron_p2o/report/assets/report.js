// Hover values of the charts: pointer, touch, and the arrow keys on a focused chart.
"use strict";

const hover = document.getElementById("hover");
hover.setAttribute("role", "status");

function make(parent, tag, className, text) {
  const node = document.createElement(tag);
  node.className = className;
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function nearest(positions, wanted) {
  let best = 0;
  positions.forEach((position, index) => {
    if (Math.abs(position - wanted) < Math.abs(positions[best] - wanted)) best = index;
  });
  return best;
}

function attach(plot) {
  const chart = JSON.parse(plot.querySelector("script").textContent);
  let marks = [];
  let shown = chart.x.length - 1;

  function hide() {
    marks.forEach((mark) => mark.remove());
    marks = [];
    hover.style.visibility = "hidden";
  }

  function show(index) {
    hide();
    shown = index;
    const rule = make(plot, "div", "rule");
    rule.style.left = chart.left[index] + "%";
    marks.push(rule);
    hover.replaceChildren();
    make(hover, "b", "", chart.xLabel + " " + chart.x[index].toLocaleString("en"));
    for (const line of chart.lines) {
      if (line.text[index] === null) continue;
      const spot = make(plot, "div", "spot s" + line.style);
      spot.style.left = chart.left[index] + "%";
      spot.style.top = line.top[index] + "%";
      marks.push(spot);
      const row = make(hover, "div", "");
      make(row, "span", "name s" + line.style, line.name);
      make(row, "span", "", line.text[index]);
    }
    place(rule.getBoundingClientRect());
  }

  function place(rule) {
    const isRight = rule.left > document.documentElement.clientWidth / 2;
    const left = isRight ? rule.left - hover.offsetWidth - 12 : rule.left + 12;
    const lowest = document.documentElement.clientHeight - hover.offsetHeight - 8;
    hover.style.left = Math.max(6, left) + "px";
    hover.style.top = Math.max(6, Math.min(rule.top, lowest)) + "px";
    hover.style.visibility = "visible";
  }

  function follow(event) {
    const box = plot.getBoundingClientRect();
    show(nearest(chart.left, (100 * (event.clientX - box.left)) / box.width));
  }

  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const last = chart.x.length - 1;
    if (event.key === "ArrowLeft") show(Math.max(0, shown - 1));
    else if (event.key === "ArrowRight") show(Math.min(last, shown + 1));
    else if (event.key === "Home") show(0);
    else if (event.key === "End") show(last);
    else if (event.key === "Escape") hide();
    else return;
    event.preventDefault();
  });
}

document.querySelectorAll(".plot").forEach(attach);
window.addEventListener("scroll", () => { hover.style.visibility = "hidden"; }, { passive: true });
