"Pictures: every file and every array comes in by one door, upright and with its values, or is refused by name."
import contextlib
import io
import itertools
import inspect
import os
import pkgutil
import struct
import tempfile
import warnings
import zlib
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
import tifffile
from PIL import Image, ImageOps, UnidentifiedImageError

import spml_kit
from spml_kit import pictures
from spml_kit.cams.background import GeodesicBackground, MeanBackground, geodesic_saliency
from spml_kit.cams.classifier import TagNet, class_maps, grad_cam
from spml_kit.core import Classes, SpmlError
from spml_kit.data.images import FolderSet, ImageSet
from spml_kit.data.weak import Sample, WeakSet
from spml_kit.data.batches import recolour
from spml_kit.infer.bundle import LabelModel
from spml_kit.infer.crf import KERNELS, dense_crf
from spml_kit.infer.drawn import DrawnNet, agreed, cell_rows
from spml_kit.infer.interactive import describe
from spml_kit.infer.pseudo import nearest_segment_scores, random_walk_scores
from spml_kit.infer.scores import (head_scores, predict_head, predict_retrieval, retrieval_scores, retrieval_witnesses, stream_head, stream_predictions, stream_retrieval,
    training_index)
from spml_kit.infer.views import embed_view, stream_views
from spml_kit.learn.frozen import FeatureCache, fingerprint
from spml_kit.look.annotate import annotate
from spml_kit.look.drawings import pixel_features, prepare_spread
from spml_kit.look.explain import cross, outline
from spml_kit.look.inputs import picture_batch
from spml_kit.look.store import crop_around, segment_store, show_neighbours
from spml_kit.look.figures import judged_picture
from spml_kit.look.plot import draw_regions, overlay, show_predictions
from spml_kit.look.thresholds import explore_regions
from spml_kit.look.widgets import ClickImage, mosaic
from spml_kit.method.nets import BackboneNet, EmbedNet, FrozenNet, SegNet, SoftmaxHead, image_tensor
from spml_kit.neighbours.cyclegan import CycleNet, cycle_labels
from spml_kit.neighbours.few_shots import colour_map
from spml_kit.neighbours.mcof import bayes_refine, region_features
from spml_kit.neighbours.ocr import image_context, ocr_head
from spml_kit.neighbours.prm import PrmNet, image_peaks, response_maps
from spml_kit.neighbours.sba import deep_map
from spml_kit.pictures import PICTURE_SETTINGS, as_image, check_scale, picture_settings, picture_size, read_image, to_bytes, value_range
from spml_kit.regions import hed
from spml_kit.regions.contours import contour_channels, gradient_contours
from spml_kit.regions.merging import RegionPairs, merge_regions
from spml_kit.regions.oversegment import oversegment, prepare_regions
from spml_kit.runs.predict import labels_over
from spml_kit.runs.semi import mean_scores

many = settings(deadline=None, max_examples=60)


@pytest.fixture(autouse=True)
def fresh():
    "Everything is told anew"
    pictures._told.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def said(act):
    "What an action warns of"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in found if w.category is UserWarning]


def noise(*shape, seed=0, top=256):
    a = np.random.default_rng(seed).integers(0, top, shape)
    a.flat[:2] = 0, top - 1  # darkest and brightest are there
    return a.astype(np.uint8 if top <= 256 else np.uint16)


def packed(im, kind, orientation=1, **how):
    "A picture as a file in memory"
    if orientation > 1: how["exif"] = Image.Exif(); how["exif"][0x0112] = orientation
    out = io.BytesIO()
    im.save(out, kind, **how)
    return out.getvalue()


def read(content, ending="", **kwargs):
    with tempfile.TemporaryDirectory() as d:
        path = Path(d, f"a{ending}")
        path.write_bytes(content)
        return read_image(path, **kwargs)


# Files

ORDINARY = {"JPEG": ["L", "RGB", "CMYK"], "PNG": ["1", "L", "P", "RGB", "RGBA", "LA"], "TIFF": ["1", "L", "P", "RGB", "RGBA", "CMYK", "LA"], "BMP": ["1", "L", "P", "RGB"],
            "GIF": ["L", "P"], "WEBP": ["RGB", "RGBA"], "PPM": ["1", "L", "RGB"], "TGA": ["L", "P", "RGB", "RGBA"], "JPEG2000": ["L", "RGB", "RGBA"]}
TURNED = "JPEG", "PNG", "TIFF", "WEBP"  # formats that carry EXIF
KINDS = [(f, m, o) for f, modes in ORDINARY.items() for m in modes for o in (range(1, 9) if f in TURNED else (1,))]


def drawn(mode, size, seed):
    "An opaque picture of a mode"
    h, w = size
    if mode == "P": return Image.fromarray(noise(h, w, 3, seed=seed)).quantize(16)
    im = Image.fromarray(noise(h, w, 3, seed=seed)).convert({"RGBA": "RGB", "LA": "L"}.get(mode, mode))
    if mode in ("RGBA", "LA"): im.putalpha(255)
    return im


@many
@given(st.sampled_from(KINDS), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(0, 99))
def test_ordinary_files_are_what_pil_makes_of_them_upright(kind, size, seed):
    form, mode, orientation = kind
    content = packed(drawn(mode, size, seed), form, orientation)
    plain = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    np.testing.assert_array_equal(read(content), np.array(plain))
    np.testing.assert_array_equal(as_image(Image.open(io.BytesIO(content))), np.array(plain))
    with tempfile.TemporaryDirectory() as d: # PIL maps some files into memory
        Path(d, "a").write_bytes(content)
        with Image.open(Path(d, "a")) as im: np.testing.assert_array_equal(as_image(im), np.array(plain))


