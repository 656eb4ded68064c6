"""The profile of encoded data as the encoder of a compact model reads them.

A plan that drops the OOV row takes values out of the vocabulary: they read the row of the dropped values, as unseen ones do.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from embtrim.data.dataset import WINDOW_ROWS, EncodedDataset
from embtrim.data.encoder import Encoder
from embtrim.data.profile import Profile
from embtrim.schema import OOV, PAD


def recounted(
    profile: Profile, data: EncodedDataset, whole: Encoder, encoder: Encoder, id_maps: Mapping[str, np.ndarray]
) -> Profile:
    """The profile with the unseen values of the compact model.

    Args:
        profile: Profile of the encoded data.
        data: The data, with their stored ids.
        whole: Encoder of the data.
        encoder: Encoder of the compact model.
        id_maps: By table, from ids of `whole` to ids of `encoder`.
    """
    schema, fields = data.schema, {field.name: field for field in profile.fields}
    for spec, columns in zip(schema.id_fields, schema.column_slices, strict=True):
        table, field = spec.table_name, fields.get(spec.name)
        if field is None or spec.hash_size or spec.type == "numeric" or table not in id_maps:
            continue
        before, after = whole.vocabularies[table], encoder.vocabularies[table]
        if before.height == after.height:
            continue
        is_unseen_V = id_maps[table] == encoder.unseen_ids.get(table, OOV)
        missing = before["id"].filter(before["value"].is_null())
        is_unseen_V[missing.to_numpy()] = False  # counted as missing
        counts = dict(field.counts)
        for split in counts.keys() & data.splits.keys():
            ids, unseen = data.split(split).ids, 0
            for start in range(0, len(ids), WINDOW_ROWS):
                part = np.asarray(ids[start : start + WINDOW_ROWS, columns])
                unseen += int(np.count_nonzero(is_unseen_V[part] & (part != PAD)))
            if not len(missing) and spec.type == "categorical":
                unseen -= counts[split].missing  # these read the row of unseen values
            counts[split] = counts[split].replace(unseen=unseen)
        fields[spec.name] = field.replace(counts=counts)
    return profile.replace(fields=tuple(fields.values()))
