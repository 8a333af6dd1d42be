"""A response of several turns: the calculator is exact and safe, what it put in is read and neither trained on nor graded, with any generator."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from idle_generator import IdleGenerator
from tiny_hf import make_tiny_model, make_tiny_tokenizer

from megatron_prism import generate
from megatron_prism.generate.interface import Completion, Generator, Request, Sampling, cut_at_stop
from megatron_prism.grading import Question, verdict
from megatron_prism.rl import rollouts, tools
from megatron_prism.rl.records import Prompt
from megatron_prism.rl.rewards import RewardConfig, answer_of, reward
from megatron_prism.rl.rollouts import RolloutConfig
from megatron_prism.rl.tools import ToolConfig, Written, calculate, generate_with_tool


class Author(IdleGenerator):
    """Writes what `write(everything so far)` says, in tokens of a real tokenizer, as a model would: until a stop string, its end or its limit."""

    def __init__(self, tokenizer: Any, write: Callable[[str], str]):
        self.tokenizer, self.write = tokenizer, write
        self.rounds: list[tuple[list[Request], Sampling]] = []

    def generate_requests(self, requests: Sequence[Request], sampling: Sampling, on_done: Callable[[Request, Completion], None]) -> None:
        self.rounds.append((list(requests), sampling))
        for request in reversed(requests):  # in any order
            tokens = self.tokenizer(self.write(self.tokenizer.decode(list(request.prompt))) + "</s>")["input_ids"]
            ends = [n for n in range(1, len(tokens) + 1) if tokens[n - 1] == 0 or cut_at_stop(self.tokenizer.decode(tokens[:n]), sampling.stop)[1]]
            is_cut = ends[0] > (request.max_new_tokens or sampling.max_new_tokens)
            tokens = tokens[: request.max_new_tokens if is_cut else ends[0]]
            text = cut_at_stop(self.tokenizer.decode(tokens, skip_special_tokens=True), sampling.stop)[0]
            on_done(request, Completion(text, tuple(tokens), "length" if is_cut else "stop", (-0.5,) * len(tokens)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    with generate.load(make_tiny_model(tmp_path_factory.mktemp("model")), device="cpu") as generator:
        yield generator


def config(**settings: Any) -> ToolConfig:
    return ToolConfig.model_validate(settings)


def run(generator: Generator, requests: Sequence[Request], asked: ToolConfig, **sampling: Any) -> dict[tuple[int, int], Written]:
    found: dict[tuple[int, int], Written] = {}
    given = Sampling(**{"temperature": 1.0, "max_new_tokens": 400, "seed": 3, **sampling})
    generate_with_tool(generator, requests, given, asked, lambda request, written: found.update({(request.place, request.sample): written}))
    return found


def request(tokenizer: Any, text: str, place: int = 0, sample: int = 0) -> Request:
    return Request(tuple(tokenizer(text)["input_ids"]), place, sample)


def student(so_far: str) -> str:
    """Multiplies with the tool once, and writes the answer down."""
    if "<result>" in so_far:
        return "So it is.</think>\nAnswer: " + so_far.rpartition("<result>")[2].partition("<")[0]
    return "<think>Let me see: <tool>48217 * 90533</tool> I think it is 7.</think>\nAnswer: 7"


def test_the_tool_answers_between_turns_and_the_model_goes_on(tokenizer: Any) -> None:
    [written] = run(Author(tokenizer, student), [request(tokenizer, "What is 48217 * 90533?")], config()).values()
    assert tokenizer.decode(list(written.tokens)) == (
        "<think>Let me see: <tool>48217 * 90533</tool><result>4365229661</result>So it is.</think>\nAnswer: 4365229661</s>"
    )
    assert (written.finish_reason, written.calls) == ("stop", 1)


def test_what_the_tool_put_in_is_masked_and_not_graded(tokenizer: Any) -> None:
    [written] = run(Author(tokenizer, student), [request(tokenizer, "?")], config()).values()
    inserted = [token for token, own in zip(written.tokens, written.written, strict=True) if not own]
    assert tokenizer.decode(inserted) == "<result>4365229661</result>"
    assert {logprob for logprob, own in zip(written.logprobs, written.written, strict=True) if not own} == {0.0}
    assert {logprob for logprob, own in zip(written.logprobs, written.written, strict=True) if own} == {-0.5}
    assert written.text == "<think>Let me see: <tool>48217 * 90533</tool>So it is.</think>\nAnswer: 4365229661"
    assert verdict(Question("?", "exact", "", {"answer": "4365229661"}), written.text).correct


def test_later_turns_read_all_that_was_written_and_draw_from_random_numbers_of_their_own(tokenizer: Any) -> None:
    author = Author(tokenizer, student)
    asked = [request(tokenizer, "a", 5, 1), request(tokenizer, "b", 6, 0)]
    found = run(author, asked, config())
    (first, first_sampling), (second, second_sampling) = author.rounds
    assert first_sampling.seed == 3 != second_sampling.seed
    assert [(each.place, each.sample) for each in second] == [(5, 1), (6, 0)]
    for before, turn in zip(first, second, strict=True):
        read = turn.prompt[len(before.prompt) :]
        assert turn.prompt[: len(before.prompt)] == before.prompt
        assert found[turn.place, turn.sample].tokens[: len(read)] == read
        assert turn.max_new_tokens == 400 - len(read)


def test_who_does_not_call_is_done_at_once_and_unlike_others_not_asked_again(tokenizer: Any) -> None:
    author = Author(tokenizer, lambda so_far: student(so_far) if so_far.startswith("call") else "Answer: 1")
    found = run(author, [request(tokenizer, "call", 0), request(tokenizer, "do not", 1)], config())
    assert [[each.place for each in requests] for requests, _ in author.rounds] == [[0, 1], [0]]
    assert (found[1, 0].text, found[1, 0].calls, all(found[1, 0].written)) == ("Answer: 1", 0, True)


def test_calls_beyond_the_last_are_text_like_any_other(tokenizer: Any) -> None:
    author = Author(tokenizer, lambda _: "<tool>1 + 1</tool> again")
    [written] = run(author, [request(tokenizer, "?")], config(max_calls=2)).values()
    assert written.text == "<tool>1 + 1</tool>" * 3 + " again"
    assert tokenizer.decode(list(written.tokens)).count("<result>2</result>") == written.calls == 2
    assert written.finish_reason == "stop"
    [plain] = run(author, [request(tokenizer, "?")], config(max_calls=0)).values()
    assert (plain.text, plain.calls) == ("<tool>1 + 1</tool> again", 0)


def test_a_turn_and_a_response_end_at_their_limits(tokenizer: Any) -> None:
    author = Author(tokenizer, lambda so_far: "x" * 60 if "<result>" in so_far else "<tool>2 * 3</tool>")
    [cut] = run(author, [request(tokenizer, "?")], config(max_turn_tokens=30)).values()
    assert (cut.finish_reason, cut.text) == ("length", "<tool>2 * 3</tool>" + "x" * 30)
    [whole] = run(author, [request(tokenizer, "?")], config(), max_new_tokens=50).values()
    assert (whole.finish_reason, len(whole.tokens)) == ("length", 50)
    call = len(tokenizer("<tool>2 * 3</tool>")["input_ids"])
    [no_room] = run(author, [request(tokenizer, "?")], config(), max_new_tokens=call + 3).values()
    assert (no_room.finish_reason, no_room.calls, no_room.text) == ("length", 0, "<tool>2 * 3</tool>")
    assert all(no_room.written)


def test_an_answer_of_the_tool_that_is_an_error_is_read_by_the_model(tokenizer: Any) -> None:
    author = Author(tokenizer, lambda so_far: so_far.rpartition("<result>")[2] if "<result>" in so_far else "<tool>1 / 0</tool>")
    [written] = run(author, [request(tokenizer, "?")], config()).values()
    assert written.text == "<tool>1 / 0</tool>error: division by zero</result>"


def test_with_a_real_model_turns_are_scored_as_one_text(tiny: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "CLOSE", "t")  # what a random model writes all the time
    asked = [request(tiny.tokenizer, text, place, sample) for place, text in enumerate(("one two", "the cat")) for sample in range(3)]
    found = run(tiny, asked, config(max_calls=2), max_new_tokens=60)
    assert sum(written.calls for written in found.values()) >= 4
    for each in asked:
        written = found[each.place, each.sample]
        [scored] = tiny.score([(each.prompt, written.tokens)])
        for own, drawn, true in zip(written.written, written.logprobs, scored.logprobs, strict=True):
            assert drawn == (pytest.approx(true, abs=1e-4) if own else 0.0)
        assert len(written.tokens) <= 60
    again = run(tiny, asked[::-1][:4], config(max_calls=2), max_new_tokens=60)
    assert all(found[pair].tokens == written.tokens for pair, written in again.items())


def test_the_first_turn_is_that_of_a_response_without_a_tool(tiny: Generator) -> None:
    asked = [request(tiny.tokenizer, "one two", sample=sample) for sample in range(4)]
    found = run(tiny, asked, config(), max_new_tokens=20)
    [plain] = tiny.generate([asked[0].prompt], Sampling(temperature=1.0, max_new_tokens=20, seed=3, n=4))
    assert [found[0, sample].tokens for sample in range(4)] == [each.tokens for each in plain]
    assert [found[0, sample].text for sample in range(4)] == [each.text for each in plain]


def test_the_tools_task_runs_through_rollouts_and_reward(tokenizer: Any) -> None:
    question = Question("What is 48217 * 90533?", "exact", "", {"answer": "4365229661"})
    asked = [Prompt("sum", "sums", question, tuple(tokenizer(question.text)["input_ids"]))]
    with_tool = RolloutConfig.model_validate({"context": 400, "tool": {}})
    without = RolloutConfig.model_validate({"context": 400})
    values = {}
    for name, rollout in (("with", with_tool), ("without", without)):
        draw = rollouts.Draw(asked, rollout, seed=0, step=0, version=0, writers=1)
        found = rollouts.write(Author(tokenizer, student), draw, [(0, 0), (0, 1)])
        [response, _] = found.values()
        answer = answer_of(response.text, "required")
        assert answer is not None
        values[name] = reward(response, verdict(question, answer), RewardConfig()).value
        inserted = [token for token, own in zip(response.tokens, response.written, strict=True) if not own]
        assert tokenizer.decode(inserted) == ("<result>4365229661</result>" if name == "with" else "")
    assert values == {"with": 1.0, "without": 0.0}


def test_a_place_and_a_sample_name_one_response(tokenizer: Any) -> None:
    with pytest.raises(AssertionError, match="of its own"):
        run(Author(tokenizer, student), [request(tokenizer, "a"), replace(request(tokenizer, "b"))], config())


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("48217 * 90533", "4365229661"),
        (" 2 ** 10 ", "1024"),
        ("0.1 + 0.2", "0.3"),
        ("1/8 - 3", "-2.875"),
        ("1/3", "0.333333333333"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("2 ** -2", "0.25"),
        ("(1 + 2) * +3", "9"),
        ("1e3 * 1_000", "1000000"),
        ("10 ** 20 + 1", "100000000000000000001"),
        ("7 / 7", "1"),
        ("2 ** 600", str(2**600)),
        ("10 ** 300", "1" + "0" * 300),
        ("2 ** -600 * 2 ** 600", "1"),
        ("1 ** 2000", "1"),
        ("(-1) ** 2025", "-1"),
        ("0 ** 1025", "0"),
        ("1 ** 10 ** 300", "1"),
        ("0.000000000001 * 3", "0.000000000003"),
        ("1.0000000000001", "1"),
        ("1.0000000000001 * 10 ** 13", "10000000000001"),
        ("0 * -1", "0"),
    ],
)
def test_the_calculator_is_exact(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("9 ** 9 ** 9", "too large"),
        ("1e999999999", "too large"),
        ("0.5 ** 99999", "too large"),
        ("2 ** 1023 * 2 ** 1023", "too large"),
        ("2 ** 1024", "too large"),
        ("3 ** 1000", "too large"),
        ("(1/3) ** 1000", "too large"),
        ("2 ** 0.5", "an exponent must be whole"),
        ("1 / 0", "division by zero"),
        ("1 % 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("__import__('os').system('ls')", "only numbers"),
        ("abs(-1)", "only numbers"),
        ("[1][0]", "only numbers"),
        ("'a' * 9", "only numbers"),
        ("True + 1", "only numbers"),
        ("1or 2", "only numbers"),
        ("2j", "only numbers"),
        ("x", "only numbers"),
        ("1, 2", "only numbers"),
        ("0x10", "no expression"),
        ("", "no expression"),
        ("(1 +", "no expression"),
        ("1\0", "no expression"),
        ("(" * 150, "no expression"),
        ("1+" * 101 + "1", "more than 200 characters"),
    ],
)
def test_what_is_no_small_arithmetic_is_an_error_in_words_and_runs_nothing(expression: str, error: str) -> None:
    assert calculate(expression).startswith(f"error: {error}")
