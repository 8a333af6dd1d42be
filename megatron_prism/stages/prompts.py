"""Prompts: prompt sets and files -> prompt files for RL, without the evaluation's questions, and by how often a given model solves them.

    OUTPUT/DOMAIN.jsonl                        what a run's [[prompts.sources]] names (docs/rl_prompts.md)
    OUTPUT/pass_counts.jsonl                   of every prompt that was measured: how many of its samples were right
    OUTPUT/responses/model/prompts.jsonl.zst   all samples, with their verdicts
    OUTPUT/report.json                         rows read, dropped by reason, what the evaluation asks by task, kept and topped up by domain
One process, or many that set RANK and WORLD_SIZE: each draws its share of the samples. Stopped in any way, it goes on where it was.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from megatron_prism import artifact
from megatron_prism.config import Block, PositiveFloat, config_hash
from megatron_prism.errors import UserError
from megatron_prism.evals.ranks import Ranks
from megatron_prism.rl.prompt_sets import PromptSetConfig, check_set, find_set, first_line
from megatron_prism.rl.solvability import SolvabilityConfig

if TYPE_CHECKING:
    from megatron_prism.rl.prompt_files import PromptLine
    from megatron_prism.rl.prompt_pool import Pool
    from megatron_prism.rl.solvability import PassCount


PASS_COUNTS = "pass_counts"


class Config(Block):
    """Prompt sets -> prompts for RL."""

    output: Path
    """folder to write"""
    sets: list[PromptSetConfig] = Field(default_factory=list)
    """[[sets]] tables: prompt sets of data_dir"""
    data_dir: Path | None = None
    """folder with the data sets of `sets`"""
    files: list[Path] = Field(default_factory=list)
    """prompt files that are taken too, such as those of another output"""
    ngrams: list[Path] = Field(default_factory=list)
    """n-gram files, or folders of them, of the evaluation's tasks (docs/cleaning.md): prompts that hold one are dropped, counted"""
    solvability: SolvabilityConfig | None = None
    """keep prompts by how often a model solves them; none: all"""
    patience_seconds: PositiveFloat = 300.0
    """a rank that gave no sign of life for so long is taken for dead: the others stop waiting and say so"""

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if not self.sets and not self.files:
            raise ValueError("there are no prompts: give [[sets]] tables, or files")
        if self.sets and self.data_dir is None:
            raise ValueError("sets are read from data_dir: give the folder that holds the data sets")
        inside = [path for path in self.files if path.resolve().parent == self.output.resolve()]
        if inside:
            raise ValueError(f"files: {inside[0]} lies in output={str(self.output)!r}, whose prompt files are replaced; choose another output")
        return self


def parents(cfg: Config) -> list[Path]:
    """The model, and folders of n-grams and prompts, as far as they are artifacts."""
    read = [*([cfg.solvability.model] if cfg.solvability else []), *cfg.ngrams, *(path.parent for path in cfg.files)]
    return [path for path in dict.fromkeys(read) if (path / artifact.PROVENANCE).is_file()]


def dry_run(cfg: Config) -> None:
    """Print what would be read, and how many samples drawn at most from which model. Errors: UserError for what is not there, also for graders."""
    from megatron_prism.grading.graders import check_question
    from megatron_prism.rl.prompt_files import check_file, read_prompts
    from megatron_prism.rl.prompt_pool import find_ngrams

    for each in cfg.sets:
        assert cfg.data_dir is not None
        print(f"set {each.name}: {len(check_set(each, cfg.data_dir))} files" + (f", a sample of {each.sample}" if each.sample else ""))
        first = first_line(each, cfg.data_dir) if cfg.solvability is not None else None
        if first is not None:
            check_question(first.graded)
    for path in cfg.files:
        check_file(path)
        print(f"file {path}: {sum(1 for _ in read_prompts(path))} prompts")
    print(f"without what {len(find_ngrams(cfg.ngrams))} files of n-grams name" if cfg.ngrams else "not decontaminated: ngrams names nothing")
    if cfg.solvability is not None:
        from megatron_prism.evals.models import find_model

        solvability = cfg.solvability
        print(f"{solvability.samples} samples of each prompt from {find_model(solvability.model)} (T={solvability.temperature:g})")
    print(f"-> {cfg.output}/DOMAIN.jsonl")


