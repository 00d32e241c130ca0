"""Provide the wheel of the work tree and an environment with it, built once per session and process."""

from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from environments import build, copy_sources, make_environment, required


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Build the wheel of the work tree."""
    source = copy_sources(tmp_path_factory.mktemp("source"))
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def requirements_of_the_wheel(wheel):
    """Return the distributions that ``pip install natgrad-pipeline`` installs, without extras."""
    (metadata_folder,) = metadata.distributions(path=[str(wheel)])
    lines = map(Requirement, metadata_folder.requires)
    return required(*(canonicalize_name(line.name) for line in lines if line.marker is None))


@pytest.fixture(scope="session")
def installed(wheel, requirements_of_the_wheel, tmp_path_factory):
    """Create an environment after ``pip install natgrad-pipeline``, without extras."""
    return make_environment(tmp_path_factory.mktemp("installed"), wheel, requirements_of_the_wheel)
