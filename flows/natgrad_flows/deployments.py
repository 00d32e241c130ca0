"""Deployments of the flows: served by one process, or given to the workers of a work pool."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect import serve
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound, ParameterTypeError
from prefect.settings import get_current_settings
from prefect.types.entrypoint import EntrypointType

from natgrad.schema.errors import InputError
from natgrad.storage import require_local
from natgrad_flows.runs import analyze_run, ingest_run, process_run
from natgrad_flows.scan import watch_runs

__all__ = ["deploy_flows", "deployments", "require_valid", "serve_flows"]


def serve_flows(root: Path, out: Path, *, limit: int = 1, **options: Any) -> None:
    """Serve the flows until the process is told to end: `watch_runs` on its schedule, the others on demand.

    Parameters
    ----------
    root, out : Path
        As those of `natgrad_flows.scan.watch_runs`.
    limit : int
        Flows in work at a time, of all.
    **options
        See `deployments`.

    Raises
    ------
    InputError
        Where no Prefect server answers, a schedule cannot be understood, or a parameter is not valid.
    """
    _require_server()
    serve(*deployments(root, out, **options), limit=limit, print_starting_message=False)


def deploy_flows(root: Path, out: Path, *, pool: str, **options: Any) -> list[str]:
    """Give the flows to a work pool, whose workers need this package and the paths.

    Parameters
    ----------
    root, out : Path
        As those of `natgrad_flows.scan.watch_runs`, as the workers see them.
    pool : str
        Work pool that is there already (``prefect work-pool create --type process NAME``).
    **options
        See `deployments`.

    Returns
    -------
    list of str
        Names of the deployments, flow and name.

    Raises
    ------
    InputError
        As `serve_flows`, and where there is no such pool.
    """
    _require_server()
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(pool)
        except ObjectNotFound as error:
            raise InputError(
                f"there is no work pool {pool!r}",
                where="--pool",
                remedy=f"make it: prefect work-pool create --type process {pool}; then start workers on it",
            ) from error
    made = deployments(root, out, **options)
    for deployment in made:
        deployment.apply(work_pool_name=pool)
    return [deployment.full_name for deployment in made]


def deployments(
    root: Path,
    out: Path,
    *,
    name: str = "natgrad",
    cron: str | None = None,
    every: float | None = None,
    parameters: dict[str, Any] | None = None,
) -> list[RunnerDeployment]:
    """Make the deployments of all flows.

    Parameters
    ----------
    root, out : Path
    name : str
        Of the deployments, one for each ROOT that is watched on a server.
    cron : str, optional
        When to look for news, ``*/10 * * * *`` for example.
    every : float, optional
        Seconds between two looks, in place of ``cron``.
    parameters : dict, optional
        Further parameters of `natgrad_flows.scan.watch_runs`.
    """
    if (cron is None) == (every is None):
        raise InputError(
            "two schedules are given" if cron else "no schedule is given",
            where="--cron, --every",
            remedy="give one of both: --cron '*/10 * * * *', or --every 600 (seconds)",
        )
    if every is not None and not every > 0:
        raise InputError(f"every {every} seconds is no schedule", where="--every", remedy="give seconds above 0")
    root, out = require_local(root, "ROOT"), require_local(out, "OUT")
    paths = {"root": str(root.absolute()), "out": str(out.absolute())}
    values = {**paths, **(parameters or {})}
    require_valid(values)
    try:
        watching = watch_runs.to_deployment(
            name,
            cron=cron,
            interval=None if every is None else timedelta(seconds=every),
            parameters=values,
            tags=["natgrad"],
            # A look that takes longer than the schedule's interval is not joined by another one.
            concurrency_limit=ConcurrencyLimitConfig(
                limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
            ),
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
    except ValueError as error:  # pydantic's is one
        raise InputError(
            f"this cannot be scheduled: {error}", where=f"deployment {name}", remedy="see natgrad serve --help"
        ) from error
    return [
        watching,
        *(
            flow.to_deployment(name, tags=["natgrad"], entrypoint_type=EntrypointType.MODULE_PATH)
            for flow in (process_run, ingest_run, analyze_run)
        ),
    ]


def require_valid(parameters: dict[str, Any]) -> None:
    """Refuse parameters that `natgrad_flows.scan.watch_runs` would not take (InputError)."""
    # Prefect logs what it raises, and it is told as all bad input is.
    logger = logging.getLogger("prefect.flows")
    disabled, logger.disabled = logger.disabled, True
    try:
        watch_runs.validate_parameters(parameters)
    except ParameterTypeError as error:
        raise InputError(
            str(error), where="parameters of watch-runs", remedy="see natgrad watch --help for what each may be"
        ) from error
    finally:
        logger.disabled = disabled


def _require_server() -> None:
    """Refuse to go on without a server: the embedded one ends with this process, and its schedules with it."""
    address = get_current_settings().api.url
    remedy = "start one (prefect server start), and say where: export PREFECT_API_URL=http://HOST:4200/api"
    if address is None:
        raise InputError("schedules need a Prefect server", where="PREFECT_API_URL is not set", remedy=remedy)
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
    if problem is not None:
        raise InputError(
            f"the Prefect server does not answer: {problem}",
            where=address,
            why="it is not running, or the address is wrong",
            remedy=remedy,
        )
