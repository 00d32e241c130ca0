"""Local files are opened only if they are regular."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import zarr

from natgrad.storage import LocalStorage, NotRegularError, open_regular, require_regular
from natgrad.storage.local import ChunkFile

OPENERS = {
    "open_regular": open_regular,
    "require_regular": require_regular,
    "open": lambda path: LocalStorage(path).open(),
    "get": lambda path: LocalStorage(path).get(),
    "get_ranges": lambda path: LocalStorage(path).get_ranges([(0, 1)]),
    "chunk": lambda path: ChunkFile(str(path)),
}


@pytest.fixture(params=["pipe", "socket", "device", "folder"])
def special(request, tmp_path, monkeypatch):
    """A path that is not a regular file."""
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    if request.param == "pipe":
        os.mkfifo("x")
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("x")
    elif request.param == "device":
        Path("x").symlink_to("/dev/zero")
    else:
        Path("x").mkdir()
    return tmp_path / "x", request.param


@pytest.mark.parametrize("opener", OPENERS)
def test_a_path_that_is_not_a_regular_file_is_refused_immediately(special, opener):
    path, kind = special
    with pytest.raises(NotRegularError, match=f"not a regular file: it is a (named )?{kind}") as caught:
        OPENERS[opener](path)
    assert caught.value.filename == str(path)


def test_a_link_to_a_regular_file_is_opened(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert require_regular(tmp_path / "link") == 7
    assert LocalStorage(tmp_path / "link").get() == b"content"
    assert LocalStorage(tmp_path / "link").get_ranges([(3, 7)]) == [b"tent"]
    with LocalStorage(tmp_path / "link").open() as file:
        assert file.size == 7
        assert file.read() == b"content"


def test_a_missing_file_is_not_found(tmp_path):
    (tmp_path / "link").symlink_to("nothing")
    for name in ("missing", "link"):
        with pytest.raises(FileNotFoundError):
            open_regular(tmp_path / name)


def test_zarr_refuses_a_pipe_in_place_of_a_chunk(tmp_path):
    array = zarr.create_array(LocalStorage(tmp_path).zarr_store(), name="a", data=np.ones(3))
    (tmp_path / "a" / "c" / "0").unlink()
    os.mkfifo(tmp_path / "a" / "c" / "0")
    with pytest.raises(OSError, match="not a regular file: it is a named pipe"):
        array[:]