@pytest.mark.parametrize("form, mode", [(f, m) for f, m, o in KINDS if o == 1])
def test_without_exif_not_a_bit_has_changed(tmp_path, form, mode):
    (tmp_path / "a").write_bytes(packed(drawn(mode, (23, 31), 5), form))
    np.testing.assert_array_equal(read_image(tmp_path / "a"), np.array(Image.open(tmp_path / "a").convert("RGB")))
    assert said(lambda: read_image(tmp_path / "a")) == []


@pytest.mark.parametrize("form, mode, dtype", [(f, m, t) for f, m, t in (("PNG", "I;16", np.uint16), ("TIFF", "I;16", np.uint16), ("TIFF", "I", np.int32), ("TIFF", "F", np.float32))])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_files_are_turned_too(form, mode, dtype, orientation):
    values = noise(5, 8, top=4096).astype(dtype)
    content = packed(Image.fromarray(values), form, orientation)
    assert Image.open(io.BytesIO(content)).mode == mode
    turned = np.array(ImageOps.exif_transpose(Image.fromarray(values.astype(np.int32)), in_place=False)) if orientation == 1 else None
    plain = ImageOps.exif_transpose(Image.open(io.BytesIO(packed(Image.fromarray((values/16).astype(np.uint8)), form, orientation))))
    found = read(content, scale=(0, 4095))
    assert found.shape[:2] == np.array(plain).shape and (turned is None or found.shape[:2] == turned.shape)
    assert np.abs(found[..., 0].astype(int) - np.array(plain)).max() <= 1  # /16 cuts, the door rounds


def test_damaged_exif_turns_nothing():
    content = packed(drawn("RGB", (6, 9), 0), "JPEG", 6)
    at = content.index(b"Exif\0\0") + 6
    assert read(content).shape == (9, 6, 3)
    assert read(content[:at] + b"XX" + content[at + 2:]).shape == (6, 9, 3)


@pytest.mark.parametrize("orientation, shape", [(1, (6, 9)), (3, (6, 9)), (6, (9, 6)), (8, (9, 6))])
def test_sets_report_the_upright_size(tmp_path, orientation, shape):
    (tmp_path / "a.jpg").write_bytes(packed(drawn("RGB", (6, 9), 0), "JPEG", orientation))
    s = FolderSet(tmp_path, classes=["background", "thing"], max_size=3)
    assert s.stored_size(0) == shape and s.image(0).shape == ((2, 3, 3) if shape == (6, 9) else (3, 2, 3))


# 16-bit colours

def png16(a):
    "16-bit PNG of 1 to 4 channels, which PIL does not write"
    h, w, c = a.shape
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in a)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, {1: 0, 2: 4, 3: 2, 4: 6}[c], 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff16(a, order="<", planes=False):
    "Uncompressed 16-bit TIFF of 3 or 4 channels, channels interleaved or one plane after another"
    h, w, c = a.shape
    pixels = (a.transpose(2, 0, 1) if planes else a).astype(f"{order}u2").tobytes()
    tags = [(256, 4, [w]), (257, 4, [h]), (258, 3, [16]*c), (259, 3, [1]), (262, 3, [2]), (273, 4, None), (277, 3, [c]), (278, 4, [h]), (279, 4, None), (284, 3, [2 if planes else 1])]
    if c == 4: tags.append((338, 3, [2]))
    strips, extra, at = c if planes else 1, b"", 8 + 2 + 12*len(tags) + 4
    room = at + sum(len(v)*{3: 2, 4: 4}[t] for _, t, v in tags if v and len(v)*{3: 2, 4: 4}[t] > 4) + (2*4*strips if strips > 1 else 0)
    out = struct.pack(f"{order}H", len(tags))
    for tag, t, v in tags:
        v = [room + k*len(pixels)//strips for k in range(strips)] if tag == 273 else [len(pixels)//strips]*strips if tag == 279 else v
        data = struct.pack(f"{order}{len(v)}{'H' if t == 3 else 'I'}", *v)
        if len(data) > 4: data, extra = struct.pack(f"{order}I", at + len(extra)), extra + data
        out += struct.pack(f"{order}HHI", tag, t, len(v)) + data.ljust(4, b"\0")
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8) + out + bytes(4) + extra + pixels


@many
@given(st.integers(1, 4), st.sampled_from([300, 1024, 4096, 65536]), st.tuples(st.integers(1, 6), st.integers(2, 6)), st.integers(0, 99))
def test_all_16_bits_of_a_png_count(channels, top, size, seed):
    a = noise(*size, channels, top=top, seed=seed)
    if channels in (2, 4): a[..., -1] = 65535
    colour = a[..., :1] if channels < 3 else a[..., :3]
    np.testing.assert_array_equal(read(png16(a)), np.broadcast_to(to_bytes(colour), (*size, 3)))
    with tempfile.TemporaryDirectory() as d:
        Path(d, "a.png").write_bytes(png16(a))
        with Image.open(Path(d, "a.png")) as im: np.testing.assert_array_equal(as_image(im), np.broadcast_to(to_bytes(colour), (*size, 3)))


@many
@given(st.integers(3, 4), st.sampled_from("<>"), st.sampled_from([1024, 4096, 65536]), st.tuples(st.integers(1, 6), st.integers(2, 6)), st.integers(0, 99))
def test_all_16_bits_of_a_tiff_count(channels, order, top, size, seed):
    a = noise(*size, channels, top=top, seed=seed)
    if channels == 4: a[..., -1] = 65535
    np.testing.assert_array_equal(read(tiff16(a, order)), to_bytes(a[..., :3]))


def tiff_read(a, **how):
    "As `read_image` and, through PIL, `as_image` take what tifffile writes"
    with tempfile.TemporaryDirectory() as d, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tifffile.imwrite(Path(d, "a.tif"), a, **how)
        out = read_image(Path(d, "a.tif"))
        with contextlib.suppress(UnidentifiedImageError), Image.open(Path(d, "a.tif")) as im: np.testing.assert_array_equal(as_image(im), out)
    return out, " ".join(str(w.message) for w in said)


