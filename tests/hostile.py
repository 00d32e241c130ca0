"""Logs designed to exhaust time or memory, or to be misread: functions of a folder that return the log."""

import io
import json
import os
import pickle
import socket
import sqlite3
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

MEBIBYTE = 1 << 20


# Torch archives ----------------------------------------------------------------------------------------------


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def value_of(value):
    return pickle.dumps(value, protocol=2)[2:-1]


def nested(levels=34, pair=b"](h%ch%ce"):
    """Return opcodes that store a list of two references to a list of two references, and so on, in the memo."""
    built = b"]\x94" + b"".join(pair.replace(b"%c", bytes([i])) + b"\x94" for i in range(levels))
    return built + b"0" * (levels + 1), b"h" + bytes([levels])


NESTED, TOP = nested()
NESTED_TUPLE, _ = nested(pair=b"(h%ch%ct")


ZERO = text("0")


def storage(size=b"K\x01", key=ZERO, kind=b"ctorch\nFloatStorage\n"):
    return b"(" + text("storage") + kind + key + text("cpu") + size + b"tQ"


def tensor(size=b"K\x02", offset=b"K\x00", shape=b"K\x02\x85", stride=b"K\x01\x85", key=ZERO):
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(size, key) + offset + shape + stride + b"\x89}tR"


