"""Register the engine ``natgrad`` of xarray, which opens the results of a folder OUT.

xarray imports this module when it looks for the engine of any file, so it imports little.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xarray as xr
from xarray.backends import BackendEntrypoint

import natgrad.reporting.accessor  # noqa: F401  # registers the accessor
from natgrad.schema.errors import InputError

__all__ = ["NatgradBackend"]


class NatgradBackend(BackendEntrypoint):
    """Open the results of a folder OUT, or of its URL.

    Values are read when they are used, and each file that is read is compared with its checksum. With ``chunks={}``
    they are Dask arrays, with the chunks of the files.
    """

    description = "Open results of natgrad-pipeline: the folder OUT or its URL"
    open_dataset_parameters = ("filename_or_obj", "drop_variables", "group", "version")
    supports_groups = True

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Return True for a local folder with results."""
        named = isinstance(filename_or_obj, str | Path)
        return named and Path(filename_or_obj, "results.zarr", "zarr.json").exists()

    def open_datatree(
        self,
        filename_or_obj: Any,
        *,
        drop_variables: str | Iterable[str] | None = None,
        version: str | None = None,
    ) -> xr.DataTree:
        """Open all groups.

        Parameters
        ----------
        filename_or_obj : str or Path
            The folder OUT of a run, or its URL.
        drop_variables : str or iterable of str, optional
            Variables to omit.
        version : str, optional
            Version of an Icechunk repository: id, tag or time.

        Raises
        ------
        InputError
            If there are no results.
        """
        from natgrad.app.opening import open_results

        dropped = [drop_variables] if isinstance(drop_variables, str) else list(drop_variables or ())
        tree = open_results(filename_or_obj, version=version)
        return tree.map_over_datasets(lambda one: one.drop_vars(dropped, errors="ignore")) if dropped else tree

    def open_groups_as_dict(self, filename_or_obj: Any, **options: Any) -> dict[str, xr.Dataset]:
        """Open all groups, by path; see `open_datatree`."""
        tree = self.open_datatree(filename_or_obj, **options)
        return {node.path: node.to_dataset(inherit=False) for node in tree.subtree}

    def open_dataset(
        self,
        filename_or_obj: Any,
        *,
        drop_variables: str | Iterable[str] | None = None,
        group: str = "model",
        version: str | None = None,
    ) -> xr.Dataset:
        """Open one group.

        Parameters
        ----------
        filename_or_obj, drop_variables, version
            See `open_datatree`.
        group : str
            For example ``model`` or ``tensor``.

        Raises
        ------
        InputError
            If there are no results, or no such group.
        """
        tree = self.open_datatree(filename_or_obj, drop_variables=drop_variables, version=version)
        try:
            return tree[group].to_dataset()
        except KeyError as error:
            raise InputError(
                f"the results have no group {group!r}",
                where=str(filename_or_obj),
                why=f"they have {', '.join(node.path for node in tree.leaves)}",
                remedy="choose one of them",
            ) from error
