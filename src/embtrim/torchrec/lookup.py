"""Tables of an export in FBGEMM's inference kernels. Needs torch, safetensors and fbgemm_gpu, and not embtrim.

    lookup = Lookup("exported")
    found = lookup({"user": (ids, lengths), ..})    # ids of the full tables -> (B, columns) for each feature

A value of 8 bits and fewer is a code, which stands for code * scale + offset; scale and offset are those of its column and
band. FBGEMM's own scales are those of a row: its rows therefore have a scale of 1 and an offset of 0 and give sums of codes,
which are exact, and scale and offset are applied to the sums. A column of ones counts the rows of a band in a bag, if the
table has several bands.

Of two bags that read one table, each is a call of the kernels: FBGEMM re-numbers ids by table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from safetensors.torch import load_file
from torch import Tensor


class Lookup:
    """Looks features up in the tables of an export; see the head of this file.

    Args:
        folder: Folder that `embtrim.torchrec.export` wrote.

    Attributes:
        tables: What tables.json says of each table: its features, their pooling, the columns of the full table that the
            stored ones stand for, and its bands.
        kernels: FBGEMM's kernels, in which each band of each table is a table.
    """

    def __init__(self, folder: str | Path) -> None:
        self.tables: list[dict[str, Any]] = json.loads(Path(folder, "tables.json").read_text("utf-8"))["tables"]
        stored = load_file(Path(folder, "tables.safetensors"))
        self.bands = [(table, band) for table in self.tables for band in table["bands"]]
        self.scales = {name: value for name, value in stored.items() if name.endswith((".scale", ".offset"))}
        specs = [
            (band["name"], band["rows"], band["width"], SparseType[band["type"]], EmbeddingLocation.HOST)
            for _, band in self.bands
        ]
        remaps: list[Any] = [stored.get(f"{band['name']}.remap") for _, band in self.bands]
        self.kernels = IntNBitTableBatchedEmbeddingBagsCodegen(
            specs,
            index_remapping=remaps if any(remap is not None for remap in remaps) else None,
            pooling_mode=PoolingMode.SUM,
            device="cpu",
            bounds_check_mode=BoundsCheckMode.FATAL,
            output_dtype=SparseType.FP32,
        )
        self.kernels.initialize_weights()
        self.kernels.assign_embedding_weights([self._weights(band, stored) for _, band in self.bands])

    @staticmethod
    def _weights(band: dict[str, Any], stored: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        values = stored[f"{band['name']}.values"]
        if not band["type"].startswith("INT"):
            return values.view(torch.uint8), None
        plain = torch.tensor([1.0, 0.0], dtype=torch.float16).view(torch.uint8)  # FBGEMM's scale and offset of a row
        return values, plain.repeat(len(values), 1)

    def __call__(self, features: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Pooled embeddings (B, stored columns) of each feature.

        Args:
            features: For each feature ids of the full table (N,), one bag after the other, and lengths of the bags (B,). A
                feature without pooling has one id a bag. B may differ from feature to feature.

        Raises:
            ValueError: A feature is missing, an id is not one of its table, or lengths are not those of the ids.
        """
        found: dict[str, Tensor] = {}
        for number in range(max((len(table["features"]) for table in self.tables), default=0)):
            named = [(table, table["features"][number]) for table in self.tables if number < len(table["features"])]
            given = {table["name"]: self._given(table, feature, features) for table, feature in named}
            none = torch.zeros(0, dtype=torch.int64)
            parts = [given.get(table["name"], (none, none)) for table, _ in self.bands]
            sums = self._sums([ids for ids, _ in parts], [lengths for _, lengths in parts]) if parts else []
            by_table: dict[str, list[tuple[dict[str, Any], Tensor]]] = {table["name"]: [] for table, _ in named}
            for (table, band), summed in zip(self.bands, sums, strict=True):
                if table["name"] in by_table:
                    by_table[table["name"]].append((band, summed))
            for table, feature in named:
                is_mean = table["pooling"][number] == "MEAN"
                found[feature] = self._pooled(table, by_table[table["name"]], given[table["name"]][1], is_mean)
        return found

    @staticmethod
    def _given(
        table: dict[str, Any], feature: str, features: Mapping[str, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        if feature not in features:
            raise ValueError(f"feature {feature!r} is missing")
        ids, lengths = (part.long() for part in features[feature])
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < table["num_rows"]:
            raise ValueError(
                f"feature {feature!r} has ids {int(ids.min())}..{int(ids.max())}; 0..{table['num_rows'] - 1}"
            )
        if int(lengths.sum()) != len(ids):
            raise ValueError(f"feature {feature!r} has {len(ids)} ids, and lengths that add up to {int(lengths.sum())}")
        if table["pooling"][table["features"].index(feature)] == "NONE" and bool((lengths != 1).any()):
            raise ValueError(f"feature {feature!r} is not pooled: give each id a bag of its own, lengths of one")
        return (ids if table["first_rows"] is None else ids.clamp(max=table["first_rows"])), lengths

    def _sums(self, ids: list[Tensor], lengths: list[Tensor]) -> list[Tensor]:
        size = max(map(len, lengths))  # FBGEMM takes equally many bags of all tables: empty ones fill up
        filled = [torch.nn.functional.pad(part, (0, size - len(part))) for part in lengths]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(filled).cumsum(0)])
        found = self.kernels(torch.cat(ids), offsets)
        return list(found.split([band["width"] for _, band in self.bands], 1))

    def _pooled(
        self, table: dict[str, Any], parts: list[tuple[dict[str, Any], Tensor]], lengths: Tensor, is_mean: bool
    ) -> Tensor:
        width = len(table["columns"])
        total = torch.zeros(len(lengths), width)
        for band, summed in parts:
            summed = summed[: len(lengths)]
            values = summed[:, :width]
            if f"{band['name']}.scale" in self.scales:
                counts = summed[:, width] if len(parts) > 1 else lengths.float()
                scale, offset = (self.scales[f"{band['name']}.{what}"] for what in ("scale", "offset"))
                values = values * scale + counts[:, None] * offset
            total += values
        return total / lengths.clamp(min=1)[:, None] if is_mean else total

    def wide(self, feature: str, narrow: Tensor) -> Tensor:
        """(B, D) embeddings at the full width, zero in the columns that were removed."""
        table = next(table for table in self.tables if feature in table["features"])
        found = narrow.new_zeros(len(narrow), table["full_width"])
        found[:, table["columns"]] = narrow
        return found