def write_archive(path, members, compression=zipfile.ZIP_STORED):
    """Write an archive, in which a name may appear twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.filterwarnings("ignore", "Duplicate name")
        for name, content in members:
            archive.writestr(name, content)
    return path.parent


def torch_log(folder, body, storages=(bytes(8),), more=()):
    stored = [(f"archive/data/{index}", content) for index, content in enumerate(storages)]
    return write_archive(folder / "step_0.pt", [("archive/data.pkl", b"\x80\x02" + body + b"."), *stored, *more])


def with_body(body, **options):
    return lambda folder: torch_log(folder, body, **options)


def with_weight(**parts):
    return with_body(b"}" + text("w") + tensor(**parts) + b"s")


NUMBERS = {
    "NaN": b"G" + struct.pack(">d", float("nan")),
    "Boolean": b"\x88",
    "text": text("2"),
    "negative": value_of(-2),
    "huge": value_of(1 << 70),
    "float": b"G" + struct.pack(">d", 2.0),
    "none": b"N",
    "nested": NESTED + TOP,
}
PARTS = {
    "size": lambda number: {"size": number},
    "offset": lambda number: {"offset": number},
    "shape": lambda number: {"shape": number + b"\x85"},
    "stride": lambda number: {"stride": number + b"\x85"},
}
TORCH = {
    f"torch, {part} {name}": with_weight(**PARTS[part](number))
    for part in PARTS
    for name, number in NUMBERS.items()
}
LONG = text("k" * MEBIBYTE) + b"\x940"
TORCH |= {
    "torch, nested identifier": with_body(NESTED + storage(key=TOP)),
    "torch, nested tuple as identifier": with_body(NESTED_TUPLE + storage(key=TOP)),
    "torch, identifier that is only nested": with_body(NESTED + TOP + b"Q"),
    "torch, nested module": with_body(NESTED + TOP + text("a") + b"\x93"),
    "torch, nested attribute": with_body(NESTED + text("a") + TOP + b"\x93"),
    "torch, long modules": with_body(LONG + b"](" + (b"h\x00" + text("a") + b"\x93") * 10_000 + b"e"),
    "torch, nested key": with_body(NESTED_TUPLE + b"}" + TOP + b"Ns"),
    "torch, joined keys": with_body(LONG + b"](" + (b"}(" + b"h\x00" * 16 + b"tNs") * 10_000 + b"e"),
    "torch, long names": with_body(LONG + b"](" + b"}h\x00}(" * 1000 + b"K\x01K\x01us" * 1000 + b"e"),
    "torch, nested dtype": with_body(
        NESTED
        + b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n"
        + TOP
        + b"\x89\x88\x87RC\x08"
        + bytes(8)
        + b"tR"
    ),
    "torch, nested flags": with_body(
        NESTED + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage() + b"K\x00))\x89}" + TOP + b"tR"
    ),
    "torch, object as key": with_body(b"}cargparse\nNamespace\n)R" + NESTED + TOP + b"bNs"),
    "torch, many opcodes": with_body(b"N0" * 10_000_000 + b"N"),
    "torch, many leaves": with_body(b"](" + b"K\x01" * 4_000_000 + b"e"),
    "torch, copies of one leaf": with_body(b"](K\x01K\x02e\x940" + b"](" + b"h\x00" * 4_000_000 + b"e"),
    "torch, expanded tensors": with_body(
        b"}("
        + b"".join(text(f"w{n}") + tensor(shape=value_of((1 << 24,)), stride=value_of((0,))) for n in range(99))
        + b"u"
    ),
    "torch, infinite member": with_body(
        b"}("
        + b"".join(
            text(f"{name}") + value_of(value)
            for name, value in {
                "optimizer": {"param_groups": [{"params": [float("inf"), float("nan")]}], "state": {}}
            }.items()
        )
        + b"u"
    ),
}


def many_members(folder, count=400_000):
    folder.mkdir(parents=True)
    entry = struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    table = entry * count
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, len(table), 0, 0)
    (folder / "step_0.pt").write_bytes(table + end)
    return folder


def repeated_member(folder):
    torch_log(folder, b"}" + text("w") + tensor() + b"s", more=[("archive/data/0", struct.pack("<2f", 7, 7))])
    return folder


def shared_position(folder):
    """Make the table of an archive list the bytes of one storage under two names."""
    body = b"}(" + text("a") + tensor(key=text("0")) + text("b") + tensor(key=text("1")) + b"u"
    torch_log(folder, body, storages=(struct.pack("<2f", 1, 1), struct.pack("<2f", 2, 2)))
    path = folder / "step_0.pt"
    content = bytearray(path.read_bytes())
    names = [content.rindex(f"archive/data/{n}".encode()) for n in range(2)]
    content[names[1] - 4 : names[1]] = content[names[0] - 4 : names[0]]
    path.write_bytes(content)
    return folder


TORCH |= {
    "torch, many members": many_members,
    "torch, repeated member": repeated_member,
    "torch, two members at one position": shared_position,
}


# Distributed checkpoints -------------------------------------------------------------------------------------


def record(module, name, state):
    return f"c{module}\n{name}\n".encode() + b")\x81}(" + b"".join(text(k) + v for k, v in state.items()) + b"ub"


DCP = "torch.distributed.checkpoint.metadata"


def dcp_log(folder, entries, stored, planner=b"}"):
    """Write metadata from the opcodes of its entries and of the positions of data."""
    path = folder / "step-0"
    path.mkdir(parents=True)
    metadata = record(
        DCP,
        "Metadata",
        {"state_dict_metadata": entries, "storage_data": stored, "planner_data": planner},
    )
    (path / ".metadata").write_bytes(b"\x80\x02" + NESTED_TUPLE + metadata + b".")
    (path / "__0_0.distcp").write_bytes(archive_bytes(b"](" + b"K\x01" * 100_000 + b"e"))
    return folder


def archive_bytes(body):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
    return content.getvalue()


def position(name, offset=b"N", start=0, length=0):
    index = record(DCP, "MetadataIndex", {"fqn": name, "offset": offset})
    info = record(
        "torch.distributed.checkpoint.filesystem",
        "_StorageInfo",
        {"relative_path": text("__0_0.distcp"), "offset": value_of(start), "length": value_of(length)},
    )
    return index + info


def number_entry(name):
    return text(name) + record(DCP, "BytesStorageMetadata", {})


def same_bytes_many_times(folder):
    length = len(archive_bytes(b"](" + b"K\x01" * 100_000 + b"e"))
    names = [f"n{n}" for n in range(300)]
    return dcp_log(
        folder,
        b"}(" + b"".join(map(number_entry, names)) + b"u",
        b"}(" + b"".join(position(text(name), length=length) for name in names) + b"u",
    )


CHECKPOINTS = {
    "dcp, nested name": lambda folder: dcp_log(folder, b"}", b"}(" + position(TOP) + b"u"),
    "dcp, nested offset": lambda folder: dcp_log(folder, b"}", b"}(" + position(text("a"), TOP) + b"u"),
    "dcp, nested level": lambda folder: dcp_log(
        folder, b"}(" + number_entry("a") + b"u", b"}", b"}(" + text("a") + TOP + b"\x85u"
    ),
    "dcp, one range of bytes many times": same_bytes_many_times,
}


def deepspeed_log(folder, states=b"", rank=b""):
    path = folder / "global_step0"
    path.mkdir(parents=True)
    states = states or b"](}" + text("w") + b"K\x02\x85se"
    (path / "mp_rank_00_model_states.pt").write_bytes(
        archive_bytes(NESTED + b"}(" + text("module") + b"}" + text("param_shapes") + states + b"u")
    )
    (path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(
        archive_bytes(
            NESTED_TUPLE
            + b"}"
            + text("optimizer_state_dict")
            + b"}("
            + text("single_partition_of_fp32_groups")
            + b"]"
            + text("partition_count")
            + (rank or b"K\x01")
            + b"us"
        )
    )
    return folder


CHECKPOINTS |= {
    "deepspeed, nested count": lambda folder: deepspeed_log(folder, rank=TOP),
    "deepspeed, nested shape": lambda folder: deepspeed_log(folder, b"](}" + text("w") + TOP + b"se"),
    "deepspeed, long shape": lambda folder: deepspeed_log(
        folder, b"](}" + text("w") + b"(" + value_of(1 << 59) * 100_000 + b"tse"
    ),
}


# Other files with tensors ------------------------------------------------------------------------------------


def npy(shape=(2,), content=bytes(16), descr="<f8", fortran=False):
    header = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def npz_log(folder, members, compression=zipfile.ZIP_STORED):
    return write_archive(folder / "step_0.npz", members, compression)


def npz_bomb(folder):
    """Write 1 GiB of zeros in 1 MiB."""
    folder.mkdir(parents=True)
    with (
        zipfile.ZipFile(folder / "step_0.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("parameter/w.npy", "w", force_zip64=True) as file,
    ):
        file.write(npy((1 << 27,), b""))
        for _ in range(16):
            file.write(bytes(64 * MEBIBYTE))
    return folder


def safetensors_log(folder, header, data=bytes(16)):
    folder.mkdir(parents=True)
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "step_0.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    return folder


def entry(shape=(2,), start=0, stop=16, dtype="F64"):
    return json.dumps({"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}).encode()


def hdf5_log(folder, write):
    import h5py

    folder.mkdir(parents=True)
    with h5py.File(folder / "step_0.h5", "w") as file:
        write(file)
    return folder


def zarr_log(folder, content):
    path = folder / "step_0.zarr" / "parameter" / "w"
    path.mkdir(parents=True)
    (folder / "step_0.zarr" / "zarr.json").write_text('{"node_type": "group", "zarr_format": 3}')
    (path / "zarr.json").write_bytes(content)
    return folder


def index_log(folder, content):
    path = folder / "step-0"
    path.mkdir(parents=True)
    (path / "model.safetensors.index.json").write_bytes(content)
    return folder


def pickle_log(folder, body, protocol=b"\x80\x04"):
    folder.mkdir(parents=True)
    (folder / "step_0.pkl").write_bytes(protocol + body + b".")
    return folder


def pickled_array(
    shape=b"K\x02\x85", code=b"f4", words=bytes(8), function=b"numpy.core.multiarray\n_reconstruct\n"
):
    """Return opcodes that rebuild an array, with any description."""
    start = b"c" + function + b"(cnumpy\nndarray\nK\x00\x85C\x01btR"
    dtype = b"cnumpy\ndtype\n(" + text(code.decode()) + b"\x89\x88tR"
    return start + b"(K\x01" + shape + dtype + b"\x89B" + struct.pack("<I", len(words)) + words + b"tb"


def with_pickle(value, **options):
    return lambda folder: pickle_log(folder, b"}" + text("params") + value + b"s", **options)


def npy_log(folder, header, content=b""):
    folder.mkdir(parents=True)
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header))
    (folder / "theta_0.npy").write_bytes(start + header + content)
    return folder


class Executed:
    """An object whose pickle would run a command."""

    def __reduce__(self):
        return os.system, ("false",)


def many_references(folder):
    """Write a pickle whose dict has one array of 64 KiB under many keys."""
    entries = b"".join(text(str(index)) + b"h\x01" for index in range(1 << 15))
    stored = pickled_array(b"M\x00\x40\x85", words=bytes(1 << 16)) + b"q\x01"
    return pickle_log(folder, b"}(" + text("first") + stored + entries + b"u")


FILES = {
    "pickle, a command": lambda folder: pickle_log(folder, pickle.dumps({"params": Executed()}, protocol=4)[2:-1]),
    "pickle, eval": with_pickle(b"cbuiltins\neval\n(" + text("1") + b"tR"),
    "pickle, too few bytes": with_pickle(pickled_array(words=bytes(4))),
    "pickle, negative shape": with_pickle(pickled_array(b"J\xff\xff\xff\xff\x85")),
    "pickle, huge shape": with_pickle(pickled_array(b"J\xff\xff\xff\x7f\x85")),
    "pickle, objects": with_pickle(pickled_array(code=b"O8")),
    "pickle, shape that is text": with_pickle(pickled_array(text("x"))),
    "pickle, nested lists": lambda folder: pickle_log(folder, b"}" + text("params") + NESTED + TOP + b"s"),
    "pickle, one array many times": many_references,
    "pickle, truncated": lambda folder: pickle_log(folder, b"}" + text("params") + pickled_array()[:-40]),
    "pickle, external": with_pickle(text("x") + b"Q"),
    "npy, exabytes": lambda folder: npy_log(
        folder, b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000000,), }"
    ),
    "npy, code": lambda folder: npy_log(folder, b"__import__('os').abort()"),
    "npy, objects": lambda folder: npy_log(
        folder, b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps(Executed())
    ),
    "npy, negative": lambda folder: npy_log(folder, b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"),
    "npy, pipe": lambda folder: fifo(folder / "theta_0.npy").parent,
    "pickle, pipe": lambda folder: fifo(folder / "step_0.pkl").parent,
}

ARRAYS = {
    "npz, negative shape": lambda folder: npz_log(folder, [("parameter/w.npy", npy((-1, -3)))]),
    "npz, shape of floats": lambda folder: npz_log(folder, [("parameter/w.npy", npy((2.0,)))]),
    "npz, huge shape": lambda folder: npz_log(folder, [("parameter/w.npy", npy((1 << 40,)))]),
    "npz, huge shape in Fortran order": lambda folder: npz_log(
        folder, [("parameter/w.npy", npy((1 << 20, 1 << 20), fortran=True))]
    ),
    "npz, member twice": lambda folder: npz_log(folder, [("parameter/w.npy", npy())] * 2),
    "npz, long header": lambda folder: npz_log(
        folder,
        [("parameter/w.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 30) + bytes(1 << 30))],
        zipfile.ZIP_DEFLATED,
    ),
    "npz, many arrays": lambda folder: npz_log(folder, [(f"w{n}.npy", npy()) for n in range(60_000)]),
    "npz, bomb": npz_bomb,
    "safetensors, key twice": lambda folder: safetensors_log(
        folder, b'{"parameter/w":' + entry() + b',"parameter/w":' + entry() + b"}"
    ),
    "safetensors, many lists": lambda folder: safetensors_log(
        folder, b'{"__metadata__":{},"a":[' + b"[]," * 10_000_000 + b"0]}"
    ),
    "safetensors, many tensors": lambda folder: safetensors_log(
        folder, b"{" + b",".join(b'"w%d":%s' % (n, entry((0,), 16, 16)) for n in range(400_000)) + b"}"
    ),
    "hdf5, dataset that was never written": lambda folder: hdf5_log(
        folder, lambda file: file.create_dataset("parameter/w", (1 << 40,), "f8", chunks=(1 << 16,))
    ),
    "hdf5, dataset without data": lambda folder: hdf5_log(
        folder, lambda file: file.create_dataset("parameter/w", (1 << 30,), "f8")
    ),
    "hdf5, deep groups": lambda folder: hdf5_log(folder, lambda file: file.create_group("/".join("a" * 2000))),
    "hdf5, many datasets": lambda folder: hdf5_log(
        folder, lambda file: [file.create_dataset(f"w{n}", data=0.0) for n in range(20_000)]
    ),
    "zarr, deep metadata": lambda folder: zarr_log(folder, b"[" * 1_000_000),
    "zarr, large metadata": lambda folder: zarr_log(folder, b'{"a":[' + b"[]," * 10_000_000 + b"0]}"),
    "index, deep": lambda folder: index_log(folder, b'{"weight_map":' + b"[" * 1_000_000),
    "index, many lists": lambda folder: index_log(folder, b'{"weight_map":[' + b"[]," * 10_000_000 + b"0]}"),
    "index, a key twice": lambda folder: index_log(folder, b'{"weight_map":{"a":"x","a":"y"}}'),
}


# Scalars -----------------------------------------------------------------------------------------------------


def with_run(folder, write):
    """Write a log of tensors and, next to it, a log of scalars; return both."""
    from safetensors.numpy import save_file

    (folder / "run").mkdir(parents=True)
    state = {"parameter/w": np.ones(3), "gradient/w": np.ones(3), "learning_rate": np.array(0.1)}
    save_file(state, folder / "run" / "step_0.safetensors")
    scalars = folder / "scalars"
    scalars.mkdir()
    return [folder / "run", write(scalars)]


def written(path, content):
    path.write_bytes(content)
    return path


def wandb_fragments(folder, count=300_000):
    content = bytearray(b":W&B\xe1\xbe\x00")
    checks = {kind: zlib.crc32(b"", zlib.crc32(bytes([kind]))) for kind in (2, 3, 4)}
    for number in range(count):
        kind = 2 if number == 0 else 4 if number == count - 1 else 3
        room = (1 << 15) - len(content) % (1 << 15)
        content += bytes(room) if room < 7 else b""
        content += struct.pack("<IHB", checks[kind], 0, kind)
    return written(folder / "run-1.wandb", bytes(content))


def event_record(data):
    """Return the record of an event file."""
    from crc32c import crc32c

    length = struct.pack("<Q", len(data))
    sums = (crc32c(part) for part in (length, data))
    crc_of_length, crc = (
        struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF) for crc in sums
    )
    return length + crc_of_length + data + crc


def parquet_of_one_value(folder, rows=40_000_000):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"step": pa.nulls(rows, pa.int64()), "loss": pa.nulls(rows, pa.float64())})
    parquet.write_table(table, folder / "scalars.parquet")
    return folder / "scalars.parquet"


def cyclic_database(folder):
    """Make the inner page of a table refer to itself."""
    path = folder / "scalars.db"
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA page_size=512")
        database.execute("CREATE TABLE metrics (run_name TEXT, step INTEGER, metrics TEXT)")
        for step in range(2000):
            database.execute("INSERT INTO metrics VALUES ('a', ?, ?)", (step, json.dumps({"loss": 1.0})))
        (root,) = database.execute("SELECT rootpage FROM sqlite_master").fetchone()
    database.close()
    content = bytearray(path.read_bytes())
    start = (root - 1) * 512
    assert content[start] == 5  # an inner page
    (cells,) = struct.unpack(">H", content[start + 3 : start + 5])
    for cell in range(cells):
        (place,) = struct.unpack(">H", content[start + 12 + 2 * cell : start + 14 + 2 * cell])
        content[start + place : start + place + 4] = struct.pack(">I", root)
    return written(path, bytes(content))


SCALARS = {
    "csv, many columns": lambda folder: written(folder / "a.csv", b"loss," * 3_000_000 + b"step\n"),
    "csv, one long line": lambda folder: written(folder / "a.csv", b"step,loss\n" + b"1" * 20_000_000),
    "csv, step that is not a number": lambda folder: written(folder / "a.csv", b"step,loss\nnan,1\n"),
    "jsonl, many keys": lambda folder: written(
        folder / "a.jsonl", b"".join(b'{"step":1,"loss":1,"k%d":1}\n' % n for n in range(200_000))
    ),
    "jsonl, deep": lambda folder: written(folder / "a.jsonl", b'{"step":' + b"[" * 1_000_000 + b"\n"),
    "jsonl, a key twice": lambda folder: written(folder / "a.jsonl", b'{"step":1,"loss":1,"loss":2}\n'),
    "jsonl, a joined key twice": lambda folder: written(
        folder / "a.jsonl", b'{"step":1,"train":{"loss":1},"train/loss":2}\n'
    ),
    "jsonl, long levels": lambda folder: written(
        folder / "a.jsonl",
        b'{"' + b"k" * 4_000_000 + b'":{' + b",".join(b'"%d":1' % n for n in range(1000)) + b"}}\n",
    ),
    "wandb, many fragments": wandb_fragments,
    "tensorboard, many fields": lambda folder: written(
        folder / "tfevents.1", event_record(b"\x10\x01" * 2_000_000)
    ),
    "parquet, many rows": parquet_of_one_value,
    "trackio, cyclic pages": cyclic_database,
}


# Text files --------------------------------------------------------------------------------------------------


def with_file(name, content):
    """Return a function that writes a valid log and a file next to it."""

    def write(folder):
        path, _ = with_run(folder, lambda scalars: scalars)
        (path / name).write_bytes(content)
        return path

    return write


def trainer_log(content):
    def write(folder):
        path = folder / "checkpoint-1"
        path.mkdir(parents=True)
        (path / "trainer_state.json").write_bytes(content)
        return folder

    return write


def bergson_log(folder, config=b"", info=b""):
    path = folder / "checkpoint-1"
    path.mkdir(parents=True)
    (path / "gradients.bin").write_bytes(bytes(8))
    (path / "info.json").write_bytes(info or b'{"grad_sizes":{"a":2},"num_grads":1,"base_dtype":"float32"}')
    (path / "config.yaml").write_bytes(config)
    return folder


TEXTS = {
    "natgrad.toml, dotted key": with_file("natgrad.toml", b"a." * 500_000 + b"b=1"),
    "natgrad.toml, dotted keys": with_file("natgrad.toml", (b"a." * 60 + b"b=1\n") * 30_000),
    "natgrad.toml, nested": with_file("natgrad.toml", b"a=" + b"[" * 1_000_000),
    "natgrad.toml, quotes": with_file("natgrad.toml", b'a="' + b'\\"' * 1_000_000),
    "natgrad.toml, long": with_file("natgrad.toml", b"#" * 5_000_000),
    "run.toml, nested": with_file("run.toml", b"a=" + b"{a=" * 300_000),
    "trainer_state.json, many lists": trainer_log(b'{"log_history":[' + b"[]," * 10_000_000 + b"0]}"),
    "trainer_state.json, deep": trainer_log(b"[" * 1_000_000),
    "trainer_state.json, step": trainer_log(b'{"log_history":[{"step":1e400,"loss":1}]}'),
    "bergson, spaces": lambda folder: bergson_log(folder, b"a:" + b" " * 4_000_000 + b"x"),
    "bergson, NaN": lambda folder: bergson_log(
        folder, b"", b'{"grad_sizes":{"a":NaN},"num_grads":1,"base_dtype":"float32"}'
    ),
}


# Files that are not regular ----------------------------------------------------------------------------------


def fifo(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def listening_socket(path):
    """Bind a socket to a path; a path that is too long for a socket is reached through a relative one."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(before)


