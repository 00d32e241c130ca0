"""Test the status of updates and of windows of them."""

from dataclasses import replace

import numpy as np
import pytest
from test_dataset import table_of, walk

from natgrad.results import dataset
from natgrad.schema.variables import Status


@pytest.mark.parametrize("group", ["model", "tensor"])
def test_a_window_is_skipped_if_one_of_its_updates_is(group):
    skipped = np.array([False, False, True, False, False])
    tree = dataset.label(replace(table_of(walk()), skipped=skipped), windows=[2], variables=[])
    found = tree[group]["status"].sel(descent="gradient") == Status.SKIPPED
    for window, starts in ((1, [2]), (2, [1, 2])):
        expected = np.isin(tree[group]["step"].values, starts).reshape(-1, *[1] * (found.ndim - 2))
        np.testing.assert_array_equal(found.sel(window=window), np.broadcast_to(expected, found[..., 0].shape))
