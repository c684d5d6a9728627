"""Hostile files of PyTorch's: one clear message, nothing executed, memory bounded."""

import io
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from clip_jax.cli import main
from clip_jax.convert.files import read_tensors
from tests.convert.conftest import MAX_MEMORY, refuse

# ------------------------------------------------------------------ writing PyTorch's files by hand


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    raw = value.to_bytes(10, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values) -> bytes:
    return b"(" + b"".join(integer(v) for v in values) + b"t"


def tensor(shape=(2, 3), strides=(3, 1), *, offset=0, numel=6, key="0", kind="FloatStorage"):
    view = b"N" if CONTAINER["kind"] == "stream" else b""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + integer(numel) + view + b"tQ"
        + integer(offset) + numbers(shape) + numbers(strides)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def state_dict(*values: bytes) -> bytes:
    items = b"".join(text(f"weight{i}") + value for i, value in enumerate(values))
    return b"\x80\x02}(" + items + b"u."


CONTAINER = {"kind": "zip"}


@pytest.fixture(params=["zip", "stream"], autouse=True)
def container(request):
    CONTAINER["kind"] = request.param
    return request.param


def save(path: Path, content: bytes, storage: bytes = bytes(24)) -> Path:
    """Put a pickle and one storage into PyTorch's container: a zip, or the stream before 2020."""
    if CONTAINER["kind"] == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/byteorder", "little")
            archive.writestr("archive/data/0", storage)
            archive.writestr("archive/version", "3\n")
    else:
        system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
        head = [0x1950A86A20F9469CFC6C, 1001, system]
        parts = [pickle.dumps(x, protocol=2) for x in head]
        keys = pickle.dumps(["0"], protocol=2)
        size = struct.pack("<q", len(storage) // 4)
        path.write_bytes(b"".join([*parts, content, keys, size, storage]))
    return path


# ------------------------------------------------------------------ what is right is read


def test_an_honest_file_is_read(tmp_path):
    values = np.arange(6, dtype=np.float32)
    content = state_dict(tensor(), tensor((2,), (2,), offset=1, numel=6))
    # Two tensors in one storage of 24 bytes claim 32: padded by the container's own bytes.
    tensors = read_tensors(save(tmp_path / "x.pt", content, values.tobytes()))
    np.testing.assert_array_equal(tensors["weight0"], values.reshape(2, 3))
    np.testing.assert_array_equal(tensors["weight1"], [1, 3])


# ------------------------------------------------------------------ code in pickles


class Attack:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("attack", ["mkdir", "eval", "exec", "nested", "persistent"])
def test_nothing_is_executed(tmp_path, protocol, attack):
    marker = tmp_path / "executed"
    program = f"import pathlib; pathlib.Path({str(marker)!r}).mkdir()"
    payload = {
        "mkdir": Attack(__import__("os").mkdir, (str(marker),)),
        "eval": Attack(eval, (f"__import__('os').mkdir({str(marker)!r})",)),
        "exec": Attack(exec, (program,)),
        "nested": {"state_dict": {"a": [Attack(exec, (program,))]}},
        "persistent": Attack(exec, (program,)),
    }[attack]
    content = pickle.dumps(payload, protocol)
    if attack == "persistent":  # as the description of a storage
        content = content[:-1] + b"Q."
    pickle.loads(pickle.dumps(Attack(marker.mkdir, ())))  # the attack works …
    marker.rmdir()
    refuse(save(tmp_path / "x.pt", content), "refused|which files of tensors do not need|storage")
    assert not marker.exists()  # … and is not run


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"ctorch.storage\n_load_from_bytes\n(C\x01atR.", "torch.storage._load_from_bytes"),
        (b"cbuiltins\ngetattr\n(ctorch\nFloatStorage\n" + text("x") + b"tR.", "builtins.getattr"),
        (b"ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
        (b"c__torch__\nA\n)\x81}(" + text("a") + b"cos\nsystem\nub.", "os.system"),
        (b"(ios\nsystem\n.", "INST"),
        (b"(cos\nsystem\no.", "asks for os.system"),
        (b"\x82\x01.", "EXT1|code"),
        (b"c__torch__\nA\n)}\x92.", "NEWOBJ_EX"),
        (b"ccollections\nOrderedDict\n)R" + text("append") + b"b.", None),
        (b"]" + text("x") + b"b.", "sets the state of a list"),
        (b"}(]" + b"Nu.", "a dict with a list as key"),
        (b"}(" + b"(tNu.", "a dict with a tuple as key"),
        (b"N" + b"(Nt" + b"R.", "calls a NoneType"),
        (text("a") + text("b") + b"a.", "appends to a str"),
        (b"\x93.", "not a PyTorch file"),
        (b"h\x05.", "not a PyTorch file"),
        (b"R.", "not a PyTorch file"),
        (b"u.", "not a PyTorch file"),
        (b"N", "end|exhausted|unknown"),
        (b"\xff\xff", "opcode"),
    ],
)  # fmt: skip
def test_other_instructions_are_refused(tmp_path, content, match):
    refuse(save(tmp_path / "x.pt", b"\x80\x02" + content), match or "no tensors")


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    "content",
    [
        b"\x96" + struct.pack("<Q", 1 << 40) + b".",  # BYTEARRAY8 allocates before it reads
        b"\x8d" + struct.pack("<Q", 1 << 62) + b".",  # BINUNICODE8
        b"Nr" + struct.pack("<I", 0xFFFFFFFF) + b"0.",  # LONG_BINPUT into a huge memo
        b"\x8b" + struct.pack("<i", 0x7FFFFFFF) + b".",  # LONG4
        b"X" + struct.pack("<I", 0xFFFFFFFF) + b".",
        b"\x95" + struct.pack("<Q", 1 << 60) + b"N.",  # FRAME
    ],
)
def test_claimed_lengths_allocate_nothing(tmp_path, content):
    refuse(save(tmp_path / "x.pt", b"\x80\x02" + content), "x.pt")


