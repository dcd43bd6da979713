"""Rules for the values of a config's fields."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """A condition on a value, and how to say it.

    Attributes:
        holds: returns whether a value is so.
        text: says it, after "to be".
    """

    holds: Callable[[Any], bool]
    text: str


def is_number(v: Any) -> bool:
    """Returns whether a value is an integer or a float, and not a boolean."""
    return isinstance(v, int | float) and not isinstance(v, bool)


def is_finite(v: Any) -> bool:
    """Returns whether a value is a number that is neither infinite nor NaN."""
    return is_number(v) and math.isfinite(v)


def one_of(*choices: str) -> Rule:
    """Makes a rule that lists all values."""
    return Rule(lambda v: v in choices, f"one of {', '.join(choices)}")


def at_least(low: int) -> Rule:
    """Makes a rule for integers."""
    return Rule(lambda v: isinstance(v, int) and v >= low, f"an integer from {low} up")


POSITIVE = Rule(lambda v: is_finite(v) and v > 0, "a finite number above 0")
NOT_NEGATIVE = Rule(lambda v: is_finite(v) and v >= 0, "a finite number from 0 up")
BELOW_ONE = Rule(lambda v: is_number(v) and 0 <= v < 1, "a number in [0, 1)")
SHARE = Rule(lambda v: is_number(v) and 0 < v < 1, "a number between 0 and 1")
FRACTION = Rule(lambda v: is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
NOT_EMPTY = Rule(lambda v: isinstance(v, str) and v != "", "some text")
BOOLEAN = Rule(lambda v: isinstance(v, bool), "True or False")
