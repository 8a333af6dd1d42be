"""Eight H200s in half an hour: every row of docs/benchmarks.md that waits for them, by one command that is typed again until nothing is left.

    python tests/benchmarks/eight_h200.py --output OUT --minutes 8 --limit 9.5     what is done is not run again; OUT/results.json, table.md, log.txt
    ... --earlier OLDER/results.json                                               results of a machine that is gone count too
    python tests/benchmarks/eight_h200.py --output OUT --device cpu                every case on 8 real ranks (gloo), tiny models, short sequences
    python tests/benchmarks/eight_h200.py --predict [--write docs/benchmarks.md]   what `prism plan` says of each case; nothing is run

Cases come in order of their value (eight_cases.py). Neighbours of one kind on as many ranks share a launch of `prism bench`, each result is on disk
when its case is over, and a launch that dies or hangs ends its case alone. After --minutes no case begins; at --limit what runs is ended. Done is a
case with a result of the same settings, code, versions and machine; one that failed is tried again, after all others. No torch in this process.
"""

import argparse
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import tomli_w

sys.path.append(str(Path(__file__).resolve().parent))
from eight_cases import CHECKPOINT_PARAMETERS, LAWS, RANKS, RECIPE, SOURCES, Case, every_case, on_gpus, tiny
from eight_tables import CONVENTIONS, MEMORY_GIB, first_kernels, first_line, predict, predicted_table, results_table, seconds_needed

import megatron_prism
from megatron_prism import artifact
from megatron_prism.config import TIMEOUT_MINUTES
from megatron_prism.launch.job import Job, environment, torchrun_argv, torchrun_variables
from megatron_prism.surroundings import package_versions

HERE = Path(__file__).resolve().parent
HELPERS = (str(HERE.parent), str(HERE.parent / "laws"))
RESULTS, TABLE, LOG = "results.json", "table.md", "log.txt"
BEGIN, END = "<!-- eight_h200.py --predict -->", "<!-- end -->"
FILES = ("*.py", "*.toml", "*.json")
VARIABLES = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    TIMEOUT_MINUTES: "4",
    "TRITON_CACHE_AUTOTUNING": os.environ.get("TRITON_CACHE_AUTOTUNING", "1"),
}
"""of every launch; a group that waits for longer than these minutes would cost the other cases their time"""
POLL_SECONDS = 0.5
TOO_LONG = 124
"""as a status"""
START_SECONDS = 30.0
"""of a launch on GPUs, a guess from imports of 15 s"""


@dataclass
class Site:
    """Where the cases run, what is done there, and how much time is left."""

    device: str
    output: Path
    scratch: Path
    minutes: float
    limit: float
    any_code: bool
    entries: list[dict[str, Any]] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)
    launches: int = 0

    @property
    def left(self) -> float:
        """Seconds in which a case may begin."""
        return 60 * min(self.minutes, self.limit) - (time.monotonic() - self.begun)

    @property
    def left_at_all(self) -> float:
        """Seconds until what runs is ended."""
        return 60 * self.limit - (time.monotonic() - self.begun)

    @functools.cached_property
    def place(self) -> dict[str, Any]:
        """Code, versions and machine, which a result is of."""
        return {"code": code_digest(), "versions": package_versions(), "machine": machine(self.device)}

    def find(self, case: Case) -> dict[str, Any] | None:
        """The newest entry of a case under the same settings, code, versions and machine; one with a result before one that failed."""
        wanted = {"name": case.name, "settings": case_settings(case), **self.place}
        keys = [key for key in wanted if not (self.any_code and key == "code")]
        found = [entry for entry in self.entries if all(entry["of"].get(key) == wanted[key] for key in keys)]
        return max(found, key=lambda entry: ("failed" not in entry, entry["at"]), default=None)

    def record(self, case: Case, seconds: float, **outcome: Any) -> None:
        """What came of a case, on disk when it returns."""
        of = {"name": case.name, "settings": case_settings(case), **self.place}
        at = datetime.now().astimezone().isoformat(timespec="seconds")
        self.entries.append({"of": of, "at": at, "seconds": round(seconds, 1), **outcome})
        artifact.write_atomic(self.output / RESULTS, json.dumps({"schema_version": 1, "entries": self.entries}, indent=1) + "\n")
        said = f"failed: {first_line(outcome['failed'])}" if "failed" in outcome else "done"
        print(f"[{(time.monotonic() - self.begun) / 60:5.1f} min] {case.name}: {said} ({seconds:.0f} s)", flush=True)


