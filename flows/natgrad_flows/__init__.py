"""Run natgrad as Prefect flows. Each stage of a run is one task; tasks pass paths, never arrays.

``natgrad_flows.runs``
    `ingest_run`, `analyze_run`, `process_run`.
``natgrad_flows.scan``
    `scan_runs`: process the runs below a folder that changed.
``natgrad_flows.server``
    The Prefect server: that of ``PREFECT_API_URL``, or one for the duration of a command.
``natgrad_flows.parameters``
    The parameters of the flows, derived from `natgrad.app.options`.
``natgrad_flows.deployments``, ``natgrad_flows.cli``
    The flows on a schedule, and the command ``natgrad``.
``natgrad_flows.demo``, ``python -m natgrad_flows``
    The experiments of the paper, logged and processed.

If ``PREFECT_API_URL`` is not set, the flows run on Prefect's embedded server (SQLite). The defaults below disable
telemetry. They are set before Prefect is imported, and environment variables take precedence.
"""

import os

_DEFAULTS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # A cold start took 18 s on a busy machine, and the default is 20.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # A request is repeated five times. Without a response, it then fails after four minutes instead of seven.
    "PREFECT_API_REQUEST_TIMEOUT": "30",
}
for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)
