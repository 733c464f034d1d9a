// Crosshair and readout of the charts, by pointer and by arrow keys. The page is whole without it.
"use strict";
for (const figure of document.querySelectorAll(".chart")) {
  const svg = figure.querySelector("svg");
  const cross = svg.querySelector(".cross");
  const readout = figure.querySelector(".readout");
  const legend = readout.innerHTML; // our own markup, restored when the pointer leaves
  const points = JSON.parse(figure.querySelector("script").textContent);
  let current = points.x.length - 1;

  const show = (index) => {
    current = Math.max(0, Math.min(points.x.length - 1, index));
    cross.setAttribute("x1", points.x[current]);
    cross.setAttribute("x2", points.x[current]);
    cross.setAttribute("visibility", "visible");
    readout.textContent = points.text[current];
  };
  const hide = () => {
    cross.setAttribute("visibility", "hidden");
    readout.innerHTML = legend;
  };
  const nearest = (x) => {
    let best = 0;
    points.x.forEach((candidate, index) => {
      if (Math.abs(candidate - x) < Math.abs(points.x[best] - x)) best = index;
    });
    return best;
  };

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    show(nearest(((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(current); });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    show(current + step);
  });
}
