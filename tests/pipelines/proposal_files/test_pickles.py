"""Pickles of arrays are read; pickles that would do anything else are not, and do nothing."""

from __future__ import annotations

import base64
import builtins
import datetime
import os
import pickle
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdovd.core import HdovdError
from hdovd.pipelines.proposal_files.pickles import load_arrays

PROTOCOLS = (2, 3, 4, 5)
ENCODE = b"c_codecs\nencode\n"
RECONSTRUCT = b"cnumpy._core.multiarray\n_reconstruct\n"
NDARRAY, DTYPE = b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"
# [array([[0.5, -2, 3]], float32), zeros((0, 5), float32), float16(1.5)] as numpy 1.26.4 pickles it, protocols 2 to 5
NUMPY_1 = {
    2: "c-nQ4$xg#C5Qd#}0Su+=`@X4MB7ry}=$S}4_>>EZVkgLv+O)sp9CGW0ls*>^22R==Vn$<In&tn-6Z;*cC(?X4E*vpZu`|pEIti5u3mT|cjM7Z2TxbewUPa"  # noqa: E501
    "Sro`vm_Pc%dzMo}y>8mHBRqUl?N5RR7LHuoUZN&0|xi6w^RDOMP0&$Wy<N~|tMM!FcA&NbgQ9Uo8V%)X{rXXy6aMm_Br8=mLA{TQncmuPJAnQZzUQroME?"
    "+GFOKDMM0+h*9&*yYlaHRhf)+WQO#l{Rr(B@ShGCW3(HiP<*|0?G>=XB0>G496NL{GU(BL^uc)#i?B2KH{vxJ!iNuxbiRPB{!T^DS5$F1$WJGQ{tB4E_Qw"
    "asOfsU",
    3: "c-nQ3IZwkt5QS%L0$~&G`|4e}Kq(`L<Sr|@*eVS|-i^^BB~IREUAUvc!T*YX2AiWp%xI>V_oVmDNB9DYbWu*{Rjg+=kEi9ty=T^D6@Rt4o)rscOYJz=#>I"  # noqa: E501
    ">AMnxd#6Jf#>c9v*K>_&q54r}aftz%csbB^{XAfmS(_M5LIxI`xs;fVQLAKf%fhd;j7OOV5XYLc$kp8b3i4F))LI8uh0b>Ok_X(tk=t27d=8fT`{B!qK^3"
    "-!+@3!P0e%W-M8ERVQav0O{scoy@Q;#MUAJ>jm#y~INv{{pnNVBG",
    4: "c-m`VnfiqR0%E6V^oZt_<`z`yCFd8V>gAT^lw>9r6(v?q>EVelN=?qsD=sN2O)i--c}fo}SmBf&_Pi8`lF3uN8Cs_}GbT-GpAs}h!<!KZncJphu=KE|lvE"  # noqa: E501
    "a^f;2IunM~>IfXFlVFxpJ<^Yioi4+LPso1tV%Ql~Qy&?)vne1L($!C?weD1$kJ4P<r(2h3y!Z&skm0-eqbV0p$Kw&LW(oWvra9T~hpTZ|C4WC&u~;mpKfH"
    ">C|IpQ;A{B+Fv|",
    5: "c-m`Vo%(?R0%E6V^a$mZ<`z`yCFd8V>H(RlMVZM{dbs1$it=-lO4HI(i>6GTqA`t!0S@ee_y7ZggTs^_R<K?mol;U+kP1}T!<1$+rL&`bO3)MyZ{{9Gn<;"  # noqa: E501
    "*NeqR5908Dr@luSwTX7pxmo6^JRJf#GvEQ48N8qDM=8C>2B-mGm?GWbAJJ)%fX%Pq|*$xJLNN(5TRR-BxelL&HH20PG3BZQ3^+?e(`GcnjrX#>iq>Hz=%l"
    "3k_",
}


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


def _load(tmp_path: Path, data: bytes) -> Any:
    (tmp_path / "p.pkl").write_bytes(data)
    return load_arrays(tmp_path / "p.pkl")


