"""Bad inputs, each with the exit code and the words that its message must have.

    python -m tests.cli.bad_inputs > docs/bad_inputs.md     the most frequent ones, with the messages they get

`test_cli.py` runs this list and the one of bad_calls.py, and compares docs/bad_inputs.md with the messages.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.cli.bad_calls import BAD_CALLS
from tests.cli.workshop import TINY, Result, Workshop, call, call_limited, write_log


@dataclass(frozen=True)
class BadInput:
    """One bad input.

    Attributes:
        name: what is wrong, in words.
        arguments: prepares it and gives the command line.
        code: exit code.
        words: what the message must contain.
        limit: bytes that a file may have; None runs in this process without a limit.
        leaves: whether it is found so late that what was finished before is on disk.
    """

    name: str
    arguments: Callable[[Workshop], list[str | Path]]
    code: int
    words: tuple[str, ...]
    limit: int | None = None
    leaves: bool = False

    def run(self, shop: Workshop) -> tuple[Result, dict[str, str], dict[str, str]]:
        """The result, and what was on disk before and after."""
        arguments = self.arguments(shop)
        before = shop.snapshot()
        result = call(*arguments) if self.limit is None else call_limited(self.limit, *arguments)
        return result, before, shop.snapshot()


def _encode(log: Callable[[Workshop], Path | str], *more: str) -> Callable[[Workshop], list[str | Path]]:
    label = [] if "--label" in more else ["--label", "click"]
    return lambda shop: ["encode", log(shop), *label, "--out", shop.new("out"), *more]


def _run(*more: str, tiny: bool = True) -> Callable[[Workshop], list[str | Path]]:
    return lambda shop: ["run", shop.data, "--out", shop.new("out"), *(TINY if tiny else ()), *more]


def _compare(*more: str, models: str = "fm") -> Callable[[Workshop], list[str | Path]]:
    return lambda shop: ["compare", shop.data, "--models", models, "--out", shop.new("out"), *more]


def _predict(log: Callable[[Workshop], Path | str], *more: str) -> Callable[[Workshop], list[str | Path]]:
    return lambda shop: ["predict", shop.small, log(shop), "--out", shop.new("scores.parquet"), *more]


def _with_cell(row: int, column: int, value: str) -> Callable[[list[str]], list[str]]:
    def change(lines: list[str]) -> list[str]:
        cells = lines[row].split(",")
        cells[column] = value
        return [*lines[:row], ",".join(cells), *lines[row + 1 :]]

    return change


def _without_column(column: int) -> Callable[[list[str]], list[str]]:
    return lambda lines: [",".join(c for i, c in enumerate(line.split(",")) if i != column) for line in lines]


def _truncated_parquet(shop: Workshop) -> Path:
    import polars as pl

    whole = shop.new("whole.parquet")
    pl.read_csv(shop.log).write_parquet(whole)
    return shop.text("truncated.parquet", whole.read_bytes()[:20_000])


def _other_data(shop: Workshop) -> Path:
    """Another log's encoded folder."""
    out = shop.folder / "other"
    if not out.exists():
        write_log(shop.folder / "other.csv", num_rows=1500, seed=1)
        done = call("encode", shop.folder / "other.csv", "--label", "click", "--out", out)
        assert done.code == 0, done.err
    return out


def _plan_of_other(shop: Workshop) -> list[str | Path]:
    plan = json.loads(shop.plan.read_text())
    broken = shop.text("other-plan.json", json.dumps({**plan, "fingerprint": "0123456789ab"}))
    return ["compact", shop.bundle, broken, shop.data, "--out", shop.new("out")]


def _newer_plan(shop: Workshop) -> list[str | Path]:
    plan = json.loads(shop.plan.read_text())
    return ["compact", shop.bundle, shop.text("new-plan.json", json.dumps({**plan, "plan_version": 99})), shop.data,
            "--out", shop.new("out")]  # fmt: skip


def _truncated_bundle(shop: Workshop) -> list[str | Path]:
    bundle = shop.copy(shop.small, "broken")
    weights = bundle / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    return ["predict", bundle, shop.log, "--out", shop.new("scores.csv")]


def _incomplete_bundle(shop: Workshop) -> list[str | Path]:
    bundle = shop.copy(shop.small, "broken")
    (bundle / "encoder" / "vocab.parquet").unlink()
    return ["predict", bundle, shop.log, "--out", shop.new("scores.csv")]