def main() -> None:
    """Predict, or run what is left and print the table."""
    options = arguments()
    chosen = [case for case in every_case() if options.only is None or case.name in options.only]
    if options.predict:
        text = section(chosen)
        print(text if options.write is None else written(options.write, text))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the blocks that it leaves end what they started
    with tempfile.TemporaryDirectory(prefix="eight-", dir=options.scratch) as folder:
        site = Site(options.device, options.output, Path(folder), options.minutes, options.limit or 1e6, options.any_code)
        site.entries = list(entries_of([options.output / RESULTS, *options.earlier]))
        cases = [tiny(case, Path(folder) / "models") if options.device == "cpu" else on_gpus(case) for case in chosen]
        cases = [case for case in cases if options.device == "cuda" or case.name != "law 3, TransformerEngine"]
        run(site, cases)
        table = results_table(cases, site.find, options.device)
        (options.output / TABLE).write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\n{sum(done(site, case) for case in cases)} of {len(cases)} cases done; all figures: {options.output / RESULTS}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/eight_h200"), help="folder of results.json, table.md and log.txt")
    parser.add_argument("--earlier", type=Path, action="append", default=[], help="a results.json of an earlier machine; again for more")
    parser.add_argument("--minutes", type=float, default=1e6, help="after so many no case begins")
    parser.add_argument("--limit", type=float, help="after so many minutes what still runs is ended")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of cases")
    parser.add_argument("--any-code", action="store_true", help="results of other code count as done too")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints and what else is not kept (60 GB); default: the system's")
    parser.add_argument("--predict", action="store_true", help="print what the plan says of each case, run nothing")
    parser.add_argument("--write", type=Path, help="with --predict: the document whose marked section is replaced")
    return parser.parse_args()


# --- what is done --------------------------------------------------------------------------------------------------------------------------------


