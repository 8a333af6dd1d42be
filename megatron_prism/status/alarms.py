"""What a person should look at in a run: what it said itself, what was left in its folder, and figures beyond a limit."""

import json
from pathlib import Path
from typing import Any

from megatron_prism import artifact
from megatron_prism.status.log import Line, number
from megatron_prism.status.said import Alarm, table

SLOW_DATA = 0.1
"""share of a step that may be waited for data before it is an alarm"""
MOST_FILES = 8
RL_LIMITS = {"kl": "kl_above", "mismatch": "mismatch", "truncated": "truncated_above"}


def alarms(folder: Path, session: list[Line], steps: list[Line], config: dict[str, Any]) -> list[Alarm]:
    """The newest first: what the run said in this session, and what was left in its folder."""
    found = [Alarm(key, str(line[key]), line["step"]) for line in reversed(session) for key in ("error", "alarm") if key in line]
    found += _left_files(folder)
    last = steps[-1] if steps else {}
    for key in ("loss", "grad_norm"):
        value = number(last, key)
        if value is not None and value - value != 0:
            found.append(Alarm("not a number", f"{key} is {value} in the last line", last["step"]))
    waited, seconds = number(last, "data_wait_seconds"), number(last, "seconds_per_step")
    if waited and seconds and waited > SLOW_DATA * seconds:
        found.append(Alarm("data", f"{100 * waited / seconds:.0f} % of a step is waited for data", last["step"]))
    if failed := number(last, "gradings_failed"):
        found.append(Alarm("grading", f"{failed:.0f} gradings failed in the last step", last["step"]))
    limits = table(config, "alarms")
    for key, name in RL_LIMITS.items():
        value, limit = number(last, key), limits.get(name)
        if value is not None and isinstance(limit, int | float) and value > limit:
            found.append(Alarm(key, f"{key} {value:.3g} in the last step is above alarms.{name}={limit:g}", last["step"]))
    return found


def _left_files(folder: Path) -> list[Alarm]:
    """bad_steps/*.json, watchdog/*, and the launcher's count of failures beside the run."""
    found = []
    bad = sorted((folder / "bad_steps").glob("*.json"))
    for path in bad[: -MOST_FILES - 1 : -1]:
        content = _json(path)
        step, what = content.get("step"), "rollback" if "rollback" in content else "bad step"
        found.append(Alarm(what, _in_words(content) or path.name, step if isinstance(step, int) else None))
    if len(bad) > MOST_FILES:
        found.append(Alarm("bad step", f"and {len(bad) - MOST_FILES} more in {folder / 'bad_steps'}"))
    for path in sorted((folder / "watchdog").glob("*"))[:MOST_FILES]:
        found.append(Alarm("watchdog", f"{path.stem}: {_first_line(path)} ({path})"))
    failures = folder.with_name(folder.name + ".failures")
    if failures.is_file() and not artifact.is_complete(folder):
        count = len(failures.read_text(encoding="utf-8", errors="replace").splitlines())
        found.append(Alarm("failures", f"{count} noted in {failures}"))
    return found


def _in_words(content: dict[str, Any]) -> str:
    """What a record says of itself; of one without a message, its plain values as `key value`."""
    if isinstance(content.get("message"), str):
        done = {"skip": "; the step was left out", "stop": "; the run stopped"}.get(str(content.get("action")), "")
        return content["message"].removeprefix(f"step {content.get('step')}: ") + done
    plain = {key: value for key, value in content.items() if isinstance(value, str | int | float) and key not in ("step", "schema_version", "time")}
    return "  ".join(f"{key} {value}" for key, value in plain.items())[:300]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _first_line(path: Path) -> str:
    try:
        return next(iter(path.read_text(encoding="utf-8", errors="replace").splitlines()), "")[:200]
    except OSError:
        return ""