def test_16_bit_planes_that_pil_misreads():
    a = noise(4, 5, 3, top=4096)
    np.testing.assert_array_equal(read(tiff16(a, planes=True)), to_bytes(a))


@pytest.mark.parametrize("dtype, top", [("uint8", 200), ("uint16", 4000), ("uint16", 60000), ("uint32", 2**31 + 5), ("int16", 3000), ("float32", 1), ("float64", 1), ("float16", 1), ("uint64", 900), ("int8", 90)])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_grey_tiff_of_any_type(dtype, top, photometric, compression):
    a = (np.random.default_rng(3).random((7, 9))*top).astype(dtype)
    a[0, 0], a[0, 1] = 0, top
    out, _ = tiff_read(a, photometric=photometric, compression=compression)
    plain = to_bytes(a.astype(np.float32) if a.dtype.kind == "f" else a)
    white = photometric == "miniswhite"
    np.testing.assert_array_equal(out, np.repeat((255 - plain if white else plain)[..., None], 3, 2))
    assert out[0, 0, 0] == (255 if white else 0)  # what the file calls white is white


@pytest.mark.parametrize("dtype, top", [("uint8", 255), ("uint16", 4000), ("uint16", 65535), ("float32", 1), ("float64", 1), ("uint32", 2**32 - 1)])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("bands", [3, 4, 5])
def test_colours_of_a_tiff_of_any_type(dtype, top, planar, bands):
    a = (np.random.default_rng(4).random((6, 7, bands))*top).astype(dtype)
    a[0, 0, :3], a[0, 1, :3] = 0, top
    if bands == 4: a[..., 3] = 1 if a.dtype.kind == "f" else np.iinfo(dtype).max
    out, said = tiff_read(a if planar == "contig" else a.transpose(2, 0, 1), photometric="rgb", planarconfig=planar, extrasamples=None if bands == 3 else ("unassalpha",) if bands == 4 else (0, 0))
    colour = a[..., :3].astype(np.float32) if a.dtype.kind == "f" else a[..., :3]
    np.testing.assert_array_equal(out, to_bytes(colour))
    assert ("5 bands; the first three" in said) == (bands == 5)


