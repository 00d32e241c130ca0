"""Dask clusters: on this machine, of a batch system, of Kubernetes. All give the address of a scheduler.

What a job or a pod asks for is said in Dask's own configuration (``~/.config/dask/*.yaml``), as is TLS; see
``docs/cluster.md``.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from natgrad.schema.errors import InputError

__all__ = ["CLUSTERS", "ONE_THREAD", "job_options", "local_scheduler", "memory_bytes", "named_scheduler"]

_log = logging.getLogger(__name__)

_WORKER_CONFIG = {
    "distributed": {
        "worker": {"memory": {"target": False, "spill": False, "pause": False}, "profile": {"enabled": False}}
    }
}
"""The plan bounds the memory of our own workers. One that paused below its limit would not go on again, as what it
holds is buffers, and those cannot be spilled. Their profile costs three percent, and without a dashboard nobody can
look at it."""

ONE_THREAD = {
    name: "1"
    for name in (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "NUMBA_NUM_THREADS",
        "BLOSC_NTHREADS",
        "ZARR_THREADING__MAX_WORKERS",
    )
}
"""Environment of a worker: it is a core's worth of work, so BLAS, the kernel and the codecs get one thread each."""

CLUSTERS = {
    "slurm": ("dask_jobqueue", "SLURMCluster"),
    "pbs": ("dask_jobqueue", "PBSCluster"),
    "lsf": ("dask_jobqueue", "LSFCluster"),
    "sge": ("dask_jobqueue", "SGECluster"),
    "oar": ("dask_jobqueue", "OARCluster"),
    "htcondor": ("dask_jobqueue", "HTCondorCluster"),
    "kubernetes": ("dask_kubernetes.operator", "KubeCluster"),
}
"""Names of clusters to the module and class that makes them."""


@contextmanager
def local_scheduler(workers: int, memory_limit: int | None = None) -> Iterator[str]:
    """Dask cluster of processes on this machine, of one thread each; gives the address of its scheduler.

    Parameters
    ----------
    workers : int
    memory_limit : int, optional
        Bytes of each process.
    """
    import dask.config
    from distributed import LocalCluster

    # Starts and stops of workers are no news, but where Prefect has set up logging they would be told: by the
    # scheduler in this process, and by the workers, which set up logging before they are told anything else.
    logging.getLogger("distributed").setLevel(logging.WARNING)
    environment = ONE_THREAD | {"DASK_LOGGING__DISTRIBUTED": "warning"}
    with (
        dask.config.set(
            {f"distributed.nanny.pre-spawn-environ.{key}": value for key, value in environment.items()}
        ),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=memory_limit or "auto",
            config=dask.config.merge(dask.config.config, _WORKER_CONFIG),
            # Without a dashboard Dask serves its health page all the same, and warns where another has its port.
            scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
            silence_logs=logging.ERROR,
        ) as cluster,
    ):
        yield cluster.scheduler_address


@contextmanager
def named_scheduler(name: str, workers: int) -> Iterator[str]:
    """Cluster of a batch system or of Kubernetes, which ends with the context; gives the address of its scheduler.

    Parameters
    ----------
    name : str
        One of `CLUSTERS`.
    workers : int
        Worker processes to ask for; the pass begins with the first that comes.

    Raises
    ------
    InputError
        Where the name is not known, its package is not installed, or the cluster cannot be made.
    """
    if name not in CLUSTERS:
        raise InputError(
            f"cluster {name!r} is not known", where="--cluster", remedy=f"choose one of {', '.join(CLUSTERS)}"
        )
    module, kind = CLUSTERS[name]
    extra = "kubernetes" if name == "kubernetes" else "batch"
    try:
        make = getattr(importlib.import_module(module), kind)
    except ImportError as error:
        raise InputError(
            f"--cluster {name} needs a package that is not installed: {error}",
            where="--cluster",
            remedy=f"pip install 'natgrad-pipeline[{extra}]'",
        ) from error
    section = "kubernetes" if name == "kubernetes" else f"jobqueue.{name}"
    try:
        made = make(**_pod_options() if name == "kubernetes" else job_options(name))
    except Exception as error:  # batch systems and Kubernetes share no class of errors
        raise InputError(
            f"the cluster cannot be made: {error}",
            where=f"--cluster {name}",
            why=f"Dask's configuration has no whole section {section}, or {name} cannot be reached from here",
            remedy=f"see docs/cluster.md for the section {section}",
        ) from error
    with made as cluster:
        if name != "kubernetes":  # whose operator replaces pods by itself
            _replace_lost_jobs(cluster, workers)
        cluster.scale(workers)
        yield cluster.scheduler_address


