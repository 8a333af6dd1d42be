"""lm-eval's view of a `Generator`: its tasks, prompts and scorers on our models and backends.

Tokenising is lm-eval's own (`TemplateLM`); what its Hugging Face backend decides beside that is decided the same way here: special tokens as the
tokenizer adds them, none where the text begins with one; contexts that are too long lose their beginning, with vLLM two tokens more than there.
Owns: the translation. Refuses: generation settings that a `Sampling` cannot say. Imports lm-eval: only `retention` imports this, and only to run.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megatron_prism.errors import UserError
from megatron_prism.generate.interface import Generator, Sampling

SCORED_AT_ONCE = 2048
SAMPLING_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}

Encoded = tuple[Any, list[int], list[int]]
"""What was asked, the tokens of the context, the tokens of the continuation"""


class LmEvalModel(TemplateLM):
    """A generator as an lm-eval model. max_length: tokens that the model reads at most. seed: of sampled tasks."""

    max_gen_toks = 256

    def __init__(self, generator: Generator, max_length: int, seed: int = 0):
        super().__init__()
        self.generator, self.tokenizer, self.max_length, self.seed = generator, generator.tokenizer, max_length, seed
        limits = (max_length + 1, generator.longest_pair)  # the last token of a continuation is not read
        self.longest_pair = min(limit for limit in limits if limit is not None)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Names cached requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens as told, else as the tokenizer does, but none before a text that begins with one."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **special))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as a prompt. Errors: UserError for a model without a chat template."""
        if not self.tokenizer.chat_template:
            raise UserError(f"{self.tokenizer.name_or_path} has no chat template; set chat=false")
        settings = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **settings))

    def _loglikelihood_tokens(self, requests: list[Encoded], disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(pairs)), key=lambda place: -sum(map(len, pairs[place])))
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="scoring") as bar:
            for start in range(0, len(order), SCORED_AT_ONCE):
                places = order[start : start + SCORED_AT_ONCE]
                for place, scored in zip(places, self.generator.score([pairs[place] for place in places]), strict=True):
                    found[place] = (sum(scored.logprobs), scored.greedy)
                    self._remember("loglikelihood", requests[place][0], found[place])
                bar.update(len(places))
        return [found[place] for place in range(len(pairs))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """See lm-eval: each token once, after as much text as the model reads."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        scores = iter(self._loglikelihood_tokens([(None, *window) for each in windows for window in each], disable_tqdm))
        sums = [sum(next(scores)[0] for _ in each) for each in windows]
        for request, total in zip(requests, sums, strict=True):
            self._remember("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """See lm-eval. Requests of the same settings are generated together."""
        groups: defaultdict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(place)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generating") as bar:
            for places in groups.values():
                sampling = self._sampling(requests[places[0]].args[1])
                room = self.max_length - sampling.max_new_tokens
                if room < 1:
                    raise UserError(f"a task asks for {sampling.max_new_tokens} new tokens of a model that reads {self.max_length}")
                prompts = [self.tok_encode(requests[place].args[0])[-room:] for place in places]
                rows = self.generator.generate(prompts, sampling, lambda count: bar.update(count) and None)
                for place, (completion,) in zip(places, rows, strict=True):
                    texts[place] = completion.text
                    self._remember("generate_until", requests[place].args, completion.text)
        return [texts[place] for place in range(len(requests))]

    def _fitted(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[list[int], list[int]]:
        room = self.longest_pair - len(continuation)
        if room < 1:
            raise UserError(f"a continuation of {len(continuation)} tokens leaves no room for a context: the model reads {self.max_length}")
        return list(context[-room:]), list(continuation)

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        tokens = self.tok_encode(text)
        return map(make_disjoint_window, get_rolling_token_windows(tokens, self.prefix_token_id, self.longest_pair - 1, context_len=1))

    def _sampling(self, asked: dict[str, Any]) -> Sampling:
        settings = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        unknown = {key: value for key, value in settings.items() if key not in SAMPLING_KEYS}
        if unknown:
            raise UserError(f"a task asks to generate with {unknown}, which our generators do not know; known: {', '.join(sorted(SAMPLING_KEYS))}")
        return Sampling(
            temperature=float(settings["temperature"]),
            top_p=float(settings.get("top_p", 1.0)),
            max_new_tokens=int(settings["max_gen_toks"]),
            stop=tuple(stop for stop in settings["until"] if stop),
            seed=self.seed,
        )

    def _remember(self, kind: str, asked: Any, answer: Any) -> None:
        """Into lm-eval's cache of answers, where one is open."""
        if asked is not None:
            self.cache_hook.add_partial(kind, asked, answer)
