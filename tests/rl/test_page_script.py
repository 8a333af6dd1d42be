"""The script of the pages with responses, run: menus are filled, and what is chosen is listed as text."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from graded import group

from megatron_prism.evals.report_page import PAGE
from megatron_prism.rl import samples_page

DOCUMENT = """
const node = () => ({children: [], options: [], selectedIndex: 0, value: "", textContent: "", append(child) { this.children.push(child); },
  replaceChildren() { this.children = []; }, add(option) { this.options.push(option.value); this.value = this.options[0]; }});
const known = {};
const Option = function (text, value) { this.value = String(value); };
const document = {getElementById: (id) => (known[id] ??= node()), createElement: node};
"""
TEXTS = 'const texts = (one) => [one.textContent, ...one.children.flatMap(texts)]; console.log(JSON.stringify([texts(known["list"]), MENUS]));'

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs node, to run the script of a page")


def listed(page: str, menus: list[str], folder: Path) -> tuple[list[str], list[list[str]]]:
    """Texts of the list, and what the menus offer, as a browser has them when the page was opened."""
    found = re.search(r'id="data">(.*?)</script>\s*<script>(.*?)</script>', page, re.DOTALL)
    assert found is not None
    options = "[" + ", ".join(f"known.{menu}.options" for menu in menus) + "]"
    data = f'document.getElementById("data").textContent = {json.dumps(found[1])};\n'
    (folder / "page.js").write_text(DOCUMENT + data + found[2] + TEXTS.replace("MENUS", options), encoding="utf-8")
    done = subprocess.run(["node", folder / "page.js"], capture_output=True, text=True, timeout=60, check=True)
    texts, offered = json.loads(done.stdout)
    return texts, offered


def test_an_evaluation_lists_the_chosen_models_responses(tmp_path: Path) -> None:
    common = {"task": "gcd", "id": "q0", "sample": 0, "prompt": "asked", "reason": "wrong"}
    common |= {"answer": None, "num_tokens": 3, "finish_reason": "length"}
    data = json.dumps([{**common, "model": "a", "text": "one <b>"}, {**common, "model": "b", "text": "two"}]).replace("<", "\\u003c")
    texts, menus = listed(PAGE.replace("{{data}}", data), ["model", "task", "reason"], tmp_path)
    assert menus == [["a", "b"], ["gcd"], ["every verdict", "wrong"]]
    assert "one <b>" in texts and "two" not in texts and " (answer none; 3 tokens, cut off)" in texts


def test_an_rl_run_lists_the_newest_steps_responses(tmp_path: Path) -> None:
    for step in (1, 2):
        samples_page.keep(tmp_path, step, [group("q0", [1.0, 0.0], text=f"<b>{step}")], [[1.0, -1.0]], lambda tokens: "asked")
    page = samples_page.write_page(tmp_path, [], shown_steps=2, shown_prompts=1).read_text(encoding="utf-8")
    texts, menus = listed(page, ["step", "domain", "why"], tmp_path)
    assert menus[0] == ["2", "1"] and menus[2] == ["every outcome", "correct", "wrong"]
    assert "<b>2" in texts and "<b>1" not in texts and "1: reward 0.00, advantage -1.00, " in texts
