"""Open logs in child processes with limits of CPU time and memory: ``python tests/limited.py`` reads JSON lines.

Each line has the ``path`` of a log, and the limits ``seconds`` and ``bytes``. The response has an ``outcome``:
"read" (with the tensors, each with its first values), "refused" (with the message), "failed" (with a traceback),
or "killed" (with the signal).
"""

import json
import math
import os
import resource
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np

VALUES = 1 << 12


def described(path, format=None):
    """Describe all steps of a log, and read the first values of each tensor."""
    from natgrad.schema.errors import InputError
    from natgrad.schema.layout import widened
    from natgrad.sources.opening import open_sources
    from natgrad.storage import open_all

    try:
        log = open_sources(open_all(path if isinstance(path, list) else [path]), format)
        steps = []
        for step in log.steps():
            with log.open(step) as reader:
                content = reader.content()
                tensors = {}
                for array, named in content.arrays.items():
                    for name, logged in named.items():
                        words = np.zeros(
                            min(math.prod(logged.shape), VALUES),
                            np.uint16 if logged.dtype == "bfloat16" else logged.dtype,
                        )
                        reader.read(array, name, 0, words)
                        tensors[f"{array}/{name}"] = sorted(set(map(str, widened(words, logged.dtype).tolist())))
                steps.append({"step": step.number, "tensors": tensors, "notes": list(content.notes)[:8]})
    except InputError as error:
        return {"outcome": "refused", "message": str(error)}
    except BaseException:
        return {"outcome": "failed", "message": traceback.format_exc()}
    return {"outcome": "read", "steps": steps[:8]}


def in_child(job):
    """Run one job in a fork, whose limits apply from here on."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (virtual + job["bytes"],) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(job["seconds"]),) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        answer = json.dumps(described(job["path"], job.get("format"))).encode()
        with os.fdopen(writing, "wb") as file:
            file.write(answer)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        answer = file.read()
    _, status, usage = os.wait4(child, 0)
    found = json.loads(answer) if answer else {"outcome": "killed", "message": f"signal {status & 127}"}
    return found | {"cpu": usage.ru_utime + usage.ru_stime, "resident": usage.ru_maxrss * 1024}


def main():
    """Run the jobs from standard input."""
    import h5py  # noqa: F401  the imports are not part of what is limited
    import pyarrow.parquet  # noqa: F401
    import tensorstore  # noqa: F401

    import natgrad.sources.opening  # noqa: F401

    warnings.simplefilter("ignore")
    for line in sys.stdin:
        sys.stdout.write(json.dumps(in_child(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
