"""Raw values to what the exported model reads. It needs numpy; for ids also polars or pyarrow, to read vocab.parquet.

    from encode import Encoder

    encoder = Encoder()                                             # reads the folder of this file
    ids, dense = encoder.encode({"user": ["ann"], "price": [9.5]})  # for model_ids.onnx, model.pt2 and the tables of torchrec
    feeds = encoder.graph_inputs({"user": ["ann"], "price": [9.5]})  # for model.onnx

Rows come as a dict of columns, or as a table of polars, pandas or pyarrow. A missing value is None or NaN.
"""

from __future__ import annotations

import datetime as dt
import decimal
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

PAD = -1
OOV = 0
MISSING_BUCKET = -(2**31)
MISSING_INTEGER = -(2**63)
MISSING_TOKEN = "\0missing"
HASH_KEY = b"embtrim"

NUMBERS = ("integer", "decimal", "float", "float32")
EXACT = ("integer", "decimal")
BOOLEAN_WORDS = {"true": ("true", "1", "t", "yes", "y"), "false": ("false", "0", "f", "no", "n")}
EXACT_FLOAT = 2.0**53

_NUMBER = re.compile(r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|inf|infinity|nan)", re.ASCII | re.IGNORECASE)
_PLAIN = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)", re.ASCII)
_WHOLE = re.compile(r"0|-?[1-9]\d*", re.ASCII)  # as it is written in every exact kind
_INTEGER = re.compile(r"-?\d{1,18}")
_ISO = re.compile(
    r"\s*(?P<year>\d{4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})"
    r"(?:(?:[Tt]|,?\s+|:)(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2})(?:[.,](?P<digits>\d+))?)?"
    r"(?:\s*(?P<half>[AaPp])\.?[Mm]\.?)?\s*(?P<zone>[Zz]|UTC|GMT|[+-]\d{2}(?::?\d{2})?)?(?:\[[^\]]*\])?)?\s*",
    re.ASCII,
)
_SPACES = r" '\u00a0\u202f\u2019"
_BETWEEN = {",": rf"[.{_SPACES}]", ".": rf"[,{_SPACES}]"}


