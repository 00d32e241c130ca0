"""Test files of safetensors whose headers are equal, or differ in a part."""

import json
import os

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
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


def rewritten(path, metadata, tensors_first=False, spaces=0):
    """Write a file with the tensors of another one, and the text of its metadata."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = json.dumps(header, separators=(",", ":"))[1:-1]
    parts = [tensors, f'"__metadata__":{metadata}'] if tensors_first else [f'"__metadata__":{metadata}', tensors]
    text = ("{" + ",".join(parts) + "}" + " " * spaces).encode()
    path.with_name("rewritten").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    return path.with_name("rewritten")


@pytest.mark.parametrize("metadata", ['{"loss":1}', '["loss"]', '{"loss":"\\ud800"}', '{"loss":"1"', '"loss"', "1"])
def test_metadata_that_the_library_refuses_are_refused_for_a_known_header_too(tmp_path, metadata):
    save_file({"a": np.ones(5, np.float32)}, tmp_path / "one", metadata={"loss": "1"})
    path = rewritten(tmp_path / "one", '{"loss":"2"}')
    assert read(path)[0] == {"loss": 2}
    path = rewritten(tmp_path / "one", metadata)
    with pytest.raises(SafetensorError), safe_open(path, framework="numpy"):
        pass
    with pytest.raises(InputError, match="cannot read a safetensors file"):
        opened(path)


def test_metadata_are_read_wherever_the_header_has_them(tmp_path):
    save_file({"a": np.ones(5, np.float32)}, tmp_path / "one")
    for number in range(6):
        path = rewritten(tmp_path / "one", f'{{"loss":"{number}"}}', number % 2 == 1, spaces=number)
        for _ in range(2):
            assert read(path) == ({"loss": number}, {"a": [1.0] * 5})
