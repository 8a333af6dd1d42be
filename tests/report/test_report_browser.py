"""The page in a real browser, from disk and without a network: nothing is asked for, nothing fails, everything can be read, it prints.

A page around it holds it in frames of a desk's and a phone's width, in either theme; a probe in each says what the browser sees.
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_cases import HOSTILE, long_names, pipeline

from megatron_prism.stages import report

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (apt-get install chromium)")
QUIET = "--no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-quic".split()
PROBE = Path(__file__).parent / "probe.js"
FRAMES = [(width, theme) for width in (1280, 390) for theme in ("light", "dark")]


def browse(folder: Path, url: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Chromium without a window, a network or a history."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", *QUIET, f"--user-data-dir={folder / 'profile'}"]
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=20000"]
    return subprocess.run([*command, *offline, *options, url], capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    return report.write([long_names(pipeline(folder / "runs"))], folder / "report.html")


@pytest.fixture(scope="module")
def seen(page: Path) -> list[dict]:
    """What the probe says of each frame; the browser's own words under `console`."""
    folder = page.parent
    text = page.read_text()
    assert text.count("<head>") == 1
    (folder / "probed.html").write_text(text.replace("<head>", f"<head><script>{PROBE.read_text()}</script>"))
    frames = "".join(f'<iframe src="probed.html#{theme}" style="width:{width}px;height:900px;border:0"></iframe>' for width, theme in FRAMES)
    listener = "const all = []; addEventListener('message', (e) => { all.push(JSON.parse(e.data)); said.textContent = JSON.stringify(all); });"
    (folder / "around.html").write_text(f"<!DOCTYPE html><meta charset=utf-8><pre id=said></pre><script>{listener}</script>{frames}")
    done = browse(folder, f"file://{folder}/around.html", "--window-size=1400,1000", "--dump-dom")
    found = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    results = json.loads(html.unescape(found[1]))
    assert sorted((one["width"], one["theme"]) for one in results) == sorted(FRAMES)
    return [{**one, "console": [line for line in done.stderr.splitlines() if "CONSOLE" in line]} for one in results]


def test_nothing_is_wider_than_a_desk_or_a_phone(seen):
    assert [(one["width"], one["wide"], one["over"]) for one in seen if one["wide"] > one["room"]] == []


def test_every_text_stands_out_from_its_ground_in_both_themes(seen):
    assert [(one["theme"], one["faint"]) for one in seen if one["faint"]] == []


def test_nothing_fails_and_nothing_is_asked_for(seen):
    assert [(one["faults"], one["console"], one["resources"], one["images"]) for one in seen] == [([], [], 0, 0)] * len(FRAMES)


def test_what_a_model_wrote_is_text(page, seen):
    assert html.escape(HOSTILE) in page.read_text()
    assert HOSTILE not in page.read_text()
    assert {one["title"] for one in seen} == {"runs"}


def test_every_axis_has_a_title_and_every_picture_a_name(seen):
    assert seen[0]["plots"] > 10
    assert [(one["untitled"], one["unnamed"]) for one in seen] == [(0, 0)] * len(FRAMES)


def test_links_lead_somewhere_and_names_are_given_once(seen):
    assert [(one["dangling"], one["twice"]) for one in seen] == [(0, 0)] * len(FRAMES)


def test_a_curve_is_read_with_the_arrow_keys(seen):
    place, _, values = seen[0]["read"].partition(": ")
    assert place == "at 512" and {"base 4", "midtrain 4"} <= set(values.split(", ")), "the first step had 512 tokens and a loss of 4"


def test_the_theme_changes_at_a_click(seen):
    grounds = {one["theme"]: (one["before"], one["after"]) for one in seen}
    assert grounds["light"] == grounds["dark"][::-1]
    assert grounds["light"][0] == "rgb(255, 255, 255)"


def test_a_reader_who_prefers_dark_gets_dark(page):
    folder = page.parent
    (folder / "preferred.html").write_text((folder / "probed.html").read_text().replace('parent.postMessage(JSON.stringify(result), "*")', PREFERRED))
    done = browse(folder, f"file://{folder}/preferred.html", "--blink-settings=preferredColorScheme=0", "--dump-dom")
    assert 'data-preferred="rgb(18, 21, 26)"' in done.stdout


PREFERRED = 'document.documentElement.dataset.preferred = result.theme ? "" : result.before'


def test_it_prints_on_a_few_pages_of_paper(page):
    target = page.parent / "report.pdf"
    browse(page.parent, f"file://{page}", f"--print-to-pdf={target}", "--no-pdf-header-footer")
    content = target.read_bytes()
    boxes = set(re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", content))
    pages = len(re.findall(rb"/Type\s*/Page\b", content))
    assert [(round(float(width)), round(float(height))) for width, height in boxes] == [(595, 842)], "A4"
    assert 4 <= pages <= 30, pages