def _tampered_bundle(shop: Workshop) -> list[str | Path]:
    bundle = shop.copy(shop.small, "broken")
    weights = bundle / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    return ["predict", bundle, shop.log, "--out", shop.new("scores.csv")]


def _newer_bundle(shop: Workshop) -> list[str | Path]:
    bundle = shop.copy(shop.small, "broken")
    info = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**info, "bundle_version": 99}))
    return ["predict", bundle, shop.log, "--out", shop.new("scores.csv")]


def _without_valid(shop: Workshop) -> list[str | Path]:
    data = shop.new("trainonly")
    done = call("encode", shop.log, "--label", "click", "--split", "8:0:2", "--out", data)
    assert done.code == 0, done.err
    return ["run", data, "--out", shop.new("out"), *TINY]


def _truncated_data(shop: Workshop) -> list[str | Path]:
    data = shop.copy(shop.data, "halfdata")
    ids = data / "train" / "ids.npy"
    ids.write_bytes(ids.read_bytes()[:1000])
    return ["run", data, "--out", shop.new("out"), *TINY]


def _damaged_record(shop: Workshop) -> list[str | Path]:
    records = shop.new("records")
    records.mkdir()
    (records / "full-seed0.json").write_text('{"variant": "full"')
    return ["report", records]


def _update(log: Callable[[Workshop], Path | str], *more: str) -> Callable[[Workshop], list[str | Path]]:
    return lambda shop: ["update", shop.small, log(shop), "--out", shop.new("out"), *more]


def _search(*more: str) -> Callable[[Workshop], list[str | Path]]:
    return lambda shop: ["search", shop.bundle, shop.data, *more, "--out", shop.new("p.json")]


def _curve(*more: str) -> Callable[[Workshop], list[str | Path]]:
    return lambda shop: ["curve", shop.bundle, shop.data, "--out", shop.new("out"), *more]


def _export(*more: str) -> Callable[[Workshop], list[str | Path]]:
    return lambda shop: ["export", shop.small, *more, "--out", shop.new("out")]


def _edited_bundle(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Workshop], list[str | Path]]:
    """Export of a bundle whose bundle.json was changed by hand."""

    def arguments(shop: Workshop) -> list[str | Path]:
        bundle = shop.copy(shop.small, "broken")
        path = bundle / "bundle.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
        return ["export", bundle, "--format", "pt2", "--out", shop.new("out")]

    return arguments


def _crowded_bundle(shop: Workshop) -> list[str | Path]:
    bundle = shop.copy(shop.small, "broken")
    (bundle / "scores.csv").write_text("score")
    return ["export", bundle, "--format", "pt2", "--out", shop.new("out")]


def _config(text: str) -> Callable[[Workshop], list[str | Path]]:
    return lambda shop: ["run", shop.data, "--config", shop.text("settings.toml", text), "--out", shop.new("out")]