def entries_of(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """Of results.json files; the first need not be there."""
    for number, path in enumerate(paths):
        if number or path.exists():
            yield from json.loads(path.read_text(encoding="utf-8"))["entries"]


def done(site: Site, case: Case) -> bool:
    """Whether it has a result."""
    entry = site.find(case)
    return entry is not None and "failed" not in entry


def case_settings(case: Case) -> str:
    """A digest of all that says what a case is; the folder of a tiny model is none of it."""
    keys = {key: Path(str(value)).name if key == "model" else value for key, value in case.keys.items()}
    return hashlib.sha256(json.dumps([case.name, case.kind, case.ranks, keys], sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def code_digest() -> str:
    """Of every source file of the package, with the folders that are linked into it, and of what runs the laws and the checkpoints."""
    package = Path(megatron_prism.__file__).parent
    roots = [package, *(path.resolve() for path in package.iterdir() if path.is_symlink())]
    files = sorted({file for root in roots for pattern in FILES for file in root.rglob(pattern)})
    return digest_of([*files, HERE / "checkpoint.py", HERE.parent / "laws" / "eight_ranks.py"])


def digest_of(files: Iterable[Path]) -> str:
    """Of names and contents."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def machine(device: str) -> str:
    """The devices that a result is of."""
    if device == "cpu":
        return f"{os.cpu_count()} cores"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    return ", ".join(f"{len(list(same))} x {name.strip()}" for name, same in groupby(sorted(filter(None, names))))


# --- running -------------------------------------------------------------------------------------------------------------------------------------


def run(site: Site, cases: list[Case]) -> None:
    """What is not done, in order, then what has failed before; a launch's cases are left to the next one where it ends early."""
    todo = [case for case in cases if not done(site, case)]
    print(f"{site.device}, code {site.place['code']}, {site.place['machine']}: {len(cases) - len(todo)} of {len(cases)} done", flush=True)
    todo.sort(key=lambda case: site.find(case) is not None)
    while todo and site.left > 0:
        first = todo[0]
        together = [first]
        if first.kind == "bench":
            rest = (case.kind == "bench" and case.ranks == first.ranks for case in todo)
            together = todo[: next((number for number, same in enumerate(rest) if not same), len(todo))]
        tried = {"bench": bench, "law": law, "checkpoint": checkpoint}[first.kind](site, together)
        todo = todo[tried:]


def bench(site: Site, cases: list[Case]) -> int:
    """One launch of `prism bench`; how many cases need no other: all, or those before and with the one that ended it."""
    site.launches += 1
    output = site.scratch / f"bench_{site.launches}"
    recipe = {"output": str(output), "cases": [case.keys for case in cases]}
    recipe |= {"minutes": max(site.left, 1.0) / 60}
    path = output.with_suffix(".toml")
    path.write_text(tomli_w.dumps(recipe), encoding="utf-8")
    job = Job("bench", recipe=path, ranks=cases[0].ranks, env=variables(site))
    seen, mark, why = 0, time.monotonic(), ""
    with launched(site, torchrun_argv(job), environment(job)) as process:
        while True:
            ended = process.poll() is not None
            found = measured(output)
            for result in found[seen:]:
                outcome = {"failed": result["failed"]} if "failed" in result else {"result": result}
                site.record(cases[seen], time.monotonic() - mark, **outcome)
                seen, mark = seen + 1, time.monotonic()
            if ended or seen == len(cases):
                break
            why = overdue(site, cases[seen], time.monotonic() - mark, first=seen == 0)
            if why:
                break
            time.sleep(POLL_SECONDS)
        if seen == len(cases):
            with suppress(subprocess.TimeoutExpired):  # leaving the groups may hang; all is said
                process.wait(60)
    state = everything(output)
    if seen == len(cases) or "not_begun" in state or site.left_at_all <= 0:
        return len(cases)
    if seen and "running" not in state:  # the one before ended the launch, and said so
        return seen
    site.record(cases[seen], time.monotonic() - mark, failed=why or f"its launch ended: {last_words(site)}")
    return seen + 1


def everything(output: Path) -> dict[str, Any]:
    """bench.json so far."""
    path = output / "bench.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def measured(output: Path) -> list[dict[str, Any]]:
    """The cases in bench.json so far, in the recipe's order."""
    return everything(output).get("cases", [])


def overdue(site: Site, case: Case, seconds: float, first: bool) -> str:
    """Why a case is ended: it takes much longer than it may, or the time is up; empty: it goes on."""
    if site.left_at_all <= 0:
        return "time was up"
    allowed = 600.0 if site.device == "cpu" else 120.0 + 2.5 * seconds_needed(case) + (60.0 if first else 0.0) + first_kernels(case)
    return f"not over after {seconds:.0f} s" if seconds > allowed else ""


def law(site: Site, cases: list[Case]) -> int:
    """Law 3 on one rank and on eight: tests/laws/eight_ranks.py."""
    (case,), begun, group = cases, time.monotonic(), LAWS[cases[0].name]
    seconds = min(1800.0 if site.device == "cpu" else 240.0, max(site.left_at_all, 1.0))
    folder, told = site.scratch / f"law_{group}", site.scratch / f"law_{group}.json"
    folder.mkdir()
    extra = {"PYTHONPATH": os.pathsep.join([*HELPERS, *filter(None, [os.environ.get("PYTHONPATH")])])}
    env = {**os.environ, **variables(site), **extra, "MAMBA_DETERMINISTIC": "1", "TRITON_CACHE_AUTOTUNING": "0"}  # one configuration of each kernel
    argv = [sys.executable, str(HERE.parent / "laws" / "eight_ranks.py"), group, site.device, "--folder", str(folder), "--json", str(told)]
    status = finished(site, argv, env, seconds)
    found = json.loads(told.read_text()) if told.exists() else None
    if status or found is None or found["error"]:
        why = f"it took more than {seconds:.0f} s" if status == TOO_LONG else first_line((found or {}).get("error") or last_words(site))
        site.record(case, time.monotonic() - begun, failed=why, result=found)
    else:
        site.record(case, time.monotonic() - begun, result=found)
    return 1


def checkpoint(site: Site, cases: list[Case]) -> int:
    """tests/benchmarks/checkpoint.py on eight ranks."""
    (case,), begun, told = cases, time.monotonic(), site.scratch / "checkpoint.json"
    words = ["--device", site.device, "--parameters", str(CHECKPOINT_PARAMETERS[site.device]), "--ranks", str(RANKS), "--rounds", "1"]
    argv = [sys.executable, str(HERE / "checkpoint.py"), *words, "--folder", str(site.scratch / "checkpoint"), "--json", str(told)]
    status = finished(site, argv, {**os.environ, **variables(site)}, 600.0 if site.device == "cpu" else 400.0)
    if site.left_at_all <= 0:
        return 1
    if status or not told.exists():
        why = "it took too long" if status == TOO_LONG else last_words(site)
        site.record(case, time.monotonic() - begun, failed=why)
    else:
        site.record(case, time.monotonic() - begun, result=json.loads(told.read_text()))
    return 1


def variables(site: Site) -> dict[str, str]:
    """Of a launch; the processes of a dry run have a thread each."""
    return {**torchrun_variables(20), **VARIABLES, **({"OMP_NUM_THREADS": "1"} if site.device == "cpu" else {})}


def finished(site: Site, argv: list[str], env: dict[str, str], seconds: float) -> int:
    """The status of a process that may take so long, and no longer than the limit."""
    with launched(site, argv, env) as process:
        try:
            return process.wait(max(min(seconds, site.left_at_all), 1.0))
        except subprocess.TimeoutExpired:
            return TOO_LONG


class launched:  # noqa: N801 (reads as a verb where it is used)
    """A process whose output goes to the log; at the end of the block it is ended, with its descendants, where it still runs."""

    def __init__(self, site: Site, argv: list[str], env: dict[str, str]) -> None:
        self.log = (site.output / LOG).open("ab")
        self.log.write(f"\n=== {datetime.now().astimezone():%Y-%m-%d %H:%M:%S}  {' '.join(argv)[:400]}\n".encode())
        self.log.flush()
        self.process = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self.process

    def __exit__(self, *rest: object) -> None:
        if self.process.poll() is None:
            family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            self.process.wait()
        self.log.close()


def last_words(site: Site) -> str:
    """The last line of the newest launch's log that tells an error, ours before Python's before torchrun's; else its last line."""
    text = (site.output / LOG).read_text(encoding="utf-8", errors="replace").rpartition("\n=== ")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("error:")]
    errors = [line for line in lines if "Error" in line and "torch.distributed.elastic" not in line]
    return [*lines[-1:], *errors[-1:], *ours[-1:]][-1]


# --- predictions ---------------------------------------------------------------------------------------------------------------------------------


def section(cases: list[Case]) -> str:
    """The predictions as a document has them: what made them, the table, the time that all of it would take."""
    timed = [case for case in cases if case.kind == "bench"]
    full = [case.name for case in timed if not predict(case).choice.need.fits(MEMORY_GIB)]
    hybrids = {case.keys["model"]: first_kernels(case) for case in timed}
    minutes = (sum(map(seconds_needed, cases)) + sum(hybrids.values()) + START_SECONDS * launches(cases)) / 60
    plan = digest_of(sorted((Path(megatron_prism.__file__).parent / "planning").glob("*.py")))
    head = (
        f"Made by `python tests/benchmarks/eight_h200.py --predict` on {datetime.now():%Y-%m-%d}: what `prism plan` of megatron-prism "
        f"{megatron_prism.__version__} (its `planning/*.py`: {plan}) says of the cases of `{RECIPE.relative_to(HERE.parents[1])}`\n"
        f"on H200s of {MEMORY_GIB:g} GiB, of which a tenth stays free. "
        f"{'All fit' if not full else 'Too large: ' + ', '.join(full)}. All of it should take about {minutes:.0f} minutes.\n\n{CONVENTIONS}\n"
    )
    return f"{head}\n{predicted_table(cases)}\n\n{SOURCES}"


def launches(cases: list[Case]) -> int:
    """Of `prism bench`."""
    return sum(kind == "bench" for (kind, _), _ in groupby(cases, key=lambda case: (case.kind, case.ranks)))


def written(path: Path, text: str) -> str:
    """The marked section of a document, replaced."""
    whole = path.read_text(encoding="utf-8")
    before, after = whole.split(BEGIN)[0], whole.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    return f"{path}: the section between {BEGIN} and {END} is new"


if __name__ == "__main__":
    main()
