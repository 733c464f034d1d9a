// Readout of the charts, by pointer and by arrow keys. The page is whole without it.
"use strict";
for (const figure of document.querySelectorAll(".chart")) {
  const svg = figure.querySelector(".plot svg");
  const ring = svg.querySelector(".ring");
  const readout = figure.querySelector(".readout");
  const { by, points } = JSON.parse(figure.querySelector("script").textContent);
  if (!points.length) continue;
  const hint = readout.textContent = "Point at a mark, or use the arrow keys, to read all of a row.";
  let current = -1;

  const show = (index) => {
    current = Math.max(0, Math.min(points.length - 1, index));
    ring.setAttribute("cx", points[current].x + "%");
    ring.setAttribute("cy", points[current].y);
    ring.setAttribute("visibility", "visible");
    readout.textContent = points[current].text;
    readout.classList.add("on");
  };
  const hide = () => {
    ring.setAttribute("visibility", "hidden");
    readout.textContent = hint;
    readout.classList.remove("on");
  };
  const nearest = (event) => {
    const box = svg.getBoundingClientRect();
    const distance = ({ x, y }) => {
      const across = by === "row" ? 0 : event.clientX - box.left - (x / 100) * box.width;
      return Math.hypot(across, event.clientY - box.top - y);
    };
    return points.reduce((best, point, index) => (distance(point) < distance(points[best]) ? index : best), 0);
  };

  svg.addEventListener("pointermove", (event) => show(nearest(event)));
  svg.addEventListener("pointerdown", (event) => show(nearest(event)));
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(current); });
  svg.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: current - 1, ArrowUp: current - 1, ArrowRight: current + 1, ArrowDown: current + 1,
      PageUp: current - 10, PageDown: current + 10, Home: 0, End: points.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
}
