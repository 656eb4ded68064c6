"""Engines on which `embtrim.encode` reads the files of a log: this machine's processes, Ray, or Spark.

    embtrim.encode("logs/*.parquet", "schema.toml", out="data/logs", engine=embtrim.engines.Local(jobs=4))

An engine moves work to workers and results back. What is done with a file is embtrim's own, so the encoded data are the
same on all engines, and without one.
"""

from embtrim.engines.engine import Engine
from embtrim.engines.local import Local
from embtrim.engines.on_ray import Ray
from embtrim.engines.on_spark import Spark

__all__ = ["Engine", "Local", "Ray", "Spark"]
