"""Small models on TorchRec's collections, and how the tests shard them on two ranks of gloo."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingEnv, ShardingPlan

SIZES = {"user": 500, "item": 300, "ad": 40, "hour": 24}
WIDTH, NUM_ROWS, BATCH = 8, 2048, 256
RATE = 0.05  # of the tables
SHARDINGS = ("table_wise", "row_wise", "column_wise", "mixed")


class Pooled(nn.Module):
    """FM and a hidden layer over the pooled embeddings, read by name."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        configs = [
            EmbeddingBagConfig(name=f"t_{name}", embedding_dim=WIDTH, num_embeddings=rows, feature_names=[name])
            for name, rows in SIZES.items()
        ]
        self.ebc = EmbeddingBagCollection(tables=configs, device=torch.device(device))
        self.hidden = nn.Linear(WIDTH * len(SIZES), 16)
        self.out = nn.Linear(16, 1)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        found = self.ebc(features)
        x_BFD = torch.stack([found[name] for name in SIZES], 1)
        fm = 0.5 * (x_BFD.sum(1).pow(2) - x_BFD.pow(2).sum(1)).sum(1)
        return self.out(torch.relu(self.hidden(x_BFD.flatten(1)))).squeeze(1) + fm


class Sequences(nn.Module):
    """The mean of a tanh over the embeddings of every id."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        configs = [
            EmbeddingConfig(name=f"t_{name}", embedding_dim=WIDTH, num_embeddings=rows, feature_names=[name])
            for name, rows in SIZES.items()
        ]
        self.ec = EmbeddingCollection(tables=configs, device=torch.device(device))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        found = self.ec(features)
        total = torch.zeros(features.stride())
        for name in SIZES:
            jagged = found[name]
            sample = torch.repeat_interleave(torch.arange(features.stride()), jagged.lengths().long())
            total = total.index_add(0, sample, self.head(torch.tanh(jagged.values())).squeeze(1))
        return total


def loss(model: nn.Module, batch: tuple[Tensor, KeyedJaggedTensor]) -> Tensor:
    labels, features = batch
    return nn.functional.binary_cross_entropy_with_logits(model(features), labels)


def batches(start: int, stop: int, size: int = BATCH) -> list[tuple[Tensor, KeyedJaggedTensor]]:
    """Batches of the rows start..stop of one log of single ids; beyond its end they are empty."""
    rng = np.random.default_rng(0)
    ids = np.stack([np.minimum(rng.geometric(8 / rows, NUM_ROWS) - 1, rows - 1) for rows in SIZES.values()], 1)
    labels = torch.tensor(((ids[:, 0] % 3 + ids[:, 2] % 2 + rng.random(NUM_ROWS)) > 2).astype(np.float32))
    cuts = range(start, stop, size)
    return [(labels[a : min(a + size, stop)], keyed(ids[a : min(a + size, stop)])) for a in cuts]


def keyed(ids: np.ndarray) -> KeyedJaggedTensor:
    flat = torch.from_numpy(np.ascontiguousarray(ids.T)).long().flatten()
    return KeyedJaggedTensor.from_lengths_sync(list(SIZES), flat, torch.ones(len(flat), dtype=torch.int32))


def make_model(kind: type[nn.Module] = Pooled, seed: int = 0) -> Any:
    """A model with weights that are large enough to matter."""
    torch.manual_seed(seed)
    model = kind()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "embedding" in name:
                value.normal_(0, 0.3)
    return model


def sharded(
    model: nn.Module,
    path: str,
    sharding: str,
    kernel: str = "fused",
    optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD,
) -> DistributedModelParallel:
    """The model under DistributedModelParallel, with the weights that it had."""
    world = dist.get_world_size()
    collection = model.get_submodule(path)
    is_bags = isinstance(collection, EmbeddingBagCollection)
    configs = collection.embedding_bag_configs() if is_bags else collection.embedding_configs()
    makers = {
        "table_wise": lambda i: table_wise(rank=i % world, compute_kernel=kernel),
        "row_wise": lambda i: row_wise(compute_kernel=kernel),
        "column_wise": lambda i: column_wise(ranks=list(range(world)), compute_kernel=kernel),
        "data_parallel": lambda i: data_parallel(),
    }
    mixed = ("table_wise", "row_wise", "data_parallel")
    by_table = {
        config.name: makers[mixed[i % 3] if sharding == "mixed" else sharding](i) for i, config in enumerate(configs)
    }
    fused = {"optimizer": optimizer, "learning_rate": RATE, "eps": 1e-8}
    sharder = (EmbeddingBagCollectionSharder if is_bags else EmbeddingCollectionSharder)(fused_params=fused)
    plan = construct_module_sharding_plan(
        collection, by_table, sharder=sharder, device_type="cpu", world_size=world, local_size=world
    )
    part = "embedding_bags" if is_bags else "embeddings"
    weights = {c.name: collection.state_dict()[f"{part}.{c.name}.weight"].clone() for c in configs}
    is_made = not any(weight.is_meta for weight in weights.values())
    found = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=torch.device("cpu"),
        plan=ShardingPlan({path: plan}),
        sharders=[sharder],
    )
    from embtrim.torchrec.sites import find_collections, shards_of

    with torch.no_grad():
        for _, module in find_collections(found):
            for shard in shards_of(module, configs):
                if is_made:
                    shard.weight_RC.copy_(weights[shard.table][shard.rows, shard.columns])
    return found
