"""Start Dask clusters on this machine, on a batch system or on Kubernetes. Each yields the address of a scheduler.

Dask's own configuration (``~/.config/dask/*.yaml``) sets the resources of jobs and pods, and TLS; see
``docs/howto/cluster.md``.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from natgrad.schema.errors import InputError
from natgrad.schema.logs import logger

__all__ = [
    "CLUSTERS",
    "ONE_THREAD",
    "configuration_errors",
    "job_options",
    "local_scheduler",
    "memory_bytes",
    "named_scheduler",
    "require_cluster",
    "require_configuration",
    "worker_number",
]

_log = logger(__name__)

_WORKER_CONFIG = {
    "distributed": {
        "worker": {"memory": {"target": False, "spill": False, "pause": False}, "profile": {"enabled": False}}
    }
}
"""Configuration of local workers. The plan bounds their memory. A worker that paused below its limit would never
resume, because its memory consists of buffers that cannot be spilled. Profiling takes three percent of the time,
and without a dashboard nobody sees the result."""

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
"""Environment of a worker. A worker uses one core, so BLAS, the kernel and the codecs get one thread each."""

CLUSTERS = {
    "slurm": ("dask_jobqueue", "SLURMCluster"),
    "pbs": ("dask_jobqueue", "PBSCluster"),
    "lsf": ("dask_jobqueue", "LSFCluster"),
    "sge": ("dask_jobqueue", "SGECluster"),
    "oar": ("dask_jobqueue", "OARCluster"),
    "htcondor": ("dask_jobqueue", "HTCondorCluster"),
    "kubernetes": ("dask_kubernetes.operator", "KubeCluster"),
}
"""Module and class of each kind of cluster, by name."""


_SECTIONS = ("distributed", "jobqueue", "kubernetes")
"""Sections of other packages, which declare their defaults when they are imported."""


@contextmanager
def local_scheduler(workers: int, memory_limit: int | None = None, threads: int = 1) -> Iterator[str]:
    """Start Dask worker processes with one task at a time on this machine; yield the address of their scheduler.

    Parameters
    ----------
    workers : int
    memory_limit : int, optional
        Bytes of each process; 0 for no limit. Default: its share of the memory of the machine.
    threads : int
        Number of threads that libraries may use in each process.

    Raises
    ------
    InputError
        If a process does not start, usually because it imports a program that starts processes itself.
    """
    import dask.config
    from distributed import LocalCluster

    # If Prefect has set up logging, each start and stop of a worker would be logged: by the scheduler in this
    # process, and by the workers, which set up logging before they receive any other configuration.
    logging.getLogger("distributed").setLevel(logging.WARNING)
    environment = dict.fromkeys(ONE_THREAD, str(threads)) | {"DASK_LOGGING__DISTRIBUTED": "warning"}
    settings = {f"distributed.nanny.pre-spawn-environ.{key}": value for key, value in environment.items()}
    with dask.config.set(settings):
        try:
            started = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                memory_limit="auto" if memory_limit is None else memory_limit,
                config=dask.config.merge(dask.config.config, _WORKER_CONFIG),
                # Dask serves its health page even without a dashboard, and warns if another process uses the port.
                scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
                silence_logs=logging.ERROR,
            )
        except RuntimeError as error:
            raise InputError(
                f"worker processes cannot be started: {error}",
                why="each of them imports the program that starts them, which must not start them again",
                remedy="in a program, call natgrad below the line: if __name__ == '__main__':",
            ) from error
        with started as cluster:
            yield cluster.scheduler_address


def worker_number() -> int:
    """Return the number of this process among the workers of `local_scheduler`, which a restarted worker keeps."""
    from distributed import get_worker

    return int(get_worker().name)


@contextmanager
def named_scheduler(name: str, workers: int) -> Iterator[str]:
    """Start a cluster on a batch system or on Kubernetes until the context ends; yield its scheduler's address.

    Parameters
    ----------
    name : str
        One of `CLUSTERS`.
    workers : int
        Worker processes to request. The address is yielded when the first one has connected.

    Raises
    ------
    InputError
        If the name is unknown, its package is not installed, or the cluster cannot be started.
    """
    make = _cluster_class(name)
    with _configuration_errors(name):
        made = make(**_pod_options() if name == "kubernetes" else job_options(name))
    with made as cluster:
        if name != "kubernetes":  # the operator of Kubernetes replaces pods
            _replace_lost_jobs(cluster, workers)
        cluster.scale(workers)
        _log.info("waiting for the first worker of %s", name)
        # Jobs may be in a queue for hours.
        cluster.wait_for_workers(1)
        yield cluster.scheduler_address


def require_cluster(name: str) -> None:
    """Check what `named_scheduler` needs on this machine, without starting anything.

    Parameters
    ----------
    name : str
        One of `CLUSTERS`.

    Raises
    ------
    InputError
        If the name is unknown, its package is not installed, the configuration of jobs is incomplete, or the
        command that submits jobs is missing. Whether Kubernetes can be reached is only known when the cluster is
        started.
    """
    make = _cluster_class(name)
    if name == "kubernetes":
        return
    with _configuration_errors(name):
        # The cluster itself would create such a job first. This fails if the configuration is incomplete.
        job = make.job_cls("tcp://scheduler:8786", name="check")
    command = shlex.split(job.submit_command)[0]
    if shutil.which(command) is None:
        raise InputError(
            f"--cluster {name} requires the command {command}, which is not available on this machine",
            where=f"--cluster {name}",
            why="jobs are submitted from the machine on which natgrad runs",
            remedy="run natgrad on a login node of the cluster, or add the command to PATH",
        )


def require_configuration() -> None:
    """Check that Dask can read its configuration. xarray also imports Dask, so every result depends on it.

    Raises
    ------
    InputError
        If a file is malformed.
    """
    try:
        import dask.config

        files = list(dask.config.collect_yaml(dask.config.paths, return_paths=True))
    except ImportError:
        raise
    except Exception as error:
        found = re.match("A dask config file at '(.*)' is malformed", str(error))
        if found is None:
            raise _malformed(f"a file in {_folders()}", f"{type(error).__name__}: {error}") from error
        why = " ".join(str(error)[found.end() :].partition("message:")[2].split()).rstrip(" :^")
        raise _malformed(found[1], why or "it is not a mapping") from error
    expected = {name: {} for name in _SECTIONS} | dask.config.merge(*dask.config.defaults)
    for path, values in files:
        _require_sections(path, values, expected)


def _require_sections(path: Path, values: Mapping[str, Any], expected: Mapping[str, Any], name: str = "") -> None:
    """Require that the values of a file are mappings where the defaults are mappings."""
    for key, value in values.items():
        default = expected.get(str(key).replace("_", "-"))
        if not isinstance(default, Mapping):
            continue
        if not isinstance(value, Mapping):
            raise _malformed(str(path), f"{name}{key} must be a section (a mapping), got {value!r}")
        _require_sections(path, value, default, f"{name}{key}.")


def _malformed(where: str, why: str) -> InputError:
    return InputError(
        "a configuration file of Dask is malformed",
        where=where,
        why=why,
        remedy="correct this file or move it away",
    )


def _folders() -> str:
    """Return the folders in which Dask looks for its configuration, which cannot be imported."""
    own = os.environ.get("DASK_CONFIG")
    return ", ".join(filter(None, (own, "~/.config/dask", "/etc/dask")))


@contextmanager
def configuration_errors() -> Iterator[None]:
    """If an error occurs while the configuration of Dask is malformed, raise the error of `require_configuration`.

    Dask fails when it is imported. The configuration is read only after an error, because that takes as long as
    some functions.
    """
    try:
        yield
    except InputError:
        raise
    except Exception:
        require_configuration()
        raise


def _cluster_class(name: str) -> Any:
    if name not in CLUSTERS:
        raise InputError(
            f"unknown cluster {name!r}", where="--cluster", remedy=f"choose one of: {', '.join(CLUSTERS)}"
        )
    module, kind = CLUSTERS[name]
    extra = "kubernetes" if name == "kubernetes" else "batch"
    try:
        return getattr(importlib.import_module(module), kind)
    except ImportError as error:
        raise InputError(
            f"--cluster {name} requires a package that is not installed: {error}",
            where="--cluster",
            remedy=f"pip install 'natgrad-pipeline[{extra}]'",
        ) from error


@contextmanager
def _configuration_errors(name: str) -> Iterator[None]:
    section = "kubernetes" if name == "kubernetes" else f"jobqueue.{name}"
    try:
        yield
    except Exception as error:  # batch systems and Kubernetes share no class of errors
        raise InputError(
            f"the cluster cannot be started: {error}",
            where=f"--cluster {name}",
            why=f"the section {section} of Dask's configuration is incomplete, or {name} cannot be reached",
            remedy=f"see docs/howto/cluster.md for the section {section}",
        ) from error


def _replace_lost_jobs(cluster: Any, workers: int) -> None:
    """Request another job when the workers of a job are lost, because of its time limit or a failure.

    Dask removes a lost job of one process and requests no other. It never removes a lost job of several processes.
    """
    import dask.config
    from dask.utils import parse_timedelta
    from distributed.diagnostics.plugin import SchedulerPlugin

    # A nanny restarts its worker under the same name. Dask itself checks after this time.
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
    """Return the options of jobs in addition to those of the configuration: one thread, and TLS if configured.

    Parameters
    ----------
    name : str
        Name of a batch system in `CLUSTERS`.
    """
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


def memory_bytes(amount: str, option: str = "memory_limit") -> int:
    """Return the bytes of an amount of memory in Dask's notation, for example ``512MiB`` or ``2GB``.

    Parameters
    ----------
    amount : str
    option : str
        Name of the option that has this value, for errors.

    Raises
    ------
    InputError
        If the text is not an amount of memory.
    """
    from dask.utils import parse_bytes

    try:
        # Dask parses "MiB" without a number as one MiB, and the empty string as one byte.
        parsed = int(parse_bytes(amount)) if any(map(str.isdigit, amount)) else 0
    except (ValueError, OverflowError):
        parsed = 0
    if parsed < 1:
        raise InputError(
            f"{amount!r} is not an amount of memory",
            where=f"option {option}",
            why="an amount is a number of bytes, or a number and a unit (kB, MB, GB, KiB, MiB, GiB), and at least "
            "one byte",
            remedy="use, for example, {0} 512MiB or {0} 2GB".format(f"--{option.replace('_', '-')}"),
        )
    return parsed