def _refused(tmp_path: Path, data: bytes, named: str) -> None:
    with pytest.raises(HdovdError) as caught:
        _load(tmp_path, data)
    assert str(tmp_path / "p.pkl") in str(caught.value)
    assert named in str(caught.value), str(caught.value)
    assert "save it anew" in str(caught.value) or "complete?" in str(caught.value)


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _array(shape: bytes, dtype: bytes, raw: bytes) -> bytes:
    """Pickle instructions for an array whose state is given instruction by instruction."""
    return RECONSTRUCT + NDARRAY + b"K\0\x85C\x01b\x87R(K\x01" + shape + dtype + b"\x89" + raw + b"tb"


def _dtype(code: str, state: bytes = b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0") -> bytes:
    return DTYPE + _text(code) + b"\x89\x88\x87R(K\x03" + _text("<") + state + b"tb"


@pytest.mark.parametrize("protocol", range(6))
def test_every_number_type_and_layout_comes_back(tmp_path: Path, protocol: int) -> None:
    written = [np.arange(10).reshape(2, 5).astype(code) for code in "i1 >i2 i4 i8 u1 u2 u4 u8 f2 f4 >f8 c8 c16".split()]  # noqa: SIM905
    written += [
        np.array([[True, False]]),
        np.zeros((0, 5), np.float32),
        np.array(7.0),
        np.arange(10.0)[::2],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(24.0).reshape(2, 3, 4).transpose(1, 2, 0),
    ]
    scalars = [np.float32(0.1), np.int64(-3), np.bool_(True), np.complex64(1j)]
    plain: list[Any] = [None, True, 3, -(2**70), 0.25, "é", b"\xff\0", (), (1, [2]), {"a": {1: None}}]
    found = _load(tmp_path, pickle.dumps({"arrays": written, "scalars": (*scalars,), "plain": plain}, protocol))
    assert found["plain"] == plain
    assert isinstance(found["scalars"], tuple)
    for old, new in zip([*written, *scalars], [*found["arrays"], *found["scalars"]], strict=True):
        assert type(new) is type(old)
        assert new.dtype in (old.dtype, old.dtype.newbyteorder("="))  # numpy turns bytes round where it copies them
        assert new.shape == old.shape
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pickles_of_numpy_1(tmp_path: Path, protocol: int) -> None:
    data = zlib.decompress(base64.b85decode(NUMPY_1[protocol]))
    assert b"numpy._core" not in data
    box, empty, scalar = _load(tmp_path, data)
    assert box.dtype == empty.dtype == np.float32
    assert box.tolist() == [[0.5, -2, 3]]
    assert empty.shape == (0, 5)
    assert (type(scalar), scalar) == (np.float16, 1.5)


def test_arrays_of_python_2(tmp_path: Path) -> None:
    """Its bytes are text (SHORT_BINSTRING), here with values that are no ASCII."""
    raw = np.array([-1.5, 2.0], "<f4").tobytes()
    data = _array(b"K\x02\x85", _dtype("f4"), b"U" + bytes([len(raw)]) + raw)
    assert _load(tmp_path, b"\x80\x02" + data + b".").tolist() == [-1.5, 2.0]


def test_what_stands_in_many_places_stays_one(tmp_path: Path) -> None:
    array = np.arange(3.0)
    found = _load(tmp_path, pickle.dumps([[array, array], [array]]))
    assert found[0][0] is found[0][1] is found[1][0]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_that_is_asked_for_runs(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "it ran"
    write = f"open({str(marker)!r}, 'w').close()"
    attacks: dict[str, Any] = {
        "posix.system": Calls(os.system, f"touch '{marker}'"),
        ".eval": Calls(eval, write),
        ".exec": Calls(exec, write),
        ".getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        ".__import__": Calls(__import__, "antigravity"),
        ".open": Calls(open, str(marker), "w"),
        "numpy.memmap": Calls(np.memmap, str(marker), "u1", "w+", 0, 8),
        "numpy.save": Calls(np.save, str(marker), 1),
        "": Calls(Path.touch, marker),  # by name or by getattr, as the protocol has it
    }
    for named, attack in attacks.items():
        for wrapped in (
            attack,
            [np.zeros(3), {"x": attack}],
            Calls(np.zeros, attack),
            np.array([attack, None], object),
        ):
            _refused(
                tmp_path, pickle.dumps(wrapped, protocol), "" if isinstance(wrapped, Calls | np.ndarray) else named
            )
            assert [f.name for f in tmp_path.iterdir()] == ["p.pkl"]
    pickle.loads(pickle.dumps(attacks["posix.system"], protocol))
    assert marker.exists()  # the attack is a live one


def test_refusal_names_file_and_function_and_the_way_out(tmp_path: Path) -> None:
    _refused(tmp_path, pickle.dumps(Calls(os.system, "true")), "asks for posix.system")
    _refused(tmp_path, pickle.dumps(datetime.date(2020, 1, 1)), "datetime.date")
    _refused(tmp_path, pickle.dumps(torch.zeros(2)), "torch._utils._rebuild_tensor_v2")
    _refused(tmp_path, pickle.dumps(Path("x")), "pathlib")
    _refused(tmp_path, pickle.dumps({1, 2}, 2), ".set")
    _refused(tmp_path, b"\x80\x02cos\n" + b"\x1b[2J" * 1000 + b"\n.", "os.\\x1b[2J")  # and keeps the terminal whole


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("numpy", "ndarray.__class__"),
        ("numpy", "ndarray.__class__.__base__.__subclasses__"),
        ("numpy", "dtype.__init__.__globals__"),
        ("numpy", "core.multiarray._reconstruct"),
        ("numpy.core", "multiarray._reconstruct"),
        ("numpy.core.multiarray", "_reconstruct.x"),
        ("numpy._core.numeric", "_frombuffer.__globals__"),
        ("numpy._core.numeric", "frombuffer"),
        ("_codecs", "encode.__call__"),
        ("_codecs", "decode"),
        ("codecs", "encode"),
        ("builtins", "bytearray"),
        ("", "numpy.ndarray"),
        ("numpy.ndarray", ""),
        ("numpy", "matrix"),
        ("numpy", "load"),
        ("numpy", "f2py.os.system"),
        ("numpy.testing._private.utils", "runstring"),
    ],
)
def test_names_are_taken_whole(tmp_path: Path, module: str, name: str) -> None:
    _refused(tmp_path, b"\x80\x04" + _text(module) + _text(name) + b"\x93.", f"{module}.{name}")
    _refused(tmp_path, b"\x80\x02c" + module.encode() + b"\n" + name.encode() + b"\n.", f"{module}.{name}")


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (NDARRAY + b")R", "not callable"),
        (NDARRAY + b")\x81", "is not a type object"),
        (NDARRAY + b")}\x92", "is not a type object"),
        (DTYPE + b")\x81", "is not a type object"),
        (b"(" + NDARRAY + b"o", "no pickle"),
        (b"(" + DTYPE + _text("O") + b"o", "no number type"),
        (b"(inumpy\nndarray\n", "no pickle"),
        (b"(ios\nsystem\n", "os.system"),
        (b"\x82\x01", "extension code"),
        (b"Psome id\n", "persistent"),
        (_text("storage") + b"Q", "persistent"),
        (b"\x97", "out-of-band"),
        (b"C\x01x\x98)R", "not callable"),
        (b"]}R", "not callable"),
        (RECONSTRUCT + b"N}\x8c\x0c__defaults__)s\x86b", "attributes of"),
        (ENCODE + b"}\x8c\x08function)sb", "attributes of"),
        (b"]}\x8c\x01x)sb", "attributes of list"),
        (RECONSTRUCT + b")R}\x8c\x01x)sb", "attributes of ndarray"),
        (RECONSTRUCT + b")RK\0K\x01s", "items of ndarray"),
        (RECONSTRUCT + b")R(K\0K\x01u", "items of ndarray"),
        (b"](K\0K\x01u", "items of list"),
    ],
)
def test_instructions_that_arrays_do_not_need(tmp_path: Path, data: bytes, named: str) -> None:
    _refused(tmp_path, b"\x80\x05" + data + b".", named)


