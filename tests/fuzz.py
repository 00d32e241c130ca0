"""Damage real logs of every format, and check that each is read correctly, refused with the file named, or marked.

``python tests/fuzz.py --seconds 600`` runs each parser for ten minutes (``make fuzz``), two at a time;
``--cases 100`` runs a fixed number of cases instead. A case takes a log that the original software or its layout
wrote, damages one of its files (bytes, lengths, numbers, members of archives, fields of records with valid
checksums), opens the log and reads all of it. A case fails if

- anything but an `InputError` is raised, or its message does not name the log,
- it takes more than three seconds of CPU time or a gigabyte of memory,
- a tensor has values that are not those of one storage: every tensor of the logs consists of one repeated number.
"""

import argparse
import contextlib
import io
import json
import math
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
from crc32c import crc32c
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "sources"), str(HERE / "sources" / "scalars"), str(HERE.parent / "pipeline")]
CPU_SECONDS, MEMORY = 3.0, 1 << 30
TENSORS = {"layers.0.weight": (5, 3), "layers.0.bias": (5,), "scale": (2, 2)}
CONSTANTS = [float(1 + index) * 1.0078125 for index in range(2 * len(TENSORS))]
STEPS = 3


# Logs --------------------------------------------------------------------------------------------------------


def states():
    """States in which each tensor consists of one number."""
    keys = [f"{array}/{name}" for array in ("parameter", "gradient") for name in TENSORS]
    one = {
        key: np.full(TENSORS[key.partition("/")[2]], constant, np.float32)
        for key, constant in zip(keys, CONSTANTS, strict=True)
    }
    return [one | {"loss": np.float64(1.5), "learning_rate": np.float64(0.125)} for _ in range(STEPS)]


def of_formats(name):
    def write(folder):
        import test_formats

        return test_formats.WRITERS[name][0](folder / "log", states())

    return write


def of_conformance(name):
    def write(folder):
        import conformance

        written = {number: conformance.State(state, str(number)) for number, state in enumerate(states())}
        return conformance.TENSOR_WRITERS[name].write(folder / "log", written)

    return write


def native(folder):
    from logs import write_log

    path = write_log(folder / "log", states())
    (path / "natgrad.toml").write_text('inert = ["a.B"]\norder = ["x", "y"]\n[map]\nloss = "loss"\n')
    return [path]


def uncompressed_hdf5(folder):
    import h5py

    (folder / "log").mkdir()
    with h5py.File(folder / "log" / "step_0.h5", "w", libver="latest") as file:
        for key, value in states()[0].items():
            file.create_dataset(key, data=value)
    return [folder / "log"]


def optimizer(folder):
    """Checkpoints of torch with the state of an optimizer and a scheduler."""
    import torch

    (folder / "log").mkdir()
    model = torch.nn.Linear(3, 2)
    adam = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(adam, 1)
    for step in range(2):
        model(torch.ones(3)).sum().backward()
        adam.step()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        tree = {"model": model.state_dict(), "grad": gradients, "optimizer": adam.state_dict(), "step": step}
        torch.save(tree | {"scheduler": schedule.state_dict(), "loss": 1.0}, folder / "log" / f"c-{step}.pt")
    return [folder / "log"]


