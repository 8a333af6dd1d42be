"""Prompts of a run: what they are read from, what is left out, and that a step's prompts are a function of the prompts, the seed and the step."""

import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_hf import make_tiny_tokenizer

from megatron_prism.config import validate
from megatron_prism.errors import UserError
from megatron_prism.evals.registry import HELD_OUT_SEED, load_task
from megatron_prism.grading import Question, verdict
from megatron_prism.rl.prompt_files import PromptLine, read_prompts, sha256_of, write_prompts
from megatron_prism.rl.prompts import PromptConfig, PromptSet, check_sources, load_prompts
from megatron_prism.rl.records import Prompt
from megatron_prism.rl.tools import ToolConfig
from megatron_prism.stages import prompts as stage

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<bot>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def chat_tokenizer(tokenizer: Any) -> Any:
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def config(**settings: Any) -> PromptConfig:
    return PromptConfig.model_validate({"sources": [{"task": "gcd"}], **settings})


def line(number: int, domain: str = "math", **fields: Any) -> PromptLine:
    given = {"id": f"{domain}/{number}", "domain": domain, "question": f"What is {number}?", "grader": "exact", "entry": {"answer": str(number)}}
    return PromptLine.model_validate({**given, **fields})


def prompts(**counts: int) -> list[Prompt]:
    return [Prompt(f"{domain}/{n}", domain, Question("?", "exact", "", {}), (n,)) for domain, count in counts.items() for n in range(count)]


def names(found: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in found]