def step_file(suffix, make=fifo):
    def write(folder):
        path, _ = with_run(folder, lambda scalars: scalars)
        make(path / f"step_1{suffix}")
        return path

    return write


def fifo_in(name):
    def write(folder):
        path, _ = with_run(folder, lambda scalars: scalars)
        fifo(path / name)
        return path

    return write


def fifo_replacing(write, name):
    """Return a function that writes a log and replaces one of its files with a pipe."""

    def replaced(folder):
        path = write(folder)
        fifo(folder / name)
        return path

    return replaced


def fifo_of_database(folder):
    path = folder / "scalars.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE metrics (run_name TEXT, step INTEGER, metrics TEXT)")
    database.close()
    fifo(folder / "scalars.db-journal")
    return path


VALID_ZARR = json.dumps(
    {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [2],
        "data_type": "float64",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2]}},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }
).encode()

IRREGULAR = {
    **{f"pipe{suffix}": step_file(suffix) for suffix in (".safetensors", ".npz")},
    "device": step_file(".safetensors", lambda path: path.symlink_to("/dev/zero")),
    "socket": step_file(".safetensors", listening_socket),
    "link to nothing": step_file(".safetensors", lambda path: path.symlink_to("nothing")),
    "folder": step_file(".safetensors", lambda path: path.mkdir()),
    "pipe .pt": lambda folder: fifo(folder / "step_0.pt").parent,
    "pipe .h5": lambda folder: fifo(folder / "step_0.h5").parent,
    "pipe natgrad.toml": fifo_in("natgrad.toml"),
    "pipe chunk": fifo_replacing(lambda folder: zarr_log(folder, VALID_ZARR), "step_0.zarr/parameter/w/c/0"),
    "pipe zarr.json": fifo_replacing(
        lambda folder: zarr_log(folder, VALID_ZARR), "step_0.zarr/parameter/w/zarr.json"
    ),
    "pipe .distcp": fifo_replacing(same_bytes_many_times, "step-0/__0_0.distcp"),
    "pipe model states": fifo_replacing(deepspeed_log, "global_step0/mp_rank_00_model_states.pt"),
    "pipe optimizer states": fifo_replacing(
        deepspeed_log, "global_step0/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    ),
    "pipe shard": fifo_replacing(
        lambda folder: index_log(folder, b'{"weight_map":{"a":"x.safetensors"}}'), "step-0/x.safetensors"
    ),
    "pipe config.yaml": fifo_replacing(bergson_log, "checkpoint-1/config.yaml"),
    "pipe normalizers.pth": fifo_replacing(bergson_log, "checkpoint-1/normalizers.pth"),
    **{
        f"pipe {name}": lambda folder, name=name: with_run(folder, lambda scalars: fifo(scalars / name))
        for name in ("a.csv", "a.jsonl", "a.parquet", "a.wandb", "events.out.tfevents.1", "a.db")
    },
    "pipe in a folder of Parquet": lambda folder: with_run(folder, lambda s: fifo(s / "a.parquet").parent),
    "pipe in a folder of events": lambda folder: with_run(folder, lambda s: fifo(s / "tfevents.1").parent),
    "pipe journal": lambda folder: with_run(folder, fifo_of_database),
}

LOGS = {
    **TORCH,
    **CHECKPOINTS,
    **ARRAYS,
    **FILES,
    **{name: lambda folder, write=write: with_run(folder, write) for name, write in SCALARS.items()},
    **TEXTS,
    **IRREGULAR,
}
"""Logs that are refused, except those in `HARMLESS`."""

HARMLESS = {
    "torch, nested dtype": "",
    "torch, infinite member": "",
    "hdf5, dataset that was never written": "never written",
    "hdf5, dataset without data": "never written",
}
"""Logs whose harmful part is omitted, and the notes of the step about it."""
