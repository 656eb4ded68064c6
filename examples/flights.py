"""Code of all examples: the bundled flights data, a training with early stopping, and the steps to a smaller model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

import embtrim
from embtrim.compaction.foreign import compact_tables
from embtrim.training.metrics import auc

WIDTH = 16
SEEDS = (0, 1, 2)
BUDGET = "10%"
METHODS = {"sseds": embtrim.methods.SSEDSConfig(min_dim=0), "uniform": embtrim.methods.UniformConfig()}
# The best weight decay of 0, 1e-5, 1e-4, 1e-3, 2e-3, 5e-3 by the validation AUC of deepctr-torch's full model, seed 0.
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-3
MOST_EPOCHS, PATIENCE = 40, 3
DATA = embtrim.load("flights")
SIZES = {field.name: field.vocab_size for field in DATA.schema.id_fields}

Probability = Callable[[nn.Module, Tensor], Tensor]


def loader(split: str) -> DataLoader:
    """Batches (ids_BF, labels_B) of a split; training batches are shuffled."""
    arrays = DATA.split(split)
    rows = TensorDataset(torch.from_numpy(np.array(arrays.ids, np.int64)), torch.from_numpy(np.array(arrays.labels)))
    order = RandomSampler(rows) if split == "train" else SequentialSampler(rows)
    return DataLoader(rows, sampler=BatchSampler(order, batch_size=2048, drop_last=False), batch_size=None)


@torch.no_grad()
def evaluate(model: nn.Module, probability: Probability, split: str) -> float:
    """AUC over a whole split."""
    model.eval()
    parts = [(probability(model, ids_BF), labels_B) for ids_BF, labels_B in loader(split)]
    probabilities_N, labels_N = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return auc(labels_N, probabilities_N)


def train(model: nn.Module, loss: Callable[[nn.Module, list[Tensor]], Tensor], probability: Probability) -> None:
    """Train until the validation AUC has not risen for some epochs, and restore the best one."""
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    best, best_epoch, best_state = 0.0, 0, {}
    for epoch in range(MOST_EPOCHS):
        model.train()
        for batch in loader("train"):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
        score = evaluate(model, probability, "valid")
        if score > best:
            best, best_epoch = score, epoch
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
        elif epoch - best_epoch == PATIENCE:
            break
    model.load_state_dict(best_state)


def trim(library: str, make_model: Callable[[int], nn.Module], probability: Probability) -> None:
    """Train a model, search it with each method, compact, retrain, and print the rows of the table in README.md.

    Args:
        library: Name and version of the library.
        make_model: Function that takes a seed and returns a model with initial weights.
        probability: Function that takes a model and ids_BF and returns the probability of a late flight, (B,).
    """

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return nn.functional.binary_cross_entropy(probability(model, batch[0]), batch[1])

    outcomes_by_method: dict[str, list[tuple[float, ...]]] = {name: [] for name in METHODS}
    for seed in SEEDS:
        model = make_model(seed)
        train(model, loss, probability)
        full_auc, full_bytes = evaluate(model, probability, "test"), num_bytes(model)

        task = embtrim.Task(model, loss, loader("train"), loader("valid"))
        for name, config in METHODS.items():
            plan = embtrim.search(task, config, BUDGET, seed)
            verified = embtrim.verify(model, plan, task)
            # A fresh model: `compact` keeps the dense layers that it is given.
            small = embtrim.compact(make_model(seed), plan, seed=seed)
            train(small, loss, probability)

            verified.require()
            sizes = (4 * plan.num_full_params, num_bytes(*compact_tables(small, plan)), full_bytes, num_bytes(small))
            aucs = full_auc, evaluate(small, probability, "test")
            outcomes_by_method[name].append((*aucs, *sizes, verified.max_difference))

    for finding in task.survey():
        print(finding)
    for name, outcomes in outcomes_by_method.items():
        *aucs, table, small_table, whole, small_whole, difference = zip(*outcomes, strict=True)
        row = [library, type(model).__name__, f"{num_lines(Path(sys.argv[0]))}", f"{name} {BUDGET}"]
        row += [
            f"{mean(values):.4f} ({stdev(values):.4f})" if len(SEEDS) > 1 else f"{values[0]:.4f}" for values in aucs
        ]
        row += [f"{max(values):,}" for values in (table, small_table, whole, small_whole)]
        print(f"| {' | '.join([*row, f'{max(difference):.1e}'])} |", flush=True)


def num_bytes(*modules: nn.Module) -> int:
    """Bytes of the saved tensors of modules; a shared tensor counts once."""
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def num_lines(script: Path) -> int:
    """Lines of code of a script, without docstrings, comments and blank lines."""
    lines = [line.strip() for line in script.read_text("utf-8").splitlines()]
    return sum(bool(line) and not line.startswith(('"""', "#")) for line in lines)
