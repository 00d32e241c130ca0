"""Which metric makes a logged training run natural gradient descent.

The modules are the API, from the ground up:

``schema``
    The words: vectors, dimensions, units, the layout of a model.
``blocks``, ``gram``, ``geometry``
    Pure and strangers to each other: integers; the kernel; the paper.
``metrics``
    The paper's metrics as operators on real vectors, and what any matrix has to do with them.
``sources``
    One small reader per log format behind one protocol.
``store``, ``results``
    The trajectory store and the ledger in Zarr; labelled results in xarray.
``ingest``, ``compute`` (with ``clusters``)
    Logs to store; store to ledger, on Dask.
``run``, ``report`` (with ``figures``), ``cli``
    One run's folder from end to end, the page to look at, the command line.
``watch``
    Many runs: which there are, which have news, what came of each.
``paper``
    The paper's figures from three runs.

Nothing is imported here, so ``import natgrad.theory.geometry`` needs NumPy alone.
"""

from natgrad.schema.version import __version__

__all__ = ["__version__"]