@pytest.mark.parametrize("extra, says", [((0,), "4 bands"), ((2,), "transparent"), ((1,), "transparent")])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_fourth_band_is_alpha_where_the_file_says_so(extra, says, dtype):
    top = np.iinfo(dtype).max
    a = np.zeros((4, 5, 4), dtype)
    a[..., 0], a[..., 3] = (top//2 if extra == (1,) else top), top//2  # half a red
    out, said = tiff_read(a, photometric="rgb", extrasamples=extra)
    red, other = (255, 0) if extra == (0,) else (255, 128)
    assert says in said and np.abs(out[0, 0].astype(int) - (red, other, other)).max() <= 1


@pytest.mark.parametrize("a, says", [(np.zeros((5, 6, 4), "u2"), "4 bands of 16-bit whole numbers"), (np.zeros((5, 6, 5), "u1"), "5 bands of 8-bit whole numbers"), (np.zeros((5, 6, 3), "f8"), "3 bands of 64-bit floats"), (np.zeros((5, 6, 2), "i2"), "2 bands of 16-bit signed"), (np.zeros((5, 6), "c8"), "1 band of 64-bit complex")])
def test_bands_of_which_nobody_says_what_they_are(a, says):
    with pytest.raises(SpmlError, match=f"a.tif: a TIFF of {says}.*choose one band or three"): tiff_read(a, photometric="minisblack", **dict(planarconfig="contig") if a.ndim == 3 else {})


def test_compression_that_only_pil_decodes(tmp_path):
    "LZW: the common kinds are read by PIL, with what is left away told"
    a = noise(5, 6, 4, top=256).astype(np.uint8)
    Image.frombytes("RGBX", (6, 5), a.tobytes()).save(tmp_path / "a.tif", compression="tiff_lzw")
    with pytest.warns(UserWarning, match="4 bands; the first three"): out = read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(out, a[..., :3])
    deep = noise(5, 6, 1, top=4096)[..., 0]
    Image.fromarray(deep).save(tmp_path / "b.tif", compression="tiff_lzw")
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif")[..., 0], to_bytes(deep))
    Image.fromarray(deep).save(tmp_path / "c.tif", compression="tiff_lzw", tiffinfo={262: 0})
    with Image.open(tmp_path / "c.tif") as im: white = im.tag_v2[262] == 0
    np.testing.assert_array_equal(read_image(tmp_path / "c.tif")[..., 0], 255 - to_bytes(deep) if white else to_bytes(deep))


def test_a_tiff_that_pil_misreads_is_upright_and_has_pages():
    a = np.random.default_rng(5).random((3, 4, 5))
    with tempfile.TemporaryDirectory() as d:
        with tifffile.TiffWriter(Path(d, "a.tif")) as w:
            for page in a: w.write(page, photometric="minisblack", extratags=[(274, 3, 1, 6, True)])
        for k in range(3): np.testing.assert_array_equal(read_image(Path(d, "a.tif"), page=k)[..., 0], np.rot90(to_bytes(a[k].astype("f4")), -1))
        with pytest.raises(SpmlError, match="there is no page 3 among 3"): read_image(Path(d, "a.tif"), page=3)
        Path(d, "b.tif").write_bytes(Path(d, "a.tif").read_bytes()[:300])
        with pytest.raises(SpmlError, match="b.tif"): read_image(Path(d, "b.tif"))


# Values

@many
@given(hnp.arrays(st.sampled_from([np.uint16, np.int16, np.uint32, np.int32, np.int64, np.uint64]), (3, 4), elements=st.integers(0, 2**15 - 1)))
def test_depth_neither_cuts_nor_darkens(a):
    low, high = value_range(a)
    assert low == 0 and a.max() <= high and (high == 255 or a.max() > high/4 - 1)
    np.testing.assert_array_equal(to_bytes(a), np.rint(a*(255/high)).astype(np.uint8))
    assert to_bytes(a).max() >= min(int(a.max()), 63)


@many
@given(hnp.arrays(np.uint8, (3, 4)), st.sampled_from([np.float16, np.float32, np.float64]))
def test_floats_of_bytes_are_these_bytes(a, dtype):
    np.testing.assert_array_equal(to_bytes(a/255 if dtype is np.float64 else (a/255).astype(dtype)), a)
    if a.max() > 1: np.testing.assert_array_equal(to_bytes(a.astype(dtype)), a)


@many
@given(hnp.arrays(np.uint16, (3, 4)), st.integers(0, 65534), st.integers(1, 65535))
def test_the_other_scales_are_linear_between_their_ends(a, low, width):
    plain = lambda lo, hi: (255*(a.astype(float) - lo)/max(hi - lo, 1)).clip(0, 255)
    for scale, ends in (("dtype", (0, 65535)), ("range", (a.min(), a.max())), ((low, low + width), (low, low + width))):
        assert np.abs(to_bytes(a, scale) - plain(*map(float, ends))).max() <= .501


@pytest.mark.parametrize("values, scale, says", [
    ([-3, 5], "depth", "int64 values -3..5: it is unknown"), ([-3, 5], "dtype", "give scale=.low, high."), ([.1, 1.3], "depth", "0.1..1.3"), ([0., 300.5], "depth", "..300.5"),
    ([0., 200.5], "dtype", "..200.5"), ([0., np.nan], "range", "1 of 2 values are not finite"), ([np.inf, 1.], (0, 1), "1 of 2 values are not finite")])
def test_values_without_a_known_white_are_refused(values, scale, says):
    with pytest.raises(SpmlError, match=f"^x.tif: .*{says}"): to_bytes(np.array(values), scale, "x.tif")


@pytest.mark.parametrize("scale", ["deep", "", 5, (1, 1), (2, 1), (1,), (0, np.nan), (0, 1, 2), ("a", "b")])
def test_scales_that_are_none_are_refused(tmp_path, scale):
    with pytest.raises(SpmlError, match="is neither one of"): check_scale(scale)
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(SpmlError, match="is neither one of"): FolderSet(tmp_path, classes=["background", "thing"], scale=scale)


def test_a_set_takes_its_scale(tmp_path):
    for k, top in enumerate((900, 4000)): Image.fromarray(np.array([[0, top]], np.uint16)).save(tmp_path / f"{k}.png")
    at = lambda scale: [int(FolderSet(tmp_path, classes=["background", "thing"], scale=scale).image(k).max()) for k in (0, 1)]
    assert (at("depth"), at((0, 4095)), at("dtype"), at("range")) == ([224, 249], [56, 249], [4, 16], [255, 255])


def test_regions_of_another_scale_are_kept_apart(tmp_path):
    Image.fromarray(noise(12, 12, top=4096)).save(tmp_path / "a.tif")
    of = lambda scale: prepare_regions(FolderSet(tmp_path, classes=["background", "thing"], scale=scale), tmp_path / "r", n=4, progress=False)
    assert "scale" not in of("depth").settings and of("depth").read("a").shape == (12, 12)
    with pytest.raises(SpmlError, match="other settings .scale was None"): of((0, 65535))


def test_what_is_done_is_told_once_a_folder(tmp_path):
    wide, half = Image.fromarray(noise(4, 5, top=4096)), Image.new("RGBA", (5, 4), (9, 9, 9, 100))
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for k in (0, 1): wide.save(tmp_path / folder / f"{k}.tif"); half.save(tmp_path / folder / f"{k}.png")
    paths = sorted(tmp_path.rglob("*.*"))
    told = said(lambda: [read_image(p) for p in (*paths, *paths)])
    assert [t.split(": ")[0] for t in told] == [str(tmp_path / f) for f in ("one/0.png", "one/0.tif", "two/0.png", "two/0.tif")]
    assert "shown on white" in told[0] and "because its largest value is 4095" in told[1] and "scale=(0, 4095)" in told[1]


# Transparency, pages

@many
@given(st.sampled_from(["RGBA", "LA", "P", "RGB"]), st.integers(0, 99))
def test_transparent_pixels_lie_on_white(mode, seed):
    "as an alpha channel, a table of the palette, or a colour that means nothing"
    a, how = noise(5, 6, 4, seed=seed), {}
    im = Image.fromarray(a)
    if mode == "LA": im = im.convert("LA")
    elif mode != "RGBA": im = Image.fromarray(a[..., :3] // 128 * 255).convert(mode); how = dict(transparency=bytes([0, 100]) if mode == "P" else (255, 255, 0))
    content = packed(im, "PNG", **how)
    rgba = np.array(Image.open(io.BytesIO(content)).convert("RGBA")).astype(float)
    plain = 255 - rgba[..., 3:]/255*(255 - rgba[..., :3])
    assert np.abs(read(content) - plain).max() < .51


def test_alpha_that_is_nowhere_hides_nothing():
    a = np.dstack([noise(4, 5, 3), np.zeros((4, 5), np.uint8)])
    np.testing.assert_array_equal(as_image(a), a[..., :3])


@pytest.mark.parametrize("form, ending", [("TIFF", ".tif"), ("GIF", ".gif"), ("WEBP", ".webp"), ("PNG", ".png")])
def test_of_several_pages_the_first_is_taken_and_told(tmp_path, form, ending):
    frames = [Image.new("RGB", (6, 4), (v, v, v)) for v in (40, 120, 200)]
    frames[0].save(path := tmp_path / f"a{ending}", form, save_all=True, append_images=frames[1:], lossless=True) if form == "WEBP" else frames[0].save(path := tmp_path / f"a{ending}", form, save_all=True, append_images=frames[1:])
    told = said(lambda: [read_image(path), read_image(path)])
    assert len(told) == 1 and told[0].startswith(f"{path}: the first of 3 pages is read")
    assert [int(read_image(path, page=k)[0, 0, 0]) for k in (0, 1, 2)] == [40, 120, 200] and read_image(path)[0, 0, 0] == 40
    pictures._told.clear()
    assert said(lambda: read_image(path, page=0)) == []
    for k in (-1, 3):
        with pytest.raises(SpmlError, match=f"a{ending}: there is no page {k} among 3"): read_image(path, page=k)


# Files that are refused

@pytest.mark.parametrize("content, ending, says", [
    (b"\0\0\0\x18ftypheic" + bytes(9), "", "HEIC is not read here: .*heif-convert"), (b"\0\0\0\x18ftypmif1" + bytes(9), ".jpg", "HEIC"), (bytes(128) + b"DICM", "", "DICOM .*pydicom"),
    (b"x", ".dcm", "DICOM"), (bytes(344) + b"n+1\0", "", "NIfTI .*nibabel"), (b"\x1f\x8bx", ".nii.gz", "NIfTI"), (b"\xff\x0a", ".jxl", "JPEG XL .*djxl"),
    (b"\x93NUMPY", "", "NumPy .*np.load"), (b"%PDF-1.4", "", "PDF .*pdftoppm"), (b"", ".jpg", "an empty file"), (b"words", ".jpg", "of an unknown kind")])
def test_files_of_other_kinds_say_what_converts_them(content, ending, says):
    with pytest.raises(SpmlError, match=f"a{ending}: not a readable image: {says}"): read(content, ending)


def test_a_folder_of_other_kinds_says_what_converts_them(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(SpmlError, match="no images here.*a.heic: HEIC is not read here: convert it"): FolderSet(tmp_path, classes=["background", "thing"])


def test_too_large_is_another_thing_than_cut_short(tmp_path, monkeypatch):
    Image.fromarray(noise(40, 40)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    with pytest.raises(SpmlError, match="cut.png: .*the file is cut short: copy it again"): read_image(tmp_path / "cut.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(SpmlError, match="a.png: 0.0016 million pixels, more than the limit of 0.001 million.*cut the picture into tiles.*MAX_IMAGE_PIXELS`$"): read_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(tmp_path / "a.png").shape == (40, 40, 3)


def test_without_memory_there_is_a_cure(tmp_path, monkeypatch):
    Image.fromarray(noise(4, 4)).save(tmp_path / "a.png")
    def load(im): raise MemoryError
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(SpmlError, match="a.png: not enough memory.*tiles"): read_image(tmp_path / "a.png")


SPOILT = {f: packed(drawn("RGB", (20, 30), 1), f) for f in ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")} | {"16": png16(noise(6, 7, 3, top=4096)), "tiff16": tiff16(noise(6, 7, 3, top=4096))}


@many
@given(st.sampled_from([*SPOILT]), st.floats(0, 1), st.integers(0, 255), st.booleans())
def test_spoilt_files_are_pictures_or_refused(form, where, byte, cut):
    whole = SPOILT[form]
    at = int(where*(len(whole) - 1))
    try: a = read(whole[:at] if cut else whole[:at] + bytes([byte]) + whole[at + 1:])
    except SpmlError as e: assert "a: " in str(e)
    else: assert a.dtype == np.uint8 and a.ndim == 3 and a.shape[2] == 3


# Arrays: every public function takes them alike

SIZE = 32, 48


def scene():
    a = np.full((*SIZE, 3), (40, 60, 200)) + np.random.default_rng(0).normal(0, 6, (*SIZE, 3))
    a[6:26, 8:30] = 255, 40, 40
    return a.clip(0, 255).astype(np.uint8)


SCENE, GREY = scene(), np.repeat(scene()[..., :1], 3, 2)
SAME = {  # kind to (what is given, the uint8 picture that it is)
    "PIL": (Image.fromarray(SCENE), SCENE), "float 0..1": (SCENE/255, SCENE), "float32 0..255": (SCENE.astype(np.float32), SCENE), "int64": (SCENE.astype(int), SCENE),
    "uint16": (SCENE.astype(np.uint16)*257, SCENE), "RGBA": (np.dstack([SCENE, np.full(SIZE, 255, np.uint8)]), SCENE), "CHW": (SCENE.transpose(2, 0, 1), SCENE),
    "CHW float tensor": (torch.tensor(SCENE).permute(2, 0, 1)/255, SCENE), "HWC uint8 tensor": (torch.tensor(SCENE), SCENE), "bfloat16 tensor": (torch.tensor(SCENE).bfloat16(), SCENE),
    "grey": (GREY[..., 0], GREY), "grey (H,W,1)": (GREY[..., :1], GREY), "view": (SCENE[:, ::-1], SCENE[:, ::-1].copy()), "turned PIL": (None, SCENE)}
exif = Image.Exif(); exif[0x0112] = 6
SAME["turned PIL"] = Image.open(io.BytesIO(packed(Image.fromarray(np.rot90(SCENE).copy()), "PNG", 6))), SCENE
WRONG = {"batch": (SCENE[None], "is a batch"), "bands": (np.zeros((*SIZE, 6)), "6 channels"), "standardised": (SCENE/128 - 1, "black and white"), "words": (np.array([["a"]]), "is not a picture"),
         "row": (SCENE[0, :, 0], "no height and width"), "empty": (SCENE[:0], "has no pixels"), "nan": (np.where(SCENE == 40, np.nan, SCENE/255), "not finite"), "nothing": (None, "is not a picture")}

torch.manual_seed(0)
NET = SegNet(EmbedNet("test_resnet", 8, pretrained=False), SoftmaxHead(8, 3)).eval()
REGIONAL = SegNet(NET.embed, ocr_head(NET.embed, 8, 3)).eval()
TAGNET, PEAKS = (net(3, backbone="test_resnet", pretrained=False).eval() for net in (TagNet, PrmNet))
BACKBONE = BackboneNet("test_resnet", pretrained=False).eval()
LABELS = np.full(SIZE, 254, np.uint8); LABELS[10:20, 10:20], LABELS[:4] = 1, 0
REGIONS = np.arange(SIZE[0]*SIZE[1]).reshape(SIZE)//(8*SIZE[1])*2 + (np.arange(SIZE[1]) > 24)
TAGS, CLASSES, SCORES = np.array([True, True, False]), Classes(("background", "thing", "other")), np.random.default_rng(1).random((3, *SIZE))
INDEX, STORE, INSIDE = training_index(NET, [SCENE], [LABELS], 3, grid=(3, 3)), segment_store(NET, [SCENE], [LABELS], 3, (3, 3)), LABELS == 1
PEAK = torch.tensor([[0, 1, 2, 3]])
MODEL, FROZEN = LabelModel(NET, CLASSES, {}, INDEX, grid=(3, 3)), FrozenNet("test_resnet", 8, pretrained=False).eval()
CYCLE = CycleNet(SegNet(NET.embed, NET.head), 3, width=8, blocks=1).eval()
DRAWN = DrawnNet(FROZEN, 8, 3, 3)
DRAWN.base.normal_(); DRAWN.mu, DRAWN.label = torch.eye(8)[:3], torch.arange(3)


class Given(ImageSet):
    "A set of one's own, that gives images of any kind"
    def __init__(self, image): self.given = image; super().__init__(["a"], CLASSES, masks=False)
    def _image(self, i): return self.given


def shown(image):
    w = ClickImage(); w.show(image)
    return np.array(Image.open(io.BytesIO(w.png)))


@cache
def small_hed():
    with pytest.MonkeyPatch.context() as m, tempfile.TemporaryDirectory() as d:
        m.setattr(hed, "WIDTHS", (2, 3, 4, 5, 6))
        torch.manual_seed(0)
        hed.save_tensors(f"{d}/w.safetensors", hed.Hed().state_dict())
        return hed.HedContours(f"{d}/w.safetensors", "cpu")


def prepared(image):
    class Plain:
        names = ["a"]
        def __len__(self): return 1
        def image(self, i): return image
    with tempfile.TemporaryDirectory() as d: return prepare_regions(Plain(), d, n=6, progress=False).read("a")


def explored(image):
    ex = explore_regions(Given(image))
    return np.concatenate([np.array(Image.open(io.BytesIO(p.png))).ravel() for p in ex.pictures if p.png])


def cammed(image):
    pytest.importorskip("pytorch_grad_cam")
    return grad_cam(TAGNET, image, TAGS)


def neighbours_of(image):
    fig = show_neighbours(NET, STORE, Given(SCENE), [image], k=1, grid=(3, 3), max_rows=1, size=8)
    return np.concatenate([np.asarray(i.get_array()).ravel() for ax in fig.axes for i in ax.images])


def frozen(image):
    "What is kept of an image: its features, its fingerprint, and that it is held"
    with tempfile.TemporaryDirectory() as d:
        cache = FeatureCache(d, FROZEN).fill(Given(image), progress=False)
        assert cache.holds("a", image)
        return np.concatenate([np.frombuffer(fingerprint(image).encode(), np.uint8), *(m.numpy().ravel() for m in cache.make(image).values())])


weak = lambda image: WeakSet(Given(image), lambda i: LABELS)
DOORS = {
    "as_image": as_image, "describe": lambda o: describe(o, [torch.ones(2, 4, 4)], 4).rows, "cell_rows": lambda o: cell_rows(o, [torch.ones(2, 4, 4)])[0],
    "agreed": lambda o: agreed([torch.tensor(SCORES).float()], o), "DrawnNet.scores": lambda o: DRAWN.scores(o), "image_tensor": image_tensor, "embed_view": lambda o: embed_view(NET, o)[0], "stream_views": lambda o: next(stream_views(NET, [o]))[0][0],
    "stream_head": lambda o: next(stream_head(NET, [o])), "head_scores": lambda o: head_scores(NET, o), "predict_head": lambda o: predict_head(NET, o, flip=True),
    "mean_scores": lambda o: mean_scores([lambda i: head_scores(NET, i)]*2, o),
    "training_index": lambda o: training_index(NET, [o], [LABELS], 3, grid=(3, 3)).mu, "stream_retrieval": lambda o: next(stream_retrieval(NET, [o], INDEX, 3, grid=(3, 3))),
    "retrieval_scores": lambda o: retrieval_scores(NET, o, INDEX, 3, grid=(3, 3)), "predict_retrieval": lambda o: predict_retrieval(NET, o, INDEX, 3, grid=(3, 3)),
    "stream_predictions": lambda o: np.stack([*next(stream_predictions({"net": lambda i: head_scores(NET, i)}, [o], crf=True)).values()]),
    "random_walk_scores": lambda o: random_walk_scores(NET, o, TAGS, steps=4),
    "Sample.__init__": lambda o: nearest_segment_scores(NET, Sample(o, LABELS, REGIONS, TAGS), (3, 3)),
    "dense_crf": lambda o: dense_crf(o, SCORES, iterations=2), "Kernel.features": lambda o: KERNELS[1].features(o),
    "class_maps": lambda o: class_maps(TAGNET, o, TAGS, (1.,)), "class_maps, related": lambda o: class_maps_related(o), "grad_cam": cammed,
    "geodesic_saliency": lambda o: geodesic_saliency(o, REGIONS), "GeodesicBackground.__call__": lambda o: GeodesicBackground()(o, SCORES, REGIONS),
    "MeanBackground.__call__": lambda o: MeanBackground()(o, SCORES, REGIONS),
    "contour_channels": lambda o: np.stack(contour_channels(o)), "gradient_contours": gradient_contours, "oversegment": lambda o: oversegment(o, n=6),
    "oversegment, another source": lambda o: oversegment(o, n=6, contours=lambda i: i.astype(float).mean(2)/255), "HedContours.__call__": lambda o: small_hed()(o), "HedContours.many": lambda o: np.stack(small_hed().many([o, SCENE])),
    "merge_regions": lambda o: merge_regions(o, side=8).altitudes, "RegionPairs.__init__": lambda o: RegionPairs(o, np.zeros(SIZE), REGIONS).histograms, "prepare_regions": prepared,
    "region_features": lambda o: region_features(BACKBONE, o, REGIONS), "bayes_refine": lambda o: bayes_refine(o, INSIDE, np.full(SIZE, .5)),
    "image_context": lambda o: image_context(REGIONAL, o)[0].logits,
    "cycle_labels": lambda o: cycle_labels(CYCLE, o, 0.), "deep_map": lambda o: deep_map(BACKBONE, o), "colour_map": colour_map,
    "image_peaks": lambda o: image_peaks(PEAKS, o)[0], "response_maps": lambda o: response_maps(PEAKS, o, PEAK),
    "overlay": lambda o: overlay(o, LABELS, CLASSES), "draw_regions": lambda o: draw_regions(o, REGIONS), "outline": lambda o: outline(o, INSIDE), "cross": lambda o: cross(o, 5, 6),
    "judged_picture": lambda o: judged_picture(o, LABELS, np.zeros_like(LABELS)),
    "show_predictions": lambda o: np.asarray(show_predictions([o], {"a": [LABELS]}, classes=CLASSES, alpha=.5).axes[1].images[0].get_array()),
    "mosaic": lambda o: mosaic([o, o]), "ClickImage.show": shown, "picture_batch": lambda o: picture_batch([o]), "crop_around": lambda o: crop_around(o, INSIDE, 16),
    "segment_store": lambda o: segment_store(NET, [o], [LABELS], 3, (3, 3)).index.mu, "show_neighbours": neighbours_of, "explore_regions": explored,
    "pixel_features": lambda o: pixel_features(o, NET), "prepare_spread": lambda o: prepare_spread(o, NET)[0], "ImageSet": lambda o: Given(o).image(0), "FeatureCache.make": frozen,
    "LabelModel.scores": lambda o: MODEL.scores(o), "LabelModel.predict": lambda o: MODEL.predict(o, by="retrieval"), "LabelModel.reduced": lambda o: MODEL.reduced(o, 20),
    "LabelModel.witnesses": lambda o: MODEL.witnesses(o, k=1)[0], "retrieval_witnesses": lambda o: next(retrieval_witnesses(NET, o, INDEX, 1, grid=(3, 3)))[1],
    "labels_over": lambda o: labels_over(o, LABELS, CLASSES), "recolour": lambda o: recolour(o, np.random.default_rng(0), 1., 1.), "WeakSet": lambda o: weak(o).sample(0).image,
}


def class_maps_related(image):
    "Partners of an image come by the same door"
    class Pairs(TagNet):
        def maps(self, x, related=()): return super().maps(x) + related[0][0].mean()
    torch.manual_seed(0)
    return class_maps(Pairs(3, backbone="test_resnet", pretrained=False), SCENE, TAGS, (1.,), related=[(image, TAGS)])


REFERENCE = {}


def reference(door, kind):
    "What a door makes of the uint8 picture of a kind"
    key = door, SAME[kind][1].tobytes()
    if key not in REFERENCE: REFERENCE[key] = np.asarray(DOORS[door](SAME[kind][1]))
    return REFERENCE[key]


@pytest.mark.parametrize("door", DOORS)
def test_every_kind_gives_what_uint8_gives(door):
    for kind, (image, _) in SAME.items(): np.testing.assert_array_equal(np.asarray(DOORS[door](image)), reference(door, kind), err_msg=kind)


@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_alike(door):
    for kind, (image, says) in WRONG.items():
        try: DOORS[door](image)
        except SpmlError as e: assert says in str(e), (kind, str(e))
        else: raise AssertionError(f"{kind} was taken")


OTHERWISE = { # parameters of these names that are no single picture of somebody else's
    "batches of tensors": {"ProbabilityNet.forward", "crf_disagreement", "SpmlLoss.segments", "snapshots", "location_colours", "paint_forces", "tracked_picture", "CycleNet.judge", "cycle_errors", "sample_rows"},
    "image sets": {"Source.regions", "DensePose.regions", "Listed.regions", "Listed.said", "FeatureCache.budget", "FeatureCache.fill", "MapFolder.__init__", "as_class_maps", "take_regions", "prepare_regions", "animal_clicks", "FolderSet.__init__", "check_masks", "Source.said", "Voc.said", "Folder.said", "DensePose.said", "Csv.said", "WeakSet.__init__", "score", "explore_embedding.__init__",
                   "images_without", "object_crops", "segment_vectors", "mean_boundary_f",
                   "explore_regions.__init__", "SegmentStore.crop", "LiveSegmenter.__init__"},
    "numbers": {"SegmentIndex.__init__", "contrast", "nearest_labels", "Prototypes.__init__", "cut_segments", "LiveCB.__init__", "Explorer.__init__", "instance_weighted_iou", "TrackCB.__init__"},
    "folders, names and plans of files": {"predict_pictures", "contact_sheet", "plan_import", "ImportPlan.__init__", "Drawing.__init__", "labelme_json"},
    "what the kit has drawn": {"Scene.__init__", "View.__init__"},
    "not looked at": {"PowerBackground.__call__", "OracleBackground.__call__"}}


def test_no_public_function_is_left_out():
    "Whoever takes an image is tried above, or is named as one that takes something else"
    taking = set()
    for m in pkgutil.walk_packages(spml_kit.__path__, "spml_kit."):
        if m.ispkg or m.name.rpartition(".")[2] in ("_modidx", "__main__", "all"): continue
        module = import_module(m.name)
        for name in module.__all__:
            thing = getattr(module, name)
            if getattr(thing, "__module__", "") != m.name: continue
            members = {name: thing} if inspect.isfunction(thing) else {f"{name}.{k}": f for k, f in vars(thing).items() if inspect.isfunction(f) and (k[0] != "_" or k in ("__init__", "__call__"))} if inspect.isclass(thing) else {}
            taking |= {k for k, f in members.items() if {"image", "images", "picture", "pictures"} & inspect.signature(inspect.unwrap(f)).parameters.keys()}
    others = set(itertools.chain(*OTHERWISE.values()))
    known = {k.partition(",")[0] for k in DOORS} | {"FeatureCache.holds", "FeatureCache.keep", "fingerprint"} | others # these beside FeatureCache.make
    assert taking - known == set() and others - taking == set()


def test_uint8_passes_as_the_same_object():
    for a in (SCENE, SCENE[::2], SCENE[:, ::-1], np.zeros((1, 1, 3), np.uint8)): assert as_image(a) is a
    s = Given(SCENE)
    assert s.image(0) is SCENE and weak(SCENE).sample(0).image is SCENE


def test_paths_are_read(tmp_path):
    Image.fromarray(SCENE).save(tmp_path / "a.png")
    np.testing.assert_array_equal(as_image(tmp_path / "a.png"), SCENE)
    np.testing.assert_array_equal(as_image(str(tmp_path / "a.png")), SCENE)
    with pytest.raises(SpmlError, match="absent.png: no such file"): as_image(tmp_path / "absent.png")


def test_a_lazy_pil_image_of_a_cut_file_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(packed(Image.fromarray(SCENE), "PNG")[:900])
    with Image.open(tmp_path / "a.png") as im, pytest.raises(SpmlError, match="a.png: not a readable image"): as_image(im)


def test_the_annotator_draws_on_the_upright_picture(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(packed(drawn("RGB", (24, 36), 0), "JPEG", 6))
    Image.fromarray(noise(24, 36, top=4096)).save(tmp_path / "images" / "b.tif")
    a = annotate(tmp_path, ["background", "thing"])
    a.add_stroke([(2, 30), (20, 30)], "thing")
    assert a.size == [36, 24] and np.array(Image.open(tmp_path / "labels" / "a.png")).shape == (36, 24)
    a.go(1)
    assert not a.failed and len(np.unique(a.image)) > 200


def paged(path):
    "Three pages of 12 bits, the third of another size"
    with tifffile.TiffWriter(path) as f:
        for v, size in ((4095, (4, 6)), (100, (4, 6)), (819, (5, 7))): f.write(np.full(size, v, np.uint16), photometric="minisblack")


@pytest.mark.parametrize("place", [".", "..", "../.."])
def test_settings_of_a_folder_reach_every_reader(place, tmp_path):
    folder = tmp_path / "p" / "images" / "sub"
    folder.mkdir(parents=True)
    paged(folder / "a.tif")
    assert picture_settings(folder) == {} and read_image(folder / "a.tif").min() == 255
    (folder / place / PICTURE_SETTINGS).write_text("scale: [0, 4095]\npage: 2\n")
    images = FolderSet(folder, classes=["background", "thing"])
    for a in (read_image(folder / "a.tif"), as_image(str(folder / "a.tif")), images.image(0)): assert a.shape == (5, 7, 3) and (a == 51).all()
    assert picture_size(folder / "a.tif") == images.stored_size(0) == (5, 7) and (images.scale, images.page) == ([0, 4095], 2)
    assert (read_image(folder / "a.tif", (0, 819), 0) == 255).all() # an argument has the last word
    assert FolderSet(folder, classes=["background", "thing"], scale=(0, 819)).image(0).min() == 255
    assert prepare_regions(images, tmp_path / "r", n=4, progress=False).settings["scale"] == [0, 4095]


def test_the_nearest_settings_count_and_new_ones_at_once(tmp_path):
    (tmp_path / "a").mkdir()
    paged(tmp_path / "a" / "a.tif")
    for where, page, seen in ((tmp_path, 1, 1), (tmp_path / "a", 2, 2), (tmp_path / "a", 0, 0)):
        (where / PICTURE_SETTINGS).write_text(f"page: {page}")
        os.utime(where / PICTURE_SETTINGS, ns=(page*10**9, page*10**9))
        assert picture_settings(tmp_path / "a")["page"] == seen
    (tmp_path / "a" / PICTURE_SETTINGS).write_text("")
    assert picture_settings(tmp_path / "a") == {}


@pytest.mark.parametrize("text, says", [("scales: range", "no setting 'scales'; did you mean 'scale'"), ("- 1", "must hold lines such as"), ("page: two", "page 'two' is not a whole number"), ("page: true", "page True"), ("page: -1", "page -1"), ("scale: [5, 1]", "neither one of"), ("scale: [", "not YAML"), ("page: 9", "there is no page 9 among 3")])
def test_broken_settings_are_named(text, says, tmp_path):
    paged(tmp_path / "a.tif")
    (tmp_path / PICTURE_SETTINGS).write_text(text)
    for read in (read_image, picture_size):
        with pytest.raises(SpmlError, match=f"(?s){PICTURE_SETTINGS}.*{says}|{says}.*{PICTURE_SETTINGS}"): read(tmp_path / "a.tif")


def test_what_is_said_of_depth_and_pages_names_the_settings(tmp_path):
    paged(tmp_path / "a.tif")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        read_image(tmp_path / "a.tif")
    assert len(said) == 2 and all(PICTURE_SETTINGS in str(w.message) for w in said) and any("`scale: [0, 4095]`" in str(w.message) for w in said)
