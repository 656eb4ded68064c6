"""Search and compact models whose tables TorchRec shards, in the user's own loop, under torchrun or in one process.

    task = embtrim.torchrec.Task(dmp, loss=loss, train=train, valid=valid)
    plan = embtrim.search(task, embtrim.methods.SSEDSConfig(), budget="10%")
    small = DistributedModelParallel(embtrim.torchrec.compact(make_model, plan), ...)
    embtrim.torchrec.inherit(dmp, small, plan)
    embtrim.torchrec.verify(dmp, small, plan, task).require()

Importing this package needs torchrec: pip install 'embtrim[torchrec]'.
"""

try:
    import torchrec as _torchrec  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"embtrim.torchrec needs torchrec ({error}); pip install 'embtrim[torchrec]', on a machine without CUDA the packages of "
        "requirements-torchrec.lock"
    ) from error

from embtrim.torchrec.compacting import CompactCollection, CompactSequences, compact
from embtrim.torchrec.exporting import export
from embtrim.torchrec.inheriting import inherit
from embtrim.torchrec.task import Task
from embtrim.torchrec.verifying import verify

__all__ = ["CompactCollection", "CompactSequences", "Task", "compact", "export", "inherit", "verify"]
