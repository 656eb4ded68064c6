"""Where embeddings live in a model, and the Task that a search sees.

A *site* is a place where embeddings enter a model: the EmbeddingTables of a zoo model (one site, all fields), or each
nn.Embedding and nn.EmbeddingBag of a foreign model. Its *slots* are (table, column) pairs; a slot gate multiplies what the site puts out.
A search reads a Task and its sites and knows neither the model nor the kind of site.

Two gates. A *slot gate* multiplies what a site puts out, after pooling, and may differ per sample. A *row gate* sees
the distinct rows of a batch before they are expanded and pooled: single rows are masked, or their gradients read,
through it. Rows of a site are numbered table by table.

Shapes: S slots of a site, B batch, O output columns of a site, U distinct rows of a batch, V rows of a table.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from embtrim.data.dataset import Batch, EncodedDataset, SplitArrays
from embtrim.data.encoder import vocabulary_bytes
from embtrim.errors import EmbtrimError
from embtrim.models.ctr_model import CTRModel
from embtrim.plan.plan import Alignment, Block, SizePlan, TablePlan
from embtrim.schema import OOV
from embtrim.system.progress import tracked
from embtrim.tables.embedding_tables import EmbeddingTables
from embtrim.tables.replacements import Replacement, pool_entries
from embtrim.training.checkpoint import Checkpoint, CheckpointFolder
from embtrim.training.fitting import (
    FitResult,
    Hooks,
    TrainConfig,
    device_of,
    evaluate,
    fast_matmul,
    fit,
    logloss_of_batch,
    scale_learning_rates,
    train_loop,
)
from embtrim.training.metrics import compute_metrics

# Rows a batch where many gatings are scored: activations of larger ones fall out of the cache.
GATED_BATCH_SIZE = 2_048

SlotGate = Tensor | Callable[[Tensor], Tensor]
RowGate = Callable[[Tensor, Tensor], Tensor]


class Site(Protocol):
    """A place where embeddings enter a model.

    Attributes:
        names: names of its tables.
        num_rows: rows of each table.
        widths: columns of each table.
        reserved_rows: for each table the row that outlives all others, if any: OOV, or a padding row.
    """

    names: tuple[str, ...]
    num_rows: tuple[int, ...]
    widths: tuple[int, ...]
    reserved_rows: tuple[int | None, ...]

    def gated(self, slots: SlotGate | None = None, rows: RowGate | None = None) -> AbstractContextManager[None]:
        """Apply gates inside a `with` block; those of one site do not nest.

        Args:
            slots: multiply the site's slots by a tensor (S,) or (B, S), or apply a function to its output. Slots run
                table by table, column by column; a function gets the pooled output (B, O), field by field.
            rows: function of (rows of the site (U,), their embeddings (U, D)), which returns embeddings.
        """
        ...

    def weights(self) -> list[Tensor]:
        """The tables' embeddings (V, D), as views of the parameters without their gradient."""
        ...

    def drop_rows(self, kept: Sequence[Tensor]) -> None:
        """Set rows to zero in place, and their first-order weights.

        Args:
            kept: for each table, bool (V,): the rows to leave alone.
        """
        ...


class TableSite:
    """The full EmbeddingTables of a zoo model; fields that share a table share its slots."""

    def __init__(self, tables: EmbeddingTables) -> None:
        if not tables.plan.keeps_all:
            raise EmbtrimError("these tables are compact already; search in the full model")
        self.tables = tables
        plans = tables.plan.tables
        self.names = tuple(t.name for t in plans)
        self.num_rows = tuple(t.num_rows for t in plans)
        self.widths = tuple(t.output_width for t in plans)
        self.reserved_rows: tuple[int | None, ...] = (OOV,) * len(plans)
        first = dict(zip(self.names, np.cumsum([0, *self.widths[:-1]]).tolist(), strict=True))
        slots = [
            first[f.table_name] + column
            for f, width in zip(tables.schema.id_fields, tables.widths, strict=True)
            for column in range(width)
        ]
        # None where the slots are the output columns in order: no table is shared.
        self.slot_of_output = None if slots == list(range(len(slots))) else torch.tensor(slots)

    def gated(self, slots: SlotGate | None = None, rows: RowGate | None = None) -> AbstractContextManager[None]:
        """See Site."""
        if isinstance(slots, Tensor):
            by_output = slots if self.slot_of_output is None else slots[..., self.slot_of_output.to(slots.device)]
            return self.tables.gated(lambda concat: concat * by_output, rows)
        return self.tables.gated(slots, rows)

    def weights(self) -> list[Tensor]:
        """See Site."""
        self.tables.settle()
        stored = self.tables.group_view(self.tables.groups[0]).detach()  # full tables: one width, in the schema's order
        return list(stored.split(self.num_rows))

    @torch.no_grad()
    def drop_rows(self, kept: Sequence[Tensor]) -> None:
        """See Site."""
        dropped_R = ~torch.cat(list(kept))
        self.tables.settle()
        self.tables.group_view(self.tables.groups[0])[dropped_R] = 0.0
        if self.tables.first_order is not None:
            self.tables.first_order[dropped_R] = 0.0


