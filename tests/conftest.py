import logging
import os

import pytest
from hypothesis import HealthCheck, settings

# Drawing is the same everywhere: a failure in one place is a failure in all.
settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("nightly", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def prefect_server():
    """Prefect's embedded server on a database of its own, started once."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(autouse=True, scope="module")
def no_handlers_of_prefect_left():
    """A flow makes Prefect write all logs to what is standard error then, which for the next module is closed."""
    yield
    for handler in logging.root.handlers[:]:
        if type(handler).__module__.startswith("prefect"):
            logging.root.removeHandler(handler)
