"""Where the files of a log lie: paths, globs, folders and URLs, and the columns that the names of folders state.

A path that exists is taken as it is written, whatever characters its name has. Otherwise `*`, `?` and `[` make it a
glob, in which a part that exists under its own name still stands for itself. A folder means every log file below it,
in order of name. Files and folders whose names start with `_` or `.` are markers of other programs and are left out.

A folder named `key=value` (a hive partition) is a column of the files below it. The keys count from the folder or the
glob that was given, and from the folders right above it.

URLs of object stores (`s3://`, `gs://`, `az://`) and of the web (`https://`) are read through fsspec, which takes
credentials from the environment and from its own configuration. Nothing about them is kept.
"""

from __future__ import annotations

import contextlib
import glob
import io
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from embtrim.data.log_file import listed
from embtrim.errors import DataError, UnreachableError, first_line_of

logger = logging.getLogger(__name__)

# Packages of `embtrim[cloud]` by the scheme of a URL.
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
             "http": "aiohttp", "https": "aiohttp"}  # fmt: skip
_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]+)://")
_PARTITION = re.compile(r"^([^=]+)=(.*)$")
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # how Hive and Spark name the folder of missing values
_BLOCK_BYTES = 8 << 20  # bytes that a remote file is read ahead

# Folders that a table format keeps beside its data files. These files alone do not say which rows are still valid.
_TABLE_FORMATS = {"_delta_log": "Delta Lake", ".hoodie": "Hudi"}


@dataclass(frozen=True)
class Place:
    """One file of a log, on this machine or behind a URL.

    Attributes:
        name: Path or URL, for messages.
        size: Bytes; 0 if a server does not say.
        version: What changes when the content changes: the modification time, or the tag of an object.
        partitions: Columns that the names of its folders state, with their values; None is a missing value.
        remote: The fsspec file system of a URL; None for a path.
        path: Path within the file system; an absolute one on this machine, so that workers with other working folders open it.
    """

    name: str
    size: int
    version: int | str
    partitions: Mapping[str, str | None] = field(default_factory=dict)
    remote: Any = None
    path: str = ""

    def open(self) -> io.BufferedReader:
        """The file, for reading.

        Raises:
            DataError: The file cannot be opened.
        """
        if self.remote is None:
            try:
                return open(self.path, "rb")
            except OSError as error:
                raise DataError(f"{self.name} cannot be opened ({error.strerror or error})") from None
        with _reaching(self.name):
            file = self.remote.open(self.path, "rb", block_size=_BLOCK_BYTES)
        return io.BufferedReader(cast(Any, _RemoteFile(self.name, file)), 1 << 20)

    @contextlib.contextmanager
    def local(self) -> Iterator[Path]:
        """A path to the content inside a `with` block; a remote file is copied to the folder of temporary files."""
        if self.remote is None:
            yield Path(self.path)
            return
        descriptor, copy = tempfile.mkstemp(prefix="embtrim-", suffix=Path(self.path).suffix)
        try:
            with os.fdopen(descriptor, "wb") as target, self.open() as file:
                shutil.copyfileobj(file, target, 1 << 20)
            yield Path(copy)
        finally:
            os.unlink(copy)

    def copy_ranges(self, ranges: Iterable[tuple[int, int]], target: BinaryIO) -> None:
        """Copy ranges of bytes, of start and end, from behind a URL to the same places of another file.

        Raises:
            UnreachableError: The server does not answer, or the file has fewer bytes.
        """
        with _reaching(self.name):
            file = self.remote.open(self.path, "rb", cache_type="none")
        with file:
            for start, end in ranges:
                target.seek(start)
                while start < end:
                    with _reaching(self.name):
                        file.seek(start)
                        part = file.read(min(end - start, _BLOCK_BYTES))
                    if not part:
                        raise UnreachableError(f"{self.name} ended at byte {start:,} of {self.size:,}; try again")
                    target.write(part)
                    start += len(part)

    def tail(self, num_bytes: int) -> bytes:
        """The last bytes of the file."""
        with self.open() as file:
            file.seek(max(0, self.size - num_bytes))
            return file.read()

    def identity(self) -> list[Any]:
        """Path, bytes and version, which tell whether the file is still the same."""
        return [self.name if self.remote else str(Path(self.path).absolute()), self.size, self.version]


