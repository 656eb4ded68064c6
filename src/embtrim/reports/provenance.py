"""What stands behind a report: models, data, versions and hardware, as its records name them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from embtrim.experiments.records import RunRecord


def models_and_data(records: Sequence[RunRecord]) -> str:
    """The title of a report, such as "deepfm on frappe"."""
    models = ", ".join(dict.fromkeys(r.model for r in records))
    datasets = ", ".join(dict.fromkeys(data_name(r) for r in records))
    return f"{models} on {datasets}"


def data_name(record: RunRecord) -> str:
    """The folder of the encoded data; the schema's fingerprint for data that were encoded in memory."""
    return record.data["folder"] or record.data["fingerprint"]


def provenance(records: Sequence[RunRecord]) -> dict[str, str]:
    """Data, rows, versions and hardware; records that differ are listed one after another."""
    return {
        "data": _distinct(f"{r.data['folder'] or 'in memory'}, schema {r.data['fingerprint']}" for r in records),
        "rows": _distinct(", ".join(f"{k} {v:,}" for k, v in r.data["num_rows"].items()) for r in records),
        "versions": _distinct(", ".join(f"{k} {v}" for k, v in r.versions.items()) for r in records),
        "hardware": _distinct(", ".join(f"{k}: {v}" for k, v in r.hardware.items()) for r in records),
    }


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))
