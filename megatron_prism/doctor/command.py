"""`prism doctor` as people see it: findings as they come, coloured, then what to do."""

from collections.abc import Sequence
from pathlib import Path

import typer

from megatron_prism import doctor
from megatron_prism.doctor import Asked, Checked


def run(path: Path, ranks: int, device: str, only: Sequence[str], as_json: bool) -> int:
    """Examine and print; returns the exit status. Errors: UserError for what cannot be asked."""
    checked: list[Checked] = []
    for one in doctor.examine(Asked(str(path.absolute()), ranks, device), only):
        checked.append(one)
        if not as_json:
            _show(one)
    well = doctor.is_well(checked)
    typer.echo(doctor.as_json(checked) if as_json else _summary(checked))
    return 0 if well else 1


def _show(one: Checked) -> None:
    for finding in one.findings:
        typer.echo(f"{typer.style(f'{finding.state:<6}', fg=finding.state)}  {finding.name:<20}  {finding.detail}")
        if finding.fix:
            typer.echo(f"{'':<28}  fix: {finding.fix}")


def _summary(checked: Sequence[Checked]) -> str:
    states = [finding.state for one in checked for finding in one.findings]
    slowest = max(checked, key=lambda one: one.seconds)
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("green", "yellow", "red") if state in states)
    return f"\n{counts}; the longest check was {slowest.check}, {slowest.seconds:.0f} s"
