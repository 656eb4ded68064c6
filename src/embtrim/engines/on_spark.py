"""Tasks of a Spark session."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from embtrim.engines.engine import Run, package
from embtrim.errors import EmbtrimError, UnreachableError, first_line_of


@dataclass(frozen=True)
class Spark:
    """Tasks of a Spark session; Spark does a task again that fails, `spark.task.maxFailures` times in all.

    Needs pyspark: pip install 'embtrim[spark]'.

    Attributes:
        session: A `pyspark.sql.SparkSession` that is not one of Spark Connect, which runs no functions over files.
    """

    session: Any

    @contextmanager
    def started(self) -> Iterator[Run]:
        """See `embtrim.engines.Engine`."""
        if not isinstance(self.session, package("pyspark.sql", "spark").SparkSession):
            raise EmbtrimError(
                f"Spark takes a pyspark.sql.SparkSession, such as SparkSession.builder.getOrCreate(), and none of Spark Connect; given a "
                f"{type(self.session).__module__}.{type(self.session).__name__}"
            )
        context = self.session.sparkContext

        def run(function: Callable[[Any], Any], items: Sequence[Any]) -> Generator[tuple[int, Any], None, None]:
            numbered = context.parallelize(list(enumerate(items)), len(items))
            try:
                yield from numbered.map(partial(_call, function)).collect()
            except package("py4j.protocol", "spark").Py4JError as error:
                raise UnreachableError(
                    f"Spark gave a task up ({first_line_of(error)}); what was finished is on disk: start again to go on. A session of "
                    "master local[N] tries each task once; local[N,4] tries it four times"
                ) from error

        yield run


def _call(function: Callable[[Any], Any], numbered: tuple[int, Any]) -> tuple[int, Any]:
    index, item = numbered
    return index, function(item)