class ModuleSite:
    """The nn.Embedding or nn.EmbeddingBag of a foreign model that holds a weight, used any number of times in a pass.

    A *flat table*, whose ids run through several fields, has a table a field; slots then gate single entries, before
    they are pooled.

    Args:
        name: path of the module; tables of a flat one are called "path[field]".
        module: what holds the weight.
        fields: rows of each field, in order, where the table is flat.

    Attributes:
        path: `name`.
        modules: `module`, and others with the same weight and the same settings.
    """

    def __init__(
        self, name: str, module: nn.Embedding | nn.EmbeddingBag, fields: Mapping[str, int] | None = None
    ) -> None:
        self.path, self.module = name, module
        self.modules = [module]
        self.names = tuple(f"{name}[{field}]" for field in fields) if fields else (name,)
        self.num_rows = tuple(fields.values()) if fields else (module.num_embeddings,)
        self.widths = (module.embedding_dim,) * len(self.names)
        first = np.cumsum([0, *self.num_rows]).tolist()
        row = module.padding_idx
        self.reserved_rows: tuple[int | None, ...] = tuple(
            row - low if row is not None and low <= row < high else None for low, high in itertools.pairwise(first)
        )

    @contextmanager
    def gated(self, slots: SlotGate | None = None, rows: RowGate | None = None) -> Iterator[None]:
        """See Site; a slot function gets the module's output (..., D), of a flat table ones (B, S)."""
        by_entry = slots if len(self.names) > 1 else None

        def apply(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            if rows is not None or by_entry is not None:
                ids, offsets, weights = read_call(args, kwargs)
                rows_U, inverse = torch.unique(ids, return_inverse=True)
                found_UD = nn.functional.embedding(
                    rows_U, module.weight, padding_idx=module.padding_idx, sparse=module.sparse
                )
                entries = (found_UD if rows is None else rows(rows_U, found_UD))[inverse]
                if by_entry is not None:
                    entries = entries * self._entry_gates(by_entry, ids, offsets)
                output = pool_entries(module, entries, ids, offsets, weights)
            if slots is None or by_entry is not None:
                return output
            if not isinstance(slots, Tensor):
                return slots(output)
            return output * (slots if slots.ndim == 1 else slots.view(len(slots), *[1] * (output.ndim - 2), -1))

        with ExitStack() as stack:
            for module in self.modules:
                handle = module.register_forward_hook(apply, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _entry_gates(self, slots: SlotGate, ids: Tensor, offsets: Tensor | None) -> Tensor:
        """What multiplies each entry (..., D) of a flat table, by the field that its id is of, and its sample."""
        width = self.widths[0]
        ends = torch.tensor(np.cumsum(self.num_rows), device=ids.device)
        field = torch.bucketize(ids.long(), ends, right=True)
        if isinstance(slots, Tensor) and slots.ndim == 1:
            return nn.functional.embedding(field, slots.view(-1, width))
        if offsets is None:
            sample, size = torch.arange(len(ids), device=ids.device).view(-1, *[1] * (ids.ndim - 1)), len(ids)
        else:
            sample = torch.bucketize(torch.arange(len(ids), device=ids.device), offsets.long(), right=True) - 1
            size = len(offsets) - bool(self.module.include_last_offset)
        if not isinstance(slots, Tensor):
            slots = slots(self.module.weight.new_ones(size, len(self.names) * width))
        return slots.view(size, -1, width)[sample, field]

    def weights(self) -> list[Tensor]:
        """See Site."""
        return list(self.module.weight.detach().split(self.num_rows))

    @torch.no_grad()
    def drop_rows(self, kept: Sequence[Tensor]) -> None:
        """See Site."""
        self.module.weight[~torch.cat(list(kept))] = 0.0


def read_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Ids, offsets and per-sample weights of a call of an nn.Embedding or nn.EmbeddingBag."""
    given = {**dict(zip(("input", "offsets", "per_sample_weights"), args, strict=False)), **kwargs}
    return given["input"], given.get("offsets"), given.get("per_sample_weights")


@dataclass(frozen=True)
class Finding:
    """What `survey` says of one module with embeddings.

    Attributes:
        name: path of the module.
        kind: its type.
        num_rows: rows of its tables.
        width: their columns.
        found: whether it is a site, or part of one.
        note: why it was left alone, or its fields, or what it shares.
        num_bytes: of its parameters, but of those that an earlier finding counts.
    """

    name: str
    kind: str
    num_rows: int
    width: int
    found: bool
    note: str
    num_bytes: int

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.name}: {self.kind} {self.num_rows:,} x {self.width}, {'found' if self.found else 'left'}{note}"


Fields = Mapping[str, Mapping[str, int]]


def survey(model: nn.Module, keep: Callable[[str], bool] | None = None, fields: Fields | None = None) -> list[Finding]:
    """Say of each module with embeddings whether it is found or left alone, and why; for arguments see `find_sites`.

    Example:
        >>> print(*survey(nn.Sequential(nn.Embedding(9, 4), nn.Embedding(9, 1))), sep="; ")
        0: Embedding 9 x 4, found; 1: Embedding 9 x 1, left (width 1, a first-order term)
    """
    return _look(model, keep, fields)[0]


def find_sites(model: nn.Module, keep: Callable[[str], bool] | None = None, fields: Fields | None = None) -> list[Site]:
    """Find where embeddings enter a model.

    Modules that hold one weight are one site. Left alone are first-order terms (width 1), pooling by max, gradients
    scaled by frequency, subclasses with a forward of their own, and weights that other kinds of modules read too.

    Args:
        model: zoo model or foreign module.
        keep: filter on module paths; False leaves a module alone.
        fields: of each flat table, by module path: the fields that its ids run through, in order, and their rows.

    Raises:
        EmbtrimError: nothing was found, with what was seen and why it was left; or `fields` names no module that was
            found, or rows that do not add up to its table.
    """
    findings, sites = _look(model, keep, fields)
    if not sites:
        seen = "; ".join(map(str, findings)) or "it has no nn.Embedding or nn.EmbeddingBag"
        raise EmbtrimError(f"no embedding to shrink was found in {type(model).__name__}: {seen}")
    return sites


def _look(
    model: nn.Module, keep: Callable[[str], bool] | None, fields: Fields | None
) -> tuple[list[Finding], list[Site]]:
    """One pass for `survey` and `find_sites`, so that what is said is what is done."""
    if keep is not None and not callable(keep):
        raise EmbtrimError(
            f"keep= is a function of a module's path, such as lambda path: path != 'user'; given {keep!r}"
        )
    findings: list[Finding] = []
    sites: list[Site] = []
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), []).append((name, module))
    by_weight: dict[int, ModuleSite] = {}
    counted: set[int] = set()

    def num_bytes(module: nn.Module) -> int:
        new = {id(p): p.nbytes for p in module.parameters() if id(p) not in counted}
        counted.update(new)
        return sum(new.values())

    for name, module in model.named_modules():
        if isinstance(module, Replacement):
            note = "compact already; search and compact the full model"
            if not any(name.startswith(f"{f.name}.") for f in findings if f.note == note):  # else a part of one
                rows, width = module.num_embeddings, module.embedding_dim
                findings.append(Finding(name, type(module).__name__, rows, width, False, note, num_bytes(module)))  # type: ignore[arg-type]
        elif isinstance(module, EmbeddingTables):
            sites.append(TableSite(module))
            rows = sum(sites[-1].num_rows)
            findings.append(Finding(name, type(module).__name__, rows, module.width, True, "", num_bytes(module)))
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            sharing = holders.get(id(module._parameters.get("weight")), [])
            reasons = [_why_left(name, module, keep), *(_why_left(*other, keep) for other in sharing)]
            note = next(filter(None, reasons), "")
            others = [other for other, their in sharing if their is not module]
            if not note and any(_settings(their) != _settings(module) for _, their in sharing):
                note = f"shares its weight with {others[0]}, whose settings differ"
            found = not note
            named = (fields or {}).get(name)
            if found and named is not None:
                _check_fields(name, module.num_embeddings, named)
                note = f"fields {', '.join(named)}"
            elif found and others:
                note = f"one table with {', '.join(others)}"
            rows, width = module.num_embeddings, module.embedding_dim
            findings.append(Finding(name, type(module).__name__, rows, width, found, note, num_bytes(module)))
            if not found:
                continue
            if id(module.weight) in by_weight:
                by_weight[id(module.weight)].modules.append(module)
            else:
                by_weight[id(module.weight)] = ModuleSite(name, module, named)
                sites.append(by_weight[id(module.weight)])
    unknown = set(fields or ()) - {site.path for site in by_weight.values()}
    if unknown:
        seen = "; ".join(map(str, findings)) or "it has none"
        raise EmbtrimError(f"fields= names {sorted(unknown)[0]!r}, which is no embedding that was found: {seen}")
    return findings, sites


def _why_left(name: str, module: nn.Module, keep: Callable[[str], bool] | None) -> str:
    """Why a module that holds an embedding weight is no site; empty if it is one."""
    if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return f"{name or type(module).__name__}, a {type(module).__name__}, reads its weight too"
    if type(module).forward not in (nn.Embedding.forward, nn.EmbeddingBag.forward):
        return f"{type(module).__name__} has a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which a replacement would not call"
    if "weight" not in module._parameters:
        return "its weight is computed from others"
    if module.embedding_dim == 1:
        return "width 1, a first-order term"
    if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        return "mode 'max': a removed entry is not the same as a zero"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq"
    return "filtered out" if keep is not None and not keep(name) else ""


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """What two modules with one weight must have in common to be replaced by one."""
    names = ("padding_idx", "max_norm", "norm_type", "sparse", "mode", "include_last_offset")
    return tuple(getattr(module, name, None) for name in names)


def _check_fields(name: str, num_rows: int, fields: Mapping[str, int]) -> None:
    total = sum(fields.values())
    if total != num_rows or min(fields.values()) < 1:
        listed = " + ".join(f"{rows:,} ({field})" for field, rows in fields.items())
        raise EmbtrimError(
            f"the fields of {name!r} have {listed or 'none'} = {total:,} rows, the table has {num_rows:,}; name "
            "every field of the table with its rows, at least one each, in the order of their offsets"
        )


def fields_of(model: nn.Module, plan: SizePlan) -> dict[str, dict[str, int]]:
    """Fields of each module of `model` that a plan is for, with their rows; none of a table that is not flat."""
    paths = {path for path, _ in model.named_modules()}
    found: dict[str, dict[str, int]] = {}
    for table in plan.tables:
        # Of "path[field]" either part may hold brackets of its own: the longest path that the model has is meant.
        starts = [i for i, character in enumerate(table.name) if character == "["]
        candidates = [table.name, *(table.name[:i] for i in reversed(starts))]
        path = next((c for c in candidates if c in paths), candidates[-1])
        fields = found.setdefault(path, {})
        if path != table.name:
            fields[table.name[len(path) + 1 : -1]] = table.num_rows
    return found


def site_plan(sites: Sequence[Site]) -> SizePlan:
    """The keep-everything plan of a foreign model's sites; its fingerprint covers names, rows and widths."""
    tables = tuple(
        TablePlan(name, rows, width, (Block(rows, tuple(range(width))),))
        for site in sites
        for name, rows, width in zip(site.names, site.num_rows, site.widths, strict=True)
    )
    text = repr([(t.name, t.num_rows, t.width) for t in tables])
    return SizePlan(hashlib.sha256(text.encode()).hexdigest()[:12], len(tables), tables, standalone=True, method="full")


class Task:
    """A model with everything a search may ask of it.

    Args:
        model: the model to shrink; searches never change it.
        loss: (model, batch) -> mean loss, a scalar tensor.
        train: training batches: an iterable that starts anew at each `iter`, such as a DataLoader.
        valid: validation batches, likewise; needed by searches that score on validation data.
        score: model -> validation score, higher is better, by which searches compare models; without one it is minus the
            mean validation loss.
        optimizer: model -> optimiser; needed by searches that train.
        fresh: seed -> a model with initial weights; needed by searches that start from them. It may also take no
            argument: torch's generator is then seeded around the call.
        keep: filter on module paths, see `find_sites`.
        fields: of each flat table, by module path: the fields that its ids run through, and their rows; such as
            `{"embedding": {"user": 1000, "item": 500}}`.

    Attributes:
        progress: whether searches show progress bars on stderr.
        checkpoints: where a search keeps the state of its trainings, and of other work that takes long, if anywhere: an
            interrupted search that is started again with the same folder goes on where it was.
    """

    needs_aligned = True  # a foreign module's forward expects the full width
    progress = False
    checkpoints: CheckpointFolder | None = None

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        train: Iterable[Any],
        valid: Iterable[Any] | None = None,
        score: Callable[[nn.Module], float] | None = None,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        fresh: Callable[..., nn.Module] | None = None,
        keep: Callable[[str], bool] | None = None,
        fields: Fields | None = None,
    ) -> None:
        self.model = model
        self.loss = loss
        self._train, self._valid = train, valid
        self.score = score
        self._optimizer, self._fresh, self._keep, self._fields = optimizer, fresh, keep, fields

    def sites(self, model: nn.Module) -> list[Site]:
        """The sites of a model of this task."""
        return find_sites(model, self._keep, self._fields)

    def survey(self) -> list[Finding]:
        """What was found of the model's embeddings, what was left alone, and why."""
        return survey(self.model, self._keep, self._fields)

    def full_plan(self) -> SizePlan:
        """The plan that keeps everything."""
        return site_plan(self.sites(self.model))

    def batches(self, split: str, seed: int | None = None) -> Iterable[Any]:
        """Batches of "train" or "valid"; `seed` shuffles where the task can."""
        batches = self._train if split == "train" else self._valid
        if batches is None:
            raise EmbtrimError(f"this search reads {split} batches; give the Task `{split}=`")
        return batches

    def probe(self) -> list[Any]:
        """One batch, of "valid" if there are any; none of an iterator, which gives each batch once, or of no batches."""
        batches = self._train if self._valid is None else self._valid
        return [] if batches is None or isinstance(batches, Iterator) else list(itertools.islice(batches, 1))

    def tracked_batches(self, split: str, what: str, seed: int | None = None) -> Iterable[Any]:
        """`batches`, with a progress bar where the task shows them."""
        total = self.num_batches(split) if self.progress else None
        return tracked(self.batches(split, seed), what, total, self.progress)

    def num_batches(self, split: str) -> int:
        """Batches a pass over "train" or "valid"; a loader without a length is read once."""
        batches = self.batches(split)
        return len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)

    def fresh(self, seed: int) -> nn.Module:
        """A model with initial weights."""
        if self._fresh is None:
            raise EmbtrimError("this search starts from initial weights; give the Task `fresh=` (seed -> model)")
        if takes_seed(self._fresh):
            return self._fresh(seed)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return self._fresh()

    def fit(
        self,
        model: nn.Module,
        epochs: int,
        seed: int,
        hooks: Hooks | None = None,
        patience: int | None = None,
        lr_factor: float = 1.0,
        **settings: Any,
    ) -> FitResult:
        """Train a model of this task, full or compact; with `patience` stop early and restore the best weights.

        Args:
            model: trained in place.
            epochs: passes over the training batches, at most.
            seed: of shuffling and dropout.
            hooks: additions of a search method.
            patience: epochs without a better validation score (`valid_score`) after which training stops; 0 never stops
                early, but restores the best weights. None looks at no score.
            lr_factor: on the learning rates of the task.
            settings: fields of TrainConfig that a method asks for, such as `tables="dense"`; they have no effect on a
                task with an `optimizer=` of its own.

        Raises:
            EmbtrimError: the task has no `optimizer=`, or for `patience` neither `valid=` nor `score=`.

        Example:
            >>> task.fit(small, epochs=40, seed=0, patience=3)  # doctest: +SKIP
        """
        if self._optimizer is None:
            raise EmbtrimError("this trains; give the Task `optimizer=` (model -> optimiser)")
        if patience is not None and self.score is None and self._valid is None:
            raise EmbtrimError("patience watches a validation score; give the Task `valid=` or `score=`")
        hooks = hooks or Hooks()
        sizes = [tuple(p.shape) for p in model.parameters()]
        depends_on = {
            "epochs": epochs, "seed": seed, "patience": patience, "lr_factor": lr_factor, "sizes": sizes, **hooks.settings
        }  # fmt: skip
        optimizer = self._optimizer(model)
        if lr_factor != 1:
            scale_learning_rates([optimizer], lr_factor)
        config = TrainConfig(epochs=epochs, seed=seed, precision="fp32", patience=patience or 0, reduce_lr=1.0)

        def batches(epoch: int, skip: int) -> Iterator[Any]:
            found = iter(self.batches("train", seed * 100_003 + epoch))
            for _ in range(skip):  # now: a loader draws its order when the first batch is asked for
                next(found)
            return found

        result = train_loop(
            model,
            loss=self.loss,
            batches=batches,
            num_rows=None,
            optimizers=[optimizer],
            score=None if patience is None else lambda: self.valid_score(model),
            config=config,
            hooks=hooks,
            progress=self.progress,
            checkpoint=self.next_checkpoint(depends_on, model),
        )
        return self._noted(result)

    def next_checkpoint(self, settings: Mapping[str, Any], model: nn.Module) -> Checkpoint | None:
        """Where the next piece of work of a search keeps its state, if anywhere; see Checkpoint for the arguments."""
        if self.checkpoints is None:
            return None
        return Checkpoint(self.checkpoints.next_path(), self.checkpoints.interval, settings, model)

    def kept(self, what: str, model: nn.Module, make: Callable[[], Any]) -> Any:
        """What `make` gives, or in a search that goes on what it gave before.

        Args:
            what: name of the work and of its settings; the result of other work is refused.
            model: what it is done on.
            make: work that changes nothing, with a tensor or a JSON-able value as its result.
        """
        checkpoint = self.next_checkpoint({"work": what}, model)
        if checkpoint is None or self.checkpoints is None:
            return make()
        saved = checkpoint.load()
        if saved is not None:
            self.checkpoints.spent_seconds += saved["seconds"]
            return saved["value"]
        started = time.perf_counter()
        value = make()
        checkpoint.save({"value": value, "seconds": time.perf_counter() - started})
        return value

    def _noted(self, result: FitResult) -> FitResult:
        """The result of a training; what it took before it was interrupted is added up."""
        if self.checkpoints is not None:
            self.checkpoints.spent_seconds += result.restored_seconds
        return result

    def vocabulary_bytes(self, plan: SizePlan | None = None) -> int:
        """Bytes of the vocabulary that goes along with a model of a plan, or with the full one; 0 where none is known of."""
        return 0

    def recoded(self, plan: SizePlan) -> Task:
        """This task for a compact model: its batches carry the ids of the plan, where the task can re-number them.

        It shows no progress: whoever trains many candidates counts them.
        """
        task = copy.copy(self)
        task.progress = False
        return task

    @torch.no_grad()
    def valid_score(self, model: nn.Module) -> float:
        """`score=` of a model, or without one minus its mean validation loss; higher is better."""
        model.eval()
        if self.score is not None:
            return float(self.score(model))
        total = rows = 0.0
        for batch in self.batches("valid"):
            weight = loss_weight(batch)
            total, rows = total + weight * float(self.loss(model, batch)), rows + weight
        return -total / self._scored(rows)

    @torch.no_grad()
    def gated_scores(self, model: nn.Module, gates: Sequence[Sequence[SlotGate]], max_rows: int = 0) -> list[float]:
        """Validation score of a model under each of several slot gatings, higher is better.

        Without a `score=` it is minus the mean validation loss.

        Args:
            model: put into evaluation mode.
            gates: for each gating, the slot gate of each site.
            max_rows: validation rows to score on, where the task can draw a sample; 0 means all.
        """
        sites = self.sites(model)
        model.eval()
        if self.score is not None:
            scores = []
            for gating in gates:
                with gate_sites(sites, gating):
                    scores.append(float(self.score(model)))
            return scores
        totals, rows = [0.0] * len(gates), 0.0
        for batch in self.batches("valid"):
            weight = loss_weight(batch)
            rows += weight
            for number, gating in enumerate(gates):
                with gate_sites(sites, gating):
                    totals[number] -= weight * float(self.loss(model, batch))
        return [total / self._scored(rows) for total in totals]

    @staticmethod
    def _scored(rows: float) -> float:
        """Validation rows that were scored; without any no score means anything."""
        if not rows:
            raise EmbtrimError("there are no valid batches to score on; give some that can be read again")
        return rows

    def row_counts(self) -> dict[str, np.ndarray]:
        """Occurrences of each row in the training data, int64 (V,) by table; one forward pass over the batches."""
        sites = [site for site in self.sites(self.model) if isinstance(site, ModuleSite)]
        totals = [np.zeros(sum(site.num_rows), np.int64) for site in sites]

        def count(total_V: np.ndarray, _module: nn.Module, args: Any, kwargs: Any, _output: Tensor) -> None:
            ids, *_ = read_call(args, kwargs)
            total_V += torch.bincount(ids.flatten(), minlength=len(total_V)).cpu().numpy()

        hooks = [
            module.register_forward_hook(partial(count, total_V), with_kwargs=True)
            for site, total_V in zip(sites, totals, strict=True)
            for module in site.modules
        ]
        was_training = self.model.training
        self.model.eval()
        num_batches = 0
        try:
            with torch.no_grad():
                for batch in self.batches("train"):
                    self.loss(self.model, batch)
                    num_batches += 1
        finally:
            self.model.train(was_training)
            for hook in hooks:
                hook.remove()
        if not num_batches:
            raise EmbtrimError("there are no train batches to count rows on; give some that can be read again")
        return {
            name: part
            for site, total_V in zip(sites, totals, strict=True)
            for name, part in zip(site.names, np.split(total_V, np.cumsum(site.num_rows)[:-1]), strict=True)
        }


