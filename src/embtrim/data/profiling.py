"""The profile of a log that is being encoded: the values of its training rows, and what is missing or unseen in each split.

The values of the training rows are counted for the vocabulary anyway, so `note_training_rows` keeps what it needs of them when
the vocabulary is made. `finish_profile` passes over the codes of the other splits once all rows are written.

Shapes: N rows of a block, C id columns, V texts of a table, K numeric and dense fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import Field

from embtrim.config import Config
from embtrim.data.encoder import Encoder
from embtrim.data.encoding_state import Coded
from embtrim.data.log_file import Skipped
from embtrim.data.numbering import Numbering, Seen
from embtrim.data.profile import Counts, FieldProfile, Profile
from embtrim.data.tally import MISSING, UNSEEN, NumberSample, outside_range, quantiles_of, ranges
from embtrim.data.transforms import MISSING_BUCKET
from embtrim.data.writing import blocks_of_codes, numbers_path
from embtrim.schema import PAD, Schema
from embtrim.system.files import read_json

AGAINST_FILE = "against.json"
_NUM_EXAMPLES = 3


class Against(Config):
    """The training rows of a log as the encoder of an earlier log reads them.

    Attributes:
        counts: Counts by field.
        examples: The most frequent unseen values, by field.
    """

    counts: dict[str, Counts] = Field(default_factory=dict)
    examples: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> Against:
        """Read against.json from a folder of encoded data."""
        return cls.parse(read_json(Path(folder) / AGAINST_FILE))


def note_training_rows(numbering: Numbering, encoder: Encoder, earlier: Encoder | None, folder: Path) -> None:
    """Write the values of the training rows into `folder`, and their counts as an earlier encoder reads them.

    Args:
        numbering: The texts and what the training rows hold; its `vocabularies` was called.
        encoder: The encoder of the log.
        earlier: The encoder of an earlier log, if the log is compared with it.
        folder: Folder of the data.
    """
    seen, fields = numbering.seen, []
    counts = _training_counts(numbering, encoder)
    for field in numbering.schema.fields:
        top = () if field.type == "numeric" else tuple(seen.top.get(field.name, ()))
        distinct, own = seen.distinct.get(field.name), {"train": counts[field.name]}
        fields.append(FieldProfile(name=field.name, type=field.type, distinct=distinct, top=top, counts=own))
    Profile(fields=tuple(fields)).save(folder)
    if earlier is not None:
        against = Against(counts=_training_counts(numbering, earlier), examples=_unseen_texts(numbering, earlier))
        (folder / AGAINST_FILE).write_text(against.model_dump_json(indent=1), "utf-8")
    numbering.seen = Seen()  # frees its memory


def finish_profile(
    schema: Schema, others: Mapping[str, Mapping[str, Counts]], numbers: Mapping[str, np.ndarray], coded: Coded,
    folder: Path, earlier: Profile | None,
) -> None:  # fmt: skip
    """Complete profile.json in a folder with the other splits and the numbers.

    Args:
        schema: The schema of the log.
        others: Counts of the splits that are not for training, by split and field; see `counts_of_split`.
        numbers: The sampled numbers by split: float64 (rows of the sample, K) each.
        coded: The rows that are written.
        folder: The folder of the data.
        earlier: Profile of an earlier log with which the log is compared, if any.
    """
    profile = Profile.load(folder)
    assert profile is not None
    counts = {f.name: dict(f.counts) for f in profile.fields}
    for split, by_field in others.items():
        for name, found in by_field.items():
            counts[name][split] = found
    sample = NumberSample(schema, 0)
    quantiles = quantiles_of(sample, numbers["train"]) if sample.fields else {}
    limits = ranges(Profile(fields=tuple(FieldProfile(name=n, type="", quantiles=q) for n, q in quantiles.items())))
    for split, numbers_NK in numbers.items():
        _with_numbers(counts, split, schema, sample, numbers_NK, limits, coded)
    fields = [f.replace(counts=counts[f.name], quantiles=quantiles.get(f.name, ())) for f in profile.fields]
    Profile(fields=tuple(fields), skipped=skipped_lines(coded)).save(folder)
    if (folder / AGAINST_FILE).exists():
        against = Against.load(folder)
        found = {name: {"train": part} for name, part in against.counts.items()}
        _with_numbers(found, "train", schema, sample, numbers["train"], ranges(earlier), coded)
        against = against.replace(counts={name: part["train"] for name, part in found.items()})
        (folder / AGAINST_FILE).write_text(against.model_dump_json(indent=1), "utf-8")


def skipped_lines(coded: Coded) -> dict[str, Skipped]:
    """The lines that could not be read, by log; a log without such lines is left out."""
    return {name: lines for name, lines in coded.skipped.items() if lines.num_lines}


def _training_counts(numbering: Numbering, encoder: Encoder) -> dict[str, Counts]:
    """Counts of the training rows as an encoder reads them, by field; numbers are not counted yet."""
    seen, found = numbering.seen, {}
    for field in numbering.schema.fields:
        missing, values, unseen = seen.missing.get(field.name, 0), 0, None
        if field.name in seen.counts:
            (_, status_V), count_V = numbering.read_by(encoder, field.name), seen.counts[field.name]
            values, unseen = int(count_V.sum()), int(count_V[status_V == UNSEEN].sum())
        found[field.name] = Counts(rows=seen.rows, missing=missing, values=values, unseen=unseen)
    return found


def _unseen_texts(numbering: Numbering, encoder: Encoder) -> dict[str, tuple[str, ...]]:
    found = {}
    for field in numbering.schema.fields:
        if field.name in numbering.seen.counts:
            count_V = numbering.seen.counts[field.name] * (numbering.read_by(encoder, field.name)[1] == UNSEEN)
            most = np.argsort(-count_V, kind="stable")[:_NUM_EXAMPLES]
            texts = numbering.values(field.table_name)[most[count_V[most] > 0].tolist()]
            found[field.name] = tuple(texts.drop_nulls())
    return found


def counts_of_split(numbering: Numbering, encoder: Encoder, split: str, coded: Coded, codes: Path) -> dict[str, Counts]:
    """Counts of a split by field, from its codes in a folder of codes; numbers are not counted yet."""
    schema = numbering.schema
    statuses = {
        f.name: np.append(numbering.read_by(encoder, f.name)[1], np.int8(-1))  # the last place holds PAD
        for f in schema.id_fields
        if f.type in ("categorical", "multi") and not f.hash_size
    }
    total = {field.name: np.zeros(3, np.int64) for field in schema.fields}  # missing, values, unseen
    for codes_CN in blocks_of_codes(split, coded, schema, codes):
        for field, columns in zip(schema.id_fields, schema.column_slices, strict=True):
            code = codes_CN[columns]
            if field.name in statuses:
                status = statuses[field.name].take(code, mode="wrap")
                total[field.name] += [np.count_nonzero(status == mark) for mark in (MISSING, -1, UNSEEN)]
            elif field.type == "numeric" or field.hash_size:
                missing = 0 if field.hash_size else MISSING_BUCKET
                total[field.name][0] += np.count_nonzero(code == missing)
            if field.type == "multi":
                total[field.name][0] += np.count_nonzero(code[0] == PAD)
    rows, found = sum(coded.blocks[split]), {}
    for field in schema.fields:
        missing, padding, unseen = map(int, total[field.name])
        is_listed = field.name in statuses
        values = rows * field.length - padding if is_listed else 0
        found[field.name] = Counts(rows=rows, missing=missing, values=values, unseen=unseen if is_listed else None)
    return found


def sampled_numbers(schema: Schema, split: str, codes: Path) -> np.ndarray:
    """The sampled numbers of a split in a folder of codes: float64 (rows of the sample, K)."""
    path = numbers_path(codes, split)
    return np.load(path) if path.exists() else np.empty((0, len(schema.fields)))


def _with_numbers(
    counts: dict[str, dict[str, Counts]],
    split: str,
    schema: Schema,
    sample: NumberSample,
    numbers_NK: np.ndarray,
    limits: Mapping[str, tuple[float, float]],
    coded: Coded,
) -> None:
    """Fill in the counts of a split that come from numbers: those out of range, and missing dense values."""
    for name, (values, outside) in outside_range(sample, numbers_NK, limits).items():
        counts[name][split] = counts[name][split].replace(values=values, unseen=outside if name in limits else None)
    for field, missing in zip(schema.dense_fields, coded.dense_missing.get(split, ()), strict=True):
        counts[field.name][split] = counts[field.name][split].replace(missing=missing)
