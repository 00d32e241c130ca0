"""Open and create Icechunk repositories, list their versions, and let their readers read the files of logs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import icechunk

from natgrad.schema.errors import InputError
from natgrad.storage.base import FileRange
from natgrad.storage.objects import open_objects

__all__ = [
    "BRANCH",
    "create_repository",
    "find_repository",
    "find_version",
    "history",
    "newest_version",
    "reason",
    "require_containers",
    "virtual_chunk",
]

BRANCH = "main"

_MANIFEST_CHUNKS = 256
"""Number of chunks along the first axis of an array in one manifest. Each commit rewrites the last manifest. With
one manifest for the complete array, the size of a commit would grow with the run."""

_guard = threading.Lock()
_repositories: dict[str, icechunk.Repository] = {}


def _storage(url: str) -> icechunk.Storage:
    """Return the Icechunk storage of a repository, with credentials from the environment, files or a role."""
    scheme, _, path = url.partition("://")
    bucket, _, prefix = path.partition("/")
    if scheme == "gs":
        return icechunk.gcs_storage(bucket=bucket, prefix=prefix, from_env=True)
    return icechunk.s3_storage(bucket=bucket, prefix=prefix, from_env=True, **_address(url, bucket))


def _address(url: str, bucket: str) -> dict[str, Any]:
    """Return the options of Icechunk for the server of a bucket of S3."""
    system = open_objects(url).fs
    system.connect()
    endpoint, region = system.s3.meta.endpoint_url, system.s3.meta.region_name
    if ".amazonaws.com" in endpoint:
        # AWS only answers requests to the region of the bucket.
        headers = system.call_s3("head_bucket", Bucket=bucket)["ResponseMetadata"]["HTTPHeaders"]
        return {"region": headers.get("x-amz-bucket-region", region)}
    is_plain = endpoint.startswith("http:")
    return {"region": region, "endpoint_url": endpoint, "allow_http": is_plain, "force_path_style": True}


def _container(folder: str) -> icechunk.VirtualChunkContainer:
    """Return the description of a folder of a log for readers of chunks that are in its files."""
    scheme, _, path = folder.partition("://")
    store: Any = icechunk.local_filesystem_store(folder)
    if scheme == "gs":
        store = icechunk.gcs_store()
    elif path:
        store = icechunk.s3_store(**_address(folder, path.partition("/")[0]))
    return icechunk.VirtualChunkContainer(_prefix(folder), store)


def _prefix(folder: str) -> str:
    """Return the name of the container of a folder. Icechunk compares it with unescaped URLs of files."""
    return f"{folder if '://' in folder else f'file://{folder}'}/"


def virtual_chunk(index: list[int], found: FileRange) -> icechunk.VirtualChunkSpec:
    """Return the description of a chunk that is a range of a file, or of an object at a URL."""
    scheme, _, path = found.location.rpartition("://")
    url = f"{scheme or 'file'}://{quote(path)}"
    # Icechunk compares times in seconds.
    changed = datetime.fromtimestamp(-(-found.time // 10**9), UTC)
    return icechunk.VirtualChunkSpec(index, url, found.offset, found.size, None, changed)


def require_containers(url: str, folders: Iterable[str]) -> None:
    """Add folders of a log to those from which readers of a repository may read chunks."""
    repository = find_repository(url) or create_repository(url)
    config = repository.config
    known = config.virtual_chunk_containers or {}
    missing = [folder for folder in sorted({*folders}) if _prefix(folder) not in known]
    if missing:
        for folder in missing:
            config.set_virtual_chunk_container(_container(folder))
        storage = _storage(url)
        changed = icechunk.Repository.open(storage, config)
        changed.save_config()
        with _guard:
            _repositories[str(storage)] = changed


def find_repository(url: str) -> icechunk.Repository | None:
    """Open a repository once per process; return None if there is none."""
    storage = _storage(url)
    with _guard:
        if str(storage) not in _repositories:
            if not icechunk.Repository.exists(storage):
                return None
            _repositories[str(storage)] = icechunk.Repository.open(storage)
        return _repositories[str(storage)]


def create_repository(url: str) -> icechunk.Repository:
    """Create a repository."""
    axes: dict[Any, int] = {icechunk.ManifestSplitDimCondition.Axis(0): _MANIFEST_CHUNKS}
    split = icechunk.ManifestSplittingConfig.from_dict({icechunk.ManifestSplitCondition.AnyArray(): axes})
    config = icechunk.RepositoryConfig(manifest=icechunk.ManifestConfig(splitting=split))
    try:
        return icechunk.Repository.create(_storage(url), config)
    except icechunk.IcechunkError as error:
        if "clean prefixes" not in str(error):
            raise
        raise InputError(
            f"cannot create a repository here: {reason(error)}",
            where=url,
            why="a process was interrupted while creating one, or the prefix contains unrelated objects",
            remedy="remove the objects below this URL, or choose another OUT",
        ) from error


def newest_version(url: str) -> str:
    """Return the identifier of the latest version; empty if there is no repository."""
    repository = find_repository(url)
    return "" if repository is None else repository.lookup_branch(BRANCH)


def history(url: str, last: int | None = None) -> list[dict[str, Any]]:
    """List the versions of a repository, newest first: ``version``, ``time`` (UTC), ``message``, ``tags``.

    Each version takes one request, so only the requested number of versions is read.
    """
    repository = find_repository(url)
    if repository is None:
        return []
    tags: dict[str, list[str]] = {}
    for tag in sorted(repository.list_tags()):
        tags.setdefault(repository.lookup_tag(tag), []).append(tag)
    return [
        {
            "version": found.id,
            "time": found.written_at.astimezone(UTC).isoformat(timespec="seconds"),
            "message": found.message,
            "tags": tags.get(found.id, []),
        }
        for found in itertools.islice(repository.ancestry(branch=BRANCH), last)
    ]


def find_version(url: str, version: str) -> str:
    """Return the identifier of a version.

    Parameters
    ----------
    url : str
    version : str
        An identifier, a tag, or a time (ISO 8601, UTC by default), which selects the newest version at that time.

    Raises
    ------
    InputError
        If there is no such version.
    """
    repository = find_repository(url)
    try:
        if repository is None:
            raise LookupError("there is no repository")
        if version in repository.list_tags():
            return repository.lookup_tag(version)
        try:
            time = datetime.fromisoformat(version)
        except ValueError:
            return repository.lookup_snapshot(version).id
        time = time if time.tzinfo else time.replace(tzinfo=UTC)
        return repository.readonly_session(BRANCH, as_of=time).snapshot_id
    except (icechunk.IcechunkError, LookupError) as error:
        raise InputError(
            f"there is no version {version!r}: {reason(error)}",
            where=url,
            why="no identifier, tag or time of a version matches it, or the version has expired",
            remedy="choose an identifier or a tag listed by natgrad versions OUT, or a time (ISO 8601, UTC)",
        ) from error


def reason(error: BaseException) -> str:
    """Return the first line of an error of Icechunk."""
    return str(error).strip().partition("\n")[0].strip(" x\u2716\u00d7")
