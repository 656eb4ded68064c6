"""Frames of other libraries, as polars frames."""

from __future__ import annotations

import importlib.util
from typing import Any

import polars as pl

from embtrim.errors import DataError


def as_polars(rows: Any) -> Any:
    """A pandas DataFrame or a pyarrow Table as a polars frame; anything else as it is.

    The index of a pandas frame is left out. NaN and NaT become missing values.

    Raises:
        DataError: A column holds values of several kinds, or pyarrow, which converts the columns, is not installed.
    """
    library, name = type(rows).__module__.partition(".")[0], type(rows).__name__
    if (library, name) not in (("pandas", "DataFrame"), ("pyarrow", "Table")):
        return rows
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError("a pandas frame is read through pyarrow, which is not installed: pip install pyarrow")
    if library == "pyarrow":
        return pl.DataFrame(rows)
    columns = []
    for position, column in enumerate(rows.columns):
        values = rows.iloc[:, position]
        try:
            columns.append(pl.from_pandas(values).alias(str(column)))
        except (TypeError, ValueError, pl.exceptions.PolarsError) as error:  # pyarrow's errors are kinds of these
            raise DataError(
                f"column {str(column)!r} of the pandas frame has values of several kinds ({str(error).splitlines()[0]}); "
                f"convert it first: frame[{column!r}].astype(str)"
            ) from None
    return pl.DataFrame(columns)
