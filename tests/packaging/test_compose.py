"""Test compose.yaml without a Docker engine: its commands are valid, and its references exist."""

import re
from pathlib import Path

import pytest
import typer.main
import yaml

from natgrad.compute.clusters import ONE_THREAD
from natgrad_flows.cli import app

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())


def test_every_service_depends_on_existing_services_and_mounts_existing_volumes():
    assert set(COMPOSE["services"]) == {"database", "server", "scheduler", "worker", "scanner"}
    for service in COMPOSE["services"].values():
        assert set(service.get("depends_on", ())) <= set(COMPOSE["services"])
        for volume in service.get("volumes", ()):
            # A variable with a default contains a colon.
            source = re.sub(r"\$\{.*?\}", "/host", volume).partition(":")[0]
            assert source.startswith("/") or source in COMPOSE["volumes"]


def test_services_are_awaited_only_if_they_have_a_health_check():
    for service in COMPOSE["services"].values():
        wanted = service.get("depends_on", ())
        for name in wanted:
            if isinstance(wanted, dict) and wanted[name]["condition"] == "service_healthy":
                assert "healthcheck" in COMPOSE["services"][name]


def test_the_command_of_the_scanner_is_valid():
    program, name, *arguments = COMPOSE["services"]["scanner"]["command"].split()
    command = typer.main.get_command(app).commands[name]
    context = command.make_context(program, arguments)
    assert context.params["every"] == 600
    assert (
        context.params["scheduler"] == f"tcp://scheduler:{COMPOSE['services']['scheduler']['command'].split()[-1]}"
    )


@pytest.mark.parametrize("name", ["compose.yaml", "docs/howto/cluster.md"])
def test_workers_started_by_hand_have_one_thread_of_each_kind(name):
    text = (ROOT / name).read_text()
    for variable in ONE_THREAD:
        assert re.search(rf'\b{variable}(=1|: "1")', text), variable
    assert "--nthreads 1" in text
