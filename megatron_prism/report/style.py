"""How the report looks and what its script does. Builds on the style that all our pages share. Nothing is fetched from anywhere: the page forbids it.

Owns: the palette (Okabe and Ito's hues, each with a contrast of 3 or more to its ground, light and dark), print, narrow screens, and the script: the
theme, values read off a curve with pointer or arrow keys, everything unfolded for print.
"""

from pathlib import Path

from megatron_prism.evals.report_page import STYLE as SHARED

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""The page's own ban on loading anything."""

LIGHT = """\
color-scheme: light; --ink: #1a1f27; --paper: #ffffff; --soft: #f4f6f9; --line: #dde2ea; --good: #17724a; --bad: #a83a24; --faint: #586273;
--grid: #e4e8ee; --accent: #0b5a96; --s0: #0072b2; --s1: #d55e00; --s2: #00835f; --s3: #b0478a; --s4: #9a6b00; --s5: #2a86bd; --s6: #4b525c;
--data: #e3f2ec; --model: #e4eefa; --measure: #fbf0e2; --data-edge: #00835f; --model-edge: #0072b2; --measure-edge: #b35c00;"""
DARK = """\
color-scheme: dark; --ink: #e6eaf0; --paper: #12151a; --soft: #1b2028; --line: #343c49; --good: #62cf98; --bad: #f5937f; --faint: #a2adbd;
--grid: #2a313c; --accent: #7cc0f2; --s0: #56a9e4; --s1: #f08a45; --s2: #2dbd92; --s3: #e08fc0; --s4: #dcae3c; --s5: #8fd0f5; --s6: #c3cad4;
--data: #14302a; --model: #14293f; --measure: #38270f; --data-edge: #2dbd92; --model-edge: #56a9e4; --measure-edge: #e59a45;"""

FOLDER = Path(__file__).parent
STYLE = SHARED + (FOLDER / "style.css").read_text(encoding="utf-8").replace("{{light}}", LIGHT).replace("{{dark}}", DARK)
SCRIPT = (FOLDER / "script.js").read_text(encoding="utf-8")
