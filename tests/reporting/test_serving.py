"""Request values from the server of a page, and compare them with the results."""

import base64
import http.client
import json
import threading
import zlib
from urllib.parse import urlencode

import numpy as np
import pytest

from logs import random_walk, write_log
from natgrad.reporting.run_results import RunResults
from natgrad.reporting.serving import ReportServer
from natgrad.schema.errors import InputError
from processing import process

QUERY = {
    "run": 0,
    "kind": "tensor",
    "variable": "angle",
    "descent": "gradient",
    "window": 1,
    "start": 0,
    "stop": 99,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    tensors = {"layers.0.w": (3,), "layers.0.b": (2,), "layers.1.w": (3,)}
    tree = process(write_log(folder / "log", random_walk(100, tensors)), folder / "out", windows=(1, 4))
    return RunResults.of("run", tree)


@pytest.fixture(scope="module")
def server(results):
    with ReportServer([results]) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def values(server, **query):
    status, content = get(server, f"/values?{urlencode(QUERY | query)}")
    assert status == 200, content
    found = json.loads(content)
    reference = found["entry"]["values"]
    packed = zlib.decompress(base64.b64decode(found["arrays"]))
    array = np.frombuffer(packed, reference["type"], int(np.prod(reference["shape"])), reference["at"])
    return found["entry"]["edges"], array.reshape(reference["shape"])


@pytest.mark.parametrize("descent", ["gradient", "trapezoid"])
@pytest.mark.parametrize("window", [1, 4])
def test_every_value_of_every_tensor_is_available(server, results, descent, window):
    edges, found = values(server, descent=descent, window=window, start=20, stop=50)
    assert edges == list(range(20, 51))
    expected = results.tensors["angle"].sel(descent=descent, window=window).values[20:50]
    np.testing.assert_array_equal(found[0], expected.T.astype(np.float32))


def test_groups_and_the_model_are_available(server, results):
    _, found = values(server, kind="block", variable="condition_number")
    blocks = results.groups["condition_number"].sel(descent="gradient", window=1).values
    np.testing.assert_allclose(10.0 ** found[0], blocks.T, rtol=1e-5)
    _, found = values(server, kind="model", variable="loss")
    np.testing.assert_array_equal(found[0, 0], results["loss"].astype(np.float32))


def test_the_page_asks_for_values(server):
    status, content = get(server, "/")
    assert status == 200
    assert b'"served": true' in content


@pytest.mark.parametrize(
    "query",
    [
        {"run": 1},
        {"run": -1},
        {"kind": "x"},
        {"variable": "source"},
        {"start": 60, "stop": 3},
        {"window": 2},
        {"stop": "x"},
    ],
)
def test_unknown_values_are_refused(server, query):
    assert get(server, f"/values?{urlencode(QUERY | query)}")[0] == 400


def test_other_addresses_and_hosts_are_refused(server):
    assert get(server, "/etc/passwd")[0] == 404
    assert get(server, "/", Host="evil.example")[0] == 403
    assert get(server, "/", Host=f"localhost:{server.server_port}")[0] == 200


def test_a_port_that_is_used_is_an_error(server, results):
    with pytest.raises(InputError, match=f"cannot listen on port {server.server_port}"):
        ReportServer([results], server.server_port)