class Encoder:
    """The encoder of an export.

    Attributes:
        fields: Fields of schema.json, in the order of the columns of ids.
        columns: The raw columns that the fields read.
    """

    def __init__(self, folder: str | Path = Path(__file__).parent) -> None:
        folder = Path(folder)
        encoder = folder / "encoder"
        schema = json.loads((encoder / "schema.json").read_text("utf-8"))
        state = json.loads((encoder / "transforms.json").read_text("utf-8"))
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        self.fields: list[dict[str, Any]] = schema["fields"]
        self.columns = list(dict.fromkeys(column_of(field) for field in self.fields))
        self._nulls = {field["name"]: (*schema["nulls"], *field["nulls"]) for field in self.fields}
        self._transforms = state.get("fields", {})
        self._inputs = manifest.get("raw_inputs", {})
        self._hash_maps: dict[str, np.ndarray] = {}
        if (encoder / "hash_maps.npz").exists():
            self._hash_maps = dict(np.load(encoder / "hash_maps.npz", allow_pickle=False))
        self._vocabulary_file, self._unseen_ids = encoder / "vocab.parquet", state.get("unseen_ids", {})

    @cached_property
    def _listings(self) -> dict[str, tuple[dict[str, int], int, int]]:
        """What each listed field finds in its vocabulary, which is read when ids are first asked for: model.onnx has its own."""
        tables = _tables(self._vocabulary_file, self._unseen_ids)
        return {f["name"]: self._listing(f, tables) for f in self.fields if f["type"] != "dense" and not f["hash_size"]}

    def encode(self, rows: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """int32 ids (rows, columns of ids) and float32 dense values (rows, dense fields), None if no field is dense.

        Raises:
            KeyError: A column is missing.
            ValueError: A value cannot be read, or the rows are not columns of one length.
        """
        columns = columns_of(rows, self.columns)
        ids, dense = [], []
        for field in self.fields:
            cells = columns[column_of(field)]
            if field["type"] == "dense":
                dense.append([self._dense(field, cell) for cell in cells])
            elif field["type"] == "multi":
                ids.append([self._list_ids(field, cell) for cell in cells])
            else:
                known: dict[Any, int] = {}  # the id of each distinct cell
                ids.append([[_recalled(known, cell, self._id, field)] for cell in cells])
        num_rows = len(next(iter(columns.values())))
        ids_NC = np.concatenate([np.array(part, np.int32).reshape(num_rows, -1) for part in ids], axis=1)
        return ids_NC, np.array(dense, np.float32).T if dense else None

    def graph_inputs(self, rows: Any) -> dict[str, np.ndarray]:
        """The inputs of model.onnx by name.

        Raises:
            KeyError: A column is missing.
            ValueError: A value cannot be read, or the rows are not columns of one length.
        """
        columns = columns_of(rows, self.columns)
        feeds = {}
        for field in self.fields:
            cells, entry = columns[column_of(field)], self._inputs[field["name"]]
            quick = self._quick_input(field, cells)
            known: dict[Any, Any] = {}  # what each distinct cell is to the graph
            if quick is not None:
                feeds[field["name"]] = quick
            elif field["type"] in ("numeric", "dense"):
                numbers = [_recalled(known, cell, self._number, field) for cell in cells]
                feeds[field["name"]] = np.array(numbers, np.float64)
            elif field["type"] == "multi":
                parts = [[self._value(field, part) or "" for part in self._parts(field, cell)] for cell in cells]
                width = max([1, *map(len, parts)])
                feeds[field["name"]] = np.array([row + [""] * (width - len(row)) for row in parts], object).reshape(
                    -1, width
                )
            else:
                values = [_recalled(known, cell, self._cell, field) for cell in cells]
                feeds[field["name"]] = np.array(values, object if entry["dtype"] == "string" else entry["dtype"])
        return feeds

    # --- cells --------------------------------------------------------------------------------------------------------

    def _quick_input(self, field: Mapping[str, Any], cells: Sequence[Any]) -> np.ndarray | None:
        """A column of plain texts, integers or floats as an input of the graph; None if it needs a look at each cell."""
        types, nulls = {*map(type, cells)} - {type(None)}, self._nulls[field["name"]]
        missing = self._inputs[field["name"]]["missing"]
        match field["type"], field["kind"], self._inputs[field["name"]]["dtype"]:
            case "categorical", "text", "string" if types <= {str} and not _brought_nulls("text", nulls)[1]:
                return np.array([missing if cell is None or cell in nulls else cell for cell in cells], object)
            case "categorical", "integer", "int64" if types <= {int, np.int64}:
                given = np.array([0 if cell is None else cell for cell in cells])
                if given.dtype != np.int64:
                    return None
                numbers = [
                    int(null) for null in _brought_nulls("integer", nulls)[0] if null and _INTEGER.fullmatch(null)
                ]
                is_missing = np.array([cell is None for cell in cells]) | np.isin(given, numbers)
                is_long = (given >= 10**18) | (given <= -(10**18))
                return np.where(is_missing, missing, np.where(is_long, missing + 1, given))
            case "numeric" | "dense", _, _ if types <= {int, float, np.int64, np.float64}:
                given = np.array([math.nan if cell is None else cell for cell in cells], np.float64)
                return None if np.isinf(given).any() else np.where(np.isin(given, null_numbers(nulls)), math.nan, given)
        return None

    def _cell(self, field: Mapping[str, Any], cell: Any) -> Any:
        """A cell of a categorical field as its input of the graph takes it."""
        entry = self._inputs[field["name"]]
        return _typed(self._value(field, text_of(cell, field["kind"])), entry["dtype"], entry["missing"])

    def _id(self, field: Mapping[str, Any], cell: Any) -> int:
        if field["type"] == "numeric":
            bucket = self._bucket(field, cell)
            if field["hash_size"]:
                return self._hash(field, None if bucket == MISSING_BUCKET else str(bucket))
            by_text, unseen, missing = self._listings[field["name"]]
            return missing if bucket == MISSING_BUCKET else by_text.get(str(bucket), unseen)
        text = text_of(cell, field["kind"])
        if field["hash_size"]:
            return self._hash(field, None if text in self._nulls[field["name"]] else self._value(field, text))
        return self._text_id(field, text)

    def _text_id(self, field: Mapping[str, Any], text: str | None) -> int:
        by_text, unseen, missing = self._listings[field["name"]]
        if text is not None and text not in by_text:
            text = self._value(field, text)
        return missing if text is None else by_text.get(text, unseen)

    def _list_ids(self, field: Mapping[str, Any], cell: Any) -> list[int]:
        parts = self._parts(field, cell)
        parts = parts[-field["max_len"] :] if field["keep"] == "last" else parts[: field["max_len"]]
        if field["hash_size"]:
            ids = [self._hash(field, self._value(field, part)) for part in parts]
        else:
            ids = [self._text_id(field, part) for part in parts]
        return ids + [PAD] * (field["max_len"] - len(ids))

    def _parts(self, field: Mapping[str, Any], cell: Any) -> list[str]:
        """The values of a cell of a multi field that are not missing."""
        if _is_missing(cell):
            return []
        if isinstance(cell, str):
            parts: list[str | None] = list(
                cell.split(field["separator"]) if field["kind"] is None else split_text(cell, field["separator"])
            )
        else:
            parts = [text_of(part, field["kind"]) for part in cell]
        nulls = self._nulls[field["name"]]
        numbers = [] if field["kind"] is None else null_numbers(nulls)
        return [
            part
            for part in parts
            if part is not None and part not in nulls and part != "" and number_of(part) not in numbers
        ]

    def _value(self, field: Mapping[str, Any], text: str | None) -> str | None:
        """The one text of a value; None if it is missing."""
        if text is None or field["kind"] is None:
            return text
        check_text(field, text)
        return brought_text(text, field["kind"], self._nulls[field["name"]])

    def _number(self, field: Mapping[str, Any], cell: Any) -> float:
        """The number of a cell of a numeric or dense field; NaN if it is missing."""
        if _is_missing(cell):
            return math.nan
        nulls = self._nulls[field["name"]]
        if isinstance(cell, str):
            text = cell.strip()
            if cell in nulls or text in nulls or text.lower() in ("nan", "+nan", "-nan"):
                return math.nan
            if field["kind"] == "boolean":
                text = {"true": "1", "false": "0"}.get(brought_text(text, "boolean", ()) or "", text)
            number = number_of(text if field["decimal"] is None else written_number(text, field["decimal"]))
        else:
            number = float(cell)
        if number is None or math.isinf(number):
            raise ValueError(f"column {column_of(field)!r} holds {cell!r}, which is not a finite number")
        numbers = null_numbers(nulls)
        if isinstance(cell, np.float32):  # type: ignore[arg-type]
            numbers = [*numbers, *(float(np.float32(null)) for null in numbers)]
        return math.nan if number in numbers else number

    def _bucket(self, field: Mapping[str, Any], cell: Any) -> int:
        number = self._number(field, cell)
        if math.isnan(number):
            return MISSING_BUCKET
        if field["transform"] == "log2":
            if "rounded" in self._transforms.get(field["name"], {}):
                with np.errstate(over="ignore"):
                    single = float(np.float32(number))
                number = number if math.isinf(single) else single
            return math.floor(math.log(number) ** 2) if number > 2 else math.floor(max(number, MISSING_BUCKET + 1))
        # Bucket i holds edge[i-1] <= number < edge[i].
        return int(np.searchsorted(self._transforms[field["name"]]["edges"], number, side="right"))

    def _dense(self, field: Mapping[str, Any], cell: Any) -> float:
        number = self._number(field, cell)
        if math.isnan(number):
            return 0.0
        if field["transform"] == "log1p":
            return math.copysign(math.log1p(abs(number)), number)
        if field["transform"] == "standard":
            fitted = self._transforms[field["name"]]
            return (number - fitted["mean"]) / fitted["std"]
        return number

    def _hash(self, field: Mapping[str, Any], text: str | None) -> int:
        value = hashed_id(MISSING_TOKEN if text is None else text, field["hash_size"], field.get("hash_function"))
        id_map = self._hash_maps.get(table_of(field))
        return value if id_map is None else int(id_map[value])

    def _listing(
        self, field: Mapping[str, Any], tables: Mapping[str, tuple[dict[str, int], int, int]]
    ) -> tuple[dict[str, int], int, int]:
        """What a field finds in its vocabulary: ids by text, the id of unseen values, and that of missing ones."""
        by_text, unseen, missing = tables.get(table_of(field), ({}, OOV, OOV))
        nulls = self._nulls[field["name"]]
        readers = [f for f in self.fields if f["type"] != "dense" and table_of(f) == table_of(field)]
        if field["type"] != "numeric" and len({f["kind"] for f in readers}) > 1:  # each reads the texts by its own kind
            one = {text: brought_text(text, field["kind"], nulls) for text in by_text}
            by_text = {t: missing if o is None else by_text.get(o, unseen) for t, o in one.items()}
        if field["type"] == "categorical":
            by_text = by_text if len(readers) == 1 else dict(by_text)
            by_text.update(dict.fromkeys(nulls, missing))
        return by_text, unseen, missing


# --- rows -------------------------------------------------------------------------------------------------------------


def columns_of(rows: Any, names: Sequence[str]) -> dict[str, Sequence[Any]]:
    """The named columns of a dict of columns, or of a table of polars, pandas or pyarrow.

    Raises:
        KeyError: A column is missing.
        ValueError: The rows are not columns, or the columns have different lengths.
    """
    if isinstance(getattr(getattr(rows, "schema", None), "names", None), list):  # pyarrow
        rows = dict(zip(rows.schema.names, rows.columns, strict=True))
    if not hasattr(rows, "keys") and not hasattr(rows, "columns"):
        raise ValueError(f"rows are a dict of columns, such as {{'user': ['ann']}}, or a table; given a {_kind(rows)}")
    given = list(rows.columns if hasattr(rows, "columns") else rows.keys())
    if missing := [name for name in names if name not in given]:
        raise KeyError(f"the rows have no column {missing[0]!r}; they have {', '.join(map(str, given)) or 'none'}")
    found = {name: _cells(name, rows[name]) for name in names}
    if len({len(cells) for cells in found.values()}) > 1:
        lengths = ", ".join(f"{name} {len(cells):,}" for name, cells in found.items())
        raise ValueError(f"all columns need one value for each row, given columns of different lengths: {lengths}")
    return found


def _cells(name: str, column: Any) -> Sequence[Any]:
    """The cells of a column; those of float32 keep their type, which decides their text."""
    if isinstance(column, (str, bytes)) or not hasattr(column, "__len__") or getattr(column, "ndim", 1) == 0:
        raise ValueError(f"column {name!r} is one {_kind(column)}; give a list with one value for each row")
    if hasattr(column, "to_pylist"):  # pyarrow
        is_single = "float" in (str(column.type), str(getattr(column.type, "value_type", "")))
        return [None if cell is None else np.float32(cell) if is_single else cell for cell in column.to_pylist()]
    if hasattr(column, "get_chunks"):  # polars
        if str(column.dtype) == "Float32":
            return column.to_numpy()
        if str(column.dtype) in ("List(Float32)", f"Array(Float32, shape={getattr(column.dtype, 'shape', None)})"):
            return [None if cell is None else cell.to_numpy() for cell in column]
        return column.to_list()
    if hasattr(column, "to_numpy"):  # pandas
        if str(column.dtype).lower() in ("float32", "float[pyarrow]"):
            return column.to_numpy(np.float32, na_value=np.nan)
        return column.to_numpy(object, na_value=None) if hasattr(column.dtype, "na_value") else column.to_numpy()
    return column


def _kind(value: Any) -> str:
    return type(value).__name__


def column_of(field: Mapping[str, Any]) -> str:
    """The raw column that a field reads."""
    return field["column"] or field["name"]


def table_of(field: Mapping[str, Any]) -> str:
    """The table that a field reads."""
    return field["table"] or field["name"]


def _tables(path: Path, unseen_ids: Mapping[str, int]) -> dict[str, tuple[dict[str, int], int, int]]:
    """For each table of vocab.parquet its ids by text, the id of unseen values, and that of missing ones."""
    tables: dict[str, tuple[dict[str, int], int, int]] = {}
    for table, value, id in _vocabulary(path):
        unseen = unseen_ids.get(table, OOV)
        by_text = tables.setdefault(table, ({}, unseen, unseen))[0]
        if value is None:
            tables[table] = (by_text, unseen, id)
        else:
            by_text[value] = id
    for table, unseen in unseen_ids.items():
        tables.setdefault(table, ({}, unseen, unseen))
    return tables


def _vocabulary(path: Path) -> Iterator[tuple[str, str | None, int]]:
    """Table, value and id of each row of vocab.parquet."""
    try:
        import polars

        frame: Any = polars.read_parquet(path, columns=["table", "value", "id"]).to_dict(as_series=False)
    except ImportError:
        import pyarrow.parquet  # type: ignore[import-not-found]

        frame = pyarrow.parquet.read_table(path, columns=["table", "value", "id"]).to_pydict()
    return zip(frame["table"], frame["value"], frame["id"], strict=True)


def _recalled(known: dict[Any, Any], cell: Any, make: Any, field: Mapping[str, Any]) -> Any:
    key = (type(cell), cell)  # 1, 1.0 and True are equal, and have different texts
    try:
        if key not in known:
            known[key] = make(field, cell)
        return known[key]
    except TypeError:  # a cell that is a list, for which `make` has better words
        return make(field, cell)


def _typed(text: str | None, dtype: str, missing: Any) -> Any:
    """The text of a value as an input of the graph."""
    if dtype == "string":
        return missing if text is None else text
    if dtype == "float64":
        # A text that is not a number is not in the vocabulary, and neither is infinity.
        number = number_of(text)
        return math.nan if text is None else math.inf if number is None else number
    # A text that is no integer of 64 bits is not in the vocabulary. Neither is the integer next to the missing one, which stands for it.
    if text is None:
        return missing
    return int(text) if _INTEGER.fullmatch(text) else missing + 1


# --- values: docs/values.md of embtrim says the rules in words --------------------------------------------------------


def text_of(cell: Any, kind: str | None) -> str | None:
    """The text of a cell as its own type writes it; None if it is missing."""
    if _is_missing(cell):
        return None
    if isinstance(cell, str):
        return cell
    if isinstance(cell, (bool, np.bool_)):
        return "true" if cell else "false"
    if isinstance(cell, (int, np.integer)):
        return str(int(cell))
    if isinstance(cell, (float, np.floating)):
        return float_text(cell)
    if isinstance(cell, decimal.Decimal):
        return trimmed(format(cell, "f"))
    if isinstance(cell, np.datetime64):
        cell = cell.astype("datetime64[us]").item()
    if isinstance(cell, dt.datetime):
        zone = "" if cell.tzinfo is None else "Z"
        moment = cell if cell.tzinfo is None else cell.astimezone(dt.timezone.utc)
        return trimmed(moment.strftime("%Y-%m-%d %H:%M:%S.%f").rjust(26, "0")) + zone
    if isinstance(cell, dt.date):
        return cell.isoformat()
    if isinstance(cell, dt.time):
        return trimmed(cell.strftime("%H:%M:%S.%f"))
    raise ValueError(
        f"{cell!r} is a {type(cell).__name__}, which no field reads; give text, a number, a date or a time"
    )


def float_text(number: float | np.floating) -> str | None:
    """Whole floats below 2^53 without a fraction, others with the fewest digits that read back the same."""
    if math.isnan(number):
        return None
    if abs(number) < EXACT_FLOAT and number == math.floor(number):
        return str(int(number))
    text = str(number) if isinstance(number, np.float32) else repr(float(number))  # type: ignore[arg-type]
    digits, _, exponent = text.partition("e")
    if exponent == "-05":
        sign = "-" if digits.startswith("-") else ""
        return f"{sign}0.0000{digits.lstrip('-').replace('.', '')}"
    return text if not exponent else f"{digits}e{exponent[0]}{exponent[1:].lstrip('0')}"


def trimmed(text: str) -> str:
    """A text of a number or time without the zeros that end its fraction."""
    whole, point, fraction = text.partition(".")
    fraction = fraction.rstrip("0")
    return whole + point + fraction if fraction else whole


def check_text(field: Mapping[str, Any], text: str) -> None:
    """Refuse a text that cannot be brought to the field's kind without a guess.

    Raises:
        ValueError: It is a large number that has been a float, or has a zone where the field has none, or the reverse.
    """
    kind = field["kind"]
    if kind in EXACT and re.search("[eE]" if kind == "decimal" else "[.eE]", text):
        number = number_of(text.strip())
        if number is not None and abs(number) >= EXACT_FLOAT:
            raise ValueError(
                f"{_where(field, text)} may have lost its last digits as a floating-point number; give integers or text"
            )
    if kind in ("timestamp", "instant"):
        found = moment_of(text)
        if found is not None and found[2] != (kind == "instant"):
            raise ValueError(
                f"{_where(field, text)} has {'no zone' if kind == 'instant' else 'a zone'}, unlike the times of training"
            )


def _where(field: Mapping[str, Any], text: str) -> str:
    return f"column {column_of(field)!r} holds {text!r}, which"


def brought_text(text: str, kind: str | None, nulls: Sequence[str]) -> str | None:
    """A text brought to a kind; None if it means "missing"."""
    if kind is None:
        return text
    result = numeric_text(text, kind) if kind in NUMBERS else text if kind == "text" else _of_kind(text, kind)
    if result is None or text in nulls or (kind != "text" and result.strip() in nulls):
        return None
    brought, plain = _brought_nulls(kind, tuple(nulls))
    if kind in NUMBERS:
        return None if result in brought else result
    if plain and _plain_number(text) in plain:
        return None
    return None if result in brought else result


@lru_cache(maxsize=1024)
def _brought_nulls(kind: str, nulls: tuple[str, ...]) -> tuple[set[str | None], set[str]]:
    """Texts that mean "missing", brought to a kind, and as plain numbers for a kind that has no numbers."""
    if kind in NUMBERS:
        return {numeric_text(null, kind) for null in nulls}, set()
    plain = {number for null in nulls if (number := _plain_number(null)) is not None}
    return set() if kind == "text" else {_of_kind(null, kind) for null in nulls}, plain


def numeric_text(text: str, kind: str) -> str | None:
    """A text of a number as the one text of a kind of numbers; NaN is None, other texts stay."""
    stripped = text.strip()
    if kind in EXACT and _WHOLE.fullmatch(stripped):
        return stripped
    number = number_of(stripped)
    if number is None:
        return {"true": "1", "false": "0"}.get(stripped.lower(), text)
    if math.isnan(number):
        return None
    if kind in EXACT and _PLAIN.fullmatch(stripped):
        exact = re.sub(r"^(-?)\.", r"\g<1>0.", stripped.removeprefix("+"))
        exact = trimmed(re.sub(r"^(-?)0+(\d)", r"\1\2", exact))
        return "0" if exact == "-0" else exact
    with np.errstate(over="ignore"):
        return float_text(np.float32(number) if kind == "float32" else number)


def number_of(text: str | None) -> float | None:
    """The number that a text is, without spaces around it; None for other texts."""
    return float(text) if text is not None and _NUMBER.fullmatch(text) else None


@lru_cache(maxsize=1024)
def null_numbers(nulls: tuple[str, ...]) -> list[float]:
    """The finite numbers among texts that mean "missing"."""
    numbers = [number_of(null.strip()) for null in nulls]
    return [number for number in numbers if number is not None and math.isfinite(number)]


def _plain_number(text: str) -> str | None:
    stripped = text.strip()
    number = number_of(stripped)
    if number is None or not math.isfinite(number) or re.match(r"[+-]?0\d", stripped):
        return None
    return numeric_text(stripped, "decimal")


def _of_kind(text: str, kind: str) -> str:
    """A text as the one text of a boolean, day, timestamp or instant; other texts stay."""
    if kind == "boolean":
        word = (numeric_text(text.lower(), "integer") or "").strip()
        return next((one for one, words in BOOLEAN_WORDS.items() if word in words), text)
    found = moment_of(text)
    if found is None:
        return text
    moment, digits, is_zoned = found
    if kind == "date":
        is_day = moment.time() == dt.time(0) and not digits and not is_zoned
        return moment.strftime("%Y-%m-%d").rjust(10, "0") if is_day else text
    if is_zoned != (kind == "instant"):
        return text
    whole = moment.strftime("%Y-%m-%d %H:%M:%S").rjust(19, "0")
    return whole + (f".{digits}" if digits else "") + ("Z" if is_zoned else "")


def moment_of(text: str) -> tuple[dt.datetime, str, bool] | None:
    """The moment that an ISO text names, in UTC if it has a zone; the digits of its fraction; whether it has a zone."""
    match = _ISO.fullmatch(text)
    if match is None:
        return None
    part = match.groupdict()
    hour = int(part["hour"] or 0)
    if part["half"]:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + 12 * (part["half"].lower() == "p")
    try:
        moment = dt.datetime(
            int(part["year"]),
            int(part["month"]),
            int(part["day"]),
            hour,
            int(part["minute"] or 0),
            int(part["second"] or 0),
        )
        zone = re.fullmatch(r"([+-])(\d{2})(\d{2})?", (part["zone"] or "").replace(":", ""))
        if zone:
            minutes = int(zone[2]) * 60 + int(zone[3] or 0)
            moment -= dt.timedelta(minutes=-minutes if zone[1] == "-" else minutes)
    except (ValueError, OverflowError):
        return None
    return moment, (part["digits"] or "").rstrip("0"), part["zone"] is not None


def written_number(text: str, mark: str) -> str | None:
    """A number written with a decimal comma, or with commas between thousands, with a point; None for other texts."""
    between = _BETWEEN[mark]
    form = rf"\s*[+-]?(?:\d{{1,3}}(?:{between}\d{{3}})+|\d+)?(?:[{mark}]\d*)?(?:[eE][+-]?\d+)?\s*"
    return re.sub(rf"{between}|\s", "", text).replace(",", ".") if re.fullmatch(form, text) else None


def split_text(text: str, separator: str) -> list[str]:
    """The parts of a text that holds a list, such as `a|b` or `['a', 'b']`, without empty parts."""
    text = text.strip()
    is_open = len(text.encode()) >= 2 and (text[0] + text[-1]) in ("[]", "()", "{}")
    if not is_open:
        return [part for part in _split(text, separator) if part]
    inner = text[1:-1].strip()
    parts = _split(inner, separator)
    if "'" in inner or '"' in inner:
        between = r"\s" if separator == " " else re.escape(separator[0])
        quoted = rf"""\s*'(?:[^'\\]|\\.)*'\s*|\s*"(?:[^"\\]|\\.)*"\s*|[^{between}]+"""
        parts = [part.strip() for part in re.findall(quoted, inner)]
    parts = [part for part in parts if part not in ("None", "null", "NULL", "nan", "NaN")]
    for mark in "'\"":
        is_quoted = [len(part) >= 2 and part[0] == part[-1] == mark for part in parts]
        bare = [re.sub(r"\\(['\"\\])", r"\1", part[1:-1]) for part in parts]
        parts = [b if q else part for part, b, q in zip(parts, bare, is_quoted, strict=True)]
    return [part for part in parts if part]


def _split(text: str, separator: str) -> list[str]:
    text = re.sub(r"\s+", " ", text) if separator == " " else text
    return [part.strip() for part in text.split(separator)]


def _is_missing(cell: Any) -> bool:
    return cell is None or (not isinstance(cell, (str, list, tuple, np.ndarray)) and bool(cell != cell))


# --- hashes -----------------------------------------------------------------------------------------------------------


def hashed_id(text: str, hash_size: int, function: str | None) -> int:
    """1 + hash mod hash_size, of the UTF-8 bytes of a text."""
    if function == "murmur3":
        return 1 + murmur3(text.encode()) % hash_size
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=HASH_KEY).digest()
    return 1 + int.from_bytes(digest, "little") % hash_size


def murmur3(data: bytes) -> int:
    """MurmurHash3 of bytes: x86, 32 bits, seed 0, without sign."""
    mask, state = 0xFFFFFFFF, 0
    for start in range(0, len(data), 4):
        block = data[start : start + 4]
        part = int.from_bytes(block, "little") * 0xCC9E2D51 & mask
        part = ((part << 15 | part >> 17) & mask) * 0x1B873593 & mask
        state ^= part
        if len(block) == 4:
            state = ((state << 13 | state >> 19) & mask) * 5 + 0xE6546B64 & mask
    state ^= len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B & mask
    state = (state ^ state >> 13) * 0xC2B2AE35 & mask
    return state ^ state >> 16
