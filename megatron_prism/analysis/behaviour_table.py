"""How models answer, as tables: what is printed and what the page shows. Owns: rounding; behaviour.json has every figure unrounded."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_prism.analysis.table import WIDE, open_console, print_table

Results = Mapping[str, Any]
"""Content of behaviour.json."""
UNITS = {"pass_rate": (100, 1), "median_tokens": (1, 0), "neg_logprob": (1, 3), "neg_logprob_correct": (1, 3), "neg_logprob_incorrect": (1, 3)}
"""figure -> what it is shown times, digits"""
MORE_DIGITS = 3
"""than those, where fewer would show a difference as 0"""
HEAD = ("", "questions", "pass %", "tokens", "-log p", "correct", "incorrect")
CHANGE_HEAD = ("", "questions", *HEAD[2:])
SOLVED_HEAD = ("", "newly solved", "by chance", "lost", "by chance", "never", "kept")
COURSE_HEAD = ("", "first steps", "pass %", "last steps", "pass %")
MEAN = "mean of tasks"
LEGEND = (
    "pass: mean over samples, then over questions. tokens: of a response, median. -log p: mean over sampled tokens, in nats, under the model itself "
    "at temperature 1; it is no entropy. In brackets: 95 % intervals, a bootstrap over questions. *: 0 lies outside. -: too few responses, or not "
    "stored."
)


def title(task: str | None) -> str:
    """A task, or the mean of all."""
    return MEAN if task is None else task


def rows(results: Results, task: str | None, intervals: bool = True) -> Iterator[list[str]]:
    """The cells of one task's table, the paper's figures below each model's."""
    paper = results["paper"] if results["paper"] and results["paper"]["task"] == task else None
    for row in results["rows"]:
        if row["task"] == task:
            asked = f"{row['questions']} x {row['samples']}" if row["samples"] else str(row["questions"])
            yield [row["model"], asked, *(cell(name, row["figures"][name], intervals) for name in UNITS)]
            if paper and row["model"] in paper["rows"]:
                printed = paper["rows"][row["model"]]
                yield [f"  paper ({paper['table']})", "", *(number(name, printed[name]) for name in UNITS)]


def changes(results: Results, task: str | None, intervals: bool = True) -> Iterator[list[str]]:
    """The cells of one task's table of changes."""
    for pair in results["pairs"]:
        for row in pair["rows"]:
            if row["task"] == task:
                left_out = f" ({row['left_out'][0]} and {row['left_out'][1]} left out)" if any(row["left_out"]) else ""
                yield [_label(pair), f"{row['questions']}{left_out}", *(change(name, row["figures"][name], intervals) for name in UNITS)]


def solved(results: Results, task: str) -> Iterator[list[str]]:
    """The cells of one task's table of questions that were solved or lost."""
    for pair in results["pairs"]:
        found = next(row["transitions"] for row in pair["rows"] if row["task"] == task)
        newly, lost = by_chance(found)
        cells = [found["newly_solved"], newly, found["lost"], lost, found["never"], found["kept"]]
        yield [_label(pair), *map(str, cells)]


def by_chance(found: Results) -> tuple[str, str]:
    """How many questions chance alone would have solved anew, and lost; "-" where answers do not vary by drawing."""
    chance = found["expected"]
    return ("-", "-") if chance is None else (f"{chance['newly_solved']:.1f}", f"{chance['lost']:.1f}")


def show(results: Results) -> None:
    """Print the tables of every task, and the ends of each course through RL; without intervals where the terminal has no room for them."""
    console = open_console()
    intervals = console.width >= WIDE
    for task in _lines(results):
        print_table(console, title(task), HEAD, rows(results, task, intervals))
        if results["pairs"]:
            print_table(console, f"{title(task)}: changes", CHANGE_HEAD, changes(results, task, intervals))
        if results["pairs"] and task is not None:
            print_table(console, f"{task}: questions solved in some sample", SOLVED_HEAD, solved(results, task))
    if results["rl"]:
        print_table(console, "prompts through RL, by right samples in the filter", COURSE_HEAD, course(results["rl"]))
    for line in [LEGEND, *results["notes"]]:
        console.print(line, highlight=False)


def course(rl: Results) -> Iterator[list[str]]:
    """The cells of the table of courses: where each begins and where it ends."""
    for curve in rl["curves"]:
        ends = (curve["points"][0], curve["points"][-1])
        cells = [text for point in ends for text in (_steps(point), f"{_percent(point)} ({point['prompts']} prompts)")]
        yield [course_label(curve, rl["samples"]), *cells]


def course_label(curve: Results, samples: int) -> str:
    """What a curve is about: 0/16, math 1/16."""
    return f"{curve['domain'] + ' ' if curve['domain'] else ''}{curve['right']}/{samples}"


def cell(name: str, found: Mapping[str, float | None] | None, interval: bool = True) -> str:
    """A figure with its interval."""
    if found is None:
        return "-"
    value, ends = with_ends(name, found, "value")
    return value + (_brackets(ends) if interval else "")


def change(name: str, found: Mapping[str, Any] | None, interval: bool = True) -> str:
    """A difference with its interval, starred where it is one."""
    if found is None:
        return "-"
    value, ends = with_ends(name, found, "difference", is_signed=True)
    return value + (_brackets(ends) if interval else "") + ("*" if found["is_difference"] else "")


def with_ends(name: str, found: Mapping[str, Any], key: str, is_signed: bool = False) -> tuple[str, tuple[str, ...]]:
    """A figure and the ends of its interval, none where it has none. is_signed: a change, whose rise has a sign."""
    ends = [found.get("low"), found.get("high")]
    value = number(name, found[key])
    sign = "+" if is_signed and float(value) > 0 else ""
    return sign + value, tuple(number(name, end) for end in ends) if None not in ends else ()


def number(name: str, value: float | None) -> str:
    """A figure in its unit. With as few digits as do not show it as 0 when it is not; zero has no sign."""
    if value is None:
        return "-"
    factor, least = UNITS[name]
    shown = factor * value
    digits = next((digits for digits in range(least, least + MORE_DIGITS + 1) if round(shown, digits)), least)
    return f"{round(shown, digits) + 0.0:.{digits}f}"


def _steps(point: Results) -> str:
    first, last = point["first_step"], point["step"]
    return str(last) if first == last else f"{first} to {last}"


def _brackets(ends: Sequence[str]) -> str:
    return f" [{', '.join(ends)}]" if ends else ""


def _percent(point: Results) -> str:
    return cell("pass_rate", {"value": point["pass_rate"], "low": point["low"], "high": point["high"]})


def _label(pair: Results) -> str:
    return f"{pair['start']} to {pair['end']}"


def _lines(results: Results) -> list[str | None]:
    return [*results["tasks"], *([None] if len(results["tasks"]) > 1 else [])]