def run(cfg: Config) -> Path:
    """Read, clean, measure, select, on every rank of the launch; returns the output folder, which rank 0 finishes."""
    from megatron_prism.evals.frames import named_disk_full
    from megatron_prism.evals.responses import reopen_shares
    from megatron_prism.rl.prompt_pool import read_pool

    ranks = Ranks.of_environment(cfg.output, cfg.patience_seconds)
    if artifact.is_current(cfg.output, cfg, parents(cfg)) and _is_as_read(cfg):
        return artifact.left_as_it_is(cfg.output)
    inputs = _inputs(cfg)
    pool = read_pool(cfg.sets, cfg.data_dir, cfg.files, cfg.ngrams)
    _check_domains(cfg, pool)
    reopen_shares(cfg.output, ranks.rank)
    with named_disk_full(cfg.output), ranks.together():
        _begin(cfg, ranks)
        counts = _measure(cfg, cfg.solvability, pool, ranks) if cfg.solvability else {}
        if ranks.is_main:
            _write(cfg, pool, counts, inputs)
    return cfg.output


def _check_domains(cfg: Config, pool: "Pool") -> None:
    if PASS_COUNTS in pool.domains:
        raise UserError(f"domain={PASS_COUNTS!r} is what this stage calls a file of its own, {PASS_COUNTS}.jsonl; rename that domain")
    if cfg.solvability is not None:
        cfg.solvability.check_domains(pool.domains)


def _inputs(cfg: Config) -> dict[str, str]:
    """Digests of what is read, as far as it is there and no artifact that the output records: files, n-grams, a model's folder. Of data sets, which
    are large, names and sizes alone."""
    from megatron_prism.evals.models import fingerprint, is_hf_folder
    from megatron_prism.rl.prompt_files import sha256_of
    from megatron_prism.rl.prompt_pool import find_ngrams

    listed = [path for each in cfg.sets if cfg.data_dir is not None for path in find_set(each, cfg.data_dir)]
    read = [path for path in cfg.files if path.is_file()] + find_ngrams([path for path in cfg.ngrams if path.exists()])
    model = [cfg.solvability.model] if cfg.solvability is not None and is_hf_folder(cfg.solvability.model) else []
    return {
        **{str(path): str(path.stat().st_size) for path in listed},
        **{str(path): sha256_of(path) for path in read},
        **{str(path): fingerprint(path) for path in model},
    }


def _is_as_read(cfg: Config) -> bool:
    """Whether they are what a finished output was made of; those that are gone since are not asked about."""
    read = json.loads((cfg.output / "report.json").read_text(encoding="utf-8")).get("inputs", {})
    return all(read.get(path) == digest for path, digest in _inputs(cfg).items())


def _begin(cfg: Config, ranks: Ranks) -> None:
    """Rank 0 opens the output; the others wait until it did."""
    if ranks.is_main:
        artifact.begin(cfg.output, "prompts", cfg, parents(cfg))
    else:
        ranks.wait("the start", lambda: [] if artifact.begun_as(cfg.output) == config_hash(cfg) else [0])