def _replace_lost_jobs(cluster: Any, workers: int) -> None:
    """Ask for another job where the workers of one came and went: its time was up, it failed, or its host did.

    Dask forgets a job of one process that it lost, and asks for no other; a job of several it does not forget.
    """
    import dask.config
    from dask.utils import parse_timedelta
    from distributed.diagnostics.plugin import SchedulerPlugin

    # A nanny starts its worker again, under the same name. Dask's own look is at the end of this time.
    grace = parse_timedelta(dask.config.get("distributed.deploy.lost-worker-timeout")) + 1.0

    def is_of(worker: str, job: Any) -> bool:
        return worker == str(job) or worker.startswith(f"{job}-")

    class Replacing(SchedulerPlugin):
        def __init__(self) -> None:
            self.names: dict[str, str] = {}

        def add_worker(self, scheduler: Any, worker: str) -> None:
            self.names[worker] = str(scheduler.workers[worker].name)

        def remove_worker(self, scheduler: Any, worker: str, **details: Any) -> None:
            name = self.names.pop(worker)
            for job in cluster.worker_spec:
                if is_of(name, job):
                    scheduler.loop.call_later(grace, self.replace, job, cluster.workers.get(job))

        def replace(self, job: Any, lost: Any) -> None:
            if job not in cluster.worker_spec or any(is_of(name, job) for name in self.names.values()):
                return
            here = cluster.workers.get(job)
            if here is not None and lost in (None, here):
                del cluster.workers[job], cluster.worker_spec[job]
                cluster.loop.add_callback(here.close)
            cluster.scale(workers)

    cluster.scheduler.add_plugin(Replacing())


def job_options(name: str) -> dict[str, Any]:
    """Options of jobs besides those of the configuration: threads pinned, and TLS where certificates are given."""
    import dask.config
    from distributed.security import Security

    prologue = dask.config.get(f"jobqueue.{name}.job-script-prologue", None) or []
    options: dict[str, Any] = {
        "job_script_prologue": [*(f"export {key}={value}" for key, value in ONE_THREAD.items()), *prologue]
    }
    security = Security()
    if security.get_tls_config_for_role("worker").get("ca_file"):
        options |= {"security": security, "protocol": "tls://"}
    return options


def _pod_options() -> dict[str, Any]:
    import dask.config

    configured = dask.config.get("kubernetes.env", None) or {}
    if isinstance(configured, dict):
        return {"env": ONE_THREAD | configured}
    return {"env": [*({"name": key, "value": value} for key, value in ONE_THREAD.items()), *configured]}


def memory_bytes(amount: str) -> int:
    """Bytes of an amount of memory as Dask writes it, for example ``512MiB`` or ``2GB``.

    Raises
    ------
    InputError
        Where it is none.
    """
    from dask.utils import parse_bytes

    try:
        # Without a number Dask reads "MiB" as one MiB, and nothing at all as one byte.
        parsed = int(parse_bytes(amount)) if any(map(str.isdigit, amount)) else 0
        if parsed < 1:
            raise ValueError("it is less than a byte")
    except (ValueError, OverflowError) as error:
        raise InputError(
            f"{amount!r} is not an amount of memory",
            where="--memory-limit",
            why=str(error),
            remedy="say 512MiB or 2GB",
        ) from error
    return parsed
