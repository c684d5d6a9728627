"""A bucket that isn't there: gs:// in memory, with a bucket's manners."""

from typing import ClassVar

import fsspec
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """Objects appear whole; there are no appends and no renames."""

    protocol = ("gcs", "gs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    writes: ClassVar[list] = []  # the paths, in order

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").removeprefix("gcs://").strip("/")

    def _open(self, path, mode="rb", **kwargs):
        if mode not in ("rb", "wb"):
            raise OSError(f"a bucket has no mode {mode!r}")
        if mode == "wb":
            self.writes.append(path)
        return super()._open(path, mode, **kwargs)

    def mv(self, *args, **kwargs):
        raise OSError("a bucket has no renames")


def fake_bucket(monkeypatch):
    """Make gs:// paths of epath lie in an empty `Bucket`."""
    Bucket.store.clear()
    Bucket.writes.clear()
    Bucket.pseudo_dirs[:] = [""]
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    backend = epath.backend.fsspec_backend
    monkeypatch.setattr(backend, "fs", lambda path: Bucket(skip_instance_cache=True))
    return epath.Path("gs://bucket/run")
