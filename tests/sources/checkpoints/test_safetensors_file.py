"""Test files of safetensors whose headers are equal, or differ in a part."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from natgrad.schema.errors import InputError
from natgrad.sources.checkpoints.safetensors_file import SafetensorsFile
from natgrad.sources.steps import LoggedStep
from natgrad.storage import LocalStorage


def opened(path):
    return SafetensorsFile(LoggedStep(0, LocalStorage(path)))


def read(path):
    """Return the numbers and the tensors of a file."""
    with opened(path) as file:
        tensors = {key: np.empty(logged.shape, logged.dtype) for key, logged in file.tensors.items()}
        for key, out in tensors.items():
            file.read(key, 0, out.reshape(-1))
        return dict(file.numbers), {key: out.tolist() for key, out in tensors.items()}


def test_files_that_differ_in_metadata_or_shapes_keep_their_own_contents(tmp_path):
    expected = []
    for number in range(12):
        shapes = [(2, 3), (3, 2), (6,)][number % 3]
        tensors = {"a": np.full(shapes, number, np.float32), "b": np.arange(number % 4, dtype=np.float64)}
        metadata = {"loss": repr(10.0 ** (number % 5)), "note": "x" * number} if number % 6 else None
        save_file(tensors, tmp_path / str(number), metadata=metadata)
        numbers = {"loss": 10.0 ** (number % 5)} if number % 6 else {}
        expected.append((numbers, {key: value.tolist() for key, value in tensors.items()}))
    for _ in range(2):
        assert [read(tmp_path / str(number)) for number in range(12)] == expected


def test_a_truncated_file_with_the_header_of_another_is_refused(tmp_path):
    for name in ("one", "other"):
        save_file({"a": np.ones(5, np.float32)}, tmp_path / name, metadata={"loss": name})
    read(tmp_path / "one")
    os.truncate(tmp_path / "other", (tmp_path / "other").stat().st_size - 1)
    with pytest.raises(InputError, match="cannot read a safetensors file"):
        opened(tmp_path / "other")


def test_a_name_that_metadata_contain_twice_is_refused_for_a_known_header_too(tmp_path):
    save_file({"a": np.ones(5, np.float32)}, tmp_path / "one", metadata={"loss": "1"})
    read(tmp_path / "one")
    content = (tmp_path / "one").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip(b" ").replace(b'{"loss":"1"}', b'{"loss":"1","loss":"2"}')
    assert json.loads(header)["__metadata__"] == {"loss": "2"}
    (tmp_path / "twice").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    with pytest.raises(InputError, match="cannot read a safetensors file"):
        opened(tmp_path / "twice")