def doubled(times: int, opener: bytes) -> bytes:
    """A structure of 2^times leaves in a few bytes: every level holds the one below twice."""
    level = b"".join(b"q\x01" + opener + text("a") + b"h\x01" + text("b") + b"h\x01u"
                     for _ in range(times))  # fmt: skip
    return b"\x80\x02}" + level + b"."


def test_a_structure_that_grows_exponentially(tmp_path):
    refuse(save(tmp_path / "x.pt", doubled(60, b"}(")), "too many")


def test_a_structure_that_contains_itself(tmp_path):
    for key in ("", "a"):
        content = b"\x80\x02}q\x01(" + text(key) + b"h\x01u."
        refuse(save(tmp_path / "x.pt", content), "too deep|too many|recursion")


def test_deep_nesting(tmp_path):
    body = b"\x80\x02}" + b"".join(b"q\x01}(" + text("") + b"h\x01u" for _ in range(1_000)) + b"."
    refuse(save(tmp_path / "x.pt", body), "too deep|too many|recursion")


def test_a_pickle_without_end(tmp_path):
    refuse(save(tmp_path / "x.pt", b"\x80\x02" + b"N0" * (9 << 19) + b"."), "POP|end within")
    refuse(save(tmp_path / "x.pt", b"\x80\x02" + b"\x95" + bytes(8) * (9 << 17)), "x.pt")


def test_one_state_given_to_many_objects(tmp_path):
    state = b"}q\x01(" + b"".join(text(f"k{i}") + b"N" for i in range(1000)) + b"u"
    objects = b"(" + b"c__torch__\nA\n)\x81h\x01b" * 1000 + b"l."
    refuse(save(tmp_path / "x.pt", b"\x80\x02" + state + objects), "no tensors")


# ------------------------------------------------------------------ tensors


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (lambda: tensor((2, 4), (4, 1)), "leaves its storage"),
        (lambda: tensor((2, 3), (3, 1), offset=1), "leaves its storage"),
        (lambda: tensor((2, 3), (1 << 40, 1)), "leaves its storage"),
        (lambda: tensor((1 << 40,), (0,)), "claims|leaves its storage"),
        (lambda: tensor((7,), (0,)), "leaves its storage"),
        (lambda: tensor((2, 3), (-3, 1), offset=5), "impossible"),
        (lambda: tensor((-2, 3), (3, 1)), "impossible"),
        (lambda: tensor(offset=-1), "impossible"),
        (lambda: tensor((2, 3), (3,)), "impossible"),
        (lambda: tensor((1,) * 17, (1,) * 17), "impossible"),
        (lambda: tensor((1 << 61,), (1,)), "impossible"),
        (lambda: tensor(numel=1 << 50), "bytes for it"),
        (lambda: tensor(numel=7), "bytes for it"),
        (lambda: tensor(kind="DoubleStorage"), "claims|bytes for it|truncated"),
        (lambda: tensor(kind="EvilStorage"), "torch.EvilStorage"),
        (lambda: tensor(key="1"), "lacks"),
        (lambda: tensor(key="../../data.pkl"), "lacks"),
    ],
)
def test_a_view_that_leaves_its_storage(tmp_path, value, match):
    refuse(save(tmp_path / "x.pt", state_dict(value())), match)


def test_many_tensors_of_one_storage(tmp_path):
    """Twenty names for the same bytes would be twenty copies."""
    path = save(tmp_path / "x.pt", state_dict(*[tensor((262144,), (1,), numel=262144)] * 200),
                bytes(1 << 20))  # fmt: skip
    refuse(path, "share storage")


# ------------------------------------------------------------------ containers


def test_truncated_files(tmp_path):
    whole = save(tmp_path / "x.pt", state_dict(tensor())).read_bytes()
    for length in range(len(whole)):
        path = tmp_path / "cut.pt"
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.pt"):
            read_tensors(path)


