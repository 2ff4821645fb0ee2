"""One checkpoint: a folder that is there as a whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlodeco.errors import CheckpointError, quoted
from mlodeco.runtime.processes import Processes

FORMAT = 1
"""The version of the files."""

MANIFEST = "manifest.json"
HISTORY = "history.jsonl"
_COMMON = "common"
_ASIDE = ".old"

BROKEN = (
    OSError,
    SafetensorError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    RecursionError,
    RuntimeError,
    MemoryError,
    AssertionError,
    OverflowError,
    ArithmeticError,
)
"""What comes of reading a file that is not what it should be."""


class WriteError(CheckpointError):
    """The files could not be written."""


@dataclass(frozen=True)
class Part:
    """Some JSON, and the tensors that it refers to."""

    tree: Any
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        head: what its manifest says of it.
        common: what is the same in all processes.
        own: what is this process's own.
        weights: for each level the tensors of its module, by their names there, and for names
            that stand for one of them which.
        history: the records, a line of JSON each.
    """

    head: Mapping[str, Any]
    common: Part
    own: Part
    weights: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]]
    history: str


@dataclass(frozen=True)
class Found:
    """A checkpoint that was read.

    Attributes:
        head: what its manifest says of it.
        common: what is the same in all processes.
        own: that of this process; of the main one where there was no such process.
        has_own: whether there was one.
        weights: for each level the tensors of its module.
        history: the records, a line of JSON each.
    """

    head: Mapping[str, Any]
    common: Part
    own: Part
    has_own: bool
    weights: Mapping[str, Mapping[str, Tensor]]
    history: str


def write(path: Path, contents: Contents, processes: Processes) -> None:
    """Writes a checkpoint, which takes the place of one that is there.

    All processes write to a temporary folder beside it, which is renamed when everything is on
    the disk; one that cannot write keeps the others from it.

    Raises:
        WriteError: the files could not be written; nothing is left of them.
    """
    temporary = path.with_name(f".{path.name}.writing")
    is_main, rank = processes.is_main, processes.rank
    try:
        _together(processes, lambda: _begin(temporary) if is_main else None)
        own = _together(processes, lambda: _write_own(temporary, contents, rank))
        _together(processes, lambda: _commit(path, temporary, contents, own) if is_main else None)
    except BaseException:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def read(path: Path, rank: int = 0, *, all_files: bool = True) -> Found:
    """A checkpoint, every file of which is as it was written.

    Args:
        path: its folder.
        rank: the process whose part is wanted.
        all_files: whether files that are not wanted are compared with their checksums too.

    Raises:
        CheckpointError: one is not; the message names it.
    """
    old = _aside(path)
    path = old if old.exists() and not path.exists() else path
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: there is no checkpoint.",
            remedy="give the folder of one, such as runs/one/checkpoints/000000030.",
        )
    manifest = _read_manifest(path)
    has_own = rank < manifest["head"]["processes"]
    names = [_COMMON, _process(rank if has_own else 0)]
    levels = {level: _weights(level) for level in manifest["head"]["program"]}
    files = {f"{name}{end}" for name in names for end in (".json", ".safetensors")}
    files |= {HISTORY, *levels.values()}
    for name in files - manifest["files"].keys():
        raise _broken(path / name, "it is not in the manifest")
    for name in manifest["files"] if all_files else files:
        _check(path / name, *manifest["files"][name])
    common, own = (_read_part(path, name) for name in names)
    weights = {level: _read(path / file, _tensors) for level, file in levels.items()}
    history = _read(path / HISTORY, lambda p: p.read_text(encoding="utf-8"))
    return Found(manifest["head"], common, own, has_own, weights, history)


def remove(path: Path) -> None:
    """Deletes a checkpoint; nobody sees a part of it."""
    part = path.with_name(f".{path.name}.removed")
    shutil.rmtree(part, ignore_errors=True)
    try:
        path.rename(part)
    except OSError:
        return
    shutil.rmtree(part, ignore_errors=True)


def recover(path: Path) -> None:
    """Gives checkpoints in a folder their names back that were about to be replaced by others.

    Raises:
        OSError: the folder cannot be changed.
    """
    for aside in path.glob(f".*{_ASIDE}"):
        whole = path / aside.name[1 : -len(_ASIDE)]
        if not whole.exists():
            aside.rename(whole)


def copy(path: Path, target: Path, processes: Processes) -> None:
    """Makes another checkpoint of the same files.

    Raises:
        WriteError: they could not be linked or copied.
    """
    _together(processes, lambda: _copy(path, target) if processes.is_main else None)


def _copy(path: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(path, temporary, copy_function=_link)
        _put(temporary, target, [])
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sync(*paths: Path) -> None:
    """Waits until files and folders are on the disk; several at a time, which costs little more.

    Raises:
        OSError: they cannot be put there.
    """
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(_sync, paths))


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
        _sync(Path(target))


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{_ASIDE}")


def _process(rank: int) -> str:
    return f"process-{rank}"


def _weights(level: str) -> str:
    return f"levels/{quote(level, safe=' ')}.safetensors"


def _together(processes: Processes, action: Callable[[], Any]) -> list[Any]:
    """What the action gives in each process; if it fails in one, none goes on."""
    failure, found = None, None
    try:
        found = action()
    except (OSError, SafetensorError) as error:
        failure = f"{type(error).__name__}: {error}"
    results = processes.exchange([found, failure])
    failures = [failure for _, failure in results if failure]
    if failures:
        raise _unwritten(failures[0])
    return [found for found, _ in results]


def _unwritten(why: str) -> WriteError:
    return WriteError(
        f"a checkpoint could not be written: {why}",
        remedy="free space on the disk, or give another out=; earlier checkpoints stay.",
    )