def uncompressed_zarr(version):
    def write(folder):
        import zarr

        with zarr.config.set({"array.write_empty_chunks": True}):
            group = zarr.open_group(folder / "log" / "step_0.zarr", mode="w", zarr_format=version)
            for key, value in states()[0].items():
                chunks = tuple(-(-length // 2) for length in np.shape(value)) or "auto"
                group.create_array(key, data=np.asarray(value), chunks=chunks, compressors=None)
        return [folder / "log"]

    return write


def trainer(folder):
    import torch
    from safetensors.numpy import save_file

    for step in (1, 2):
        path = folder / "log" / f"checkpoint-{step}"
        path.mkdir(parents=True)
        state = states()[0]
        for array, name in (("parameter", "model"), ("gradient", "gradient")):
            part = {k.partition("/")[2]: v for k, v in state.items() if k.startswith(f"{array}/")}
            save_file(part, path / f"{name}.safetensors")
        torch.save({"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1, 2]}]}, path / "optimizer.pt")
        history = [{"step": n, "loss": 1.0 / n, "learning_rate": 0.1, "epoch": 0.5} for n in range(1, 4)]
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
    return [folder / "log"]


def megatron(folder):
    import torch

    for step in range(2):
        path = folder / "log" / f"iter_{step:07d}" / "mp_rank_00"
        path.mkdir(parents=True)
        tree = {"model": {"language_model": {"weight": torch.full((4, 3), CONSTANTS[0])}}, "iteration": step}
        args = argparse.Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
        torch.save(tree | {"args": args, "grad": {"weight": torch.ones(1)}}, path / "model_optim_rng.pt")
    (folder / "log" / "latest_checkpointed_iteration.txt").write_text("1")
    return [folder / "log"]


def deepspeed(stage):
    def write(folder):
        import torch

        path = folder / "log" / "global_step0"
        path.mkdir(parents=True)
        groups = [{"w": torch.Size((4, 3)), "b": torch.Size((4,))}]
        prefix = "" if stage < 3 else "zero_pp_rank_0_"
        model = {
            "module": {},
            "param_shapes": groups,
            "global_steps": 0,
            "shared_params": {"tied": "w"},
            "loss": 1.0,
        }
        torch.save(model, path / f"{prefix}mp_rank_00_model_states.pt")
        key = "single_partition_of_fp32_groups" if stage < 3 else "fp32_flat_groups"
        inner = "base_optimizer_state" if stage < 3 else "optimizer_state_dict"
        for rank in range(2):
            flat = torch.full((8,), CONSTANTS[0])
            adam = {
                "state": {0: {"step": 1, "exp_avg": flat.clone(), "exp_avg_sq": flat.clone()}},
                "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}],
            }
            state = {key: [flat], "partition_count": 2, inner: adam, "group_paddings": [0]}
            torch.save({"optimizer_state_dict": state}, path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        (folder / "log" / "latest").write_text("global_step0")
        return [folder / "log"]

    return write


def orbax(folder):
    import pickle

    from logs import random_walk, run_writer

    (folder / "float32.states").write_bytes(pickle.dumps(random_walk(1)))
    run_writer("write_orbax.py", folder / "float32.states", JAX_PLATFORMS="cpu")
    kept = folder / "float32" / "zarr3"
    (folder / "float32" / "ocdbt").rename(folder / "log")
    shutil.rmtree(kept, ignore_errors=True)
    return [folder / "log"]


def bergson(folder):
    import torch

    models, stores = folder / "log" / "models", folder / "log" / "stores"
    for step in range(2):
        (models / f"step-{step}").mkdir(parents=True)
        from safetensors.torch import save_file

        save_file({"model.a.weight": torch.ones(4, 3)}, models / f"step-{step}" / "model.safetensors")
        path = stores / f"checkpoint-{step}"
        path.mkdir(parents=True)
        (path / "gradients.bin").write_bytes(np.full(12, CONSTANTS[0], np.float32).tobytes())
        info = {"grad_sizes": {"a": 12}, "num_grads": 1, "base_dtype": "float32", "attribute_tokens": False}
        (path / "info.json").write_text(json.dumps(info))
        (path / "config.yaml").write_text("aggregation: mean\nunit_normalize: false\nprecision: fp32\ndataset: d\n")
        (path / "processor_config.yaml").write_text("projection_dim: null\ninclude_bias: false\n")
        torch.save({}, path / "normalizers.pth")
    (stores / "natgrad.toml").write_text('[bergson]\nlayout = "linear"\n[bergson.modules]\n"a" = "linear"\n')
    return [models, stores]


def with_scalars(write):
    def both(folder):
        from logs import write_log

        (folder / "log" / "scalars").mkdir(parents=True)
        scalars = write(folder / "log" / "scalars")
        return [write_log(folder / "tensors", states()), scalars]

    return both


def of_scalars(name):
    def write(folder):
        import test_scalar_log

        return test_scalar_log.WRITERS[name][0](folder, test_scalar_log.values_of())

    return with_scalars(write)


def tensorboard(folder):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as writer:
        for step in range(6):
            writer.add_scalar("loss/train", 1.0 / (step + 1), step)
            writer.add_scalar("lr", 0.1, step, new_style=True)
            writer.add_histogram("weights", np.arange(9.0), step)
    return folder


def wandb(folder):
    import test_wandb_file

    rows = "".join(json.dumps(test_wandb_file.row(*values)) + "\n" for values in test_wandb_file.VALUES)
    command = [sys.executable, "-W", "ignore", "-c", test_wandb_file.WRITE, str(folder / "w")]
    done = subprocess.run(command, input=rows, capture_output=True, text=True, check=True)
    shutil.copy(done.stdout.splitlines()[0], folder / "run-1.wandb")
    shutil.rmtree(folder / "w", ignore_errors=True)
    return folder / "run-1.wandb"


def text(folder):
    """Write a text log with lines of two forms, and the run file that states them."""
    from logs import write_log

    (folder / "log").mkdir()
    pair = "iter {step}: loss {loss}, time 9ms\n{{'step': {step}, 'lr': 0.1}}\n"
    lines = "".join(pair.format(step=step, loss=1.0 / (step + 1)) for step in range(9))
    (folder / "log" / "train.log").write_text(lines)
    write_log(folder / "tensors", states())
    (folder / "run.toml").write_text(
        '[[source]]\npath = "tensors"\n'
        '[[source]]\npath = "log/train.log"\nmap = { line = "nanogpt", loss = "loss" }\n'
        '[[source]]\npath = "log/train.log"\nmap = { line = "dictionary", learning_rate = "lr" }\n'
    )
    return [folder / "run.toml"]


PARSERS = {
    "safetensors": native,
    "safetensors, index": of_formats("safetensors, sharded"),
    "npz": of_formats("npz"),
    "npz, one file": of_formats("npz, one file"),
    "torch": of_formats("torch"),
    "torch, optimizer": optimizer,
    "npy": of_conformance("npy"),
    "pickle": of_conformance("pickle"),
    "hdf5": uncompressed_hdf5,
    "hdf5, one file": of_formats("hdf5, one file"),
    "hdf5, groups": of_conformance("hdf5, groups"),
    "torch, one file": of_conformance("torch, one file"),
    "zarr": uncompressed_zarr(3),
    "zarr, version 2": uncompressed_zarr(2),
    "zarr, one group": of_formats("zarr, one group"),
    "dcp": of_formats("dcp, one rank"),
    "huggingface": trainer,
    "megatron": megatron,
    "deepspeed, stage 2": deepspeed(2),
    "deepspeed, stage 3": deepspeed(3),
    "orbax": orbax,
    "bergson": bergson,
    "run file": of_formats("run file"),
    "csv": of_scalars("pandas, csv"),
    "jsonl": of_scalars("nested lines of json"),
    "parquet": of_scalars("parquet"),
    "trackio": of_scalars("trackio"),
    "mlflow": of_scalars("mlflow"),
    "mlflow database": of_scalars("mlflow database"),
    "csv, long": of_scalars("long csv"),
    "tensorboard": with_scalars(tensorboard),
    "wandb": with_scalars(wandb),
    "text": text,
}
"""Parser to a function that writes a log into a folder and returns its SOURCEs. Files below ``log`` are damaged."""

OTHER_VALUES = (
    "orbax",
    "zarr, one group",
    "hdf5",
    "hdf5, one file",
    "hdf5, groups",
    "torch, optimizer",
    "bergson",
    "megatron",
    "deepspeed, stage 2",
)
"""Parsers whose logs are not checked for the values of tensors.

Orbax does not store chunks of zeros, a damaged chunk of compressed data has other values, and HDF5 can describe any
format of numbers. The others have further tensors.
"""


# Damage ------------------------------------------------------------------------------------------------------

NUMBERS = [b"-1", b"0", b"1", b"NaN", b"1e999", b"-0.5", b"true", b"null", b'"x"', b"[]", b"{}", b"9" * 40]
NUMBERS += [str(number).encode() for number in (2**31, 2**32, 2**53 + 1, 2**63, 2**64)]
WORDS = [struct.pack("<Q", n) for n in (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)]
WORDS += [struct.pack("<I", n) for n in (0, 1, 2**31, 2**32 - 1)]

MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["byte", "bit", "insert", "delete", "repeat", "truncate", "number", "word", "swap"]),
        st.integers(0, 1 << 20),
        st.integers(0, 1 << 20),
    ),
    min_size=1,
    max_size=4,
)


def mutate(content, mutations, protected=()):
    """Apply mutations to bytes; those that would change a protected range are omitted."""
    damaged = bytearray(content)
    for kind, first, second in mutations:
        if not damaged:
            return b""
        at = first % len(damaged)
        length = 1 + second % 16
        if protected and (kind not in ("byte", "bit", "word") or any(a - 8 <= at < b for a, b in protected)):
            continue
        if kind == "byte":
            damaged[at] = second % 256
        elif kind == "bit":
            damaged[at] ^= 1 << second % 8
        elif kind == "insert":
            damaged[at:at] = bytes((second + i * 37) % 256 for i in range(length))
        elif kind == "delete":
            del damaged[at : at + length]
        elif kind == "repeat":
            damaged[at:at] = damaged[at : at + length * 8] * (1 + second % 3)
        elif kind == "truncate":
            del damaged[at:]
        elif kind == "word":
            word = WORDS[second % len(WORDS)]
            damaged[at : at + len(word)] = word[: len(damaged) - at]
        elif kind == "swap":
            other = second % len(damaged)
            damaged[at], damaged[other] = damaged[other], damaged[at]
        else:
            found = list(re.finditer(rb"-?\d+(\.\d+)?", bytes(damaged)))
            if found:
                chosen = found[first % len(found)]
                damaged[chosen.start() : chosen.end()] = NUMBERS[second % len(NUMBERS)]
    return bytes(damaged)


def repacked(content, mutations):
    """Damage a member of a zip archive and write the archive again, with valid checksums; None for other files."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(member.filename, archive.read(member)) for member in archive.infolist()]
    except (zipfile.BadZipFile, OSError, ValueError):
        return None
    chosen = mutations[0][2] % len(members)
    pickles = [index for index, (name, _) in enumerate(members) if name.endswith("data.pkl")]
    chosen = pickles[0] if pickles else chosen
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")
        for index, (name, body) in enumerate(members):
            archive.writestr(name, mutate(body, mutations, data_ranges(body)) if index == chosen else body)
    return out.getvalue()


def resealed(content, mutations):
    """Damage the records of a TensorBoard or W&B file and write valid checksums; None for other files."""
    out, position = bytearray(), 0
    if content[:7] == b":W&B\xe1\xbe\x00":
        out, position = bytearray(content[:7]), 7
        while position + 7 <= len(content):
            room = (1 << 15) - position % (1 << 15)
            if room < 7:
                out += content[position : position + room]
                position += room
                continue
            length = int.from_bytes(content[position + 4 : position + 6], "little")
            kind, body = content[position + 6 : position + 7], content[position + 7 : position + 7 + length]
            damaged = mutate(body, [m for m in mutations if m[0] not in ("insert", "delete", "repeat", "truncate")])
            if mutations[0][1] % 8 or length > 4000:
                damaged = body if mutations[0][2] % 2 else damaged
            damaged = damaged[:length].ljust(length, b"\0")
            out += struct.pack("<IH", zlib.crc32(damaged, zlib.crc32(kind)), length) + kind + damaged
            position += 7 + length
        return bytes(out)

    def masked(data):
        crc = crc32c(bytes(data))
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    if len(content) < 12 or masked(content[:8]) != content[8:12]:
        return None
    number = 0
    while position + 12 <= len(content):
        length = int.from_bytes(content[position : position + 8], "little")
        body = content[position + 12 : position + 12 + length]
        body = mutate(body, mutations) if (number + mutations[0][1]) % 3 == 0 else body
        head = struct.pack("<Q", len(body))
        out += head + masked(head) + body + masked(body)
        position, number = position + 16 + length, number + 1
    return bytes(out)


def data_ranges(content):
    """Return the ranges of a file that contain repeated constants: the data of tensors."""
    found = []
    for constant in CONSTANTS:
        word = np.float32(constant).tobytes()
        for match in re.finditer(b"(?:" + re.escape(word) + b")+", content):
            found.append(match.span())
    return found


# Cases -------------------------------------------------------------------------------------------------------


class Slow(BaseException):
    """Error for a case that takes too long."""


def read_all(paths):
    """Open a log and read it; return the different values of each tensor."""
    from natgrad.schema.errors import InputError
    from natgrad.sources.completion import complete
    from natgrad.sources.opening import open_sources
    from natgrad.storage import open_all

    values = {}
    log = open_sources(open_all(paths))
    for step in log.steps()[:4]:
        with log.open(step) as reader:
            content = reader.content()
            with contextlib.suppress(InputError):  # not every log has gradients, or names of its optimizer
                content = complete(step, content, optimizer=True)
            for array, tensors in content.arrays.items():
                for name, logged in tensors.items():
                    size = min(math.prod(logged.shape), 1 << 16)
                    words = np.zeros(size, np.uint16 if logged.dtype == "bfloat16" else logged.dtype)
                    reader.read(array, name, 0, words)
                    values[step.number, array, name] = logged.dtype, set(words.tolist())
    return values


def check(paths, root, has_constants):
    """Read a damaged log and return the outcome; raise AssertionError if it is not allowed."""
    from natgrad.schema.errors import InputError

    try:
        values, refusal = read_all(paths), None
    except InputError as error:
        values, refusal = {}, error
    if refusal is not None:
        cause = refusal
        while cause is not None:
            assert not isinstance(cause, MemoryError), f"more than {MEMORY} bytes: {refusal}"
            cause = cause.__cause__
        assert str(root) in str(refusal), f"the message does not name the log: {refusal}"
        return "refused"
    if has_constants:
        swapped = [float(np.float32(constant).byteswap()) for constant in CONSTANTS]
        for key, (dtype, found) in values.items():
            allowed = dtype != "float32" or (len(found) <= 1 and found <= {*CONSTANTS, *swapped})
            assert allowed, f"{key} has the values {sorted(found)[:4]}"
    return "read"


def fuzz(parser, *, seconds=None, cases=None, first_seed=0):
    """Run the cases of a parser and return the number of each outcome."""
    from natgrad.schema.errors import InputError

    counts = {"read": 0, "refused": 0}
    # What the libraries keep in memory when they are loaded is not part of a case.
    for library in ("h5py", "pyarrow.parquet", "tensorstore", "natgrad.sources.opening"):
        __import__(library)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name).resolve()
        paths = PARSERS[parser](folder)
        read_all(paths)
        root = folder / "log"
        files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.stat().st_size]
        contents = {path: path.read_bytes() for path in files}
        constant = parser not in OTHER_VALUES
        protected = {path: data_ranges(content) if constant else [] for path, content in contents.items()}

        def on_alarm(*_):
            raise Slow(f"more than {CPU_SECONDS} s")

        signal.signal(signal.SIGPROF, on_alarm)

        def case(which, inside, mutations):
            path = files[which % len(files)]
            whole = contents[path]
            damaged = (repacked(whole, mutations) or resealed(whole, mutations)) if inside else None
            if damaged is None:
                damaged = mutate(whole, mutations, protected[path])
            path.write_bytes(damaged)
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            try:
                counts[check(paths, folder, constant)] += 1
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                path.write_bytes(whole)

        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        start, round_seed = time.monotonic(), first_seed
        while True:
            # Hypothesis decorates a function only once, so each round has its own.
            cases_of_round = given(which=st.integers(0, 1 << 16), inside=st.integers(0, 2), mutations=MUTATIONS)(
                case
            )
            run = settings(
                max_examples=cases or 500,
                database=None,
                deadline=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            )(seed(round_seed)(cases_of_round))
            with contextlib.redirect_stderr(io.StringIO()):
                run()
            round_seed += 1
            if cases or time.monotonic() - start > seconds:
                break
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        try:
            read_all(paths)  # the log is unchanged
        except InputError as error:
            raise AssertionError(f"the log was changed: {error}") from error
    return counts


def main():
    """Run parsers in separate processes, because a library may crash, and print their counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parser", action="append", choices=PARSERS, help="parsers to run; all by default")
    parser.add_argument("--seconds", type=float, default=600, help="time for each parser")
    parser.add_argument("--cases", type=int, help="number of cases for each parser, instead of a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="parsers that run at the same time; 0: in this process")
    given_arguments = parser.parse_args()
    names = given_arguments.parser or list(PARSERS)
    if not given_arguments.jobs:
        warnings.simplefilter("ignore")
        for name in names:
            counts = fuzz(
                name, seconds=given_arguments.seconds, cases=given_arguments.cases, first_seed=given_arguments.seed
            )
            sys.stdout.write(
                f"{name:<20} {sum(counts.values()):>8} cases: {counts['read']} read, {counts['refused']} refused\n"
            )
            sys.stdout.flush()
        return
    options = ["--seconds", str(given_arguments.seconds), "--seed", str(given_arguments.seed), "--jobs", "0"]
    options += ["--cases", str(given_arguments.cases)] if given_arguments.cases else []
    waiting, running, failed = list(names), {}, []
    while waiting or running:
        while waiting and len(running) < given_arguments.jobs:
            name = waiting.pop(0)
            command = [sys.executable, __file__, "--parser", name, *options]
            running[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for name, process in list(running.items()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                text, _ = process.communicate(timeout=0.5)
                del running[name]
                failed += [name] if process.returncode else []
                sys.stdout.write(
                    text if not process.returncode else f"{name}: FAILED ({process.returncode})\n{text}\n"
                )
                sys.stdout.flush()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
