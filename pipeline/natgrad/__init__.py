"""Find the metric that makes a logged training run natural gradient descent.

Process a log, and open the results:

>>> import natgrad
>>> natgrad.process("logs/run", "runs/run", windows=[1, 20])  # doctest: +SKIP
>>> natgrad.open_results("runs/run")["model"]  # doctest: +SKIP

``process``, ``ingest``, ``analyze``, ``report``
    Process one run completely, or do one stage.
``replay``, ``TorchObjective``, ``JaxObjective``, ``causal_lm_loss``
    Evaluate an objective at the states of a log without gradients, and process the run.
``inspect``, ``verify``
    Describe a log before it is processed; verify stored data against its checksums.
``materialize``, ``slim``
    Copy the states of a run that was processed in place, or remove copies.
``compare``
    Compare the results of several runs.
``scan``
    Process all runs below a folder.
``open_results``, ``open_trajectory``, ``open_ledger``
    Open the stores of a run. Results and states are xarray objects.
``watch``, ``Recorder``
    Log a PyTorch training run from the hooks of its optimizer, or any other run from its training loop.
``WatchCallback``, ``LightningWatch``
    Log a training run of the Hugging Face Trainer, or of Lightning.
``Metric``
    Apply a metric as an operator.
``InputError``, ``Unavailable``
    Errors for invalid input, and for resources that are temporarily unavailable.

The names are loaded on first use: ``import natgrad`` imports no other library.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from natgrad.app.api import (
        analyze,
        compare,
        ingest,
        inspect,
        materialize,
        process,
        replay,
        report,
        slim,
        verify,
    )
    from natgrad.app.opening import open_ledger, open_results, open_trajectory
    from natgrad.app.scan import scan
    from natgrad.objectives.jax_objective import JaxObjective
    from natgrad.objectives.torch_objective import TorchObjective, causal_lm_loss
    from natgrad.recording.lightning import LightningWatch
    from natgrad.recording.recorder import Recorder
    from natgrad.recording.torch import watch
    from natgrad.recording.transformers import WatchCallback
    from natgrad.schema.errors import InputError, Unavailable
    from natgrad.schema.version import __version__
    from natgrad.theory.metric_operators import Metric

__all__ = [
    "InputError",
    "JaxObjective",
    "LightningWatch",
    "Metric",
    "Recorder",
    "TorchObjective",
    "Unavailable",
    "WatchCallback",
    "__version__",
    "analyze",
    "causal_lm_loss",
    "compare",
    "ingest",
    "inspect",
    "materialize",
    "open_ledger",
    "open_results",
    "open_trajectory",
    "process",
    "replay",
    "report",
    "scan",
    "slim",
    "verify",
    "watch",
]

_MODULES = {
    "InputError": "natgrad.schema.errors",
    "JaxObjective": "natgrad.objectives.jax_objective",
    "LightningWatch": "natgrad.recording.lightning",
    "Metric": "natgrad.theory.metric_operators",
    "Recorder": "natgrad.recording.recorder",
    "TorchObjective": "natgrad.objectives.torch_objective",
    "Unavailable": "natgrad.schema.errors",
    "WatchCallback": "natgrad.recording.transformers",
    "__version__": "natgrad.schema.version",
    "causal_lm_loss": "natgrad.objectives.torch_objective",
    "open_ledger": "natgrad.app.opening",
    "open_results": "natgrad.app.opening",
    "open_trajectory": "natgrad.app.opening",
    "scan": "natgrad.app.scan",
    "watch": "natgrad.recording.torch",
}
"""Module of each public name; the others are functions of `natgrad.app.api`."""


def __dir__() -> list[str]:
    return sorted(__all__)


# If a type checker saw this function, it would accept any name.
if not TYPE_CHECKING:

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from natgrad.compute.clusters import configuration_errors

        with configuration_errors():
            value = getattr(import_module(_MODULES.get(name, "natgrad.app.api")), name)
        globals()[name] = value
        return value
