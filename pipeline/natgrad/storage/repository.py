"""Whether OUT is plain or an Icechunk repository, which keeps every commit of its stores as a version.

Such a repository is found by its content, and made where `--store icechunk` asks for it. Reading is of one version,
the newest unless another one is asked for; who writes sees what it writes, and others see it when it is published.
Locks, pages, and what watchers remember stand as objects beside the repository.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from natgrad.schema.errors import InputError
from natgrad.storage.objects import is_url, names, network_errors, place

__all__ = [
    "KINDS",
    "holds",
    "is_repository",
    "newest",
    "outside",
    "place_of_run",
    "place_of_store",
    "publish",
    "versions",
    "written",
]

KINDS = ("plain", "icechunk")
"""Ways of storing."""

REPOSITORY = "stores.icechunk"
"""Name of the repository in OUT, which holds the stores. It has a place of its own, so locks are beside it."""

_STORES = ("trajectory.zarr", "ledger.zarr", "results.zarr")


def is_repository(path: Path) -> bool:
    """Whether a place is in an Icechunk repository."""
    return is_url(path) and "repository" in path.storage_options  # type: ignore[attr-defined]


def place_of_run(out: str | Path, *, store: str | None = None, version: str | None = None) -> Path:
    """Place of OUT: of its stores, in a repository or in the folder itself.

    Parameters
    ----------
    out : str or Path
    store : str, optional
        One of `KINDS`: how OUT is stored, where nothing is there yet.
    version : str, optional
        Id, tag or time (ISO 8601) of a version to read; the newest where not given.

    Raises
    ------
    InputError
        Where OUT is stored otherwise, where this way of storing is not possible there, or its library is not
        installed, and where there is no such version.
    """
    if store is not None and store not in KINDS:
        raise InputError(f"{store!r} is no way of storing", where="--store", remedy=f"choose of {', '.join(KINDS)}")
    found = place(out)
    if is_repository(found):
        if version is None:
            return found
        found = outside(found)
    if not is_url(found):
        if store == "icechunk":
            raise InputError(
                "a folder cannot be an Icechunk repository",
                where=str(found),
                why="Icechunk commits safely in object stores only: in a folder, commits that succeeded are lost "
                "where two processes commit (issues 804 and 1494 of earth-mover/icechunk)",
                remedy="give a URL (s3://, gs://), or leave --store out: attempts are kept in a folder too",
            )
        if version is not None:
            raise _plain(found)
        return found
    with network_errors(found):
        there = set(names(found))
        holds = REPOSITORY in there
        if store == "plain" and holds:
            raise InputError(
                "this is an Icechunk repository",
                where=str(found),
                why="it was made with --store icechunk",
                remedy="leave --store out, or choose another OUT",
            )
        if store == "icechunk" and not holds and there.intersection(_STORES):
            raise InputError(
                "this is a plain store",
                where=str(found),
                why="it was made without --store icechunk",
                remedy="leave --store out, or choose another OUT",
            )
        if holds or store == "icechunk":
            files = _icechunk(found)
            if version is not None:
                return _path(found, version=files.find_version(_url(found), version), pinned=True)
            return _path(found, version=files.newest_version(_url(found)) if holds else "")
    if version is not None:
        raise _plain(found)
    return found


def place_of_store(path: str | Path, version: str | None = None) -> Path:
    """Place of a store in OUT, such as ``OUT/trajectory.zarr``.

    Of a URL it is asked whether OUT is a repository; what is a place by now (`natgrad.storage.place`) is taken as
    it is, unless a version is asked for.

    Raises
    ------
    InputError
        As `place_of_run`.
    """
    found = place(path)
    if (is_url(path) or not is_url(found)) and version is None:
        return found
    return place_of_run(found.parent, version=version) / found.name


def _plain(out: Path) -> InputError:
    return InputError(
        "a plain store has no versions",
        where=str(out),
        why="attempts of a run are kept in it (--attempt), what a commit replaces is not",
        remedy="process into a new OUT in an object store with --store icechunk to have every commit as a version",
    )


def _icechunk(out: Path) -> Any:
    """Return the module that knows Icechunk, whose library is an extra."""
    try:
        from natgrad.storage import icechunk_files
    except ImportError as error:
        raise InputError(
            f"the library for Icechunk is not installed: {error}",
            where=str(out),
            remedy="pip install 'natgrad-pipeline[icechunk]'",
        ) from error
    return icechunk_files


def _url(out: Path) -> str:
    return str(out / REPOSITORY)


def _path(out: Path, key: str = "", **options: Any) -> Path:
    files = _icechunk(out)
    found = files.RepositoryPath(f"icechunk://{str(out).partition('://')[2]}", repository=_url(out), **options)
    return cast(Path, found / key if key else found)


def _parts(path: Path) -> tuple[Path, str]:
    """OUT, and the key of a path in it."""
    out = place(path.storage_options["repository"]).parent  # type: ignore[attr-defined]
    return out, str(path).removeprefix(str(out)).strip("/")


def outside(path: Path) -> Path:
    """Place of the same name beside the stores of OUT: in the object store itself, where OUT is a repository."""
    return place(str(path)) if is_repository(path) else path


def newest(path: Path) -> Path:
    """Place as it is now, with what others have committed since; of a version that was asked for, that.

    A place, and what is opened there, in whatever process, is of one version.
    """
    if not is_repository(path):
        return path
    options = path.storage_options  # type: ignore[attr-defined]
    if options.get("pinned") or options.get("transaction"):
        return path
    out, key = _parts(path)
    return _path(out, key, version=_icechunk(out).newest_version(_url(out)))


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Give the place of a store to write to, for one writer; what it does not `publish` of a repository is dropped.

    Raises
    ------
    InputError
        Where it is an old version.
    """
    if not is_repository(path):
        yield path
        return
    if path.storage_options.get("pinned"):  # type: ignore[attr-defined]
        raise InputError(
            "a version is only read",
            where=str(path),
            why="what was committed does not change",
            remedy="leave the version out: what is written becomes a new one",
        )
    out, key = _parts(path)
    files = _icechunk(out)
    transaction = files.begin(_url(out))
    try:
        yield _path(out, key, transaction=transaction)
    finally:
        files.end(transaction)


def holds(path: Path, folder: Path) -> bool:
    """Whether a place in a repository has the files of a folder, and no others: then there is nothing to commit."""
    if not is_repository(path):
        return False
    url: Any = path
    there = url.fs.find(url.path)
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    here = {f"{url.path}/{name}": file for name, file in files.items()}
    if sorted(here) != there:
        return False
    found = url.fs.cat_ranges(there, [None] * len(there), [None] * len(there), on_error="raise")
    return all(here[name].read_bytes() == content for name, content in zip(there, found, strict=True))


def publish(path: Path, message: str) -> None:
    """Make a version of what was written to a place of `written`; what is plain can be seen already.

    Raises
    ------
    Unavailable
        Where another process has committed the same meanwhile.
    """
    if is_repository(path):
        path.fs.commit(message)  # type: ignore[attr-defined]


def versions(out: str | Path, last: int | None = None) -> list[dict[str, Any]]:
    """List the versions of OUT, the newest first: ``version``, ``time``, ``message``, ``tags``.

    Parameters
    ----------
    out : str or Path
    last : int, optional
        Only the last so many: each is a request.

    Raises
    ------
    InputError
        Where OUT is no repository.
    """
    found = place_of_run(out)
    if not is_repository(found):
        raise _plain(found)
    found = outside(found)
    with network_errors(found):
        return cast(list[dict[str, Any]], _icechunk(found).history(_url(found), last))
