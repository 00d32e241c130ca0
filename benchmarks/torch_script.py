"""Compute angles and condition numbers of all updates of a log with torch, as a user would without natgrad."""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

torch.set_num_threads(2)
files = sorted(Path(sys.argv[1]).glob("step_*.safetensors"), key=lambda file: int(file.stem[5:]))
found, before = {}, {}
for file in files:
    after = load_file(file)
    for key in before:
        if key.startswith("parameter/"):
            update = (after[key].double() - before[key].double()).flatten()
            descent = -before[key.replace("parameter", "gradient", 1)].double().flatten()
            uu, dd, ud = (float(a @ b) for a, b in ((update, update), (descent, descent), (update, descent)))
            cosine = ud / math.sqrt(uu * dd) if uu * dd else math.nan
            sine = math.sqrt(max(0.0, 1 - cosine**2))
            kappa = ((1 + sine) / cosine) ** 2 if cosine > 0 else math.nan
            found.setdefault(key.partition("/")[2], []).append((math.acos(min(cosine, 1.0)), kappa))
    before = after
Path(sys.argv[2]).write_text(json.dumps(found))
