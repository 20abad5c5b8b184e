"""Every field's annotation is its check: types, ranges, lists, parts that are missing or unknown."""

import json
from dataclasses import dataclass
from typing import Annotated

import pytest

from chai_jax.errors import InputError
from chai_jax.inputs.fields import Count, Number, parse_as
from chai_jax.inputs.reading import parse_json

HUGE = 10**400
NO_NUMBERS = [None, True, "4", "x", [], [4], {}, float("nan"), float("inf"), -float("inf"), HUGE, -HUGE, 10**5000]
WRONG = {
    "count": [*NO_NUMBERS, 0, -1, 4.0, 1.5, 2**31, 2**70],
    "number": [*NO_NUMBERS, -1, 4.0, 2**31, 2**70],
    "cost": NO_NUMBERS,
    "flag": [None, 0, 1, 1.0, "true", []],
    "name": [None, "zzz", "", "a\nb", "é" * 10**6, 1, ["good"], {}, True],
    "maybe": [0, -1, 4.0, "4", True, 2**31],
    "several": [None, 4, "44", {}, [0.5], ["x"], [[1]], [1, 2, -1], [None]],
    "sizes": [[], 4, {"x": 1.0}, {"1.0": 1.0}, {"-1": 1.0}, {"0": 1.0}, {"9" * 30: 1.0}, {"²": 1.0}, {"4": "x"}],
    "part": [[], 4, {"other": 1}, {}, {"size": 0}],
}


@dataclass(frozen=True)
class Part:
    size: Count


@dataclass(frozen=True)
class Whole:
    count: Count = 1
    number: Number = 0
    cost: float = 0.5
    flag: bool = True
    name: Annotated[str, ("good", "better")] = "good"
    maybe: Count | None = None
    several: tuple[Number, ...] = (0, 7)
    sizes: dict[Count, float] | None = None
    part: Part | None = None


@pytest.mark.parametrize("name", WRONG)
def test_what_a_field_cannot_be(name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(InputError, match=rf"it\.{name}\b.*; expected") as caught:
            parse_as(Whole, {name: value}, "it")
        assert len(str(caught.value)) < 200
        assert str(caught.value).isprintable()


def test_every_kind_of_field_was_tried() -> None:
    assert set(WRONG) == set(Whole.__dataclass_fields__)


def test_json_there_and_back() -> None:
    text = '{"count": 2147483647, "cost": 3, "several": [], "sizes": {"12": 1e-3, "4": -1}, "part": {"size": 2}}'
    found = parse_as(Whole, json.loads(text), "it")
    assert found == Whole(2**31 - 1, cost=3.0, several=(), sizes={12: 1e-3, 4: -1.0}, part=Part(2))
    assert type(found.cost) is float
    assert parse_as(Whole, found, "it") == found


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", str(HUGE)])
def test_numbers_that_json_can_write_and_nobody_can_use(number: str) -> None:
    for name, expected in (("count", "a whole number from 1 to 2147483647"), ("cost", "a finite number")):
        with pytest.raises(InputError, match=rf"it\.{name} is .*; expected {expected}"):
            parse_as(Whole, parse_json(f'{{"{name}": {number}}}'), "it")


def test_missing_and_unknown_fields() -> None:
    with pytest.raises(InputError, match="it has an unknown field 'counts'; expected some of count, number"):
        parse_as(Whole, {"counts": 1}, "it")
    with pytest.raises(InputError, match="it has an unknown field 4"):
        parse_as(Whole, {4: 1}, "it")
    with pytest.raises(InputError, match="it has no size"):
        parse_as(Part, {}, "it")
    assert parse_as(Whole, {}, "it") == Whole()
    with pytest.raises(InputError, match="it has no count"):
        parse_as(Whole, {}, "it", whole=True)


def test_values_that_were_made_are_checked_the_same() -> None:
    assert parse_as(Part, Part(3), "it") == Part(3)
    with pytest.raises(InputError, match=r"it\.size is 0; expected a whole number from 1 to 2147483647"):
        parse_as(Part, Part(0), "it")