def _begin(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "levels").mkdir(parents=True)


def _write_own(folder: Path, contents: Contents, rank: int) -> dict[str, list[Any]]:
    """The files of this process: for each its size and checksum."""
    files = _write_part(folder, _process(rank), contents.own)
    if rank == 0:
        files += _write_part(folder, _COMMON, contents.common)
        for level, (tensors, aliases) in contents.weights.items():
            save_file(dict(tensors), folder / _weights(level), dict(aliases))
            files.append(_weights(level))
        _write_text(folder / HISTORY, contents.history)
        files.append(HISTORY)
    if rank > 0:  # the main process waits for its own with the manifest
        sync(*(folder / name for name in files))
    return {name: [(folder / name).stat().st_size, _digest(folder / name)] for name in files}


def _write_part(folder: Path, name: str, part: Part) -> list[str]:
    save_file(dict(part.tensors), folder / f"{name}.safetensors")
    _write_text(folder / f"{name}.json", json.dumps(part.tree, allow_nan=False))
    return [f"{name}.safetensors", f"{name}.json"]


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")


def _commit(path: Path, temporary: Path, contents: Contents, own: list[dict[str, Any]]) -> None:
    files = {name: entry for one in own for name, entry in one.items()}
    body = {"format": FORMAT, "head": contents.head, "files": files}
    manifest = {"checksum": _checksum(body), **body}
    _write_text(temporary / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False))
    _put(temporary, path, [temporary / name for name in (MANIFEST, *own[0])])


def _put(temporary: Path, path: Path, files: list[Path]) -> None:
    """Renames a folder that is complete, when these files are on the disk."""
    sync(*files, temporary / "levels", temporary)
    if path.exists():
        shutil.rmtree(_aside(path), ignore_errors=True)
        path.rename(_aside(path))
    temporary.rename(path)
    _sync(path.parent)
    shutil.rmtree(_aside(path), ignore_errors=True)


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = _read(path / MANIFEST, lambda p: json.loads(p.read_text()))
    try:
        version = manifest.get("format")
        body = {key: manifest[key] for key in manifest if key != "checksum"}
        is_whole = manifest.get("checksum") == _checksum(body)
    except BROKEN as error:
        raise damaged(path / MANIFEST, error) from error
    if version != FORMAT or type(version) is not int:
        raise CheckpointError(
            f"{path / MANIFEST}: the checkpoint has the format {version!r}.",
            expected=f"the format {FORMAT}, which this version of mlodeco writes.",
            remedy="go on with the version of mlodeco that wrote it, which the manifest names.",
        )
    if not is_whole:
        raise _broken(path / MANIFEST, "its checksum is another")
    found: dict[str, Any] = _read(path / MANIFEST, lambda _: _checked(manifest))
    return found


def _checked(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest, in which everything is there that is looked up."""
    head, files = manifest["head"], manifest["files"]
    is_right = is_count(head["processes"], 1, 2**20) and is_count(head["tick"])
    is_right = is_right and all(isinstance(level, str) for level in head["program"])
    for name, (size, digest) in files.items():
        parts = name.split("/")
        is_inside = ".." not in parts and not name.startswith("/")
        is_right = is_right and is_inside and is_count(size) and isinstance(digest, str)
    if not is_right:
        raise ValueError("an entry is of another kind")
    return manifest


def is_count(value: object, least: int = 0, most: int = 2**62) -> bool:
    """Whether it is an integer within bounds."""
    return type(value) is int and least <= value <= most


def _check(path: Path, size: int, digest: str) -> None:
    def compare(path: Path) -> str:
        present = path.stat().st_size
        if present != size:
            return f"it has {present} bytes and not {size}"
        return "" if _digest(path) == digest else "its contents have changed"

    difference = _read(path, compare)
    if difference:
        raise _broken(path, difference)


def _read_part(path: Path, name: str) -> Part:
    tensors = _read(path / f"{name}.safetensors", _tensors)
    return Part(_read(path / f"{name}.json", lambda p: json.loads(p.read_text())), tensors)


def _tensors(path: Path) -> Mapping[str, Tensor]:
    return load_file(path)


def _read(path: Path, action: Callable[[Path], Any]) -> Any:
    """What the action makes of a file.

    Raises:
        CheckpointError: the file is not there, or not what it should be.
    """
    try:
        # a pipe or a device would be read without end
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is no ordinary file")
        return action(path)
    except FileNotFoundError as error:
        raise _broken(path, "there is no such file") from error
    except BROKEN as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: BaseException) -> CheckpointError:
    """The error of a file, or of a whole checkpoint, that is not what it should be."""
    return _broken(path, f"{type(error).__name__}: {str(error)[:200]}")


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: the checkpoint is damaged: {why}.",
        remedy="resume from another one: resume='auto' takes the newest that is whole.",
    )


def compare_programs(saved: Mapping[str, Any], present: Mapping[str, Any], path: Path) -> None:
    """Refuses a checkpoint of another program.

    Raises:
        CheckpointError: levels, their parameters or optimizers differ.
    """
    differences = [
        f"level {level!r}: {what} was {_shown(old.get(what))} and is {_shown(new.get(what))}"
        for level in saved
        if level in present
        for old, new in ((saved[level], present[level]),)
        for what in {**old, **new}
        if old.get(what) != new.get(what)
    ]
    if saved.keys() != present.keys():
        differences.insert(0, f"the levels were {quoted(saved)} and are {quoted(present)}")
    if differences:
        raise CheckpointError(
            f"{path}: the checkpoint belongs to another program: {differences[0]}.",
            remedy="resume with the program that wrote it, or give another out=.",
        )


def _shown(value: Any) -> str:
    return "not there" if value is None else str(value)
