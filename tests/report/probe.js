// What a browser sees of the page, as one message to the page around it. The hash chooses the theme: #dark, #light or none.
const faults = [];
addEventListener("error", (event) => faults.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => faults.push(`blocked: ${event.blockedURI}`));
addEventListener("load", () => {
  const theme = location.hash.slice(1);
  if (theme) document.documentElement.dataset.theme = theme;
  for (const one of document.querySelectorAll("details")) one.open = true;
  const channels = (text) => text.match(/[\d.]+/g).map(Number);
  const light = ([red, green, blue]) => {
    const [r, g, b] = [red, green, blue].map((part) => (part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  const opaque = (text) => text !== "none" && channels(text).length && (channels(text)[3] ?? 1) > 0.99;
  const ground = (node) => {
    const box = node.closest("g.box");
    if (box) {
      const fill = getComputedStyle(box.querySelector("rect")).fill;
      if (opaque(fill)) return channels(fill);
    }
    for (let up = node; up; up = up.parentElement) {
      const fill = getComputedStyle(up).backgroundColor;
      if (opaque(fill)) return channels(fill);
    }
    return [255, 255, 255];
  };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || ["SCRIPT", "STYLE", "TITLE", "title"].includes(node.tagName) || node.hasAttribute("style")) continue;
    const style = getComputedStyle(node);
    const ink = channels(node.ownerSVGElement ? style.fill : style.color);
    const found = contrast(light(ink), light(ground(node)));
    if (found < 4.5) faint.push(`${walker.currentNode.data.trim().slice(0, 40)}: ${found.toFixed(2)}`);
  }
  const untitled = [...document.querySelectorAll("svg.chart")].filter(
    (svg) => svg.querySelectorAll(".axis-title").length < (svg.classList.contains("plot") ? 2 : 1)
  );
  const unnamed = [...document.querySelectorAll("svg")].filter((svg) => !svg.getAttribute("aria-label") && !svg.getAttribute("aria-hidden"));
  const plot = document.querySelector("svg.plot");
  plot.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  const paper = () => getComputedStyle(document.body).backgroundColor;
  const before = paper();
  const read = plot.nextElementSibling.textContent;
  const root = document.documentElement, wide = root.scrollWidth;
  const over = [...document.body.querySelectorAll("*")]
    .filter((one) => !one.closest(".scroll, nav, svg, pre") && one.getBoundingClientRect().right > root.clientWidth + 1)
    .map((one) => `${one.tagName} ${one.className} ${one.textContent.slice(0, 30)}`);
  const result = {
    over,
    theme, wide, width: innerWidth, room: root.clientWidth, faint, read, faults, before,
    untitled: untitled.length, unnamed: unnamed.length, plots: document.querySelectorAll("svg.plot").length,
    title: document.title, images: document.images.length, resources: performance.getEntriesByType("resource").length,
    dangling: [...document.querySelectorAll('a[href^="#"]')].filter((link) => !document.getElementById(link.getAttribute("href").slice(1))).length,
    twice: [...document.querySelectorAll("[id]")].length - new Set([...document.querySelectorAll("[id]")].map((one) => one.id)).size,
  };
  document.getElementById("theme").click();
  result.after = paper();
  parent.postMessage(JSON.stringify(result), "*");
});