def test_every_prompt_is_asked_once_an_epoch_and_each_epoch_has_an_order_of_its_own() -> None:
    asked = PromptSet(prompts(math=9, code=3), config(prompts_per_step=4))
    epochs = [names([prompt for step in range(3 * epoch, 3 * epoch + 3) for prompt in asked.prompts_at(step)]) for epoch in range(4)]
    assert all(sorted(epoch) == sorted(names(list(asked.prompts))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_step_is_a_function_of_seed_and_step_and_not_of_files_or_what_was_asked_before() -> None:
    there = prompts(math=50, code=20)
    forwards, backwards = (PromptSet(order, config(prompts_per_step=16)) for order in (there, there[::-1]))
    late = names(forwards.prompts_at(37))
    assert [names(forwards.prompts_at(step)) for step in range(40)] == [names(backwards.prompts_at(step)) for step in reversed(range(40))][::-1]
    assert names(PromptSet(there, config(prompts_per_step=16)).prompts_at(37)) == late
    assert names(PromptSet(there, config(prompts_per_step=16, seed=5)).prompts_at(37)) != late
    assert forwards.digest == backwards.digest != PromptSet(there, config(prompts_per_step=16, seed=5)).digest


@pytest.mark.parametrize("edit", [{"entry": {"answer": "8"}}, {"grader": "math"}, {"extraction": "boxed"}, {"dataset": "other"}])
def test_other_answers_or_graders_are_other_prompts(edit: dict[str, Any]) -> None:
    def digest(graded: PromptLine) -> str:
        return PromptSet([Prompt("7", "math", graded.graded, (7,))], config(prompts_per_step=1)).digest

    assert digest(line(7)) == digest(line(7)) != digest(line(7, **edit))


def test_an_order_stays_what_it_is_in_other_processes_and_versions() -> None:
    asked = PromptSet(prompts(math=6), config(prompts_per_step=3, seed=1))
    numbers = [[name.removeprefix("math/") for name in names(asked.prompts_at(step))] for step in (0, 1, 1000)]
    assert numbers == [["0", "4", "1"], ["5", "3", "2"], ["3", "4", "1"]]


def test_weights_give_each_domain_its_share_of_every_step() -> None:
    asked = PromptSet(prompts(math=40, code=7), config(prompts_per_step=10, weights={"math": 3.0, "code": 2.0}))
    steps = [Counter(prompt.domain for prompt in asked.prompts_at(step)) for step in range(50)]
    assert sum((Counter(step) for step in steps), Counter()) == {"math": 300, "code": 200}
    assert all(abs(step["math"] - 6) <= 1 for step in steps)
    code = [prompt.id for step in range(7) for prompt in asked.prompts_at(step) if prompt.domain == "code"]
    assert Counter(code[:7]) == Counter(code[7:14]) == Counter({f"code/{n}": 1 for n in range(7)})


def test_weights_must_name_the_domains_that_are_there() -> None:
    with pytest.raises(UserError, match=r"prompts.weights=\['chess', 'math'\] must name the domains.*\['code', 'math'\]"):
        PromptSet(prompts(math=4, code=4), config(prompts_per_step=2, weights={"math": 1.0, "chess": 1.0}))


def test_a_pool_smaller_than_a_step_is_refused() -> None:
    with pytest.raises(UserError, match=r"prompts_per_step=64 takes 64 prompts of 'all' a step, and there are 5"):
        PromptSet(prompts(math=5), config())
    with pytest.raises(UserError, match=r"takes 8 prompts of 'code' a step, and there are 7"):
        PromptSet(prompts(math=40, code=7), config(prompts_per_step=16, weights={"math": 1.0, "code": 1.0}))


def test_one_id_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"1 ids are there more than once, such as 'math/0'"):
        PromptSet([*prompts(math=3), *prompts(math=1)], config(prompts_per_step=2))


def test_task_prompts_are_training_questions_that_its_grader_knows(tokenizer: Any) -> None:
    asked = load_prompts(config(sources=[{"task": "gcd", "count": 40, "seed": 7}], prompts_per_step=8, chat=False), tokenizer)
    held_out = {question.text for question in load_task("gcd").questions()}
    assert 30 < len(asked.prompts) <= 40
    assert not held_out & {prompt.question.text for prompt in asked.prompts}
    first = asked.prompts[0]
    assert first.domain == "gcd"
    assert tokenizer.decode(list(first.tokens)) == load_task("gcd").prompt_for(first.question)
    assert verdict(first.question, f"Answer: {first.question.entry['answer']}").correct


def test_two_sources_of_a_task_whose_seeds_overlap_are_refused(tokenizer: Any) -> None:
    def asked(second: int) -> PromptConfig:
        return config(sources=[{"task": "gcd", "count": 20}, {"task": "gcd", "count": 20, "seed": second}], prompts_per_step=2)

    with pytest.raises(UserError, match=r"give sources of one task other seeds"):
        load_prompts(asked(19), tokenizer)
    assert len(load_prompts(asked(20), tokenizer).prompts) > 20


def test_easier_parameters_do_not_let_an_evaluation_question_in(tmp_path: Path, tokenizer: Any) -> None:
    small = 'name = "small"\ndomain = "math"\ndataset = "gcd"\nnum_questions = 15\n[params]\nmin_numbers = 2\nmax_numbers = 2\nmin_value = 1\n'
    (tmp_path / "small.toml").write_text(small + "max_value = 4\n")
    held_out = {question.text for question in load_task(str(tmp_path / "small.toml")).questions()}
    sources = [{"task": str(tmp_path / "small.toml"), "count": 300, "params": {"max_value": 9}, "domain": "wider"}]
    asked = load_prompts(config(sources=sources, prompts_per_step=2), tokenizer)
    assert {prompt.domain for prompt in asked.prompts} == {"wider"}
    assert not held_out & {prompt.question.text for prompt in asked.prompts}


def test_evaluation_seeds_and_benchmarks_and_held_out_generators_are_refused() -> None:
    with pytest.raises(UserError, match="held out for evaluation"):
        check_sources(config(sources=[{"task": "gcd", "seed": HELD_OUT_SEED}]))
    with pytest.raises(UserError, match="benchmark's data set"):
        check_sources(config(sources=[{"task": "aime24"}]))
    with pytest.raises(UserError, match="task chain_sum draws from chain_sum, which held_out_generators keeps"):
        check_sources(config(sources=[{"task": "gcd"}, {"task": "chain_sum"}], held_out_generators=["chain_sum"]))
    with pytest.raises(UserError, match=r"nowhere.jsonl is no prompt file"):
        check_sources(config(sources=[{"file": "nowhere.jsonl"}]))


def test_a_source_is_a_task_or_a_file() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        config(sources=[{"task": "gcd", "file": "a.jsonl"}])
    with pytest.raises(ValueError, match="count belong to a task"):
        config(sources=[{"count": 4, "file": "a.jsonl"}])
    with pytest.raises(ValueError, match=r"must hold \{question\} once"):
        config(frame="What?")


def test_files_are_asked_in_a_chat_with_frame_and_prefix_and_recorded_by_their_hash(tmp_path: Path, chat_tokenizer: Any) -> None:
    path = tmp_path / "sums.jsonl"
    write_prompts(path, [line(0, prompt="What is 0? Think."), line(1), line(2, "code")])
    settings = {"frame": "Q: {question}", "prefix": "<think>\n", "prompts_per_step": 3}
    asked = load_prompts(config(sources=[{"file": str(path)}], **settings), chat_tokenizer)
    texts = [chat_tokenizer.decode(list(prompt.tokens)) for prompt in asked.prompts]
    assert texts == [f"<user>Q: {text}<bot><think>" for text in ("What is 0? Think.", "What is 1?", "What is 2?")]
    assert [prompt.domain for prompt in asked.prompts] == ["math", "math", "code"]
    assert asked.describe()["sources"][0]["sha256"] == sha256_of(path)
    assert asked.describe()["domains"] == {"code": 1, "math": 2}


def test_a_model_without_a_chat_template_is_asked_plainly_and_counted_or_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "sums.jsonl"
    write_prompts(path, [line(n) for n in range(3)])
    asked = load_prompts(config(sources=[{"file": str(path)}], prompts_per_step=2), tokenizer)
    assert asked.sources[0].plain == 3
    assert tokenizer.decode(list(asked.prompts[0].tokens)) == "What is 0?"
    with pytest.raises(UserError, match="no chat template"):
        load_prompts(config(sources=[{"file": str(path)}], prompts_per_step=2, without_chat_template="refuse"), tokenizer)


def test_prompts_that_are_too_long_are_dropped_and_counted_before_the_run_or_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "mixed.jsonl"
    write_prompts(path, [line(0), line(1, question="two " * 400), line(2), line(3, question="one " * 200)])
    sources = [{"file": str(path)}]
    asked = load_prompts(config(sources=sources, prompts_per_step=2), tokenizer, longest=100)
    assert names(list(asked.prompts)) == ["math/0", "math/2"]
    assert (asked.sources[0].read, asked.sources[0].kept, asked.sources[0].too_long) == (4, 2, 2)
    assert asked.sources[0].longest_tokens > 400
    with pytest.raises(UserError, match=r"prompts are too long: more than 100 tokens have .*mixed.jsonl: 2 of 4"):
        load_prompts(config(sources=sources, prompts_per_step=2, on_too_long="refuse"), tokenizer, longest=100)
    with pytest.raises(UserError, match=r"no prompt is left: more than 2 tokens have"):
        load_prompts(config(sources=sources, prompts_per_step=2, max_prompt_tokens=2), tokenizer, longest=100)


def test_a_prompt_without_a_token_is_refused_before_the_run(tmp_path: Path, tokenizer: Any) -> None:
    """No generator takes it: the step that asks it would end the run, at every start anew."""
    path = tmp_path / "blank.jsonl"
    write_prompts(path, [line(0), line(1, question="")])
    with pytest.raises(UserError, match=r"prompts: 1 have no tokens, such as 'math/1'"):
        load_prompts(config(sources=[{"file": str(path)}], prompts_per_step=1), tokenizer)
    assert len(load_prompts(config(sources=[{"file": str(path)}], prompts_per_step=1, prefix="So:"), tokenizer).prompts) == 2


def test_a_prompt_file_reads_back_what_was_written(tmp_path: Path) -> None:
    lines = [line(0, entry={"answer": "½", "tests": [{"input": "a\nb"}]}, solved=3, samples=16, source="here"), line(1, prompt="?")]
    write_prompts(tmp_path / "p.jsonl", lines)
    assert list(read_prompts(tmp_path / "p.jsonl")) == lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": 3}, r"p.jsonl:1.*level"),
        ({"grader": "oracle"}, "there is no grader 'oracle'"),
        ({"extraction": "guess"}, "there is no extraction rule 'guess'"),
        ({"entry": "4"}, r"p.jsonl:1.*entry"),
        ({"domain": "../math"}, r"p.jsonl:1.*domain"),
    ],
)
def test_a_line_of_another_shape_is_refused_by_its_place(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(line(0).model_dump(exclude_none=True) | change))
    with pytest.raises(UserError, match=message):
        list(read_prompts(tmp_path / "p.jsonl"))