def loss_weight(batch: Any) -> float:
    """What the mean loss of a batch counts among those of others: its rows, or the sum of their sample weights.

    Of a batch of a loader's own making the rows are those of its first part; 1 if that is no tensor and holds none first.
    """
    if isinstance(batch, Batch):
        return float(len(batch) if batch.weights_B is None else batch.weights_B.sum())
    if isinstance(batch, Tensor):
        return float(len(batch)) if batch.ndim else 1.0
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((loss_weight(part) for part in parts), 1.0)


def takes_seed(fresh: Callable[..., nn.Module]) -> bool:
    """Whether `fresh=` of a Task wants a seed: an argument that it cannot do without, or its first one is `seed`."""
    positional = [p for p in inspect.signature(fresh).parameters.values() if p.kind <= p.VAR_POSITIONAL]
    return any(p.default is p.empty for p in positional) or any(p.name == "seed" for p in positional[:1])


class CTRTask(Task):
    """The task of a zoo model on encoded data.

    Args:
        model: zoo model; trained already, for searches that need one.
        data: encoded data with a "train" and, for most searches, a "valid" split.
        config: how `fit` trains; batch size, L2 and so on of the search's own training.

    Raises:
        EmbtrimError: the model is none of embtrim.models.
    """

    def __init__(self, model: CTRModel, data: EncodedDataset, config: TrainConfig | None = None) -> None:
        if not isinstance(model, CTRModel):
            raise EmbtrimError(
                f"a CTRTask is of a model of embtrim.models, given a {type(model).__name__}; give that one to a "
                "Task(model, loss=.., train=.., valid=..)"
            )
        self.data = data
        self.config = config or TrainConfig()
        model.to(device_of(self.config))  # in place, as `fit` does: batches go there too
        super().__init__(model, logloss_of_batch, train=(), score=self._score)
        self.model: CTRModel = model
        self.needs_aligned = model.needs_aligned

    def _score(self, model: nn.Module) -> float:
        assert isinstance(model, CTRModel)
        return evaluate(model, self.data, "valid", self.config).auc

    def full_plan(self) -> SizePlan:
        """See Task."""
        return SizePlan.full(self.data.schema, self.model.tables.width, self.model.has_first_order)

    def batches(self, split: str, seed: int | None = None) -> Iterable[Any]:
        """See Task."""
        return (b.to(self.config.device) for b in self.data.batches(split, self.config.batch_size, seed))

    def vocabulary_bytes(self, plan: SizePlan | None = None) -> int:
        """See Task."""
        return vocabulary_bytes(self.data, plan)

    def recoded(self, plan: SizePlan) -> CTRTask:
        """See Task."""
        task = CTRTask(self.model, self.data.recode(plan), self.config)
        task.checkpoints = self.checkpoints
        return task

    def num_batches(self, split: str) -> int:
        """See Task."""
        return -(-self.data.num_rows(split) // self.config.batch_size)

    def fresh(self, seed: int) -> nn.Module:
        """See Task."""
        model = type(self.model)(self.model.schema, **{**self.model.hparams, "seed": seed})
        return model.to(self.config.device)

    def fit(
        self,
        model: nn.Module,
        epochs: int,
        seed: int,
        hooks: Hooks | None = None,
        patience: int | None = None,
        lr_factor: float = 1.0,
        **settings: Any,
    ) -> FitResult:
        """See Task; the score is the AUC."""
        assert isinstance(model, CTRModel)
        splits = {"train": self.data.split("train")}
        if patience is not None:
            splits["valid"] = self.data.split("valid")
            settings |= {"patience": patience, "monitor": "auc"}
        data = EncodedDataset(self.data.schema, splits, id_maps=self.data.id_maps)
        config = self.config.replace(epochs=epochs, seed=seed, compile=False, **settings)  # they are short, and many
        config = config.replace(learning_rate=config.learning_rate * lr_factor)
        checkpoint = None
        if self.checkpoints is not None:
            config = config.replace(checkpoint_seconds=self.checkpoints.interval)
            checkpoint = self.checkpoints.next_path()
        return self._noted(fit(model, data, config, hooks=hooks, progress=self.progress, checkpoint=checkpoint))

    @torch.no_grad()
    def gated_scores(self, model: nn.Module, gates: Sequence[Sequence[SlotGate]], max_rows: int = 0) -> list[float]:
        """See Task; the score is the AUC, of the same sample of rows at every call."""
        arrays = self.data.split("valid")
        if 0 < max_rows < len(arrays):
            rows = np.sort(np.random.default_rng(0).choice(len(arrays), max_rows, replace=False))
            columns = (arrays.ids, arrays.labels, arrays.dense, arrays.weights)
            arrays = SplitArrays(*(None if column is None else column[rows] for column in columns))  # type: ignore[arg-type]
        sample = EncodedDataset(self.data.schema, {"valid": arrays}, id_maps=self.data.id_maps)
        sites, device = self.sites(model), device_of(self.config)
        model.to(device).eval()
        logits = np.empty((len(gates), len(arrays)), np.float32)
        start = 0
        with fast_matmul("fp32", device):
            for batch in sample.batches("valid", GATED_BATCH_SIZE):
                batch = batch.to(device)
                for number, gating in enumerate(gates):
                    with gate_sites(sites, gating):
                        logits_B = model(batch.ids_BC, batch.dense_BE).float().cpu().numpy()
                    logits[number, start : start + len(batch)] = logits_B
                start += len(batch)
        return [compute_metrics(arrays.labels, found, arrays.weights).auc for found in logits]

    def row_counts(self) -> dict[str, np.ndarray]:
        """See Task."""
        return self.data.value_counts("train")


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Undo on leaving what max_norm does: an nn.Embedding then renormalises rows in place as they are read."""
    limited = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None]
    weights = [module.weight for module in limited]
    before = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, values in zip(weights, before, strict=True):
                weight.copy_(values)


@contextmanager
def gate_sites(
    sites: Sequence[Site], slots: Sequence[SlotGate] | None = None, rows: Sequence[RowGate] | None = None
) -> Iterator[None]:
    """Gate every site, by the slot gates and the row gates given: one each a site."""
    with ExitStack() as stack:
        for number, site in enumerate(sites):
            stack.enter_context(site.gated(slots[number] if slots else None, rows[number] if rows else None))
        yield


def weights_by_table(sites: Sequence[Site]) -> dict[str, Tensor]:
    """The embeddings (V, D) of every table by its name; see `Site.weights`."""
    return {name: weight_VD for site in sites for name, weight_VD in zip(site.names, site.weights(), strict=True)}


def num_slots(site: Site) -> int:
    """Slots of a site, S."""
    return sum(site.widths)


def alignment_of(task: Task, wanted: Alignment) -> Alignment:
    """The alignment a plan for this task needs: none for a model that only concatenates."""
    return wanted if task.needs_aligned else "concat"
