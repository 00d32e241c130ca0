"""Call functions of the package that take open storages, with paths and URLs instead."""

from natgrad import ingestion
from natgrad.compute import ledger_pass
from natgrad.results import dataset
from natgrad.sources import opening
from natgrad.storage import open_all, open_storage
from natgrad.store import Ledger, Trajectory, open_store, verify

TIMES = "verified.json"
"""Name of the records of times in a store. All other files of equal data are equal."""


def ingest(source, store, **options):
    return ingestion.ingest(open_all(source), open_store(store), **options)


def compute_ledger(trajectory, ledger, **options):
    return ledger_pass.compute_ledger(open_store(trajectory), open_store(ledger), **options)


def open_source(location, *arguments, **options):
    return opening.open_source(open_storage(location), *arguments, **options)


def open_sources(locations, *arguments, **options):
    return opening.open_sources(open_all(locations), *arguments, **options)


def create_trajectory(location, *arguments, **options):
    return Trajectory.create(open_store(location), *arguments, **options)


def prepare_ledger(location, *arguments, **options):
    return Ledger.prepare(open_store(location), *arguments, **options)


def read_results(location, version=None):
    return dataset.read(open_store(location, version))


def write_results(tree, location):
    dataset.write(tree, open_store(location), {})


def verify_trajectory(location):
    return verify.verify_trajectory(open_store(location))


def verify_ledger(location, states=None):
    return verify.verify_ledger(open_store(location), states)
