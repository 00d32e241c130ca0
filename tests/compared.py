"""Results of runs that are compared."""

import numpy as np
import xarray as xr


def tree(losses, lengths=None, steps=None, *, angle=0.5, tensors=("w",), **attributes):
    """Return results with given losses and norms of updates, and angles that count the updates."""
    count = len(losses)
    steps = np.arange(count) if steps is None else np.asarray(steps)
    dims, ones = ("step", "descent", "window"), np.ones((count, 1, 1))
    model = {
        "loss": ("step", np.asarray(losses, float)),
        "learning_rate": ("step", np.full(count, 0.1)),
        "displacement_norm": ("step", np.ones(count) if lengths is None else np.asarray(lengths, float)),
        "update_to_weight": ("step", np.ones(count)),
        "angle": (dims, np.arange(float(count)).reshape(-1, 1, 1)),
        "condition_number": (dims, ones),
        "status": (dims, np.zeros((count, 1, 1), np.int8)),
        "loss_decrease": (("step", "window"), ones[:, 0]),
        "objective_residual": ("step", np.full(count, np.nan)),
    }
    coordinates = {"step": steps, "descent": ["gradient"], "window": [1]}
    shape = (count, len(tensors), 1, 1)
    of_tensors = {
        "angle": (("step", "tensor", "descent", "window"), np.full(shape, angle)),
        "status": (("step", "tensor", "descent", "window"), np.zeros(shape, np.int8)),
    }
    found = xr.DataTree.from_dict(
        {
            "/model": xr.Dataset(model, coordinates),
            "/tensor": xr.Dataset(of_tensors, coordinates | {"tensor": list(tensors)}),
        }
    )
    found.attrs = {"evaluation": "fixed", "gradient_source": "logged", "elements": 3, "options": {}} | attributes
    return found
