"""The entries of a folder are counted by kind, with the first and the last name."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad.app.diagnosis.contents import contents_of
from natgrad.schema.errors import InputError
from natgrad.storage import open_storage


def described(path):
    return contents_of(open_storage(path))


def test_kinds_are_counted_and_numbers_are_ordered_by_value(tmp_path):
    for name in ("step_10.pth.tar", "step_9.pth.tar", "b.csv.gz", "notes", "x.1"):
        (tmp_path / name).touch()
    for name in ("run-2", "run-10", "src"):
        (tmp_path / name).mkdir()
    assert described(tmp_path) == {
        "files .pth.tar": "2, step_9.pth.tar to step_10.pth.tar",
        "folders run-<N>": "2, run-2 to run-10",
        "files without ending": "2, notes to x.1",
        "files .csv.gz": "1, b.csv.gz",
        "folders": "1, src",
    }


@given(
    st.lists(
        st.sampled_from([".a", ".b", ".c", "", ".tar.gz", ".d", ".e", ".f", ".g", ".h", ".i", ".j", ".k", ".l"])
    )
)
def test_no_entry_is_omitted_silently(tmp_path_factory, suffixes):
    folder = tmp_path_factory.mktemp("folder")
    for index, suffix in enumerate(suffixes):
        (folder / f"n{index}{suffix}").touch()
    found = described(folder)
    assert sum(int(text.split(",")[0].split()[0]) for text in found.values() if text[0].isdigit()) == len(suffixes)


def test_special_files_and_files_are_described_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone").symlink_to("nowhere")
    assert described(tmp_path) == {"broken links": "1, gone", "named pipes": "1, pipe"}
    assert described(tmp_path / "pipe") == {"file": "a named pipe, which is not opened"}
    (tmp_path / "f").write_bytes(b"PK\x03\x04....")
    assert described(tmp_path / "f")["file"].startswith("8 bytes, a zip archive")
    (tmp_path / "empty").mkdir()
    assert described(tmp_path / "empty") == {"nothing": "the folder is empty"}


def test_a_file_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(InputError, match="cannot examine the file"):
        described(tmp_path / "missing")
