"""The peers' jobs of the benchmarks, one per process: plain PyTorch, FuxiCTR, FBGEMM, torchrec and pandas, without embtrim.

`python peers.py '[kind, threads, device, settings]'` runs a job and prints its result. Every contender gets its batches in
the form that suits it best, made beforehand. For all contenders, ids are in order of frequency.

Axes: B batch, F fields, D full width, S output columns of all fields.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import measure
import synthetic

HIDDEN = (400, 400, 400)
LEARNING_RATE = 1e-3
INIT_STD = 1e-4


class Head(nn.Module):
    """The dense part of a DeepFM in plain torch: FM and MLP over [e_1, .., e_F], and the bias.

    Args:
        columns: Columns of the full width that each field's embedding has.
        projected: Bring narrow embeddings to the full width by learned matrices, instead of putting columns in place.
    """

    def __init__(self, columns: Sequence[Sequence[int]], projected: bool = False) -> None:
        super().__init__()
        place_S = torch.tensor([column for own in columns for column in own])
        field_S = torch.tensor([field for field, own in enumerate(columns) for _ in own])
        self.num_fields = len(columns)
        self.equal = all(len(own) == synthetic.FULL_WIDTH for own in columns)
        self.projected = projected
        if not self.equal:
            width_S = torch.tensor([float(len(own)) for own in columns for _ in own])
            learned_SD = torch.randn(len(place_S), synthetic.FULL_WIDTH) * width_S[:, None] ** -0.5
            fixed_SD = functional.one_hot(place_S, synthetic.FULL_WIDTH).float()
            self.projection_SD = nn.Parameter(learned_SD if projected else fixed_SD, requires_grad=projected)
            self.register_buffer("same_field_SS", (field_S[:, None] == field_S[None, :]).float())
        widths = (len(place_S), *HIDDEN)
        layers = [layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.mlp = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, concat_BS: Tensor, first_order_B: Tensor) -> Tensor:
        """Logits (B,). Narrow embeddings are never expanded to (B, F, D): their squares use the Gram matrix P P^T."""
        if self.equal:
            sum_BD = concat_BS.view(len(concat_BS), self.num_fields, -1).sum(1)
        else:
            sum_BD = concat_BS @ self.projection_SD
        if self.projected:
            gram_SS = (self.projection_SD @ self.projection_SD.T) * self.same_field_SS
            squares_B = ((concat_BS @ gram_SS) * concat_BS).sum(1)
        else:
            squares_B = (concat_BS * concat_BS).sum(1)
        fm_B = 0.5 * ((sum_BD * sum_BD).sum(1) - squares_B)
        return self.bias + first_order_B + fm_B + self.mlp(concat_BS).squeeze(1)


def full_head(num_fields: int) -> Head:
    return Head([range(synthetic.FULL_WIDTH)] * num_fields).to(measure.device)


def logloss(logits_B: Tensor, labels_B: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits_B.float(), labels_B)


# ---- contenders: each takes sizes and settings, and returns a step and a function that makes its batches -----------------

Prepare = Callable[[np.ndarray, np.ndarray], Any]


def on_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(measure.device) for tensor in tensors)


def one_table(sizes: list[int], optimizer: str) -> tuple[Callable[[Any], Any], Prepare]:
    """All fields in one nn.Embedding, first-order weights in another, as a careful user writes it."""
    sparse = optimizer == "sparse"
    widths = (synthetic.FULL_WIDTH, 1)
    tables = [nn.Embedding(sum(sizes), width, sparse=sparse, device=measure.device) for width in widths]
    for table in tables:
        nn.init.normal_(table.weight, 0, INIT_STD)
    head, starts_F = full_head(len(sizes)), torch.from_numpy(np.cumsum([0, *sizes[:-1]]))
    weights = [table.weight for table in tables]
    if sparse:
        optimizers = [
            torch.optim.SparseAdam(weights, LEARNING_RATE),
            torch.optim.Adam(head.parameters(), LEARNING_RATE),
        ]
    else:
        fused = optimizer == "fused"
        optimizers = [torch.optim.Adam([*weights, *head.parameters()], LEARNING_RATE, fused=fused or None)]

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        rows_BF, labels_B = batch
        concat_BS = tables[0](rows_BF).flatten(1)
        return logloss(head(concat_BS, tables[1](rows_BF).flatten(1).sum(1)), labels_B)

    return (
        partial(measure.train_step, loss, optimizers),
        lambda ids, labels: on_device(torch.from_numpy(ids) + starts_F, torch.from_numpy(labels)),
    )


def fuxictr_deepfm(feature_map: Any, width: int, hidden: Sequence[int], learning_rate: float, **settings: Any) -> Any:
    """A DeepFM of FuxiCTR's layers, ready to train; `settings` are those of its MLP_Block and BaseModel."""
    from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
    from fuxictr.pytorch.models import BaseModel

    of_mlp = {name: settings.pop(name) for name in ("dropout_rates", "batch_norm") if name in settings}

    class DeepFM(BaseModel):
        def __init__(self) -> None:
            gpu = 0 if measure.device.type == "cuda" else -1
            super().__init__(feature_map, gpu=gpu, verbose=0, metrics=["AUC"], **settings)
            self.embedding = FeatureEmbedding(feature_map, width)
            self.fm = FactorizationMachine(feature_map)
            self.mlp = MLP_Block(feature_map.num_fields * width, list(hidden), output_dim=1, **of_mlp)
            self.compile("adam", "binary_crossentropy", learning_rate)
            self.reset_parameters()
            self.model_to_device()

        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            ids = self.get_inputs(inputs)
            embeddings_BFD = self.embedding(ids)
            logits_B1 = self.fm(ids, embeddings_BFD) + self.mlp(embeddings_BFD.flatten(1))
            return {"y_pred": self.output_activation(logits_B1)}

    return DeepFM()