def test_array_without_a_state_shows_no_old_memory(tmp_path: Path) -> None:
    assert _load(tmp_path, b"\x80\x05" + RECONSTRUCT + NDARRAY + b"M\xff\xff\x85C\x01b\x87R.").shape == (0,)


def test_nothing_is_left_changed_by_a_refused_pickle(tmp_path: Path) -> None:
    _refused(tmp_path, b"\x80\x04" + RECONSTRUCT + b"N}\x8c\x08function)s\x86b.", "attributes of")
    np.testing.assert_array_equal(_load(tmp_path, pickle.dumps(np.arange(3))), np.arange(3))


def test_torch_file_given_for_a_pickle(tmp_path: Path) -> None:
    torch.save([torch.zeros(3)], tmp_path / "p.pkl")
    _refused(tmp_path, (tmp_path / "p.pkl").read_bytes(), "no pickle")
    torch.save([torch.zeros(3)], tmp_path / "p.pkl", _use_new_zipfile_serialization=False)
    _refused(tmp_path, (tmp_path / "p.pkl").read_bytes(), "no pickle")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_only_number_types(tmp_path: Path, protocol: int) -> None:
    for array, named in [
        (np.array([None, 1], object), "O8"),
        (np.array([[np.zeros(2)]], object), "O8"),
        (np.array(["text"]), "U4"),
        (np.array([b"text"]), "S4"),
        (np.zeros(2, [("x", "f4")]), "V4"),
        (np.zeros(2, "M8[s]"), "M8"),
        (np.zeros(2, np.longdouble), "f16"),
        (np.zeros(2, [("x", "O")]), "V8"),
    ]:
        _refused(tmp_path, pickle.dumps([array], protocol), named)
        _refused(tmp_path, pickle.dumps(array.dtype, protocol), named)
    _refused(tmp_path, pickle.dumps(np.ma.masked_array([1.0]), protocol), "numpy.ma")
    with pytest.warns(PendingDeprecationWarning):
        _refused(tmp_path, pickle.dumps(np.matrix([1.0]), protocol), "numpy")