BAD_INPUTS = (
    # the log
    BadInput("log that does not exist", _encode(lambda s: s.new("none.csv")), 1, ("none.csv does not exist",)),
    BadInput("empty log", _encode(lambda s: s.text("empty.csv", "")), 1, ("empty.csv is empty",)),
    BadInput("log with a header only", _encode(lambda s: s.text("head.csv", "click,user\n")), 1, ("head.csv", "holds no rows")),
    BadInput("label column that is not there", _encode(lambda s: s.log, "--label", "clik"), 1,
             ("'clik'", "did you mean 'click'?")),
    BadInput("label 2", _encode(lambda s: s.lines("two.csv", _with_cell(7, 0, "2"))), 1, ("two.csv line 8", "'click' is '2'")),
    BadInput("rule that ends too early", _encode(lambda s: s.log, "--label", "price >="), 2, ("rule 'price >='", "ends too early")),
    BadInput("rule over a column that is not there", _encode(lambda s: s.log, "--where", "prise > 1"), 1,
             ("rule 'prise > 1' reads 'prise'", "did you mean 'price'?")),
    BadInput("label NaN", _encode(lambda s: s.lines("nan.csv", _with_cell(7, 0, "nan"))), 1, ("nan.csv line 8", "label 'click'")),
    BadInput("label missing", _encode(lambda s: s.lines("null.csv", _with_cell(7, 0, ""))), 1,
             ("null.csv line 8", "is missing", "drop the row")),
    BadInput("labels of one class", _encode(lambda s: s.lines("one.csv", lambda lines: [lines[0], *("1" + li[1:] for li in lines[1:])])),
             1, ("all with label 'click' = 1", "both classes are needed")),
    BadInput("line with a cell too many", _encode(lambda s: s.lines("wide.csv", lambda li: [*li[:9], li[9] + ",x", *li[10:]])), 1,
             ("wide.csv line 10", "6 cells", "5 columns")),
    BadInput("random bytes named .csv", _encode(lambda s: s.text("junk.csv", np.random.default_rng(0).bytes(5000))), 1,
             ("junk.csv is not text",)),
    BadInput("truncated parquet", _encode(_truncated_parquet), 1, ("truncated.parquet", "not a readable parquet")),
    BadInput("zip archive", _encode(lambda s: s.text("log.zip", b"PK\x03\x04" + bytes(100))), 1, ("log.zip is a zip archive",)),
    BadInput("log without header", lambda s: ["encode", s.lines("bare.csv", lambda li: li[1:]), "--label", "click", "--out", s.new("out")],
             1, ("bare.csv", "no column 'click'")),
    BadInput("split that is not a split", _encode(lambda s: s.log, "--split", "80/20"), 2, ("'80/20'", "8:1:1, time:8:1:1")),
    BadInput("split by time without a time column", _encode(lambda s: s.log, "--split", "time:8:1:1"), 1,
             ("needs the schema's time column",)),
    BadInput("number field that holds text", lambda s: ["encode", s.lines("word.csv", _with_cell(30, 4, "cheap")), "--schema",
             s.folder / "data.schema.toml", "--out", s.new("out")], 1, ("word.csv line 31", "'price'", "'cheap'")),
    BadInput("schema with an unknown key", lambda s: ["encode", s.log, "--schema", s.text("schema.toml",
             'label = "click"\n[[fields]]\nname = "user"\nmincount = 2\n'), "--out", s.new("out")], 2,
             ("schema.toml", "'mincount' for FieldSpec", "did you mean 'min_count'?")),
    BadInput("layout that is not known", lambda s: ["encode", s.log, "--dataset", "criteos", "--out", s.new("out")], 1,
             ("no dataset 'criteos'", "did you mean 'criteo'?")),
    BadInput("--label beside --dataset", _encode(lambda s: s.log, "--dataset", "criteo"), 2, ("'criteo' brings its own label",)),
    BadInput("--out of encode exists", lambda s: ["encode", s.log, "--label", "click", "--out", s.data], 1, ("data exists", "--overwrite")),
    BadInput("--overwrite of what is not a dataset", lambda s: ["encode", s.log, "--label", "click", "--out", s.bundle, "--overwrite"], 1,
             ("full exists and is not an encoded dataset",)),
    # data, flags and settings
    BadInput("data that are not there", lambda s: ["run", "flihgts", "--out", s.new("out")], 1, ("'flihgts'", "did you mean 'flights'?")),
    BadInput("raw log where encoded data belong", lambda s: ["run", s.log, "--out", s.new("out")], 1,
             ("is a file, not an encoded folder", "embtrim encode", "--label LABEL [--where RULE] --out data/log")),
    BadInput("URL of a raw log where encoded data belong",
             lambda s: ["run", "s3://bucket/days/*", "--out", s.new("out")], 1,
             ("is neither a folder nor a dataset", "embtrim encode 's3://bucket/days/*' --label LABEL [--where RULE] --out data/days")),
    BadInput("known dataset that is not bundled", lambda s: ["run", "criteo", "--out", s.new("out")], 1,
             ("criteo", "is not bundled", "licence", "embtrim encode FOLDER --dataset criteo")),
    BadInput("truncated encoded data", _truncated_data, 1, ("ids.npy is damaged", "encode again")),
    BadInput("data without a validation split", _without_valid, 1, ("no split 'valid'", "train, test")),
    BadInput("unknown flag", _run("--buget", "10%"), 2, ("No such option: --buget", "--budget")),
    BadInput("unknown command", lambda s: ["rnu"], 2, ("No such command 'rnu'",)),
    BadInput("no --out", lambda s: ["run", s.data], 2, ("--out is needed",)),
    BadInput("unknown method", _run("--method", "ssed"), 2, ("unknown method 'ssed'", "did you mean 'sseds'?")),
    BadInput("unknown control", _run("--controls", "uniform,randm"), 2, ("unknown method 'randm'", "did you mean 'random'?")),
    BadInput("unknown model", _run("--model", "deepfn"), 2, ("unknown model 'deepfn'", "did you mean 'deepfm'?")),
    BadInput("model without embeddings", _run("--model", "lr", tiny=False), 2, ("'lr' has no embedding tables",)),
    BadInput("unknown init", _run("--init", "warm"), 2, ("init", "'warm'", "'auto', 'scratch', 'initial', 'inherit' or 'low_rank'")),
    BadInput("unknown setting", _run("--set", "trian.epochs=3"), 2, ("unknown key 'trian'", "did you mean 'train'?")),
    BadInput("unknown setting of a model", _run("--set", "hparams.hidden=[16]"), 2, ("'hidden'", "did you mean 'hidden_units'?")),
    BadInput("argument that is not a setting", _run("--set", "hparams.plan=small"), 2, ("'plan'", "it is not a setting")),
    BadInput("unknown setting of a method", _run("--method", "sseds", "--set", "search.scores=signed"), 2, ("[search]", "'scores'", "did you mean 'score'?")),
    BadInput("setting of the wrong type", _run("--set", "train.epochs=many"), 2, ("TrainConfig: epochs", "'many'", "valid integer")),
    BadInput("width 0", _run("--set", "hparams.embedding_dim=0"), 2, ("embedding_dim", "given 0", "greater than or equal to 1")),
    BadInput("--set without =", _run("--set", "train.epochs"), 2, ("section.key=value", "'train.epochs'")),
    BadInput("device that is not there", _run("--set", "train.device=cuda:7"), 2, ("device 'cuda:7'", "use 'cpu'")),
    BadInput("settings file that is not there", lambda s: ["run", s.data, "--config", s.new("no.toml"), "--out", s.new("out")], 2,
             ("no.toml does not exist",)),
    BadInput("settings file that is not TOML", _config("model = \n"), 2, ("settings.toml is not valid TOML", "line 1")),
    BadInput("settings file with an unknown key", _config("[train]\nlearning_rat = 1\n"), 2,
             ("settings.toml", "'learning_rat' for TrainConfig", "did you mean 'learning_rate'?")),
    # budgets
    BadInput("budget without a unit that is known", _run("--budget", "10 parsecs"), 2, ("'10 parsecs'", "'10%', '200MB'")),
    BadInput("budget 0%", _run("--budget", "0%"), 2, ("must be a positive number",)),
    BadInput("budget 150%", _run("--budget", "150%"), 2, ("150%", "at most 100%")),
    BadInput("negative budget", _run("--budget=-5%"), 2, ("'-5%'", "not understood")),
    BadInput("budget below the first-order weights", _run("--method", "sseds", "--budget", "300 bytes"), 1,
             ("300 bytes", "a method that keeps columns", "give at least that")),
    BadInput("budget below the method's floor", _run("--method", "sseds", "--budget", "1%", "--set", "search.min_dim=4"), 1,
             ("175 embedding parameters", "4 column(s) in every table", "raise the budget"), leaves=True),
    BadInput("--budget and --max-loss", _run("--budget", "10%", "--max-loss", "0.01"), 2, ("--budget and --max-loss exclude each other",)),
    BadInput("--budget auto with another method", _run("--method", "sseds", "--budget", "auto"), 2,
             ("budget 'auto'", "method 'sseds' predicts none", "use method 'guided'")),
    BadInput("--tolerance 0", _run("--budget", "auto", "--tolerance", "0"), 2, ("tolerance", "given 0.0", "greater than 0")),
    BadInput("--bits 7", _run("--bits", "7"), 2, ("bits", "given 7", "32, 16, 8, 4")),
    BadInput("--bits in words", _run("--bits", "eight"), 2, ("bits", "'eight'", "'mixed'")),
    BadInput("teacher beyond 1", _run("--set", "teacher=2"), 2, ("teacher", "given 2", "less than or equal to 1")),
    BadInput("mixed bits and a number of parameters", _search("--bits", "mixed", "--budget", "2000 params"), 2,
             ("mixed bits need a budget in percent or bytes",)),
    BadInput("--target that is not known", _run("--target", "tensorrt"), 2, ("target", "'tensorrt'", "'torch', 'onnx' or 'fbgemm'")),
    BadInput("--target fbgemm and --bits 8", _search("--target", "fbgemm", "--bits", "8", "--method", "uniform"), 1,
             ("has 8 bits, which fbgemm's tables cannot", "torch or onnx")),
    BadInput("--max-loss 2", _run("--max-loss", "2"), 2, ("max_loss", "given 2.0", "less than 0.5")),
    BadInput("--out of run exists", lambda s: ["run", s.data, "--out", s.data, *TINY], 1, ("data exists and is not empty",)),
    # curve
    BadInput("curve: budget that is none", _curve("--budgets", "10%,lots"), 2, ("--budgets", "'lots'", "'10%', '200MB'")),
    BadInput("curve: no budgets", _curve("--budgets", ","), 2, ("--budgets names no budget",)),
    BadInput("curve: another method", _curve("--set", "method=sseds"), 2, ("'sseds' predicts no losses", "method 'guided'")),
    BadInput("curve: compact bundle", lambda s: ["curve", s.small, s.data], 1, ("small holds a compact model", "embtrim train")),
    BadInput("curve: folder of a run that is none", _curve("--run", "none"), 1, ("none is not a folder",)),
    # compare
    BadInput("compare: unknown model", _compare(models="fm,deepfn"), 2, ("unknown model 'deepfn'", "did you mean 'deepfm'?")),
    BadInput("compare: unknown method", _compare("--methods", "uniform,ssed"), 2, ("unknown method 'ssed'", "did you mean 'sseds'?")),
    BadInput("compare: no methods", _compare("--methods", ""), 2, ("nothing to compare",)),
    BadInput("compare: budget that is none", _compare("--budgets", "10%,lots"), 2, ("budgets", "'lots'", "'10%', '200MB'")),
    BadInput("compare: 0 jobs", _compare("--jobs", "0"), 2, ("--jobs",)),
    BadInput("compare: unknown tracker", _compare("--track", "mlflo"), 2, ("unknown tracker 'mlflo'", "did you mean 'mlflow'?")),
    BadInput("compare: unknown setting of a variant", _compare("--set", "variants.x.method=sseds", "--set", "variants.x.scor=abs"), 2,
             ("[variants.x]", "'scor' for SSEDSConfig", "did you mean 'score'?")),
    BadInput("compare: variant without a method", _compare("--set", "variants.x.score=abs"), 2, ("[variants.x] needs method",)),
    BadInput("compare: label that is taken", _compare("--set", "variants.random.method=sseds"), 2, ("[variants.random]", "taken")),
    BadInput("compare: argument that no model knows", _compare("--set", "hparams.hidden_units=[16]"), 2,
             ("[hparams] 'hidden_units'", "none of fm")),
    BadInput("compare: --out of something else", lambda s: ["compare", s.data, "--models", "fm", "--out", s.bundle], 1,
             ("full exists and is not a folder of `embtrim compare`",)),
    # plans and bundles
    BadInput("plan of another schema", _plan_of_other, 1, ("plan was made for schema 0123456789ab", "search again")),
    BadInput("plan of a newer version", _newer_plan, 1, ("plan version 99", "upgrade embtrim")),
    BadInput("plan that is not a plan", lambda s: ["compact", s.bundle, s.text("p.json", "[1, 2]"), s.data, "--out", s.new("out")], 1,
             ("p.json", "not an embtrim plan")),
    BadInput("untrained weights saved", lambda s: ["compact", s.bundle, s.plan, s.data, "--no-train", "--out", s.new("out")], 2,
             ("--no-train would save the untrained weights of --init scratch", "--init inherit or --init low_rank")),
    BadInput("initial weights saved",
             lambda s: ["compact", s.bundle, s.plan, s.data, "--no-train", "--init", "initial", "--out", s.new("out")], 2,
             ("--no-train would save the untrained weights of --init initial", "--init inherit or --init low_rank")),
    BadInput("plan written to .npz", lambda s: ["search", s.bundle, s.data, "--budget", "10%", "--out", s.new("p.npz")], 2,
             ("written as .json", "p.npz")),
    BadInput("search in a compact model", lambda s: ["search", s.small, s.data, "--budget", "10%", "--out", s.new("p.json")], 1,
             ("small holds a compact model", "full one")),
    BadInput("bundle and data that do not match", lambda s: ["search", s.bundle, _other_data(s), "--budget", "10%", "--out", s.new("p.json")],
             1, ("model was made for schema", "this dataset is")),
    BadInput("truncated bundle", _truncated_bundle, 1, ("model.safetensors was changed or truncated",)),
    BadInput("tampered bundle", _tampered_bundle, 1, ("model.safetensors was changed or truncated", "digest differs")),
    BadInput("incomplete bundle", _incomplete_bundle, 1, ("vocab.parquet is missing",)),
    BadInput("bundle of a newer version", _newer_bundle, 1, ("bundle version 99", "upgrade embtrim")),
    BadInput("folder that is not a bundle", lambda s: ["predict", s.data, s.log, "--out", s.new("scores.csv")], 1,
             ("data is not a bundle", "embtrim run")),
    BadInput("--out of train exists", lambda s: ["train", s.data, "--out", s.bundle, *TINY], 1, ("full exists", "--overwrite")),
    # predict and report
    BadInput("predict: column missing", _predict(lambda s: s.lines("less.csv", _without_column(2))), 1, ("less.csv has no column 'item'",)),
    BadInput("predict: text in a number field", _predict(lambda s: s.lines("word2.csv", _with_cell(30, 4, "cheap"))), 1,
             ("word2.csv line 31", "'price'", "'cheap'")),
    BadInput("predict: column to keep missing", _predict(lambda s: s.log, "--keep", "session"), 1, ("no column 'session'",)),
    BadInput("predict: scores as .txt", lambda s: ["predict", s.small, s.log, "--out", s.new("scores.txt")], 2,
             (".parquet or .csv", "scores.txt")),
    BadInput("predict: --out exists", lambda s: ["predict", s.small, s.log, "--out", s.text("old.csv", "keep me")], 1,
             ("old.csv exists", "--overwrite")),
    # update and export
    BadInput("update: column missing", _update(lambda s: s.lines("less2.csv", _without_column(2))), 1,
             ("less2.csv has no column 'item'",)),
    BadInput("update: log without labels", _update(lambda s: s.lines("unlabelled.csv", _without_column(0))), 1,
             ("unlabelled.csv has no column 'click'",)),
    BadInput("update: labels of one class", _update(lambda s: s.lines("one2.csv", lambda li: [li[0], *("1" + x[1:] for x in li[1:])])),
             1, ("all with label 'click' = 1", "both classes are needed")),
    BadInput("update: log that does not exist", _update(lambda s: s.new("none2.csv")), 1, ("none2.csv does not exist",)),
    BadInput("update: split that is not a split", _update(lambda s: s.log, "--split", "80/20"), 2, ("'80/20'", "8:1:1, time:8:1:1")),
    BadInput("update: --min-count 0", _update(lambda s: s.log, "--min-count", "0"), 2, ("min_count", "given 0")),
    BadInput("update: unknown setting", _update(lambda s: s.log, "--set", "renumbr=true"), 2, ("'renumbr'", "did you mean 'renumber'?")),
    BadInput("update: into the bundle itself", lambda s: ["update", s.small, s.log, "--out", s.small, "--overwrite"], 1,
             ("small is the bundle to update", "choose another --out")),
    BadInput("update: --out exists", lambda s: ["update", s.small, s.log, "--out", s.bundle], 1, ("full exists", "--overwrite")),
    BadInput("update of what is not a bundle", lambda s: ["update", s.data, s.log, "--out", s.new("out")], 1, ("data is not a bundle",)),
    BadInput("export: triton with another format", _export("--format", "pt2", "--triton", "ads"), 2,
             ("a Triton repository is for format 'onnx', given 'pt2'",)),
    BadInput("export: triton name that is no folder's", _export("--format", "onnx", "--triton", "../ads"), 2,
             ("triton name '../ads' cannot name a folder", "letters, digits")),
    BadInput("export: unknown format", _export("--format", "tflite"), 2, ("unknown format 'tflite'", "pt2, onnx, torchrec")),
    BadInput("export: no --format", _export(), 2, ("Missing option '--format'",)),
    BadInput("export of what is not a bundle", lambda s: ["export", s.data, "--format", "pt2", "--out", s.new("out")], 1,
             ("data is not a bundle",)),
    BadInput("export: --out exists", lambda s: ["export", s.small, "--format", "pt2", "--out", s.data], 1, ("data exists", "--overwrite")),
    BadInput("export: --overwrite of what is not an export",
             lambda s: ["export", s.small, "--format", "pt2", "--out", s.data, "--overwrite"], 1, ("data is not an earlier export",)),
    BadInput("bundle whose metrics were changed", _edited_bundle(lambda info: {**info, "metrics": {"test": {"auc": 0.99}}}), 1,
             ("bundle.json was changed or truncated", "digest differs")),
    BadInput("bundle.json without metrics", _edited_bundle(lambda info: {k: v for k, v in info.items() if k != "metrics"}), 1,
             ("bundle.json is damaged", "metrics: Field required")),
    BadInput("bundle.json with a version as text", _edited_bundle(lambda info: {**info, "bundle_version": "1"}), 1,
             ("bundle.json is damaged", "given '1'", "valid integer")),
    BadInput("file in a bundle that is not its own", _crowded_bundle, 1, ("holds scores.csv", "does not list")),
    BadInput("report of a folder without records", lambda s: ["report", s.bundle], 1, ("bundle.json is not a run record", "no record_version")),
    BadInput("report of a damaged record", _damaged_record, 1, ("full-seed0.json is not a run record",)),
    # full disk
    BadInput("disk full: encode", lambda s: ["encode", s.log, "--label", "click", "--out", s.new("out")], 1, ("out", "File too large"),
             limit=20_000),
    BadInput("disk full: run", _run(), 1, ("full-seed0", "could not be written"), limit=10_000, leaves=True),
    BadInput("disk full: predict", _predict(lambda s: s.log), 1, ("scores.parquet could not be written", "File too large"), limit=4_000),
)  # fmt: skip