def test_broken_and_doubled_lines_are_refused_by_their_place(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_prompts(path, [line(0), line(0)])
    with pytest.raises(UserError, match=r"p.jsonl:2: id 'math/0' is there twice"):
        list(read_prompts(path))
    path.write_text('{"id": "a"')
    with pytest.raises(UserError, match=r"p.jsonl:1 is no JSON"):
        list(read_prompts(path))
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"p.jsonl:1 must be a JSON object; it is list"):
        list(read_prompts(path))


def test_prompts_of_an_unfinished_output_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    write_prompts(tmp_path / "pool.jsonl", [line(0)])
    output = stage.run(validate({"output": str(tmp_path / "out"), "files": [str(tmp_path / "pool.jsonl")]}, stage.Config, where="test"))
    asked = config(sources=[{"file": str(output / "math.jsonl")}], prompts_per_step=1)
    assert names(list(load_prompts(asked, tokenizer).prompts)) == ["math/0"]
    (output / "COMPLETE").unlink()
    for read in (lambda: check_sources(asked), lambda: list(read_prompts(output / "math.jsonl"))):
        with pytest.raises(UserError, match=r"out has no COMPLETE mark: it is half-written"):
            read()


def test_the_recipes_of_the_page_are_read() -> None:
    page = (Path(__file__).parents[2] / "docs/rl_prompts.md").read_text(encoding="utf-8")
    run, pool, tool = (tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL))
    assert [source.task for source in validate(run["prompts"], PromptConfig, where="page").sources] == ["chain_sum", None]
    assert validate(pool, stage.Config, where="page").solvability is not None
    check_sources(validate(tool["prompts"], PromptConfig, where="page"))
    validate(tool["rollout"]["tool"], ToolConfig, where="page")


def test_recipes_of_prompts_and_rewards_are_read_without_torch() -> None:
    code = "import sys; import megatron_prism.rl.prompts, megatron_prism.rl.rewards; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