def test_flipped_bytes(tmp_path):
    """Whatever byte is damaged, the answer is tensors or a ValueError."""
    whole = bytearray(save(tmp_path / "x.pt", state_dict(tensor())).read_bytes())
    path = tmp_path / "x.pt"
    for at in range(len(whole)):
        for bit in (1, 128):
            whole[at] ^= bit
            path.write_bytes(whole)
            try:
                read_tensors(path)
            except ValueError as error:
                assert "x.pt" in str(error)  # noqa: PT017
            whole[at] ^= bit


def zip_of(path: Path, entries, **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def test_zip_bomb(tmp_path):
    entries = [("a/data.pkl", state_dict(tensor(numel=1 << 28))), ("a/data/0", bytes(1 << 24))]
    path = zip_of(tmp_path / "x.pt", entries, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    refuse(path, "compressed")


@pytest.mark.parametrize("name", ["a/data.pkl", "a/data/0", "a/other"])
def test_compressed_entries(tmp_path, name):
    CONTAINER["kind"] = "zip"
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for entry in ("a/data.pkl", "a/data/0", "a/other", "a/code/x.py"):
            content = state_dict(tensor()) if entry.endswith("pkl") else bytes(24)
            method = zipfile.ZIP_DEFLATED if entry in (name, "a/code/x.py") else zipfile.ZIP_STORED
            archive.writestr(entry, content, compress_type=method)
    refuse(tmp_path / "x.pt", f"{name} is compressed")


def test_overlapping_entries(tmp_path):
    """Two names in the directory for the same bytes, as zip bombs have them."""
    path = zip_of(tmp_path / "x.pt", [("a/data.pkl", state_dict()), ("a/data/0", b"0"),
                                      ("a/data/1", b"1")])  # fmt: skip
    data = bytearray(path.read_bytes())
    first, second = data.find(b"PK\x01\x02"), data.rfind(b"PK\x01\x02")
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    data[second + 20 : second + 28] = data[first + 20 : first + 28]
    path.write_bytes(data)
    refuse(path, "overlap")


def test_a_directory_of_entries_that_is_not_there(tmp_path):
    path = zip_of(tmp_path / "x.pt", [("a/data.pkl", state_dict())])
    data = bytearray(path.read_bytes())
    data[-12:-10] = b"\xff\xff"  # the count of entries
    path.write_bytes(data)
    refuse(path, "damaged")


def test_encrypted_entries_and_twins(tmp_path):
    path = zip_of(tmp_path / "x.pt", [("a/data.pkl", state_dict())])
    data = bytearray(path.read_bytes())
    data[data.find(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    refuse(path, "encrypted")
    path = zip_of(tmp_path / "x.pt", [("a/data.pkl", b"N."), ("b/data.pkl", b"N.")])
    refuse(path, "two entries")


def test_other_zips(tmp_path):
    refuse(zip_of(tmp_path / "x.pt", [("word/document.xml", b"x")]), "data.pkl")
    big = [("a/data.pkl", state_dict(tensor())), ("a/data/0", bytes(24)), ("a/byteorder", b"big")]
    refuse(zip_of(tmp_path / "x.pt", big), "big-endian")


# ------------------------------------------------------------------ on the command line


def hostile(kind: str, path: Path, marker: Path) -> None:
    if kind == "pickle":
        save(path, pickle.dumps(Attack(exec, (f"open({str(marker)!r}, 'w')",)), protocol=2))
    elif kind == "a view that leaves its storage":
        save(path, state_dict(tensor((1 << 40, 3), (3, 1))))
    elif kind == "a storage that is not there":
        save(path, state_dict(tensor((1 << 40, 3), (3, 1), numel=3 << 40)))
    elif kind == "truncated":
        whole = save(path, state_dict(tensor())).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "zip bomb":
        entries = [("a/data.pkl", state_dict(tensor(numel=1 << 24))), ("a/data/0", bytes(1 << 26))]
        zip_of(path, entries, compression=zipfile.ZIP_DEFLATED)
    elif kind == "compressed tensors":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", state_dict(tensor()))
            archive.writestr("a/data/0", bytes(24), compress_type=zipfile.ZIP_DEFLATED)
    elif kind == "directory":
        path.mkdir()
    elif kind == "zeros":
        path.write_bytes(bytes(1 << 20))


@pytest.mark.parametrize(
    "kind",
    ["pickle", "a view that leaves its storage", "a storage that is not there", "truncated",
     "zip bomb", "compressed tensors", "directory", "zeros"],
)  # fmt: skip
def test_the_command_says_one_line_and_exits_with_2(tmp_path, capsys, kind):
    path, marker = tmp_path / "x.pt", tmp_path / "executed"
    hostile(kind, path, marker)
    tracemalloc.start()
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "clip-jax"]) == 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
    assert peak < MAX_MEMORY


def test_the_attack_is_real(tmp_path):
    """Python's own unpickler would run it."""
    marker = tmp_path / "executed"
    pickle.load(io.BytesIO(pickle.dumps(Attack(exec, (f"open({str(marker)!r}, 'w').close()",)))))
    assert marker.exists()
