"""DLRM of torchrec, its tables sharded: torchrun --nproc-per-node 2 examples/torchrec_sharded.py (docs/torchrec.md)."""

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.models.dlrm import DLRM
from torchrec.optim.optimizers import in_backward_optimizer_filter

import embtrim

DATA = embtrim.load("flights")


def make_model() -> DLRM:
    """The full model, before it is sharded."""
    tables = [EmbeddingBagConfig(v, 16, name=n, feature_names=[n]) for n, v in DATA.schema.tables.items()]
    return DLRM(EmbeddingBagCollection(tables, device=torch.device("meta")), 1, [32, 16], [64, 64, 1])


def shard(model: DLRM) -> DistributedModelParallel:
    """The model on all ranks, as TorchRec's planner sees fit."""
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.05}
    return DistributedModelParallel(model, device=torch.device("cpu"), sharders=[EmbeddingBagCollectionSharder(fused)])


def batches(split: str) -> list[tuple[torch.Tensor, KeyedJaggedTensor]]:
    """This rank's batches: labels and ids; equally many on all ranks."""
    every, ranks = list(DATA.batches(split, 2048)), dist.get_world_size()
    own = every[dist.get_rank() : len(every) // ranks * ranks : ranks]
    flat = [(batch.labels_B, batch.ids_BC.T.flatten().long(), torch.ones(batch.ids_BC.numel()).int()) for batch in own]
    return [(labels, KeyedJaggedTensor.from_lengths_sync(list(DATA.schema.tables), *ids)) for labels, *ids in flat]


def loss(model: torch.nn.Module, batch: tuple[torch.Tensor, KeyedJaggedTensor]) -> torch.Tensor:
    """Mean loss of a batch; DLRM's dense input is a column of ones."""
    return torch.nn.BCEWithLogitsLoss()(model(torch.ones(len(batch[0]), 1), batch[1]).squeeze(1), batch[0])


def train(model: DistributedModelParallel, epochs: int) -> DistributedModelParallel:
    """Some epochs, with Adam for what TorchRec does not update within the backward pass."""
    optimizer = torch.optim.Adam([p for _, p in in_backward_optimizer_filter(model.named_parameters())], 2e-3)
    for batch in epochs * batches("train"):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return model


dist.init_process_group("gloo")
full = train(shard(make_model()), epochs=2)
task = embtrim.torchrec.Task(full, loss, batches("train"), batches("valid"))
plan = embtrim.search(task, embtrim.methods.SSEDSConfig(), "25%")
small = shard(embtrim.torchrec.compact(make_model, plan))
embtrim.torchrec.inherit(full, small, plan)
embtrim.torchrec.verify(full, small, plan, task).require()
losses = task.valid_score(full), task.valid_score(small), task.valid_score(train(small, epochs=1))
print("rank", dist.get_rank(), plan.digest, "validation score of the full, the compact and the retrained model", losses)
dist.destroy_process_group()
