"""Open weights read what is asked of them: a parameter, or its part, and nothing twice."""

from unittest import mock

import jax
import numpy as np
import pytest

from clip_jax.convert.formats import write_weights
from clip_jax.convert.on_demand import checked, loaded, read_together
from clip_jax.convert.state_dict import Row, flatten
from clip_jax.convert.weight_files import WeightFiles
from tests.convert.conftest import make_weights


@pytest.mark.parametrize("to", ["hugging-face", "open-clip", "clip-jax"])
def test_a_part_of_a_parameter_is_that_part_of_all_of_it(to, tmp_path):
    write_weights(make_weights("vit"), tmp_path, to)
    with WeightFiles() as weight_files:
        for name, x in flatten(weight_files.open(tmp_path).params).items():
            complete = np.asarray(x)
            assert complete.shape == x.shape, name
            middle = tuple(slice(size // 3, size - size // 3) for size in x.shape)
            np.testing.assert_array_equal(x[middle], complete[middle], err_msg=name)


def test_only_the_blocks_of_a_part_are_read(tmp_path):
    write_weights(make_weights("vit"), tmp_path, "hugging-face")
    blocks, to_ours = [], Row.to_ours

    def counted(row, arrays, shape):
        blocks.append(row.ours)
        return to_ours(row, arrays, shape)

    with WeightFiles() as weight_files, mock.patch.object(Row, "to_ours", counted):
        name = "visual/transformer/resblocks/mlp/c_fc/kernel"
        kernel = flatten(weight_files.open(tmp_path).params)[name]
        assert not blocks
        assert kernel[1:].shape == (kernel.shape[0] - 1, *kernel.shape[1:])
        assert blocks == [name] * (kernel.shape[0] - 1)


def test_what_is_read_together_is_read_once_and_checked_with_its_name():
    shapes = {"a": {"b": jax.ShapeDtypeStruct((2,), np.float32)}, "c": np.zeros(())}
    load = mock.Mock(return_value={"a": {"b": np.ones(2)}, "c": np.zeros(())})
    names = []
    params = checked(read_together(shapes, load), lambda name, _: names.append(name))
    load.assert_not_called()
    assert loaded(params)["a"]["b"].tolist() == loaded(params)["a"]["b"].tolist() == [1, 1]
    load.assert_called_once_with()
    assert names[:2] == ["a/b", "c"]
