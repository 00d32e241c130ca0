"""Read pickles as data: any bytes give a value or an error, and nothing is executed."""

import contextlib
import pickle
import pickletools
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_torch_archive import opened, repacked, saved

from lazy import Lazy
from natgrad.schema.errors import InputError
from natgrad.sources.bounds import Budget
from natgrad.sources.checkpoints import pickle_data
from opened import ingest

torch = Lazy("torch")


def loaded(data, **tables):
    return pickle_data.load(data, functions=tables.get("functions", {}), values=tables.get("values", {}))


def leaves(tree):
    return list(pickle_data.flatten(tree, Budget(1000)))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(-9, 9), inner)
    ),
)


@given(value=plain, protocol=st.sampled_from([2, 3, 4, 5]))
def test_plain_values_equal_those_of_pickle(value, protocol):
    data = pickle.dumps(value, protocol=protocol)
    expected = pickle.loads(data)
    assert repr(loaded(data, functions={"_codecs.encode": str.encode, "builtins.bytes": bytes})) == repr(expected)


@given(data=st.binary(max_size=400))
def test_any_bytes_give_a_value_or_a_value_error(data):
    for body in (data, b"\x80\x02" + data + b"."):
        with contextlib.suppress(ValueError):
            loaded(body)


OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]


@given(
    parts=st.lists(
        st.sampled_from(OPCODES)
        | st.binary(max_size=4)
        | st.sampled_from([b"cos\nsystem\n", b"X\x02\x00\x00\x00ab"]),
        max_size=60,
    )
)
@settings(max_examples=400)
def test_any_sequence_of_opcodes_gives_a_value_or_a_value_error(parts):
    with contextlib.suppress(ValueError):
        loaded(b"".join(parts) + b".")


def nested(levels):
    """Return a list of twice the same list of twice the same ...: 2**levels leaves in a few bytes."""
    body = b"\x80\x02]q\x00K\x01a"
    for level in range(levels):
        body += b"]q" + bytes([level + 1]) + b"(h" + bytes([level]) + b"h" + bytes([level]) + b"e"
    return body + b"."


@pytest.mark.parametrize(
    "body",
    [
        b"\x80\x02Nr\xff\xff\xff\xffNr\xff\xff\xff\x7f.",  # memo numbers for which pickle allocates space
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0fab.",  # 2**60 bytes
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0fab.",  # 2**60 characters
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xffN.",  # a frame of 2**64 bytes
        b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    ],
)
def test_the_memory_of_a_pickle_is_bounded_by_its_size(body):
    tracemalloc.start()
    with contextlib.suppress(ValueError):
        loaded(body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000 + 400 * len(body)


@pytest.mark.parametrize("body", [nested(60), b"\x80\x02]q\x00h\x00a.", b"\x80\x02" + b"]" * 99 + b"a" * 98 + b"."])
def test_an_infinite_tree_is_refused(body):
    with pytest.raises(ValueError, match=r"levels|more objects"):
        leaves(loaded(body))


def test_long_keys_that_multiply_are_refused():
    tree = {"k" * 100_000: {str(n): 1 for n in range(10_000)}}
    with pytest.raises(ValueError, match="longer names"):
        leaves(tree)


def test_repeated_references_to_a_long_value_do_not_copy_it(tmp_path):
    text = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\x00"
    encode = b"c_codecs\nencode\nq\x01" + b"(h\x01h\x00X\x06\x00\x00\x00latin1\x86R" * 1
    body = b"\x80\x02](" + text + b"0" + encode + b"h\x01h\x00X\x06\x00\x00\x00latin1\x86R" * 1000 + b"e."
    path = repacked(saved(tmp_path, {"w": torch.ones(2)}), lambda m, root: m.update({root + "data.pkl": body}))
    tracemalloc.start()
    with contextlib.suppress(InputError):
        opened(path).close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20  # a thousand copies would be a thousand MiB


def test_objects_of_a_known_class_are_traversed_without_copies():
    def made():
        return pickle_data.Attributes("m.C")

    shared = pickle.dumps({f"key {n}": n for n in range(10_000)}, protocol=2)[2:-1]
    body = b"\x80\x02(" + shared + b"cm\nC\n)\x81h\x00b" * 1000 + b"t."
    tracemalloc.start()
    tree = loaded(body, functions={"m.C": made})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000 + 400 * len(body)  # a thousand copies would be half a GiB
    assert dict(leaves(tree[1]))["key 9999"] == 9999
    with pytest.raises(ValueError, match="more objects"):
        leaves(tree)
    itself = b"\x80\x02cm\nC\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb."
    with pytest.raises(ValueError, match="levels"):
        leaves(loaded(itself, functions={"m.C": made}))
    with pytest.raises(ValueError, match="malformed"):
        loaded(b"\x80\x02cm\nC\nK\x01\x85\x81.", functions={"m.C": made})


@pytest.mark.parametrize("key", [[1], {"a": 1}, 1 << 61, 1.5, (1.5,), ("a",) * 17])
def test_keys_with_chosen_hash_collisions_are_refused(key):
    body = b"\x80\x04}" + pickle.dumps(key, protocol=4)[2:-1] + b"Ns."
    with pytest.raises(ValueError, match=r"key|malformed|sets items"):
        loaded(body)


@pytest.mark.parametrize("dtype", ["complex64", "float8_e5m2"])
def test_a_trained_tensor_of_an_unsupported_dtype_is_refused_but_a_buffer_is_not(tmp_path, dtype):
    special = torch.ones(2).to(getattr(torch, dtype))
    for folder, trained in (("trained", True), ("buffer", False)):
        (tmp_path / folder).mkdir()
        tree = {"model": {"w": torch.ones(3), "z": special}, "gradient": {"w": torch.ones(3)}}
        tree["gradient"] |= {"z": special} if trained else {}
        torch.save(tree, tmp_path / folder / "step-0.pt")
    with pytest.raises(InputError, match=f"dtype {dtype} is not a float dtype") as caught:
        ingest([tmp_path / "trained"], tmp_path / "trained.zarr")
    assert "gradient of tensor 'z'" in caught.value.where
    assert ingest([tmp_path / "buffer"], tmp_path / "buffer.zarr").tensors == 1
