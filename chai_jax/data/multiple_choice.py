"""What a multiple-choice task is: data that say how a row of columns becomes a question.

A template is text with columns in it, written `{{column}}`. That is the plain part of the lm-evaluation-harness's
templates; nothing in one is run.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from chai_jax.data.batches import Example
from chai_jax.data.tokens import check_characters
from chai_jax.errors import InputError
from chai_jax.inputs.fields import brief

Row = dict[str, Any]
NORMALISE = ("none", "characters", "bytes", "tokens")  # by what a choice's log-likelihood is divided, too
TASK_FILE, TASK_SHA256 = "task_file", "task_sha256"  # in results
MOST_CHOICES = 256  # of a question: scores are kept in a table as wide as the longest list of choices
_HOLE = re.compile(r"\{\{\s*(\w+)\s*\}\}")


@cache
def _parts(template: str) -> tuple[str, ...]:
    """Literal text and column names in turn; text first and last."""
    return tuple(_HOLE.split(template))


def columns_of(template: str) -> tuple[str, ...]:
    """The columns that a template names, in its order."""
    return _parts(template)[1::2]


def render(template: str, row: Row) -> str:
    """A template with a row's texts in it."""
    return "".join(row[part] if at % 2 else part for at, part in enumerate(_parts(template)))


def check_template(template: str, what: str) -> None:
    """Raise InputError where the template called `what` has more in it than text and `{{column}}`."""
    for text in _parts(template)[::2]:
        for mark in ("{{", "{%", "{#"):
            if mark in text:
                raise InputError(
                    f"{what} has {text[text.index(mark) :]!r:.40}, which is no column; expected {{{{column}}}}, its "
                    "name in letters, digits and _ alone: compute the rest beforehand, as a column of the data"
                )


@dataclass(frozen=True)
class MultipleChoice:
    """One question: a context, the possible completions (each with what stands before it), the right one's index."""

    context: str
    choices: tuple[str, ...]
    label: int

    @property
    def example(self) -> Example:
        """The context with the right answer, to train on."""
        return Example(self.context, self.choices[self.label])


@dataclass(frozen=True)
class Origin:
    """The file that describes a task: where it is, the SHA-256 of its bytes, and the file it names for each split."""

    path: Path
    sha256: str
    splits: Mapping[str, str]


@dataclass(frozen=True)
class Task:
    """A multiple-choice task.

    Attributes:
        context: the template of the prompt.
        choices: a template for each answer; or the name of a column that holds the list of answers.
        gold: the name of a column with the right answer's number, from 0; or a template that gives its text.
        delimiter: stands between the context and each answer.
        normalise: by which length of an answer its log-likelihood is divided for a second accuracy.
        hub: data set and configuration on the Hugging Face hub; empty for a task that is not there.
        prepare: makes the row that the other attributes speak of; is told what messages call the row.
        generate: makes the rows of a split, for a task that needs no files.
        origin: where the task is described, if it is not built in.
    """

    name: str
    context: str
    choices: str | tuple[str, ...]
    gold: str = "label"
    delimiter: str = " "
    normalise: str = "none"
    hub: tuple[str, ...] = ()
    prepare: Callable[[Row, str], Row] | None = None
    generate: Callable[[str], list[Row]] | None = None
    origin: Origin | None = None

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns of text that its templates name, each once."""
        answers = () if isinstance(self.choices, str) else self.choices
        named = (column for template in (self.context, *answers, self.gold) for column in columns_of(template))
        return tuple(dict.fromkeys(named))

    @cached_property
    def _needed(self) -> tuple[str, ...]:
        """The columns that a row must have, the right answer's last."""
        lists = (self.choices,) if isinstance(self.choices, str) else ()
        return (*self.columns, *lists, *(() if columns_of(self.gold) else (self.gold,)))

    @property
    def about(self) -> dict[str, str]:
        """What results say of a task that is not built in: its file, and the SHA-256 of that."""
        return {} if self.origin is None else {TASK_FILE: str(self.origin.path), TASK_SHA256: self.origin.sha256}

    def question(self, row: Row) -> MultipleChoice:
        """The question that a row asks.

        Args:
            row: as `load_rows` gives it.

        Raises:
            InputError: the right answer is none of the choices.
        """
        answers = self._answers(row)
        choices = tuple(self.delimiter + answer for answer in answers)
        return MultipleChoice(render(self.context, row), choices, self._right(row, answers, "a row"))

    def checked(self, row: Row, where: str) -> Row:
        """The row, prepared for `question`.

        Args:
            where: what messages call the row.

        Raises:
            InputError: a column is missing or of the wrong kind, a choice is empty, the right answer is none of them.
        """
        row = row if self.prepare is None else self.prepare(row, where)
        for column in self._needed:
            if column not in row:
                *others, last = self._needed
                raise InputError(f"{where} has no column {brief(column)}; expected {', '.join(others)} and {last}")
        for column in self.columns:
            require_text(row, column, where)
        if isinstance(self.choices, str):
            require_texts(row, self.choices, where)
        answers = self._answers(row)
        for at, answer in enumerate(answers):
            if not answer and self.origin is not None:  # the harness's own tasks take what their data have
                raise InputError(f"{where} has an empty choice, number {at}; expected a text that can be scored")
            if answer in row and not isinstance(self.choices, str) and not columns_of(self.choices[at]):
                raise InputError(
                    f"{where} has a column {brief(answer)}, which is also the text of a choice; expected "
                    f"{{{{{answer}}}}} if the column is meant: write so, or rename the column"
                )
        self._right(row, answers, where)
        return row

    def _answers(self, row: Row) -> tuple[str, ...]:
        if isinstance(self.choices, str):
            return tuple(row[self.choices])
        return tuple(render(choice, row) for choice in self.choices)

    def _right(self, row: Row, answers: tuple[str, ...], where: str) -> int:
        """The right answer's number."""
        if columns_of(self.gold):
            text = render(self.gold, row)
            if text in answers:
                return answers.index(text)
            raise InputError(
                f"{where} has the right answer {brief(text)}; expected one of its choices {brief(answers)}"
            )
        label = row[self.gold]
        if type(label) is not int or not 0 <= label < len(answers):
            raise InputError(
                f"{where} has {self.gold} {brief(label)}; expected an integer from 0 to {len(answers) - 1}"
            )
        return label


def require_text(row: Row, column: str, where: str) -> str:
    """The text in a column of the row called `where`; InputError where there is none."""
    if not isinstance(row.get(column), str):
        raise InputError(f"{where} has {column} = {brief(row.get(column))}; expected a string")
    check_characters(row[column], f"{where}: {column}")
    return str(row[column])


def require_texts(row: Row, column: str, where: str) -> list[str]:
    """The list of texts, two or more, in a column of the row called `where`; InputError where there is none."""
    found = row.get(column)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise InputError(f"{where} has {column} = {brief(found)}; expected a list of strings")
    if not 2 <= len(found) <= MOST_CHOICES:
        raise InputError(f"{where} has {len(found)} {column}; expected 2 to {MOST_CHOICES}")
    for text in found:
        check_characters(text, f"{where}: {column}")
    return found
