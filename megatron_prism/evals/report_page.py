"""The frame of the report: style for light and dark, and the script that lists responses. Nothing is fetched from anywhere."""

STYLE = """\
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #f2f4f7; --line: #ddd; --good: #1a7f4b; --bad: #b3412f; --faint: #667080; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --paper: #14171c; --soft: #1e232b; --line: #363d49; --good: #5ac78d; --bad: #f08a76; --faint: #97a1b1; }
}
body { margin: 0 auto; max-width: 1080px; padding: 24px; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; } h2 { font-size: 18px; margin-top: 36px; }
.scroll { overflow-x: auto; margin: 6px 0 16px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
tbody th { text-align: left; font-weight: 400; } thead th { color: var(--faint); font-weight: 600; }
thead th:first-child, th.text, td.text { text-align: left; }
.notes { background: var(--soft); border-radius: 8px; padding: 10px 10px 10px 30px; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; } svg .task { font-weight: 600; }
.c0 { fill: #7c93b2; } .c1 { fill: #d98b4a; } .c2 { fill: #6aa57a; } .c3 { fill: #b46a8e; } .c4 { fill: #8b7fc7; } .c5 { fill: #b3a04a; }
.whisker { stroke: var(--ink); stroke-width: 1.5; }
.choose { display: flex; gap: 12px; flex-wrap: wrap; margin-bottom: 12px; }
select { font: inherit; color: inherit; background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: 4px 8px; }
details { border: 1px solid var(--line); border-radius: 8px; margin: 8px 0; padding: 6px 12px; }
summary { cursor: pointer; } .correct { color: var(--good); } .other { color: var(--bad); } .faint { color: var(--faint); }
pre { background: var(--soft); border-radius: 6px; padding: 10px; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
"""
"""Of every page with responses to read."""

SCRIPT = """\
const data = JSON.parse(document.getElementById("data").textContent);
const pick = (id) => document.getElementById(id);
const fill = (id, values) => { for (const value of values) pick(id).add(new Option(value, value)); };
const put = (parent, kind, text, name) => {
  const node = document.createElement(kind);
  node.textContent = text;
  if (name) node.className = name;
  parent.append(node);
  return node;
};
"""
"""What such a page's script begins with: the page's data, and how to find an element, fill a menu and put text under an element."""

PAGE = (
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation</title>
<style>
"""
    + STYLE
    + """</style>
</head>
<body>
<h1>Evaluation</h1>
{{body}}
<h2>Responses</h2>
<p class="faint">{{limits}}</p>
<div class="choose"><select id="model"></select><select id="task"></select><select id="reason"></select></div>
<div id="list"></div>
<script type="application/json" id="data">{{data}}</script>
<script>
"""
    + SCRIPT
    + """fill("model", new Set(data.map((one) => one.model)));
fill("task", new Set(data.map((one) => one.task)));
fill("reason", ["every verdict", ...new Set(data.map((one) => one.reason))]);
function show() {
  pick("list").replaceChildren();
  for (const one of data) {
    if (one.model !== pick("model").value || one.task !== pick("task").value) continue;
    if (pick("reason").selectedIndex && one.reason !== pick("reason").value) continue;
    const box = put(pick("list"), "details", "");
    const head = put(box, "summary", `${one.id}, sample ${one.sample}: `);
    put(head, "span", one.reason.replace("_", " "), one.reason === "correct" ? "correct" : "other");
    const end = one.finish_reason === "length" ? ", cut off" : "";
    put(head, "span", ` (answer ${one.answer ?? "none"}; ${one.num_tokens} tokens${end})`, "faint");
    put(box, "div", "prompt", "faint");
    put(box, "pre", one.prompt);
    put(box, "div", "response", "faint");
    put(box, "pre", one.text);
    if (one.detail) put(box, "div", one.detail, "faint");
  }
}
for (const id of ["model", "task", "reason"]) pick(id).onchange = show;
show();
</script>
</body>
</html>
"""
)
