"""Rules: conditions on the columns of a log, such as `rating >= 8`, which make labels and choose rows.

A rule is a small part of an SQL expression:

    rule    tests joined by AND, OR and NOT, with parentheses; a column of 0 and 1, or true and false, is a test
    test    a = b, !=, <>, <, <=, >, >=;  a [NOT] IN (1, 2);  a [NOT] BETWEEN 1 AND 5;  a IS [NOT] NULL
    a, b    a column, a number, 'a text', TRUE, FALSE, or numbers joined by + - * /

A column whose name is not one word stands in double quotes or backticks: `"Book-Rating" >= 8`. What a column is compared
with says how its cells are read: as numbers beside a number, as texts beside a text, as times beside a text such as
'2024-01-31' that it is larger or smaller than. A test of a missing cell is neither true nor false, as in SQL.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Literal, NoReturn, TypeAlias

from embtrim.errors import ConfigError, shown

Kind: TypeAlias = Literal["number", "text", "time", "truth"]

_FORM = "a rule compares columns with values, such as rating >= 8, event = 'buy' or price IS NOT NULL"
_TOKEN = re.compile(
    r"""\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])|(?P<text>'(?:[^']|'')*')
    |(?P<column>"[^"]+"|`[^`]+`)|(?P<word>[^\W\d]\w*)|(?P<sign><=|>=|<>|!=|==|[-+*/=<>(),])|(?P<other>\S))""",
    re.VERBOSE,
)
_TIME = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d+)?)?)?")
_ORDERS = ("<", "<=", ">", ">=")
_COMPARISONS = (*_ORDERS, "=", "!=")
# More would pass the depth to which Python and polars follow the parts of a rule.
MAX_TOKENS = 1_000
_KEYWORDS = ("AND", "OR", "NOT", "IN", "BETWEEN", "IS", "NULL", "TRUE", "FALSE")


@dataclass(frozen=True)
class Node:
    """A part of a rule.

    Attributes:
        sign: "value", "column", `+ - * /`, `= != < <= > >=`, "and", "or", "not", "in" (the first part among the others) or
            "null" (whether the part is missing).
        kind: What the part gives; "" for a column that is read as it is asked for.
        value: The value, or the name of the column.
        parts: The parts that an operator joins.
    """

    sign: str
    kind: Kind | Literal[""] = "truth"
    value: float | str | bool = ""
    parts: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Rule:
    """A rule that was read.

    Attributes:
        text: The rule as the user wrote it.
        test: Its parts; each column in them has a kind.
        columns: Columns that it reads, without repetition.
    """

    text: str
    test: Node
    columns: tuple[str, ...]


@cache
def parse_rule(text: str) -> Rule:
    """Read a rule.

    Raises:
        ConfigError: The text is not a rule; the message says where it ends to be one.

    Example:
        >>> parse_rule("rating >= 8 AND event = 'buy'").columns
        ('rating', 'event')
    """
    parser = _Parser(text)
    if len(parser.tokens) > MAX_TOKENS:
        parser.fail(f"it has {len(parser.tokens):,} words and signs; at most {MAX_TOKENS:,} are allowed")
    try:
        return _read(parser)
    except RecursionError:
        parser.fail("it is nested too deeply")


def _read(parser: _Parser) -> Rule:
    test = parser.choice()
    if parser.token != ("end", ""):
        parser.fail(f"{parser.token[1]!r} does not belong there")
    test = parser.typed(test, "truth")
    if not _columns(test):
        parser.fail("it reads no column")
    return Rule(parser.text, test, tuple(dict.fromkeys(_columns(test))))


def rule_or_none(text: str) -> Rule | None:
    """The rule in a label; None if the label is the name of a column."""
    try:
        rule = parse_rule(text)
    except ConfigError:
        return None
    return None if rule.test.sign == "column" else rule


def quoted(column: str) -> str:
    """The name of a column as a rule writes it."""
    return column if re.fullmatch(r"[^\W\d]\w*", column) and column.upper() not in _KEYWORDS else f'"{column}"'


def _columns(node: Node) -> list[str]:
    own = [str(node.value)] if node.sign == "column" else []
    return own + [name for part in node.parts for name in _columns(part)]


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text[:19])
    except ValueError:
        return False
    return _TIME.fullmatch(text) is not None


