import logging
import os

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["slow"]

# Examples are drawn in the same way everywhere, so a failure is reproducible on every machine. The mutants are
# detected with fewer examples than these. `make fuzz` draws many, and others each time.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("many", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def log(tmp_path):
    """Return the path of a log to be written."""
    return tmp_path / "log"


@pytest.fixture
def out(tmp_path):
    """Return the path of the output of a run."""
    return tmp_path / "out"


@pytest.fixture
def store(out):
    """Return the path of the trajectory in `out`."""
    return out / "trajectory.zarr"


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """Install `distributions.HOSTILE` in every process that the test starts from now on."""
    from distributions import install_hostile

    folder = install_hostile(tmp_path / "installed")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.syspath_prepend(folder)


@pytest.fixture(autouse=True, scope="module")
def no_handlers_of_prefect_left():
    """A flow makes Prefect write all logs to the current standard error, which is closed in the next module."""
    yield
    for handler in logging.root.handlers[:]:
        if type(handler).__module__.startswith("prefect"):
            logging.root.removeHandler(handler)


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_the_disk():
    """Skip flushes in this process; the tests of storages and stores check which files are flushed, and when."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory):
    """Start an S3 server with a bucket named "bucket", and set the environment to use it."""
    from natgrad.storage import open_storage
    from servers import S3Server

    with S3Server(tmp_path_factory.mktemp("s3") / "log") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        open_storage("s3://bucket/any").fs.mkdir("bucket")
        yield server


@pytest.fixture
def url(s3_server, request):
    """A separate location in the bucket for each test."""
    from natgrad.storage import open_storage

    return open_storage(f"s3://bucket/{request.node.name}")
