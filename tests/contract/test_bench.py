"""`clip-jax bench input` of a bucket."""

import itertools
import json
from unittest import mock

from clip_jax import bench
from clip_jax.bench import describe_input
from clip_jax.cli.commands import main
from clip_jax.storage import files
from tests.conftest import ROOT
from tests.data.conftest import FORMATS, make_pairs

QUICK = ["--seconds", "1", "--warmup", "0", "--batch-size", "8"]


def test_input_from_a_bucket_says_what_it_asks_for(gs, tmp_path, capsys):
    FORMATS["tar"](tmp_path, make_pairs(80))
    for path in tmp_path.glob("*.tar"):
        files.write_whole(f"{gs.url}/{path.name}", path.read_bytes())
    ahead = 1  # MiB
    flags = ["--data.source.path", f"{gs.url}/*.tar", "--data.read-ahead-mib", f"{ahead}"]
    command = ["bench", "input", str(ROOT / "configs/webdataset.py"), *QUICK]
    clock, looks = mock.Mock(wraps=bench.CLOCK), itertools.count()
    clock.now.side_effect = lambda: next(looks) / 50  # fifty looks are a second
    with mock.patch.object(bench, "CLOCK", clock):
        assert main([*command, *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["order"] == "blocks"
    assert result["bucket_requests_per_second"] > 0
    read = result["bucket_bytes_per_second"]
    used = read / result["bytes_read_per_byte_used"]
    # Half of a tar of such small images is headers; and the budget, however little was used.
    assert read < 2 * used + ahead * 2**20
    assert used < 2 * read
    assert "bytes read per byte used" in describe_input(result)