class _Parser:
    """Reads a rule from left to right, one token ahead."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = [(str(m.lastgroup), m[m.lastgroup or 0]) for m in _TOKEN.finditer(text)] + [("end", "")]
        self._next = 0

    @property
    def token(self) -> tuple[str, str]:
        """Kind and text of the next token; keywords are in capitals, with kind "word"."""
        kind, text = self.tokens[self._next]
        return kind, text.upper() if kind == "word" and text.upper() in _KEYWORDS else text

    def fail(self, reason: str) -> NoReturn:
        raise ConfigError(f"rule {shown(self.text, 300)}: {reason}; {_FORM}")

    def _take(self, *texts: str) -> str:
        """Pass over the next token if it is one of `texts`, and return it; else the empty text."""
        kind, text = self.token
        if kind in ("word", "sign") and text in texts:
            self._next += 1
            return text
        return ""

    def _need(self, text: str) -> None:
        if not self._take(text):
            self.fail(f"{text!r} is missing before {self.token[1] or 'the end'!r}")

    def choice(self) -> Node:
        node = self._all()
        while self._take("OR"):
            node = Node("or", parts=(self.typed(node, "truth"), self.typed(self._all(), "truth")))
        return node

    def _all(self) -> Node:
        node = self._negation()
        while self._take("AND"):
            node = Node("and", parts=(self.typed(node, "truth"), self.typed(self._negation(), "truth")))
        return node

    def _negation(self) -> Node:
        if self._take("NOT"):
            return Node("not", parts=(self.typed(self._negation(), "truth"),))
        return self._test()

    def _test(self) -> Node:
        left = self._sum()
        if self._take("IS"):
            is_not = self._take("NOT")
            self._need("NULL")
            node = Node("null", parts=(self.typed(left, left.kind or "text"),))
            return Node("not", parts=(node,)) if is_not else node
        is_not = self._take("NOT")
        if self._take("IN"):
            self._need("(")
            values = [self._sum()]
            while self._take(","):
                values.append(self._sum())
            self._need(")")
            kinds: list[Kind | Literal[""]] = [v.kind for v in values if v.kind]
            kind = kinds[0] if kinds else left.kind or "text"
            node = Node("in", parts=tuple(self.typed(part, kind) for part in (left, *values)))
            return Node("not", parts=(node,)) if is_not else node
        if self._take("BETWEEN"):
            low = self._sum()
            self._need("AND")
            node = Node("and", parts=(self._compared(">=", left, low), self._compared("<=", left, self._sum())))
            return Node("not", parts=(node,)) if is_not else node
        if is_not:
            self.fail(f"NOT is followed by IN, BETWEEN or a test, not by {self.token[1] or 'the end'!r}")
        if not (sign := self._take(*_COMPARISONS, "==", "<>")):
            return left
        node = self._compared({"==": "=", "<>": "!="}.get(sign, sign), left, self._sum())
        if self._take(*_COMPARISONS, "==", "<>"):
            self.fail("two comparisons are joined by AND, such as 0 < rating AND rating <= 10")
        return node

    def _compared(self, sign: str, left: Node, right: Node) -> Node:
        kind = left.kind or right.kind or ("number" if sign in _ORDERS else "text")
        if sign in _ORDERS and kind != "number":
            texts = [str(node.value) for node in (left, right) if node.sign == "value"]
            if kind == "truth" or not all(map(_is_time, texts)):
                self.fail(
                    f"{sign} compares numbers, or times with a text such as '2024-01-31'; a number stands without quotes"
                )
            kind = "time"
        return Node(sign, parts=(self.typed(left, kind), self.typed(right, kind)))

    def _sum(self) -> Node:
        node = self._product()
        while sign := self._take("+", "-"):
            node = Node(sign, "number", parts=(self.typed(node, "number"), self.typed(self._product(), "number")))
        return node

    def _product(self) -> Node:
        node = self._operand()
        while sign := self._take("*", "/"):
            node = Node(sign, "number", parts=(self.typed(node, "number"), self.typed(self._operand(), "number")))
        return node

    def _operand(self) -> Node:
        if self._take("-"):
            return Node("-", "number", parts=(Node("value", "number", 0), self.typed(self._operand(), "number")))
        if self._take("("):
            node = self.choice()
            self._need(")")
            return node
        kind, text = self.token
        self._next += kind != "end"
        if kind == "number":
            is_integer = text.isdecimal() and len(text) < 19  # a larger one is compared as a float
            return Node("value", "number", int(text) if is_integer else float(text))
        if kind == "text":
            return Node("value", "text", text[1:-1].replace("''", "'"))
        if kind == "column":
            return Node("column", "", text[1:-1])
        if text in ("TRUE", "FALSE"):
            return Node("value", "truth", text == "TRUE")
        if kind == "word" and text not in _KEYWORDS:
            return Node("column", "", text)
        self.fail("it ends too early" if kind == "end" else f"{text!r} does not belong there")

    def typed(self, node: Node, kind: Kind | Literal[""]) -> Node:
        """The node as one of `kind`; a column is read so, and a text may be a time."""
        if node.sign == "column" and not node.kind:
            return Node("column", kind, node.value)
        if node.sign == "value" and node.kind == "text" and kind == "time":
            return Node("value", "time", node.value)
        if node.kind != kind:
            words = {"truth": "true or false", "number": "a number", "text": "a text", "time": "a time", "": "a column"}
            self.fail(f"it gives {words[node.kind]} where {words[kind]} is needed")
        return node