@pytest.mark.parametrize(
    "state",
    [
        b"NNNK\x40J\xff\xff\xff\xffK\0",  # 64 bytes an element
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3f",  # flags: holds objects
        b"N\x8c\x01x\x85}NJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0",  # fields
        b"K\x08\x85NNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0",  # a subarray
    ],
)
def test_number_type_with_a_forged_state(tmp_path: Path, state: bytes) -> None:
    _refused(
        tmp_path,
        b"\x80\x04" + _array(b"K\x01\x85", _dtype("f8", state), b"C\x08" + bytes(8)) + b".",
        "more than float64",
    )


@pytest.mark.parametrize(
    "shape",
    [
        b"K\x03\x85",
        b"K\0\x85",
        b"J\xff\xff\xff\xff\x85",
        b"\x8a\x09" + b"\0" * 8 + b"\x01\x85",
        b"N\x85",
        b"]",
        b"G" + bytes(8) + b"\x85",
        b"K\x02K\x01K\x02\x87",
    ],
)
def test_array_whose_bytes_do_not_fill_its_shape(tmp_path: Path, shape: bytes) -> None:
    array = _array(shape, _dtype("f4"), b"C\x08" + bytes(8))
    _refused(tmp_path, b"\x80\x04" + array + b".", "")
    assert _load(tmp_path, b"\x80\x04" + _array(b"K\x02\x85", _dtype("f4"), b"C\x08" + bytes(8)) + b".").tolist() == [
        0,
        0,
    ]


def test_codec_of_the_files_choice(tmp_path: Path) -> None:
    for codec in ("zlib_codec", "rot13", "utf-32", "unicode_escape", "idna"):
        _refused(tmp_path, b"\x80\x02" + ENCODE + _text("x") + _text(codec) + b"\x86R.", codec)
    _refused(tmp_path, b"\x80\x02" + ENCODE + _text("x") + _text("latin1") + _text("strict") + b"\x87R.", "TypeError")
    assert _load(tmp_path, b"\x80\x02" + ENCODE + _text("ÿ") + _text("latin1") + b"\x86R.") == b"\xff"