class _RemoteFile(io.RawIOBase):
    """A file of fsspec whose errors name the URL."""

    def __init__(self, name: str, file: Any) -> None:
        self._name, self._file = name, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with _reaching(self._name):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        with _reaching(self._name):
            part = self._file.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()


def places(source: str | Path, is_log: Callable[[str], bool]) -> list[Place]:
    """The files that a path, a glob, a folder or a URL names, in order of name.

    Args:
        source: The path, glob, folder or URL.
        is_log: Whether a file in a folder is part of a log, by its name.

    Raises:
        DataError: Nothing is there, a folder holds no log, or a table format keeps more than files in it.
        UnreachableError: A server does not answer, or refuses.
    """
    text = os.fspath(source)
    scheme = _SCHEME.match(text)
    if scheme is not None and scheme[1] == "file":
        text, scheme = url2pathname(urlsplit(text).path), None
    files = _RemoteFiles(text, scheme[1]) if scheme is not None else _LocalFiles(text)
    found, is_one = _expand(files, files.start)
    if is_one and not files.is_folder(found[0]):
        return [_place(files, found[0], len(_folders(found[0])))]
    inside = []
    for path in found:
        given = len(_folders(path)) + (1 if files.is_folder(path) else 0) if is_one else _num_fixed(files.start)
        if files.is_folder(path):
            inside += [(below, given) for below in _logs_below(files, path, is_log)]
        else:
            inside.append((path, given))
    kept = [_place(files, path, given) for path, given in dict(inside).items()]
    filled = [place for place in kept if place.size]  # writers leave empty files behind for parts without rows
    return filled or kept


def _expand(files: _LocalFiles | _RemoteFiles, path: str) -> tuple[list[str], bool]:
    """The files and folders that a path names, and whether it names one as it is written."""
    if files.exists(path):
        return [path], True
    if not glob.has_magic(path) or not files.has_globs:
        raise DataError(f"{files.name(path)} does not exist")
    parts = path.split("/")
    fixed = 0
    while fixed < len(parts) and (not glob.has_magic(parts[fixed]) or files.exists("/".join(parts[: fixed + 1]))):
        parts[fixed] = glob.escape(parts[fixed])
        fixed += 1
    names_as_written = [part if set(part) & set("*?") else glob.escape(part) for part in parts[fixed:]]
    for later in (names_as_written, parts[fixed:]):
        found = [p for p in files.matching("/".join([*parts[:fixed], *later])) if not _is_marked(p, fixed, later)]
        if found:
            return sorted(found), False
    raise DataError(f"no file matches {files.name(path)!r}")


def _is_marked(path: str, num_fixed: int, pattern: Sequence[str]) -> bool:
    """Whether a wildcard, and not the user, took in a file or folder with the name of a marker."""
    asked = {part[0] for part in pattern if part and part[0] in "._"}
    return any(_is_marker(part) and part[0] not in asked for part in path.split("/")[num_fixed:])


def _is_marker(name: str) -> bool:
    """Whether a file or folder is another program's note, such as _SUCCESS; `_part=1` is a partition."""
    return name[:1] in ("_", ".") and name not in (".", "..") and not _PARTITION.match(name)


def _logs_below(files: _LocalFiles | _RemoteFiles, folder: str, is_log: Callable[[str], bool]) -> list[str]:
    """The log files below a folder, markers left out."""
    shown = files.name(folder)
    every = files.below(folder)
    start = len(folder.rstrip("/").split("/"))
    for path in every:
        for part in path.split("/")[start:-1]:
            if part in _TABLE_FORMATS:
                raise DataError(
                    f"{shown} is a {_TABLE_FORMATS[part]} table, whose files also hold rows that the table has deleted; export "
                    "its rows to parquet, or give the files as a glob if none was ever rewritten"
                )
    plain = [path for path in every if not any(map(_is_marker, path.split("/")[start:]))]
    inside = [path for path in plain if is_log(path.split("/")[-1])]
    others = sorted(
        {"/".join(path.split("/")[start:]) for path in plain} - {"/".join(p.split("/")[start:]) for p in inside}
    )
    if inside and others:
        logger.info("left out of folder %s, without the suffix of a log: %s", shown, listed(others, 5))
    if not inside:
        beside = f"; it holds {listed(others, 5)}" if others else ""
        raise DataError(
            f"folder {shown} holds no log: no file of it or of its sub-folders has the suffix of a log, such as .csv, .csv.gz "
            f"or .parquet{beside}; say which format to read with ReadOptions(format=..) (--format csv)"
        )
    return sorted(inside)