def _measure(cfg: Config, asked: SolvabilityConfig, pool: "Pool", ranks: Ranks) -> "dict[str, PassCount]":
    """Samples of the model to every prompt. Rank 0 has the counts, the others none."""
    from transformers import AutoTokenizer

    from megatron_prism import generate
    from megatron_prism.evals.judge import open_judge
    from megatron_prism.evals.models import find_model, fingerprint
    from megatron_prism.evals.progress import progress
    from megatron_prism.evals.responses import ResponseFolder
    from megatron_prism.rl import solvability

    settings = asked.generation
    ranks.take_own_gpus(settings.servers * settings.tensor_parallel if settings.backend == "vllm" else 1)
    name = fingerprint(find_model(asked.model))
    folder = _hf_folder(cfg, asked, name, ranks)
    prompts, too_long = solvability.ask(pool.lines, asked, AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    responses = ResponseFolder(cfg.output, "model", "prompts")
    drawn_as = solvability.protocol(asked, name)
    with ExitStack() as stack, open_judge(asked.grading_workers) as judge, progress() as watch:
        generator = cache(lambda: stack.enter_context(generate.open_backend(folder, settings)))
        counts = solvability.measure(responses, prompts, drawn_as, generator, solvability.gated(judge, asked.format), ranks, watch=watch)
    if ranks.is_main:
        sampling = asked.model_dump(mode="json", include={"samples", "temperature", "top_p", "max_new_tokens", "seed", "format"})
        artifact.annotate(cfg.output, solvability={"model": str(asked.model), "fingerprint": name, **sampling, "too_long": too_long})
    return counts or {}


def _hf_folder(cfg: Config, asked: SolvabilityConfig, name: str, ranks: Ranks) -> Path:
    """The model as a Hugging Face folder; of a checkpoint, rank 0 makes one that all ranks read."""
    from megatron_prism.evals.models import export_once, find_model, is_hf_folder

    exported = cfg.output / "parts" / f"hf_{name[:12]}"
    if not ranks.is_main and not is_hf_folder(find_model(asked.model)):
        ranks.wait("the model's export", lambda: [] if (exported / "config.json").is_file() else [0])
    return export_once(asked.model, exported)


def _write(cfg: Config, pool: "Pool", counts: "Mapping[str, PassCount]", inputs: Mapping[str, str]) -> None:
    """The prompt files, the counts and the report, in place of those of an earlier making."""
    from megatron_prism.rl.prompt_files import write_prompts
    from megatron_prism.rl.solvability import select

    lines, report = pool.lines, {"inputs": dict(inputs), "sources": pool.sources}
    report |= {"decontaminated": bool(cfg.ngrams), "contaminated": pool.contaminated}
    for old in cfg.output.glob("*.jsonl"):
        old.unlink()
    if cfg.solvability is not None:
        rows = [{"id": line.id, "domain": line.domain, **counts[line.id]._asdict()} for line in pool.lines if line.id in counts]
        artifact.write_atomic(cfg.output / f"{PASS_COUNTS}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        selected = select(pool.lines, counts, cfg.solvability)
        lines = selected.lines
        report |= {"failed": sum(found.failed > 0 for found in counts.values()), "domains": selected.domains}
    by_domain: dict[str, list[PromptLine]] = {}
    for line in lines:
        by_domain.setdefault(line.domain, []).append(line)
    for domain, some in by_domain.items():
        write_prompts(cfg.output / f"{domain}.jsonl", some)
    report["prompts"] = {domain: len(some) for domain, some in sorted(by_domain.items())}
    artifact.write_atomic(cfg.output / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(cfg.output / "parts", ignore_errors=True)
    _print(report)
    artifact.complete(cfg.output)


def _print(report: Mapping[str, Any]) -> None:
    for name, found in report["sources"].items():
        dropped = "; ".join(f"{number} {reason}" for reason, number in found.get("dropped", {}).items())
        print(f"{name}: {found['kept']} of {found['rows']} rows" + (f" (left out: {dropped})" if dropped else ""))
    for task, number in report["contaminated"].items():
        print(f"{number} prompts hold questions of {task}, and are left out")
    for domain, found in report.get("domains", {}).items():
        by_right = ", ".join(f"{right}: {number}" for right, number in found["prompts_by_right"].items())
        print(f"{domain}: {found['kept']} of {found['measured']} kept, {found['topped_up']} topped up; prompts by right samples: {by_right}")
    for domain, number in report["prompts"].items():
        print(f"{domain}.jsonl: {number} prompts")
    if not report["prompts"]:
        print(f"warning: no prompt was kept; {_way_to_prompts(report)}")


def _way_to_prompts(report: Mapping[str, Any]) -> str:
    """What to set where none is left."""
    if not report.get("domains"):
        return "every row was left out for the reasons above: give other sets or files, or other ngrams"
    return (
        "no number of right samples lies in its domain's band: set at_least and at_most of [solvability.keep.DOMAIN] by the counts above, "
        "draw more (solvability.samples, longer ones with max_new_tokens), or ask another model"
    )