def _bombs() -> dict[str, bytes]:
    million = _text("x" * 1_000_000)
    huge = struct.pack("<Q", 2**33)
    return {
        "memo": b"]r\xff\xff\xff\xff0r\xff\xff\xff\xff",
        "bytes": b"\x8e" + huge,
        "bytearray": b"\x96" + huge,
        "text": b"\x8d" + huge,
        "integer": b"\x8b\xff\xff\xff\x7f",
        "frame": b"\x95" + huge,
        "zeros": b"cbuiltins\nbytes\n\x8a\x05\0\0\0\0\x02\x85R",
        "shape": RECONSTRUCT + NDARRAY + b"\x8a\x05\0\0\0\0\x02\x85C\x01b\x87R",
        "copies": million + b"q\x00](" + (ENCODE + b"h\x00" + _text("latin1") + b"\x86R") * 300 + b"e",
        "laughs": b"]" + b"q\x00](h\x00h\x00h\x00h\x00e" * 200 + b"q\x01K\x01a",
        "cycle": b"]q\x00h\x00a",
        "depth": b"]" * 100_000 + b"a" * 99_999,
    }


@pytest.mark.parametrize("name", _bombs())
def test_small_file_takes_little_memory(tmp_path: Path, name: str) -> None:
    """Some of these are refused, some are harmless pickles; none takes much, and none takes long."""
    tracemalloc.start()
    try:
        _refused(tmp_path, b"\x80\x04" + _bombs()[name] + b".", "")
    except pytest.fail.Exception:
        assert name in ("shape", "laughs", "cycle", "depth")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6


def test_bytes_used_again_and_again_are_refused(tmp_path: Path) -> None:
    raw = np.zeros(1_000_000, np.uint8).tobytes()
    array = _array(b"h\x02", b"h\x01", b"h\x00")
    shape = b"J" + struct.pack("<i", len(raw)) + b"\x85"
    data = b"\x80\x04B" + struct.pack("<I", len(raw)) + raw + b"q\x000" + _dtype("u1") + b"q\x010" + shape + b"q\x020]("
    assert [len(one) for one in _load(tmp_path, data + array * 2 + b"e.")] == [1_000_000] * 2
    _refused(tmp_path, data + array * 500 + b"e.", "more bytes than the file holds")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_cut_file(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps(
        [np.arange(5, dtype=np.float32), np.zeros((0, 5)), np.float32(1), "text", {"a": (1, 2.0)}], protocol
    )
    for length in range(len(data)):
        cut_in_name = data[:length].endswith(b".")  # for all that one can tell, a whole pickle that asks for "numpy."
        _refused(tmp_path, data[:length], "" if cut_in_name else "download complete?")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_damaged_file_fails_cleanly_or_loads(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps(
        [np.arange(5, dtype=np.float32), np.ones((2, 2), bool), np.float32(1), "text", {"a": (1, 2.0)}], protocol
    )
    rng = random.Random(protocol)
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        try:
            _load(tmp_path, bytes(damaged))
        except HdovdError:
            refused += 1
    assert 100 < refused < 400


def test_not_a_pickle(tmp_path: Path) -> None:
    for data in (
        b"",
        b"<!doctype html>",
        b'[{"image_id": 1}]',
        b"\x93NUMPY\x01\0",
        b"\xff\xd8\xff\xe0",
        b"version https://git-lfs",
    ):
        _refused(tmp_path, data, "")
    _refused(tmp_path, pickle.dumps(1) * 2, "goes on after its end")
    with pytest.raises(HdovdError, match=r"cannot read .*none\.pkl: No such file"):
        load_arrays(tmp_path / "none.pkl")
    with pytest.raises(HdovdError, match="cannot read"):
        load_arrays(tmp_path)


def test_builtins_are_untouched() -> None:
    assert builtins.bytes(2) == b"\0\0"
