"""A row of a data set, and what a reader makes of it.

Owns: naming the row in errors. Refuses: rows that lack a field, fields of another type than the data set's schema says.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from megatron_prism.config import Block
from megatron_prism.errors import UserError

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Row:
    """place: for people, FILE:NUMBER, numbers from 1. fields: as the file has them."""

    place: str
    fields: Mapping[str, Any]

    def get(self, field: str, kind: type[Kind]) -> Kind:
        """A field that must be there. Errors: UserError where it is missing or of another type."""
        if field not in self.fields:
            raise UserError(f"{self.place} has no field {field!r}; it has {', '.join(map(repr, self.fields))}: is this the data set's own schema?")
        value = self.fields[field]
        if not isinstance(value, kind):
            raise UserError(f"{self.place}: field {field!r} must be {kind.__name__}; it is {type(value).__name__}")
        return value

    def text(self, field: str) -> str:
        """A field as text: some data sets write answers and years as numbers, others as text."""
        value = self.get(field, object)
        if not isinstance(value, str | int):
            raise UserError(f"{self.place}: field {field!r} must be text or a whole number; it is {type(value).__name__}")
        return str(value)

    def json(self, field: str) -> Any:
        """A field that holds JSON as text. Errors: UserError where it does not."""
        try:
            return json.loads(self.get(field, str))
        except json.JSONDecodeError as error:
            raise UserError(f"{self.place}: field {field!r} is no JSON: {error}") from None


def json_object(text: str, place: str, hint: str) -> dict[str, Any]:
    """What a line of a file holds. place: FILE:NUMBER. Errors: UserError for what is no JSON object, with the hint."""
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is no JSON: {error}; {hint}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{place} must be a JSON object; it is {type(fields).__name__}; {hint}")
    return fields


class Asked(NamedTuple):
    """What a row asks. id: unique in the task. text: goes into the prompt. grader, entry: as `grading.Question` wants them; an entry's "statement" is
    the question without its frame, from which n-grams are taken."""

    id: str
    text: str
    grader: str
    entry: Mapping[str, Any]


class Dropped(NamedTuple):
    """A row that the task does not ask. reason: counted."""

    reason: str


class Reader(Block):
    """Turns rows into what is asked; its fields are a task file's `[params]`."""

    @abstractmethod
    def read(self, row: Row) -> Asked | Dropped:
        """What a row asks. Errors: UserError for a row of another schema."""
