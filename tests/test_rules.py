"""Rules as text: what they read, and what is said about a text that is not a rule."""

import pytest

from embtrim.errors import ConfigError
from embtrim.rules import parse_rule, quoted, rule_or_none


def test_columns_are_named_once_in_order():
    rule = parse_rule("b > 1 AND (`a b` = 'x' OR NOT b <= 5) AND \"c-d\" IS NULL")
    assert rule.columns == ("b", "a b", "c-d")


@pytest.mark.parametrize("label", ["click", "Book-Rating", "is click?", "Is fraud", "a.b", "not"])
def test_names_of_columns_are_not_rules(label):
    assert rule_or_none(label) is None


@pytest.mark.parametrize(
    "text, words",
    [
        ("rating - 8", "it gives a number where true or false is needed"),
        ("rating >=", "it ends too early"),
        ("0 < rating <= 10", "two comparisons are joined by AND"),
        ("rating >= '8'", "a number stands without quotes"),
        ("t > '2024-13-01'", "a text such as '2024-01-31'"),
        ("event LIKE 'a%'", "'LIKE' does not belong there"),
        ("__import__('os')", "does not belong there"),
        ("a = 1; DROP", "';' does not belong there"),
        ("a IN (1, 'x')", "it gives a text where a number is needed"),
        ("a NOT 1", "NOT is followed by IN"),
        ("(a = 1", "')' is missing before 'the end'"),
        ("8 > 9", "it reads no column"),
        ("a = 'b", "does not belong there"),
    ],
)
def test_faults_are_named(text, words):
    with pytest.raises(ConfigError) as caught:
        parse_rule(text)
    assert repr(text) in str(caught.value)
    assert words in str(caught.value)


def test_quoted_names_are_read_back():
    for name in ("rating", "Book-Rating", "not", "größe", "a b"):
        assert parse_rule(f"{quoted(name)} > 1").columns == (name,)