def _folders(path: str) -> list[str]:
    """The names of the folders that a file lies in."""
    return path.split("/")[:-1]


def _num_fixed(pattern: str) -> int:
    """The number of leading folders of a glob that are no pattern."""
    folders = _folders(pattern)
    return next((i for i, part in enumerate(folders) if glob.has_magic(part)), len(folders))


def _place(files: _LocalFiles | _RemoteFiles, path: str, num_given: int) -> Place:
    """The place of a file whose first `num_given` folders the user gave."""
    folders = _folders(path)
    above = num_given
    while above and _PARTITION.match(folders[above - 1]):
        above -= 1
    partitions = {}
    for name in folders[above:]:
        if found := _PARTITION.match(name):
            value = unquote(found[2])
            partitions[unquote(found[1])] = None if value == _NO_VALUE else value
    size, version = files.stat(path)
    place = path if files.remote is not None else str(Path(path).absolute())
    return Place(files.name(path), size, version, partitions, files.remote, place)


class _LocalFiles:
    """The files of this machine."""

    remote = None
    has_globs = True

    def __init__(self, path: str) -> None:
        self.start = Path(path).expanduser().as_posix()

    def name(self, path: str) -> str:
        return path

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(path)

    def matching(self, pattern: str) -> list[str]:
        return list(dict.fromkeys(glob.glob(pattern, recursive=True)))

    def below(self, folder: str) -> list[str]:
        """All files below a folder; a link to a folder is followed once."""
        found, seen = [], set()
        for here, folders, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(here)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            place = here.replace(os.sep, "/").rstrip("/")
            found += [f"{place}/{name}" for name in names if os.path.isfile(f"{place}/{name}")]
        return found

    def stat(self, path: str) -> tuple[int, int]:
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns


class _RemoteFiles:
    """The files behind the URLs of one server or object store."""

    def __init__(self, url: str, scheme: str) -> None:
        try:
            import fsspec

            options = {"use_listings_cache": False} if scheme in ("http", "https") else {}
            self.remote, path = fsspec.core.url_to_fs(url, **options)
        except ImportError:
            package = _PACKAGES.get(scheme, "another package")
            raise DataError(f"{url} needs {package}: pip install 'embtrim[cloud]'") from None
        except ValueError as error:
            raise DataError(
                f"{url} cannot be read ({first_line_of(error)}); allowed: paths, s3://, gs://, az://, https:// and file://"
            ) from None
        self.start = path.rstrip("/")
        self._scheme = scheme
        self.has_globs = scheme not in ("http", "https")  # `?` and `[` belong to an address
        self._infos: dict[str, Mapping[str, Any]] = {}

    def name(self, path: str) -> str:
        return path if _SCHEME.match(path) else f"{self._scheme}://{path}"

    def exists(self, path: str) -> bool:
        with _reaching(self.name(path)):
            if not path.rstrip("/"):
                return False
            try:
                self._infos[path] = self.remote.info(path)
            except FileNotFoundError:
                return False
            return True

    def is_folder(self, path: str) -> bool:
        return self._infos[path]["type"] == "directory"

    def matching(self, pattern: str) -> list[str]:
        with _reaching(self.name(pattern)):
            found = self.remote.glob(pattern, detail=True)
        self._infos |= found
        return list(found)

    def below(self, folder: str) -> list[str]:
        with _reaching(self.name(folder)):
            found = self.remote.find(folder, detail=True)
        self._infos |= found
        return list(found)

    def stat(self, path: str) -> tuple[int, str]:
        info = self._infos[path]
        version = next(
            (str(info[key]) for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime") if info.get(key)), ""
        )
        return int(info.get("size") or 0), version


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Turn the errors of a store, of which each client has classes of its own, into one that names the URL."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{url} does not exist") from None
    except PermissionError as error:
        raise UnreachableError(
            f"{url}: access is refused ({first_line_of(error)}); check the address and the credentials in the environment"
        ) from None
    except Exception as error:
        raise UnreachableError(
            f"{url} cannot be read ({type(error).__name__}: {first_line_of(error)}); check the address, the network and the "
            "credentials in the environment"
        ) from None
