"""The prompt sets of the paper's RL (Table 10), a TOML file each, and what reads their rows into lines of a prompt file.

    DATA_DIR/DATASET/FILE    as `hf download DATASET --repo-type dataset --local-dir DATA_DIR/DATASET` writes them; `files` are patterns
    DATA_DIR/NAME.jsonl      or all rows of a set in one file (.parquet, .csv)

Of two rows that ask the same words the first is kept. Owns: the schema of the TOML files, finding and reading the files, what was left out and why.
Refuses: a data set that is not there (with the command that fetches it), rows of another schema.
"""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from megatron_prism.config import Block, NonNegative, Positive, read_toml, validate
from megatron_prism.data_prep.cleaning.words import words
from megatron_prism.errors import UserError
from megatron_prism.evals.sources.files import SUFFIXES, rows
from megatron_prism.evals.sources.plain import Plain
from megatron_prism.evals.sources.rows import Asked, Dropped, Reader, Row
from megatron_prism.rl.prompt_files import PromptLine
from megatron_prism.rl.prompt_sets.readers import DeepCoder, Intellect, NemotronStem, OpenCodeInstruct, Skywork

FOLDER = Path(__file__).parent
Shape = Literal["plain", "intellect", "skywork", "nemotron_stem", "deepcoder", "open_code_instruct"]
READERS: dict[Shape, type[Reader]] = {
    "plain": Plain,
    "intellect": Intellect,
    "skywork": Skywork,
    "nemotron_stem": NemotronStem,
    "deepcoder": DeepCoder,
    "open_code_instruct": OpenCodeInstruct,
}
EXTRACTIONS = {"math": "boxed", "choice": "boxed_letter", "exact": "answer_line", "code_stdin": "code_block", "code_function": "code_block"}
"""how an answer to a question of a grader is found, unless the recipe says otherwise"""


class PromptSetRecipe(Block):
    """A file of rl/prompt_sets."""

    about: str
    """what it is, and what of it is uncertain"""
    read_at: str
    """where the columns were read, and what could not be"""
    domain: str
    """of its prompts"""
    dataset: str
    """owner/name on the Hugging Face hub"""
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """of it, as patterns: data/train-*.parquet"""
    rows: Shape
    """how a row is read"""
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = ("{question}",)
    """what is asked, around the question; of several, one for each question, drawn by its name"""
    extraction: str | None = None
    """how an answer is found (docs/grading.md); none: boxed for mathematics, boxed_letter for choices, code_block for programs"""
    max_entry_bytes: Positive = 1 << 20
    """rows whose answer and tests take more are left out: they are held in memory"""
    params: dict[str, Any] = Field(default_factory=dict)
    """of the reader"""

    @model_validator(mode="after")
    def _check(self) -> "PromptSetRecipe":
        bad = [prompt for prompt in self.prompts if prompt.count("{question}") != 1]
        if bad:
            raise ValueError(f"prompts={bad[0]!r} must hold {{question}} once")
        self.reader()
        return self

    def reader(self) -> Reader:
        """What reads its rows. Errors: UserError for parameters that it does not take."""
        return validate(self.params, READERS[self.rows], where=f"[params] of rows={self.rows}")


class PromptSetConfig(Block):
    """A prompt set, and how much of it."""

    recipe: str
    """a prompt set of megatron_prism/rl/prompt_sets, or the path of a .toml file of yours"""
    sample: Positive | None = None
    """so many of its prompts, by a seeded choice that does not depend on the order of the files; none: all"""
    seed: NonNegative = 1234
    """of the sample"""

    @property
    def name(self) -> str:
        """Of the set."""
        return Path(self.recipe).stem


class ReadSet(NamedTuple):
    """What a set gave. dropped: rows by reason."""

    lines: list[PromptLine]
    num_rows: int
    dropped: Counter[str]


def prompt_set_names() -> list[str]:
    """The sets that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_prompt_set(name: str) -> PromptSetRecipe:
    """The recipe of a name, or of a path that ends in .toml. Errors: UserError for unknown names and wrong keys."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        raise UserError(f"recipe={name!r} is no prompt set; known: {', '.join(prompt_set_names())}, or give the path of a .toml file")
    return validate(read_toml(path), PromptSetRecipe, where=str(path))


