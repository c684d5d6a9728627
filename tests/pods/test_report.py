"""What is said of a plan."""

from clip_jax.pods.report import reading


def test_a_starved_host_is_said():
    assert "490 MB/s in 116.8 requests/s" in reading(7000, None)
    assert reading(7000, 8000.0).endswith("its cores decode 8,000: enough")
    assert reading(7000, 900.0).endswith("its cores decode 900: TOO FEW: the devices will wait")
