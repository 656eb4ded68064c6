"""Budgets: what a user writes, read once and turned into a number of embedding parameters.

`10%` is a share of the full embedding tables, without their first-order weights. `1.5M params` is an absolute number of the
same parameters. `200MB` is a number of bytes for the embedding tables and the first-order tables; if a search has a
`target`, these bytes include the vocabulary. Projections and shared rows of the compact tables count against all three. A
percentage or a number of bytes counts each value at the precision in which it is stored.

Here a budget is only read. `SizePlan.max_bytes` in plan.py says how many bytes a budget allows a plan, and budget_limits.py
how small a budget may be.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import PlainSerializer, PlainValidator

from embtrim.errors import BudgetError

_FORMS = "allowed: '10%', '200MB', '64MiB', '1.5M params', '20000 params'"
_PARAM_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_BYTE_UNITS = {
    "b": 1,
    "byte": 1,
    "bytes": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
BYTES_PER_PARAM = 4


@dataclass(frozen=True)
class Budget:
    """A limit on the size of the embedding tables.

    Attributes:
        kind: Unit of the amount: "percent" (a share in (0, 1]), "params" or "bytes" (a count).
        amount: The limit, in the unit of `kind`.
        text: The budget as the user wrote it; the budget in words, if it was computed.

    Example:
        >>> Budget.parse("10%").max_params(full_params=1000, first_order_params=100)
        100
    """

    kind: Literal["percent", "params", "bytes"]
    amount: float
    text: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not math.isfinite(self.amount) or self.amount <= 0:
            raise BudgetError(f"budget must be a positive number, given {self.amount}; {_FORMS}")
        if self.kind == "percent" and self.amount > 1:
            raise BudgetError(f"budget {self.amount:.0%} is more than the full tables; give at most 100%")
        if not self.text:
            object.__setattr__(self, "text", str(self))  # the class is frozen

    @classmethod
    def parse(cls, text: str | Budget) -> Budget:
        """Read a budget such as `"10%"`, `"200MB"` or `"1.5M params"`; a Budget is taken as it is.

        Raises:
            BudgetError: The text is not a budget; the message names the allowed forms.
        """
        if isinstance(text, Budget):
            return text
        match = re.fullmatch(
            r"\s*([0-9][0-9_,]*\.?[0-9]*(?:e[0-9]+)?)\s*(%|[a-z]*)\s*(params|parameters)?\s*", str(text).lower()
        )
        if not match:
            raise BudgetError(f"budget {text!r} is not understood; {_FORMS}")
        number = float(match[1].replace(",", "").replace("_", ""))
        unit, of_params = match[2], bool(match[3])
        if unit in ("params", "parameters"):
            unit, of_params = "", True
        if unit == "%" and not of_params:
            return cls("percent", number / 100, str(text))
        if of_params and unit in _PARAM_UNITS:
            return cls("params", number * _PARAM_UNITS[unit], str(text))
        if not of_params and unit in _BYTE_UNITS:
            return cls("bytes", number * _BYTE_UNITS[unit], str(text))
        raise BudgetError(f"budget {text!r} has an unknown unit; {_FORMS}")

    def max_params(self, full_params: int, first_order_params: int = 0) -> int:
        """Number of fp32 embedding parameters that the budget allows beside the first-order weights.

        Args:
            full_params: Number of embedding parameters of the full tables, without first-order weights.
            first_order_params: Number of first-order weights that the compact model will keep.

        Raises:
            BudgetError: The first-order weights alone exceed a budget in bytes.
        """
        if self.kind == "percent":
            return math.floor(self.amount * full_params + 1e-9)
        if self.kind == "params":
            return math.floor(self.amount)
        left = math.floor(self.amount / BYTES_PER_PARAM) - first_order_params
        if left < 0:
            raise BudgetError(
                f"budget of {self} is below the first-order weights alone "
                f"({first_order_params * BYTES_PER_PARAM:,} bytes); give more, or a budget in percent"
            )
        return left

    def words_for(self, amount: float) -> str:
        """The smallest budget of this kind that allows an amount, as text such as "1.3%"; rounded up to the digits shown."""
        if self.kind != "percent":
            return str(Budget(self.kind, math.ceil(amount - 1e-6)))
        places = 2 - math.floor(math.log10(100 * amount))
        return f"{math.ceil(100 * amount * 10**places - 1e-6) / 10**places:.{max(0, places)}f}%"

    def __str__(self) -> str:
        if self.kind == "percent":
            return f"{self.amount * 100:g}%"
        if self.kind == "params":
            return f"{self.amount:,.0f} params"
        return f"{self.amount:,.0f} bytes"


AUTO: Literal["auto"] = "auto"


def parse_or_auto(text: str | Budget) -> Budget | Literal["auto"]:
    """Read a budget, or the word "auto" for a budget that is yet to be found.

    Raises:
        BudgetError: The text is neither.
    """
    if isinstance(text, str) and text.strip().lower() == AUTO:
        return AUTO
    try:
        return Budget.parse(text)
    except BudgetError as error:
        raise BudgetError(str(error).replace(_FORMS, f"{_FORMS}, '{AUTO}'")) from None


# A budget among settings: read once from its text, and written as that text.
BudgetSetting = Annotated[
    Budget, PlainValidator(Budget.parse), PlainSerializer(lambda budget: budget.text, return_type=str)
]
BudgetOrAuto = Annotated[
    Budget | Literal["auto"],
    PlainValidator(parse_or_auto),
    PlainSerializer(lambda budget: AUTO if budget == AUTO else budget.text, return_type=str),
]
