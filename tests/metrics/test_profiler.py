"""A trace of a run's steps."""

import pytest
from etils import epath

from clip_jax.errors import InputError
from clip_jax.metrics.profiler import Profiler, profile_range


def test_a_profile_of_some_steps_lands_in_the_work_directory(tmp_path):
    for wrong in ("10", "5:3", "0:3", "a:b", "1:2:3"):
        with pytest.raises(InputError, match="profile_steps"):
            profile_range(wrong)
    profiler = Profiler("2:2", epath.Path(tmp_path))
    ended = []
    for step in range(1, 4):
        profiler.before(step)
        ended.append(profiler.after(step, None))
    assert ended == [False, True, False]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
