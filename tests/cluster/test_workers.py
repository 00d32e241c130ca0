"""Workers on which OUT is read-only or a different storage: mount namespaces on one machine."""

import shlex

import pytest
from test_clusters import connected, refusal_of, scheduler, worker
from test_ledger_pass import ELEMENTS, ROWS

from logs import walk_arrays
from servers import free_port


@pytest.mark.parametrize(
    ("mount", "what"),
    [
        (
            "mount --bind {out} {out} && mount -o remount,bind,ro {out}",
            "cannot be written: OSError: [Errno 30] Read-only file system",
        ),
        ("mount -t tmpfs none {out}", "does not exist there, or is not the OUT of the client"),
    ],
)
def test_workers_whose_host_mounts_out_differently_end_the_pass(tmp_path, mount, what):
    out, address = tmp_path / "out", f"tcp://127.0.0.1:{free_port()}"
    out.mkdir()
    mounted = mount.format(out=shlex.quote(str(out)))
    program = ("unshare", "--mount", "sh", "-c", f'{mounted} && exec "$@"', "worker")
    with scheduler(address.rpartition(":")[2], tmp_path), worker(address, tmp_path, program=program):
        connected(address, 1)
        assert f"{out} {what}" in refusal_of(out, walk_arrays(ROWS, ELEMENTS), address)
