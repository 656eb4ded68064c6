"""Flags that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DataName = Annotated[
    str, typer.Argument(metavar="DATA", help="Folder that `embtrim encode` wrote, or a known dataset such as flights.")
]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of a saved model.")]
OutPath = Annotated[Path | None, typer.Option("--out", help="File or folder to write; needed unless --dry-run.")]
ConfigPath = Annotated[Path | None, typer.Option("--config", help="TOML file with settings.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; may be repeated.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of all random choices.")]
NumSeeds = Annotated[
    int | None, typer.Option("--seeds", help="Number of seeds; the first is --seed, each next one is larger by 1.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file or folder at --out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what the command would do, and write nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress, and log only warnings.")]
ModelName = Annotated[str | None, typer.Option("--model", help="Base model; `embtrim models` lists them.")]
MethodName = Annotated[str | None, typer.Option("--method", help="Search method; `embtrim methods` lists them.")]
BudgetText = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="Size limit of the compact tables: 10%, 200MB or '1.5M params'. With guided, auto is the smallest one whose "
        "predicted loss is within --tolerance.",
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option("--tolerance", help="Largest predicted loss of validation AUC at --budget auto; 0.001 if not given."),
]
InitName = Annotated[
    str | None,
    typer.Option(
        "--init",
        metavar="auto|scratch|initial|inherit|low_rank",
        help="Initial weights of a compact model. auto: those that the plan was made for.",
    ),
]
BitsName = Annotated[
    str | None,
    typer.Option(
        "--bits",
        metavar="32|16|8|4|3|2|mixed",
        help="Bits per stored value in the compact tables. If not given, mixed: chosen for each table; but 32 for a budget "
        "in parameters and for --target fbgemm.",
    ),
]
TargetName = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="torch|onnx|fbgemm",
        help="Where the tables will be served. Sizes are counted as that backend stores them, and a budget in bytes then "
        "includes the vocabulary.",
    ),
]
TrackerName = Annotated[
    str | None,
    typer.Option(
        "--track",
        metavar="tensorboard|mlflow|wandb",
        help="Write epochs and records into a tracking tool, beside --out: folder tensorboard, file mlflow.db, or folder "
        "wandb (offline). MLFLOW_TRACKING_URI and WANDB_MODE send them elsewhere.",
    ),
]
SplitText = Annotated[
    str | None,
    typer.Option("--split", help="How rows are split: 8:1:1 (random, the default), time:8:1:1 or time:CUT,CUT."),
]
FormatName = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="csv|parquet|libsvm|libfm", help="Format of the log; if not given, its suffix decides."
    ),
]
NoHeader = Annotated[
    bool | None, typer.Option("--no-header", help="The log has no header line; its first line is data.")
]
Columns = Annotated[str | None, typer.Option("--columns", help="Names of the log's columns, separated by commas.")]
Separator = Annotated[str | None, typer.Option("--separator", help="Character between the cells of the log.")]
Encoding = Annotated[
    str | None, typer.Option("--encoding", metavar="NAME", help="Text encoding of the log, such as utf-8 or cp1252.")
]
Quote = Annotated[
    str | None, typer.Option("--quote", help="Character that quotes cells of the log; none if cells are not quoted.")
]
Escape = Annotated[
    str | None, typer.Option("--escape", metavar="double|backslash", help="How a quoted cell of the log holds a quote.")
]
OnError = Annotated[
    str | None,
    typer.Option(
        "--on-error",
        metavar="fail|skip",
        help="What to do with a line that cannot be split into cells: fail (the default), or skip it and report it.",
    ),
]
DriftTolerance = Annotated[
    float | None,
    typer.Option(
        "--drift-tolerance",
        help="Share by which the unseen or missing values of a field may exceed those of validation before a warning; 0.01 if "
        "not given.",
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail, and write nothing, if a field has drifted.")]
