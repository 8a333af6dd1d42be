"use strict";
const root = document.documentElement, toggle = document.getElementById("theme");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
const name = () => { toggle.textContent = isDark() ? "Light" : "Dark"; };
toggle.onclick = () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); };
name();
const unfold = () => {
  const target = document.getElementById(location.hash.slice(1)), fold = target && target.closest("details");
  if (fold) { fold.open = true; target.scrollIntoView(); }
};
addEventListener("hashchange", unfold);
unfold();
let folded = [];
addEventListener("beforeprint", () => { folded = [...document.querySelectorAll("details.fold:not([open])")]; for (const one of folded) one.open = true; });
addEventListener("afterprint", () => { for (const one of folded) one.open = false; });
const SVG = "http" + "://www.w3.org/2000/svg";
const digits = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e6 || Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4))));
for (const plot of document.querySelectorAll("svg.plot")) {
  const axis = (key) => plot.dataset[key].split(",").map(Number);
  const value = ([low, high, start, stop, log, whole], at) => {
    const share = (at - start) / (stop - start);
    const found = log ? low * (high / low) ** share : low + share * (high - low);
    return whole ? Math.round(found) : found;
  };
  const lines = [...plot.querySelectorAll("polyline.line")].map((line) => ({ name: line.dataset.name, points: [...line.points] }));
  const places = [...new Set(lines.flatMap((line) => line.points.map((point) => point.x)))].sort((one, other) => one - other);
  const box = plot.viewBox.baseVal, said = document.createElement("output"), cursor = document.createElementNS(SVG, "g"), rule = document.createElementNS(SVG, "path");
  cursor.setAttribute("class", "cursor"); cursor.append(rule); plot.append(cursor); plot.after(said);
  let here = -1;
  const show = (place) => {
    here = Math.max(0, Math.min(places.length - 1, place));
    const x = places[here];
    rule.setAttribute("d", `M${x} 28V${box.height - 46}`);
    const near = (points) => points.reduce((best, point) => (Math.abs(point.x - x) < Math.abs(best.x - x) ? point : best));
    const found = lines.map((line) => [line.name, near(line.points)]).filter(([, point]) => Math.abs(point.x - x) < 6);
    said.textContent = `at ${digits(value(axis("x"), x))}: ` + found.map(([one, point]) => `${one} ${digits(value(axis("y"), point.y))}`).join(", ");
  };
  const leave = () => { rule.removeAttribute("d"); said.textContent = ""; here = -1; };
  plot.addEventListener("pointermove", (event) => {
    const frame = plot.getBoundingClientRect(), x = ((event.clientX - frame.left) / frame.width) * box.width;
    show(places.reduce((best, place, index) => (Math.abs(place - x) < Math.abs(places[best] - x) ? index : best), 0));
  });
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("blur", leave);
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (step) { event.preventDefault(); show(here < 0 ? (step > 0 ? 0 : places.length - 1) : here + step); }
    if (event.key === "Escape") leave();
  });
}
