"""Export results as tables: a DataFrame of pandas, CSV or Parquet, in bounded memory.

A table has one row per step, and per run, tensor, estimate or window if the results contain them. A variable that
does not depend on one of these has the same value in several rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import xarray as xr

from natgrad.results.ranking import select, step_parts
from natgrad.schema.errors import InputError
from natgrad.schema.names import DESCENT, GAMMA, REPLICATE, RUN, STEP, TENSOR, WINDOW

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TableOptions", "frames", "to_csv", "to_dataframe", "to_parquet"]

_ORDER = (RUN, STEP, REPLICATE, TENSOR, DESCENT, WINDOW, GAMMA)
"""Order of the columns of labels."""


class TableOptions(TypedDict, total=False):
    """Options of a table; see `frames`."""

    variables: Sequence[str] | None
    descent: str | None
    window: int | None


def frames(
    dataset: xr.Dataset,
    *,
    variables: Sequence[str] | None = None,
    descent: str | None = "gradient",
    window: int | None = 1,
) -> Iterator[pd.DataFrame]:
    """Yield the table of a group of results in parts of consecutive steps, each of about 32 MiB.

    Parameters
    ----------
    dataset : Dataset
        A group of results. Its values may be on disk; they are read part by part.
    variables : sequence of str, optional
        Variables of the columns. Default: all variables with steps, but not those of the metric family, which have
        the dimension gamma.
    descent : str, optional
        Estimate of the negative gradient; None for all estimates, each in separate rows.
    window : int, optional
        Number of updates in a window; None for all windows, each in separate rows.

    Yields
    ------
    DataFrame
        The labels are columns. Variables with flags, such as ``status``, have the names of the flags.

    Raises
    ------
    InputError
        If the results do not have a variable, this descent or this window.
    """
    if STEP not in dataset.dims:
        raise InputError(
            "these results have no steps",
            where=f"dataset with the dimensions {', '.join(map(str, dataset.dims)) or 'none'}",
            remedy='use a group of the results: tree["model"].to_dataset()',
        )
    for name in variables or ():
        if name not in dataset.data_vars:
            raise InputError(
                f"the results have no variable {name!r}",
                where="variables",
                why=f"they have {', '.join(map(str, dataset.data_vars))}",
                remedy="choose some of them",
            )
    by_step = {name for name, variable in dataset.data_vars.items() if STEP in variable.dims}
    with_steps = [name for name in dataset.data_vars if name in by_step and GAMMA not in dataset[name].dims]
    chosen = dataset[list(with_steps if variables is None else variables)]
    chosen = select(chosen, descent, window)
    chosen = chosen.reset_coords([name for name, label in chosen.coords.items() if not label.dims], drop=True)
    order = [axis for axis in _ORDER if axis in chosen.dims]
    order += [str(axis) for axis in chosen.dims if axis not in order]
    if not chosen.sizes[STEP]:
        yield _table(chosen, order)
    for part in step_parts(chosen):
        yield _table(part, order)


def _table(dataset: xr.Dataset, order: Sequence[str]) -> pd.DataFrame:
    frame = dataset.to_dataframe(dim_order=list(order)).reset_index()
    for name, variable in dataset.data_vars.items():
        if "flag_meanings" in variable.attrs:
            names = dict(zip(variable.attrs["flag_values"], variable.attrs["flag_meanings"].split(), strict=True))
            frame[name] = frame[name].map(names)
    return frame


def to_dataframe(dataset: xr.Dataset, **options: Unpack[TableOptions]) -> pd.DataFrame:
    """Return the table of a group of results; see `frames`.

    The labels are the index. The table of a large run takes much memory; `to_csv` and `to_parquet` do not.
    """
    import pandas as pd

    found = pd.concat(frames(dataset, **options), ignore_index=True)
    return found.set_index([name for name in found.columns if name in dataset.dims])


def to_csv(dataset: xr.Dataset, path: str | Path, **options: Unpack[TableOptions]) -> Path:
    """Write the table of a group of results as CSV; see `frames`. Return the path.

    Numbers have all digits, so reading them gives the same bits.
    """
    with _replaced(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        for index, frame in enumerate(frames(dataset, **options)):
            frame.to_csv(file, index=False, header=not index)
    return Path(path)


def to_parquet(dataset: xr.Dataset, path: str | Path, **options: Unpack[TableOptions]) -> Path:
    """Write the table of a group of results as Parquet; see `frames`. Return the path.

    Raises
    ------
    InputError
        If pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(
            "writing Parquet requires pyarrow, which is not installed",
            where=str(path),
            remedy="install the extra: pip install 'natgrad-pipeline[parquet]', or write CSV",
        ) from error
    with _replaced(path) as temporary:
        writer = None
        try:
            for frame in frames(dataset, **options):
                table = pa.Table.from_pandas(frame, preserve_index=False)
                writer = writer or pq.ParquetWriter(temporary, table.schema)
                writer.write_table(table.cast(writer.schema))
        finally:
            if writer is not None:
                writer.close()
    return Path(path)


@contextmanager
def _replaced(path: str | Path) -> Iterator[Path]:
    """Provide a temporary file that replaces a file, unless the block fails."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise InputError(
            "the table could not be written", where=str(target), why=str(error), remedy="choose another file"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
