"""LiveCodeBench: programs judged by tests, of contests between two months.

A row's private tests are JSON, as text, pickled, compressed and in base64. They are unpacked when a grader asks for them, not before: all problems'
tests at once fill gigabytes. Pickle can run any code, so the unpickler here knows no names: text comes out, or an error.
Owns: the months, the tests. Refuses: pickles of anything but text.
"""

import base64
import binascii
import hashlib
import io
import json
import pickle
import zlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, NoReturn

from pydantic import Field

from megatron_prism.config import PositiveFloat
from megatron_prism.errors import UserError
from megatron_prism.evals.sources.rows import Asked, Dropped, Reader, Row
from megatron_prism.grading.programs import PRELUDE

MAX_TEST_BYTES = 1 << 30
Month = Annotated[str, Field(pattern=r"^\d{4}-\d{2}$")]


class LiveCodeBench(Reader):
    """A problem of a contest, with hidden tests."""

    first_month: Month
    """of the contest, YYYY-MM"""
    last_month: Month
    """of the contest, still asked"""
    starter_code: bool = True
    """show the signature that functional tests call; without it the statement does not name the function"""
    time_limit: PositiveFloat = 6
    """seconds for a test; 6 is LiveCodeBench's"""

    def read(self, row: Row) -> Asked | Dropped:
        """See `Reader`."""
        month = row.get("contest_date", str)[:7]
        if not self.first_month <= month <= self.last_month:
            return Dropped(f"contest before {self.first_month}" if month < self.first_month else f"contest after {self.last_month}")
        statement, starter = row.get("question_content", str), row.get("starter_code", str)
        known: dict[str, Any] = {"time_limit": self.time_limit, "statement": statement}
        if any(test.get("testtype") == "stdin" for test in row.json("public_test_cases")):
            grader, text = "code_stdin", statement
        else:
            grader, text = "code_function", f"{statement}\n\nStarter code:\n{starter}" if self.starter_code else statement
            known |= {"function": row.json("metadata").get("func_name"), "prelude": PRELUDE}  # the signature names List without importing it
            if not known["function"]:
                raise UserError(f"{row.place}: its tests call a function, and metadata has no func_name")
        return Asked(row.text("question_id"), text, grader, PackedEntry(known, row.get("private_test_cases", str), row.place))


class PackedEntry(Mapping[str, Any]):
    """A grader's entry whose "tests" stay packed: each look at them unpacks them anew. It travels to other processes packed.

    Its repr tells it from entries with other tests.
    """

    def __init__(self, known: Mapping[str, Any], packed: str, place: str):
        self._known, self._packed, self._place = known, packed, place

    def __getitem__(self, key: str) -> Any:
        if key != "tests":
            return self._known[key]
        return [{"input": test["input"], "output": test["output"]} for test in unpack_tests(self._packed, self._place)]

    def __iter__(self) -> Iterator[str]:
        return iter((*self._known, "tests"))

    def __len__(self) -> int:
        return len(self._known) + 1

    def __repr__(self) -> str:
        return f"PackedEntry({self._known!r}, tests={self._digest})"

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self._packed.encode()).hexdigest()


def unpack_tests(packed: str, place: str) -> list[dict[str, str]]:
    """The tests of a field that holds them as JSON, or packed. Errors: UserError where it holds anything else."""
    if packed.lstrip().startswith("["):
        found = json.loads(packed)
    else:
        try:
            found = json.loads(_TextUnpickler(io.BytesIO(_inflate(base64.b64decode(packed, validate=True)))).text())
        except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, ValueError) as error:
            raise UserError(f"{place}: private_test_cases must be text, pickled, compressed and in base64; {error}") from None
    if not isinstance(found, list) or not all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in found):
        raise UserError(f'{place}: private_test_cases must be a list of {{"input", "output"}}')
    return found


def _inflate(content: bytes) -> bytes:
    inflater = zlib.decompressobj()
    found = inflater.decompress(content, MAX_TEST_BYTES)
    if inflater.unconsumed_tail:
        raise ValueError(f"they take more than {MAX_TEST_BYTES} bytes")
    return found


class _TextUnpickler(pickle.Unpickler):
    """Loads one text and finds no class or function, so that nothing of a file's choice can be called."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"the pickle names {module}.{name}, and text needs no names")

    def text(self) -> str:
        found = self.load()
        if not isinstance(found, str):
            raise pickle.UnpicklingError(f"the pickle holds {type(found).__name__}")
        return found