def fuxictr(sizes: list[int]) -> tuple[Callable[[Any], Any], Prepare]:
    """DeepFM of FuxiCTR's layers and its own `train_step`: dense Adam, with gradient clipping in the backward time."""
    from fuxictr.features import FeatureMap

    names = [f"f{i}" for i in range(len(sizes))]
    feature_map = FeatureMap("synthetic", tempfile.gettempdir())
    feature_map.labels = [synthetic.LABEL]
    feature_map.num_fields = len(sizes)
    for name, size in zip(names, sizes, strict=True):
        feature_map.features[name] = {"source": "", "type": "categorical", "vocab_size": size, "padding_idx": 0}
    model = fuxictr_deepfm(feature_map, synthetic.FULL_WIDTH, HIDDEN, LEARNING_RATE, model_root=tempfile.gettempdir())
    model._max_gradient_norm = 10.0  # the default of FuxiCTR's fit
    times: list[float] = []
    model.optimizer.register_step_pre_hook(lambda *_: times.append(measure.now()))
    plain_loss = model.compute_loss

    def compute_loss(*outputs: Any) -> Tensor:
        loss = plain_loss(*outputs)
        times.append(measure.now())
        return loss

    model.compute_loss = compute_loss
    model.train()

    def step(batch: dict[str, Tensor]) -> tuple[Tensor, measure.Times]:
        times[:] = [measure.now()]
        loss = model.train_step(batch)
        return loss, (*times, measure.now())

    def prepare(ids: np.ndarray, labels: np.ndarray) -> dict[str, Tensor]:
        columns = on_device(*(torch.from_numpy(column) for column in ids.T.astype(np.int64)))
        return {**dict(zip(names, columns, strict=True)), synthetic.LABEL: torch.from_numpy(labels).to(measure.device)}

    return step, prepare


