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
    """Data, rows, full models, versions and hardware; records that differ are listed one after another."""
    full = _distinct(filter(None, (_full_model(r) for r in records if r.variant == "full")))
    return {
        "data": _distinct(f"{r.data['folder'] or 'in memory'}, schema {r.data['fingerprint']}" for r in records),
        "rows": _distinct(", ".join(f"{k} {v:,}" for k, v in r.data["num_rows"].items()) for r in records),
        **({"full models": full} if full else {}),
        "versions": _distinct(", ".join(f"{k} {v}" for k, v in r.versions.items()) for r in records),
        "hardware": _distinct(", ".join(f"{k}: {v}" for k, v in r.hardware.items()) for r in records),
    }


def _full_model(record: RunRecord) -> str:
    """How `embedding_l2` was chosen, and whether training soon made the full model worse; empty where nothing is to say."""
    words = []
    if (sweep := record.l2_sweep) is not None:
        tried = ", ".join(f"{trial['embedding_l2']:g}: {abs(trial['score']):.4f}" for trial in sweep["trials"])
        share = sweep["seconds"] / max(record.train_seconds, 1e-9)
        words.append(
            f"embedding_l2 {sweep['embedding_l2']:g} was chosen (valid {record.train.get('monitor')} of short trainings on "
            f"{sweep['rows']:,} rows: {tried}; {sweep['seconds']:.1f} s, {share:.2f} of the full training)"
        )
    if record.best_epoch == 1 and record.epochs > 1:
        words.append("it was at its best after its first epoch, so that smaller models may do better for that alone")
    return "" if not words else f"{record.model}, seed {record.seed}: {'; '.join(words)}"


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))
