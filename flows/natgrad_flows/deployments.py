"""Deploy the flows: serve them from one process, or submit them to the workers of a work pool."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, cast

from prefect import serve
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.types.entrypoint import EntrypointType

from natgrad.app import declarations, options
from natgrad.schema.errors import InputError
from natgrad.schema.logs import logger
from natgrad.storage import require_local
from natgrad_flows.runs import analyze_run, ingest_run, process_run, replay_run
from natgrad_flows.scan import scan_runs
from natgrad_flows.server import require_server

__all__ = ["deploy_flows", "deployments", "serve_flows"]

_log = logger("natgrad.flows")

_TAG = "natgrad"


def serve_flows(root: options.Root, out: options.RunsFolder, values: Mapping[str, Any], *, limit: int = 1) -> None:
    """Serve the flows until the process ends: `scan_runs` on its schedule, the others on demand.

    Parameters
    ----------
    root, out : path
        See `natgrad_flows.scan.scan_runs`.
    values : mapping
        Options of `natgrad.app.options.ScanFlowOptions` and `natgrad.app.options.ScheduleOptions`.
    limit : int
        Number of flows that run at the same time.

    Raises
    ------
    InputError
        If an option is not valid, or no Prefect server responds.
    """
    made = deployments(root, out, values)
    require_server()
    _warn_of_old_deployments({deployment.full_name for deployment in made})
    serve(*made, limit=limit, print_starting_message=False)


def deploy_flows(root: options.Root, out: options.RunsFolder, values: Mapping[str, Any], *, pool: str) -> list[str]:
    """Deploy the flows to a work pool. Its workers need this package and access to the paths.

    Parameters
    ----------
    root, out : path
        Paths as the workers see them; see `natgrad_flows.scan.scan_runs`.
    values : mapping
        Options of `natgrad.app.options.ScanFlowOptions` and `natgrad.app.options.ScheduleOptions`.
    pool : str
        Existing work pool (``prefect work-pool create --type process NAME``).

    Returns
    -------
    list of str
        Full names of the deployments, flow/name.

    Raises
    ------
    InputError
        If an option is not valid, no Prefect server responds, or there is no such pool.
    """
    made = deployments(root, out, values)
    require_server()
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(pool)
        except ObjectNotFound as error:
            raise InputError(
                f"there is no work pool {pool!r}",
                where="--pool",
                remedy=f"create it: prefect work-pool create --type process {pool}; then start workers for it",
            ) from error
    for deployment in made:
        deployment.apply(work_pool_name=pool)
    names = [deployment.full_name for deployment in made]
    _warn_of_old_deployments(set(names))
    return names


def deployments(root: options.Root, out: options.RunsFolder, values: Mapping[str, Any]) -> list[RunnerDeployment]:
    """Create the deployments of all flows.

    Parameters
    ----------
    root, out : path
    values : mapping
        Options of `natgrad.app.options.ScanFlowOptions` and `natgrad.app.options.ScheduleOptions`.

    Raises
    ------
    InputError
        If an option is not valid, or there is not exactly one schedule.
    """
    scanning, schedule = (
        declarations.validated(kind, declarations.selected(kind, values))
        for kind in (options.ScanFlowOptions, options.ScheduleOptions)
    )
    cron, every, name = schedule["cron"], schedule["every"], schedule["name"]
    if (cron is None) == (every is None):
        raise InputError(
            "two schedules are set" if cron else "no schedule is set",
            where="--cron, --every",
            remedy="use one of them: --cron '*/10 * * * *', or --every 600 (seconds)",
        )
    try:
        # Only Prefect knows which syntax its server accepts.
        _ = None if cron is None else CronSchedule(cron=cron)
    except ValueError as error:  # pydantic's error is a ValueError
        raise InputError(
            f"--cron {cron!r} is not a schedule in cron syntax",
            where="option cron",
            remedy="use five fields (minute, hour, day of the month, month, day of the week), for example "
            "'*/10 * * * *' for every ten minutes",
        ) from error
    folders = {"root": require_local(root, "ROOT"), "out": require_local(out, "OUT")}
    paths = {name: str(folder.absolute()) for name, folder in folders.items()}
    scan = _deployment(
        scan_runs,
        name,
        cron=cron,
        interval=None if every is None else timedelta(seconds=every),
        parameters={**paths, **scanning},
        # If a scan takes longer than the interval of the schedule, no second scan starts.
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
    )
    return [scan, *(_deployment(flow, name) for flow in (process_run, ingest_run, analyze_run, replay_run))]


def _deployment(flow: Any, name: str, **settings: Any) -> RunnerDeployment:
    # Prefect would load a module specified by file name a second time, and the guard against two scans would fail.
    made = flow.to_deployment(name, tags=[_TAG], entrypoint_type=EntrypointType.MODULE_PATH, **settings)
    # Prefect annotates its functions for both synchronous and asynchronous callers.
    return cast(RunnerDeployment, made)


def _warn_of_old_deployments(current: set[str]) -> None:
    """Warn about deployments on the server whose flows are modules of an older version."""
    package = __name__.partition(".")[0]
    with get_client(sync_client=True) as client:
        flow_names = {flow.id: flow.name for flow in client.read_flows()}
        tagged = DeploymentFilter(tags=DeploymentFilterTags(all_=[_TAG]))
        found = client.read_deployments(deployment_filter=tagged)
    for deployment in found:
        name, entrypoint = f"{flow_names.get(deployment.flow_id)}/{deployment.name}", deployment.entrypoint or ""
        if name not in current and not entrypoint.startswith(f"{package}."):
            module = entrypoint.partition(".")[0]
            _log.warning(
                "deployment %s was created by an older version: its runs fail with \"No module named '%s'\", or "
                "run other code with that name. Delete it (prefect deployment delete %s) and deploy again "
                "(natgrad serve or natgrad deploy)",
                name,
                module,
                name,
            )