def rounded_widths(layout: str, num_fields: int) -> list[int]:
    """Widths rounded up to multiples of four, as FBGEMM needs."""
    return [-(-width // 4) * 4 for width in synthetic.widths_of(layout, num_fields)]


def batched_tables(sizes: list[int], widths: list[int]) -> Any:
    """FBGEMM's table-batched embeddings with row-wise Adagrad fused into backward.

    FBGEMM has no other fused optimiser on the CPU, and row-wise Adagrad is the usual one on the GPU.
    """
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        EmbeddingLocation,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    place = (EmbeddingLocation.HOST, ComputeDevice.CPU)
    if measure.device.type == "cuda":
        place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(size, width, *place) for size, width in zip(sizes, widths, strict=True)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LEARNING_RATE,
        device=measure.device,
    )
    tables.init_embedding_weights_uniform(-INIT_STD, INIT_STD)
    return tables


def bags_of(ids: np.ndarray) -> tuple[Tensor, Tensor]:
    """Ids, table by table, and the offsets of bags with one id each."""
    return on_device(torch.from_numpy(ids.T.astype(np.int64).ravel()), torch.arange(ids.size + 1))


def fbgemm(sizes: list[int], layout: str, autocast: Callable[[], Any]) -> tuple[Callable[[Any], Any], Prepare]:
    """FBGEMM's tables and the plain head; a first-order weight is the sum of a row of width 4."""
    widths = rounded_widths(layout, len(sizes))
    tables, first_order = batched_tables(sizes, widths), batched_tables(sizes, [4] * len(sizes))
    head = Head([range(width) for width in widths], projected=layout == "mixed").to(measure.device)
    optimizers = [torch.optim.Adam(head.parameters(), LEARNING_RATE, fused=True)]

    def loss(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        ids, offsets, labels_B = batch
        return logloss(head(tables(ids, offsets), first_order(ids, offsets).sum(1)), labels_B)

    return (
        lambda batch: measure.train_step(loss, optimizers, batch, autocast),
        lambda ids, labels: (*bags_of(ids), *on_device(torch.from_numpy(labels))),
    )


def torchrec(sizes: list[int], autocast: Callable[[], Any]) -> tuple[Callable[[Any], Any], Prepare]:
    """torchrec's fused EmbeddingBagCollection at full width, and the plain head."""
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    names = [f"f{i}" for i in range(len(sizes))]

    def collection(width: int) -> Any:
        configs = [
            EmbeddingBagConfig(
                name=f"t_{name}",
                embedding_dim=width,
                num_embeddings=size,
                feature_names=[name],
                weight_init_min=-INIT_STD,
                weight_init_max=INIT_STD,
            )
            for name, size in zip(names, sizes, strict=True)
        ]
        return FusedEmbeddingBagCollection(configs, RowWiseAdagrad, {"lr": LEARNING_RATE}, device=measure.device)

    tables, first_order, head = collection(synthetic.FULL_WIDTH), collection(4), full_head(len(sizes))
    optimizers = [torch.optim.Adam(head.parameters(), LEARNING_RATE, fused=True)]

    def loss(batch: tuple[Any, Tensor]) -> Tensor:
        ids, labels_B = batch
        return logloss(head(tables(ids).values(), first_order(ids).values().sum(1)), labels_B)

    def prepare(ids: np.ndarray, labels: np.ndarray) -> tuple[Any, Tensor]:
        values, offsets = bags_of(ids)
        bags = KeyedJaggedTensor(keys=names, values=values, offsets=offsets)
        return bags, torch.from_numpy(labels).to(measure.device)

    return lambda batch: measure.train_step(loss, optimizers, batch, autocast), prepare


def prepared(source: int | str, batch_size: int, num_batches: int, prepare: Prepare) -> list[Any]:
    return [prepare(ids, labels) for ids, labels in synthetic.batches(source, batch_size, num_batches)]


# ---- jobs ----------------------------------------------------------------------------------------------------------------


def train(
    contender: str,
    source: int | str,
    batch_size: int,
    warmup: int,
    steps: int,
    matmul: str = "highest",
    bf16: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Whole training steps. `matmul` is torch's float32 matmul precision, whose default is "highest"."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(matmul)
    if contender in ("fbgemm", "torchrec"):
        settings["autocast"] = partial(torch.autocast, measure.device.type, torch.bfloat16) if bf16 else nullcontext
    sizes = synthetic.table_sizes(source)
    makers = {"one_table": one_table, "fuxictr": fuxictr, "fbgemm": fbgemm, "torchrec": torchrec}
    step, prepare = makers[contender](sizes, **settings)
    batches = prepared(source, batch_size, warmup + steps, prepare)
    words = ("bf16 autocast" if bf16 else "fp32") + (", oneDNN matmul" if matmul == "medium" else "")
    widths = synthetic.widths_of(settings.get("layout", "full"), len(sizes))
    return {
        **measure.time_steps(step, batches, warmup),
        "precision": words,
        "table_bytes": synthetic.step_bytes(source, batch_size, widths),
    }


def embedding(source: int | str, layout: str, batch_size: int, warmup: int, steps: int) -> dict[str, Any]:
    """Steps of FBGEMM's embeddings alone: lookup, then backward from a given gradient, which includes the update."""
    sizes = synthetic.table_sizes(source)
    widths = rounded_widths(layout, len(sizes))
    tables = batched_tables(sizes, widths)
    grad_BS = torch.randn(batch_size, sum(widths), generator=torch.Generator().manual_seed(0)).to(measure.device)

    def step(batch: tuple[Tensor, Tensor]) -> tuple[None, measure.Times]:
        started = measure.now()
        tables(*batch).backward(grad_BS)
        return None, (started, measure.now())

    batches = prepared(source, batch_size, warmup + steps, lambda ids, _: bags_of(ids))
    table_bytes = synthetic.step_bytes(source, batch_size, synthetic.widths_of(layout))
    return {**measure.time_steps(step, batches, warmup), "table_bytes": table_bytes}


def predict(
    source: int | str, columns: list[list[int]], matmul: str, batch_sizes: list[int], seconds: float
) -> dict[str, Any]:
    """Latency of a forward pass with one nn.Embedding per field and the plain head."""
    torch.set_float32_matmul_precision(matmul)
    sizes, device = synthetic.table_sizes(source), measure.device
    tables = nn.ModuleList(nn.Embedding(n, len(own), device=device) for n, own in zip(sizes, columns, strict=True))
    first_order = nn.ModuleList(nn.Embedding(n, 1, device=device) for n in sizes)
    head = Head(columns).to(device).eval()

    def score(ids_BF: Tensor) -> Tensor:
        concat_BS = torch.cat([table(ids_BF[:, i]) for i, table in enumerate(tables)], 1)
        return head(concat_BS, torch.cat([table(ids_BF[:, i]) for i, table in enumerate(first_order)], 1).sum(1))

    latency = {}
    with torch.no_grad():
        for size in batch_sizes:
            turns = itertools.cycle(prepared(source, size, 20, lambda ids, _: torch.from_numpy(ids).to(device)))
            latency[str(size)] = measure.time_calls(lambda turns=turns: score(next(turns)), seconds)
    return {"latency_ms": latency}


def encode_fuxictr(log: str, out: str) -> dict[str, Any]:
    """Encode the log with FuxiCTR's preprocessing and its Criteo processor; all rows are for training."""
    from fuxictr.datasets.criteo import CustomizedFeatureProcessor
    from fuxictr.preprocess import build_dataset

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    shutil.rmtree(out, ignore_errors=True)  # FuxiCTR skips the work if an earlier result exists
    # FuxiCTR reads only files named .csv.
    source = Path(out).with_suffix(".csv")
    source.unlink(missing_ok=True)
    source.symlink_to(Path(log).resolve())
    numeric = {"name": synthetic.NUMERIC, "active": True, "dtype": "float", "type": "categorical", "fill_na": 0,
               "preprocess": "convert_to_bucket"}  # fmt: skip
    words = {"name": synthetic.CATEGORICAL, "active": True, "dtype": "str", "type": "categorical", "fill_na": ""}
    label = {"name": synthetic.LABEL, "dtype": "float"}
    started = time.perf_counter()
    processor = CustomizedFeatureProcessor([numeric, words], label, dataset_id="log", data_root=out)
    build_dataset(processor, train_data=str(source), min_categr_count=10, data_format="csv", sep="\t")
    seconds = time.perf_counter() - started
    import polars as pl

    rows = pl.scan_parquet(Path(out) / "log" / "train.parquet").select(pl.len()).collect().item()
    return {
        "rows": rows,
        "rows_per_s": rows / seconds,
        "vocabulary": processor.feature_map.total_features,
        "log_bytes": Path(log).stat().st_size,
    }


class LoaderInMemory:
    """Batches of a parquet file that FuxiCTR's preprocessing wrote, from memory instead of by Ray."""

    def __init__(self, feature_map: Any, data_path: str, split: str, batch_size: int, shuffle: bool, **_: Any) -> None:
        import polars as pl

        columns = [*feature_map.features, *feature_map.labels]
        self.columns = {name: pl.read_parquet(data_path, columns=[name])[name].to_torch() for name in columns}
        self.num_samples, self.num_blocks = len(self.columns[columns[0]]), 1
        self.batch_size, self.shuffle = batch_size, shuffle and split == "train"

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = torch.randperm(self.num_samples) if self.shuffle else torch.arange(self.num_samples)
        for rows in order.split(self.batch_size):
            yield {name: column[rows] for name, column in self.columns.items()}


def whole_way(
    files: dict[str, str],
    fields: dict[str, str],
    label: str,
    out: str,
    loader: str,
    model: dict[str, Any],
    batch_size: int,
) -> dict[str, Any]:
    """From csv files to a full DeepFM by FuxiCTR: its preprocessing, its `fit` until it stops, its metrics.

    Args:
        files: The csv files of "train", "valid" and "test".
        fields: "int", "float" or "str" by the name of each field. Numbers that are floats become buckets, as for Criteo.
        label: Column of the label.
        out: Folder for what it writes.
        loader: "ray", as shipped, or "memory".
        model: Arguments of `fuxictr_deepfm`.
        batch_size: Rows a step.
    """
    import logging

    from fuxictr.datasets.criteo import CustomizedFeatureProcessor
    from fuxictr.features import FeatureMap
    from fuxictr.preprocess import build_dataset
    from fuxictr.pytorch.dataloaders import RankDataLoader
    from fuxictr.pytorch.torch_utils import seed_everything

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    logging.basicConfig(level=logging.INFO)
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(out)
    seed_everything(seed=2024)
    columns = [
        {"name": name, "active": True, "dtype": kind, "type": "categorical"}
        | (
            {"fill_na": 0, "preprocess": "convert_to_bucket"}
            if kind == "float"
            else {"fill_na": "" if kind == "str" else 0}
        )
        for name, kind in fields.items()
    ]
    processor = CustomizedFeatureProcessor(columns, {"name": label, "dtype": "float"}, dataset_id="log", data_root=out)
    paths = {f"{name}_data": path for name, path in files.items()}
    paths = dict(zip(paths, build_dataset(processor, **paths, min_categr_count=1, data_format="csv"), strict=True))
    feature_map = FeatureMap("log", processor.data_dir)
    feature_map.load(processor.json_file, {})
    network = fuxictr_deepfm(feature_map, model_root=out, **model)
    settings: dict[str, Any] = {"batch_size": batch_size, "data_format": "parquet", **paths}
    if loader == "memory":
        settings["data_loader"] = LoaderInMemory
    train, valid, test = RankDataLoader(feature_map, stage="both", shuffle=True, **settings)
    network.fit(train, validation_data=valid, epochs=100)
    tables = sum(value.nbytes for name, value in network.state_dict().items() if "embedding" in name)
    return {
        "auc": float(network.evaluate(test)["AUC"]),
        "epochs": network._epoch_index + 1,
        "table_bytes": tables,
        "model_bytes": Path(network.checkpoint).stat().st_size,
    }


def encode_pandas(log: str, out: str) -> dict[str, Any]:
    """Encode the log with a plain pandas script: read everything, count, map, save."""
    import pandas as pd

    started = time.perf_counter()
    words = dict.fromkeys(synthetic.CATEGORICAL, str)
    frame = pd.read_csv(
        log, sep="\t", dtype=words, keep_default_na=False, na_values=dict.fromkeys(synthetic.NUMERIC, "")
    )
    ids, vocabulary = np.zeros((len(frame), synthetic.NUM_FIELDS), np.int32), 0
    for i, name in enumerate([*synthetic.NUMERIC, *synthetic.CATEGORICAL]):
        values = frame[name]
        if name in synthetic.NUMERIC:
            values = values.where(~(values > 2), np.floor(np.log(values.clip(lower=1)) ** 2)).fillna(-1).astype(int)
        counts = values.value_counts()
        kept = counts[counts >= 10].index
        ids[:, i] = values.map(pd.Series(np.arange(1, len(kept) + 1), kept)).fillna(0)
        vocabulary += len(kept) + 1
    Path(out).mkdir(exist_ok=True)
    np.save(Path(out) / "ids.npy", ids)
    np.save(Path(out) / "labels.npy", frame[synthetic.LABEL].to_numpy(np.float32))
    seconds = time.perf_counter() - started
    return {
        "rows": len(frame),
        "rows_per_s": len(frame) / seconds,
        "vocabulary": vocabulary,
        "log_bytes": Path(log).stat().st_size,
    }


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f for f in (train, embedding, predict, encode_fuxictr, encode_pandas, whole_way)
}

if __name__ == "__main__":
    measure.worker(KINDS)