# The bad inputs that docs/bad_inputs.md shows.
DOCUMENTED = (
    "log that does not exist", "label column that is not there", "label 2", "label missing", "labels of one class",
    "line with a cell too many", "random bytes named .csv", "number field that holds text", "schema with an unknown key",
    "data that are not there", "raw log where encoded data belong", "data without a validation split", "unknown method",
    "unknown setting", "setting of the wrong type", "budget without a unit that is known", "budget 150%",
    "budget below the first-order weights", "--bits 7", "--target that is not known", "--out of run exists",
    "compare: unknown method", "plan of another schema", "truncated bundle", "bundle of a newer version",
    "bundle whose metrics were changed", "folder that is not a bundle", "predict: column missing", "update: log without labels",
    "update: into the bundle itself", "export: unknown format", "disk full: encode", "module without embeddings",
    "fields= whose rows are not the table's", "plan of another module",
)  # fmt: skip

HEAD = """# Bad inputs and their messages

These are some of the bad inputs that the tests try, each with embtrim's answer. `python -m tests.cli.bad_inputs` writes this page.
Exit code 1 means that the work failed, 2 that a flag or a setting is wrong. A row without an exit code is an `EmbtrimError` in Python.
A failed command changes no existing file and leaves no half-written one.

| bad input | exit code | message |
|---|---|---|"""


def table_row(name: str, code: int | None, message: str) -> str:
    """A line of docs/bad_inputs.md: of what was printed the last line; a log line may come before it."""
    last = message.strip().splitlines()[-1].removeprefix("embtrim: ").replace("|", chr(92) + "|")
    return f"| {name} | {'' if code is None else code} | {last} |"


def documented_rows(folder: Path) -> list[str]:
    """The lines of the table, in a workshop made in `folder`."""
    shop = Workshop(folder)
    rows = {}
    for bad in BAD_INPUTS:
        if bad.name in DOCUMENTED:
            result, _, _ = bad.run(shop)
            rows[bad.name] = table_row(bad.name, result.code, result.err.replace(f"{folder}/", ""))
    rows |= {bad.name: table_row(bad.name, None, bad.message()) for bad in BAD_CALLS if bad.name in DOCUMENTED}
    return [rows[name] for name in DOCUMENTED]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        print("\n".join([HEAD, *documented_rows(Path(made))]))
