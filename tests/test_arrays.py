"""Arrays of other programs: what numpy and PyTorch pickle is read as it was saved, and no file can run anything."""
import os
import pickle
import struct
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from spml_kit.arrays import read_arrays
from spml_kit.core import SpmlError

KINDS = "b1 u1 i2 u4 i8 f2 f4 f8 >f4 >i2 U5".split()


def saved(folder, value, protocol=None):
    "A .npy as np.save writes it, or with a pickle of another protocol"
    path = folder / "a.npy"
    np.save(path, value, allow_pickle=True)
    if protocol is not None:
        array = np.asanyarray(value, dtype=object)
        with open(path, "wb") as f:
            np.lib.format.write_array_header_1_0(f, np.lib.format.header_data_from_array_1_0(array))
            pickle.dump(array, f, protocol=protocol)
    return path


@pytest.mark.parametrize("protocol", [None, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_dictionaries_of_arrays(tmp_path, kind, protocol):
    rng = np.random.default_rng(0)
    a = (rng.random((3, 4))*9).astype(kind)
    value = {7: a, np.int64(9): a.T, 15: a[::2, 1:], "name": "dog", "n": np.float32(2.5), "none": None, "list": [1, a]}
    read = read_arrays(saved(tmp_path, value, protocol))
    assert [*read] == [*value] and read["n"] == 2.5 and read["name"] == "dog" and read["none"] is None
    for k in (7, 9, 15):
        assert read[k].dtype == value[k].dtype and (read[k] == value[k]).all()
    assert read["list"][0] == 1 and (read["list"][1] == a).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=0, max_size=3), st.sampled_from("float32 float64 int64 uint8 bool bfloat16".split()), st.booleans())
def test_tensors_as_irn_saves_them(tmp_path_factory, shape, kind, turned):
    t = (torch.rand(shape, generator=torch.Generator().manual_seed(0))*9).to(getattr(torch, kind))
    t = t.permute(*range(t.ndim)[::-1])[..., 1:] if turned and t.ndim and t.shape[0] else t # strides and an offset
    read = read_arrays(saved(tmp_path_factory.mktemp("t"), {"keys": torch.tensor([3]), "cam": t}))
    assert read["keys"].tolist() == [3] and read["cam"].shape == tuple(t.shape)
    assert np.array_equal(read["cam"], t.float().numpy() if kind == "bfloat16" else t.numpy())


def test_plain_files(tmp_path):
    a = np.arange(6).reshape(2, 3)
    np.save(tmp_path / "a.npy", a)
    np.savez(tmp_path / "b.npz", a=a, **{"7": a[0]})
    assert (read_arrays(tmp_path / "a.npy") == a).all()
    assert {k: v.tolist() for k, v in read_arrays(tmp_path / "b.npz").items()} == {"a": a.tolist(), "7": [0, 1, 2]}
    np.savez(tmp_path / "c.npz", d=np.array({1: a}, dtype=object))
    assert (read_arrays(tmp_path / "c.npz")["d"][1] == a).all()


class Runs:
    def __init__(self, what): self.what = what
    def __reduce__(self): return self.what


def harmful(mark):
    touch = f"open({str(mark)!r}, 'w')"
    return {
        "system": Runs((os.system, (f"touch {mark}",))), "eval": Runs((eval, (touch,))), "exec": Runs((exec, (touch,))),
        "getattr": Runs((getattr, ("", "join"))), "load": Runs((np.load, (str(mark), None, True))),
        "torch.load": Runs((torch.load, (str(mark),))), "Runs": Runs((Runs, (1,))),
        "setitem": Runs((OrderedDict, ((), {}), None, None, iter([("a", Runs((os.system, (f"touch {mark}",))))])))}


@pytest.mark.parametrize("way", harmful(""))
def test_a_harmful_pickle_is_refused_and_does_not_run(tmp_path, way):
    path = saved(tmp_path, {7: harmful(tmp_path / "mark")[way]})
    with pytest.raises(SpmlError, match="nothing of it was run") as e: read_arrays(path)
    assert str(path) in str(e.value) and not (tmp_path / "mark").exists()


def test_harm_within_the_bytes_of_a_tensor_does_not_run(tmp_path):
    "torch.storage._load_from_bytes takes a pickle of its own"
    inner = pickle.dumps(Runs((os.system, (f"touch {tmp_path / 'mark'}",))))
    path = saved(tmp_path, {"cam": Runs((torch.storage._load_from_bytes, (inner,)))})
    with pytest.raises(SpmlError, match="not a readable .npy"): read_arrays(path)
    assert not (tmp_path / "mark").exists()


def raw_npy(folder, body):
    "A .npy with a pickle written by hand"
    path = folder / "b.npy"
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }".ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body)
    return path


@pytest.mark.parametrize("body", [
    b"\x80\x04Pposix\n.", b"\x80\x04\x82\x01.", b"garbage", b"", b"\x80\x04}.", b"\x80\x04cnumpy\nndarray\n}b.",
    b"\x80\x04cnumpy\ndtype\n(X\x02\x00\x00\x00f4tR.", b"\x80\x04cnumpy\ndtype\n(X\x03\x00\x00\x00V99tR.",
    b"\x80\x04" + b"]"*5000 + b"a"*4999 + b"."], ids=range(9))
def test_odd_pickles_are_refused_or_plain(tmp_path, body):
    try: assert read_arrays(raw_npy(tmp_path, body)) == {}
    except SpmlError as e: assert "b.npy" in str(e)


@pytest.mark.parametrize("spoil", ["short", "shape", "reach", "cycle", "zip", "ending"])
def test_damaged_files_are_named(tmp_path, spoil):
    cycle = [1]
    cycle.append(cycle)
    value = {1: cycle} if spoil == "cycle" else {7: np.ones((2, 3))}
    path = saved(tmp_path, value)
    raw = path.read_bytes()
    if spoil == "short": path.write_bytes(raw[:-30])
    if spoil == "shape": path = saved(tmp_path, {1: Runs((np._core.numeric._frombuffer, (b"12345678", np.dtype("f8"), (5,), "C")))})
    if spoil == "reach": path = saved(tmp_path, {1: Runs((torch._utils._rebuild_tensor_v2, (torch.ones(2).storage(), 1, (4,), (1,), False, OrderedDict())))})
    if spoil == "zip": (path := tmp_path / "a.npz").write_bytes(raw)
    if spoil == "ending": path = path.rename(tmp_path / "a.dat")
    with pytest.raises(SpmlError, match=path.name): read_arrays(path)