def read_set(asked: PromptSetConfig, data_dir: Path, seen: set[bytes]) -> ReadSet:
    """The prompts of a set. seen: questions that others asked already; those that this set takes are added. Errors: UserError."""
    recipe, dropped, num_rows = load_prompt_set(asked.recipe), Counter[str](), 0
    reader = recipe.reader()
    kept: list[tuple[int, int, PromptLine]] = []
    own_seen = set[bytes]()
    for row in _rows(asked, data_dir):
        num_rows += 1
        line = _line(asked.name, recipe, reader, row)
        own = _question_hash(line.question) if isinstance(line, PromptLine) else b""
        if isinstance(line, Dropped):
            dropped[line.reason] += 1
        elif own in seen or own in own_seen:
            dropped["asked already"] += 1
        else:
            own_seen.add(own)
            heapq.heappush(kept, (-_rank(asked.seed, line.id), -num_rows, line))
        if asked.sample is not None and len(kept) > asked.sample:
            heapq.heappop(kept)
            dropped["beyond the sample"] += 1
    lines = [line for _, _, line in sorted(kept, key=lambda each: -each[1])]
    seen.update(_question_hash(line.question) for line in lines)
    return ReadSet(lines, num_rows, dropped)


def find_set(asked: PromptSetConfig, data_dir: Path) -> list[Path]:
    """Those of its files that are there."""
    return [path for paths in _found(asked.name, load_prompt_set(asked.recipe), data_dir).values() for path in paths]


def check_set(asked: PromptSetConfig, data_dir: Path) -> list[Path]:
    """Its files, all of them. Errors: UserError that says what to put where."""
    recipe = load_prompt_set(asked.recipe)
    missing = [pattern for pattern, paths in _found(asked.name, recipe, data_dir).items() if not paths]
    if missing:
        folder = data_dir / recipe.dataset
        raise UserError(
            f"prompt set {asked.name}: {folder} lacks {', '.join(missing)}. Where there is network: `hf download {recipe.dataset} "
            f"--repo-type dataset --local-dir {folder}`; or put all rows into {data_dir / asked.name}.jsonl"
        )
    return find_set(asked, data_dir)


def first_line(asked: PromptSetConfig, data_dir: Path) -> PromptLine | None:
    """The first prompt of a set, which tells its grader without reading the others. Errors: UserError."""
    recipe = load_prompt_set(asked.recipe)
    reader = recipe.reader()
    lines = (_line(asked.name, recipe, reader, row) for row in _rows(asked, data_dir))
    return next((line for line in lines if isinstance(line, PromptLine)), None)


def _found(name: str, recipe: PromptSetRecipe, data_dir: Path) -> dict[str, list[Path]]:
    """The files by pattern, or the one file that stands for all."""
    own = [path for suffix in SUFFIXES if (path := data_dir / f"{name}{suffix}").is_file()]
    if own:
        return {own[0].name: own[:1]}
    return {pattern: sorted((data_dir / recipe.dataset).glob(pattern)) for pattern in recipe.files}


def _line(name: str, recipe: PromptSetRecipe, reader: Reader, row: Row) -> PromptLine | Dropped:
    found = _read(reader, row)
    if isinstance(found, Dropped):
        return found
    if not found.text.strip():
        return Dropped("no question")
    if found.grader in ("math", "exact") and not str(found.entry["answer"]).strip():
        return Dropped("no answer")
    size = len(json.dumps(dict(found.entry)).encode())
    if size > recipe.max_entry_bytes:
        return Dropped(f"more than {recipe.max_entry_bytes} bytes of tests")
    return _as_line(f"{name}/{found.id}", name, recipe, found)


def _read(reader: Reader, row: Row) -> Asked | Dropped:
    try:
        return reader.read(row)
    except UserError:
        raise
    except (LookupError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{row.place} cannot be read ({type(error).__name__}: {error}): is this the data set's own schema?") from error


def _as_line(line_id: str, name: str, recipe: PromptSetRecipe, found: Asked) -> PromptLine:
    prompt = recipe.prompts[_rank(0, line_id) % len(recipe.prompts)].replace("{question}", found.text)
    return PromptLine(
        id=line_id,
        domain=recipe.domain,
        question=found.text,
        prompt=None if prompt == found.text else prompt,
        grader=found.grader,
        extraction=recipe.extraction or EXTRACTIONS[found.grader],
        dataset=recipe.dataset,
        entry=dict(found.entry),
        source=name,
    )


def _rows(asked: PromptSetConfig, data_dir: Path) -> Iterator[Row]:
    """Of all files. A place names the file within the data set's folder: files of several folders may have one name."""
    folder = data_dir / load_prompt_set(asked.recipe).dataset
    for path in check_set(asked, data_dir):
        name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
        yield from _json_rows(path, name) if path.suffix == ".json" else rows(path, name)


def _json_rows(path: Path, name: str) -> Iterator[Row]:
    """Of a file that is one JSON list."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON: {error}; an unfinished download?") from None
    if not isinstance(found, list) or not all(isinstance(fields, dict) for fields in found):
        raise UserError(f"{path} must be a list of JSON objects; put one object a line into a .jsonl file instead")
    return (Row(f"{name}:{number}", fields) for number, fields in enumerate(found, 1))


def _question_hash(question: str) -> bytes:
    return hashlib.blake2b(" ".join(words(question)).encode(), digest_size=16).digest()


def _rank(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "big")
