"""Define the public functions that open the stores of a run.

They are in a separate module, because the return type of `open_results` requires xarray, which `natgrad.inspect`
and `natgrad.verify` do not load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, Unpack

import xarray as xr

import natgrad.reporting.accessor  # noqa: F401  # registers the accessor
from natgrad.app import declarations, options
from natgrad.app.folder import RunFolder
from natgrad.results import dataset
from natgrad.storage import storage_errors
from natgrad.store import Ledger, Trajectory

__all__ = ["open_ledger", "open_results", "open_trajectory"]

T = TypeVar("T")


@declarations.with_options(options.VersionOptions)
def open_results(out: options.Out, **values: Unpack[options.VersionOptions]) -> xr.DataTree:
    """Open the labelled results of a run.

    Parameters
    ----------
    **options

    Returns
    -------
    xarray.DataTree
        Groups ``/model`` and ``/tensor``, and ``/replicates`` if the log has replicates of a stochastic rule.
        Values are read when they are used. Its accessor ``natgrad`` ranks tensors, draws and exports, see
        `natgrad.reporting.accessor.DataTreeAccessor`.

    Raises
    ------
    InputError
        If there are no results.
    """
    return _opened(out, values, lambda folder: dataset.read(folder.results))


@declarations.with_options(options.VersionOptions)
def open_trajectory(out: options.Out, **values: Unpack[options.VersionOptions]) -> xr.Dataset:
    """Open the trajectory of a run: its logged states, copied or in the files of its log.

    Parameters
    ----------
    **options

    Returns
    -------
    xarray.Dataset
        ``parameter``, ``gradient`` and other arrays (step, element), and the numbers of each step. Elements are
        read when they are used, and compared with their checksums. bfloat16 is read as its bits, in uint16.

    Raises
    ------
    InputError
        If there is no trajectory.
    """

    def opened(folder: RunFolder) -> xr.Dataset:
        # Zarr takes time to load.
        from natgrad.store.states_store import StatesStore

        store: Any = StatesStore.of(Trajectory(folder.trajectory))
        found: xr.Dataset = xr.open_zarr(store, consolidated=False, chunks=None)
        return found

    return _opened(out, values, opened)


@declarations.with_options(options.VersionOptions)
def open_ledger(out: options.Out, **values: Unpack[options.VersionOptions]) -> Ledger:
    """Open the ledger of a run, which contains the Gram matrices of its updates.

    Parameters
    ----------
    **options

    Returns
    -------
    Ledger

    Raises
    ------
    InputError
        If there is no ledger.
    """
    return _opened(out, values, lambda folder: Ledger(folder.ledger))


def _opened(out: options.Out, values: options.VersionOptions, store: Callable[[RunFolder], T]) -> T:
    folder = RunFolder.of(out, version=values["version"])
    with storage_errors(folder.storage):
        return store(folder)
