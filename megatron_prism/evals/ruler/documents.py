"""RULER's qa: a question of SQuAD or HotpotQA, with its paragraphs among as many others as the length holds.

    DATA_DIR/squad/dev-v2.0.json                               rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json
    DATA_DIR/hotpotqa/hotpot_dev_distractor_v1.json            the file of that name of hotpotqa.github.io
Owns: reading the two files. Refuses: files that are not there, or of another schema, by name.
"""

import json
import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_prism.errors import UserError
from megatron_prism.evals.ruler.puzzle import Draw, Kind, Puzzle

RULE = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
HEAD = f"{RULE}\n\nThe following are given documents.\n\n"
TAIL = f"\n\n{RULE}\n\nQuestion: {{question}}"
PREFIX = " Answer:"
FILES = {"squad": "squad/dev-v2.0.json", "hotpotqa": "hotpotqa/hotpot_dev_distractor_v1.json"}


class Query(NamedTuple):
    """A question. documents: numbers of those that answer it, then of near ones, in `Corpus.documents`."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    near: tuple[int, ...]


class Corpus(NamedTuple):
    """Documents, sorted and each once, and the questions about them."""

    documents: tuple[str, ...]
    queries: tuple[Query, ...]


class Qa(Kind):
    """Which questions."""

    corpus: Literal["squad", "hotpotqa"]
    """whose"""

    def puzzle(self, draw: Draw) -> Puzzle:
        """See `Kind`: the file's question of that number; the other documents and the order are the seed's."""
        corpus = self.read(draw.data_dir)
        if draw.number >= len(corpus.queries):
            raise UserError(f"{FILES[self.corpus]} has {len(corpus.queries)} questions; set num_questions to that, or lower")
        query = corpus.queries[draw.number]

        def context(size: int) -> str:
            return _joined(_chosen(corpus, query, size, draw.seed))

        hay = f"documents of {FILES[self.corpus]}"
        smallest, largest = len(query.documents), len(corpus.documents)
        tail = TAIL.replace("{question}", query.text)
        return Puzzle(HEAD, tail, context, hay, PREFIX, query.answers, credit="any", smallest=smallest, largest=largest)

    def read(self, data_dir: Path | None) -> Corpus:
        """The file. Errors: UserError where it is not there, or is another."""
        file = FILES[self.corpus]
        if data_dir is None or not (data_dir / file).is_file():
            missing = "and data_dir is not set" if data_dir is None else f"which is not in data_dir={data_dir}"
            raise UserError(f"RULER's {self.corpus} questions need {file}, {missing}; get it where there is network, put it into data_dir")
        return _read(data_dir / file, self.corpus)


@cache
def _read(path: Path, corpus: Literal["squad", "hotpotqa"]) -> Corpus:
    reader = {"squad": _squad, "hotpotqa": _hotpotqa}[corpus]
    try:
        found = list(reader(json.loads(path.read_text(encoding="utf-8"))))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not the published file of {corpus}: {type(error).__name__}: {error}") from None
    documents = tuple(sorted({text for *_, own, near in found for text in (*own, *near)}))
    number = {text: place for place, text in enumerate(documents)}
    queries = (Query(text, answers, *(tuple(number[one] for one in part) for part in parts)) for text, answers, *parts in found)
    return Corpus(documents, tuple(queries))


def _squad(content: Any) -> Iterator[tuple[str, tuple[str, ...], list[str], list[str]]]:
    """(question, answers, its paragraph, the article's others) of the questions that have an answer."""
    for article in content["data"]:
        paragraphs = [paragraph["context"] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            others = [text for text in paragraphs if text != paragraph["context"]]
            for asked in paragraph["qas"]:
                if not asked["is_impossible"]:
                    yield asked["question"], tuple(answer["text"] for answer in asked["answers"]), [paragraph["context"]], others


def _hotpotqa(content: Any) -> Iterator[tuple[str, tuple[str, ...], list[str], list[str]]]:
    for asked in content:
        yield asked["question"], (asked["answer"],), [f"{title}\n{''.join(lines)}" for title, lines in asked["context"]], []


def _chosen(corpus: Corpus, query: Query, size: int, seed: str) -> list[str]:
    """`size` documents in the order of a seed: the query's own, then near ones, then any."""
    rng = random.Random(seed)
    own = [*query.documents, *rng.sample(query.near, len(query.near))][: max(size, len(query.documents))]
    known = {*query.documents, *query.near}
    rest = [place for place in range(len(corpus.documents)) if place not in known]
    chosen = [*own, *rng.sample(rest, len(rest))[: size - len(own)]] if size > len(own) else own
    random.Random(f"{seed} order").shuffle(chosen)
    return [corpus.documents[place] for place in chosen]


def _joined(documents: Sequence[str]) -> str:
    return "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(documents, start=1))
