"""A log of events that several processes extend."""

from unittest import mock

from clip_jax.storage import files
from clip_jax.storage.events import Events


def test_all_see_one_order_and_none_adds_to_a_log_that_it_has_not_read(tmp_path):
    one, two = Events(f"{tmp_path}/log"), Events(f"{tmp_path}/log")
    assert one.append({"subject": "a", "kind": "claim"})
    assert not two.append({"subject": "a", "kind": "claim"})
    assert two.refresh()
    assert two.append({"subject": "b", "kind": "claim"})
    assert one.refresh()
    assert not one.refresh()
    assert one.length == 2
    assert one.newest == two.newest == Events(f"{tmp_path}/log").newest
    assert [event["number"] for event in one.newest.values()] == [1, 2]


def test_an_event_whose_answer_was_lost_counts(tmp_path):
    log, plain = Events(str(tmp_path)), files.create
    with mock.patch.object(files, "create", autospec=True) as create:
        create.side_effect = lambda *how: plain(*how) and plain(*how)
        assert log.append({"subject": "a"})
    assert log.length == 1


def test_a_damaged_event_keeps_its_number(tmp_path):
    (tmp_path / "00000001").write_text("{")
    log = Events(str(tmp_path))
    assert (log.length, log.newest) == (1, {})
    assert log.append({"subject": "a"})
    assert (tmp_path / "00000002").exists()
