"""The command line, noting which samples each process trains on; TROUBLE=1:5 raises in process 1
when it reads the batch of step 5, TROUBLE=1:5:hang sleeps there."""

import json
import os
import sys
import time
from pathlib import Path

import jax

from clip_jax.cli import main
from clip_jax.data.pipeline import Pipeline

plain = Pipeline.batches


def recorded(self, start_step=0):
    process, step, *what = os.environ.get("TROUBLE", "-1:0").split(":")
    workdir = Path(sys.argv[sys.argv.index("--workdir") + 1])
    with (workdir / f"samples-{jax.process_index()}.jsonl").open("a") as file:
        for number, batch in enumerate(plain(self, start_step), start=start_step + 1):
            if (jax.process_index(), number) == (int(process), int(step)):
                if what:
                    time.sleep(600)
                raise RuntimeError("the disk of this host is on fire")
            row = {"step": number, "processes": jax.process_count(), "keys": batch.keys}
            row["index"] = batch.index.tolist()
            file.write(json.dumps(row) + "\n")
            file.flush()
            yield batch


if __name__ == "__main__":
    Pipeline.batches = recorded
    sys.exit(main())
