"A network for other programs and labels for other trainers: equal numbers, right layouts, nothing written over."
import json
from importlib.util import find_spec
from itertools import product

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from spml_kit.core import UNLABELLED, VOID, SpmlError
from spml_kit.files import read_index_png, write_index_png, write_json
from spml_kit.data.images import SceneSet, VocSet
from spml_kit.infer.bundle import LabelModel, architecture, create_network, save_model
from spml_kit.infer.scores import head_scores
from spml_kit.method.backbones import DepthwiseDilated
from spml_kit.method.recipes import RECIPES
from spml_kit.runs.export import LAYOUTS, ProbabilityNet, _same_padding, export_labels, export_network, spml_export

from conftest import photo

TABLE = SceneSet(1).classes


def untrained(**embed):
    recipe = RECIPES["small"].but(embed=dict(pretrained=False, **embed))
    torch.manual_seed(0)
    return LabelModel(create_network(architecture(recipe), len(TABLE)), TABLE, architecture(recipe), size=64)


@pytest.fixture(scope="module", params=["aspp", "psp"])
def model(request):
    made = untrained(backbone="mobilenetv3_small_050", head=request.param)
    assert any(type(m) is DepthwiseDilated for m in made.net.modules())
    return made


def same_at_other_sizes(model, path):
    program = torch.export.load(path).module()
    for n, h, w in ((1, 64, 64), (3, 96, 32)):
        x = torch.rand(n, 3, h, w)
        with torch.no_grad(): assert torch.allclose(program(x), ProbabilityNet(model.net)(x), atol=1e-4)
    return program


# the default's padding asks for the size; of a transformer's patches the map is resampled
@pytest.mark.parametrize("embed", [dict(head="psp"), dict(backbone="vit_small_patch14_dinov2", embed_dim=48, depth=3, num_heads=3)])
def test_backbones_are_exported_with_free_sides(embed, tmp_path):
    model, theirs = untrained(**embed), timm.layers.padding.get_same_padding
    assert export_network(model, tmp_path / "net.pt2") < 1e-4
    same_at_other_sizes(model, tmp_path / "net.pt2")
    assert timm.layers.padding.get_same_padding is theirs


def test_padding_is_that_of_the_backbones():
    for x, kernel, stride, dilation in product(range(1, 40), range(1, 8), range(1, 6), range(1, 4)):
        assert _same_padding(x, kernel, stride, dilation) == timm.layers.padding.get_same_padding(x, kernel, stride, dilation)


def test_fixed_sides_serve_swin(tmp_path):
    model = untrained(backbone="swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2))
    assert export_network(model, tmp_path / "net.pt2", sides=(64, 96)) < 1e-4
    assert "(pictures, 3, 64, 96)" in json.loads((tmp_path / "net.pt2.json").read_text())["input"]
    x, program = torch.rand(3, 3, 64, 96), torch.export.load(tmp_path / "net.pt2").module()
    with torch.no_grad(): assert torch.allclose(program(x), ProbabilityNet(model.net)(x), atol=1e-4)


@pytest.mark.parametrize("sides", [(0, 32), (33, 32), (64, 100), (-32, 64)])
def test_sides_are_multiples(sides, tmp_path):
    with pytest.raises(SpmlError, match=f"--sides {sides[0]} {sides[1]}"):
        export_network(untrained(backbone="mobilenetv3_small_050"), tmp_path / "net.pt2", sides=sides)
    assert [*tmp_path.iterdir()] == []


def test_a_program_gives_the_same_numbers_at_other_sizes(model, tmp_path):
    assert export_network(model, tmp_path / "net.pt2") < 1e-4
    program = same_at_other_sizes(model, tmp_path / "net.pt2")
    image = photo(64, 96)
    with torch.no_grad(): prob = program(torch.from_numpy(image).permute(2, 0, 1)[None]/255)
    assert torch.allclose(prob[0], head_scores(model.net, image), atol=1e-4)
    said = json.loads((tmp_path / "net.pt2.json").read_text())
    assert said["classes"] == list(TABLE.names) and "multiples of 32" in said["input"]


def test_weights_alone(model, tmp_path):
    export_network(model, tmp_path / "w.safetensors", "safetensors")
    other = create_network(model.said, len(TABLE))
    other.load_state_dict(load_file(tmp_path / "w.safetensors"))
    image = photo(40, 50)
    assert torch.equal(head_scores(other, image), head_scores(model.net, image))


def test_torchscript_gives_the_same_numbers_at_other_sizes(model, tmp_path):
    net, x = ProbabilityNet(model.net), torch.rand(1, 3, 96, 64)
    torch.jit.trace(net, torch.rand(1, 3, 64, 64), check_trace=False).save(tmp_path / "net.pt") # gradients are not off
    with torch.no_grad(): assert torch.allclose(torch.jit.load(tmp_path / "net.pt")(x), net(x), atol=1e-4)


@pytest.mark.skipif(find_spec("onnx") is None or find_spec("onnxscript") is None, reason="onnx or onnxscript is not installed")
def test_onnx_gives_the_same_numbers(model, tmp_path):
    assert not export_network(model, tmp_path / "net.onnx", "onnx") > 1e-4


def test_onnx_is_refused_by_name_where_it_is_not_installed(model, tmp_path, monkeypatch):
    monkeypatch.setattr("spml_kit.runs.export.find_spec", lambda name: None)
    with pytest.raises(SpmlError, match="pip install onnx onnxscript"): export_network(model, tmp_path / "net.onnx", "onnx")
    assert [*tmp_path.iterdir()] == []


def test_networks_are_not_written_over(model, tmp_path, capsys):
    (tmp_path / "net.pt2").write_text("mine")
    with pytest.raises(SpmlError, match="exists already"): export_network(model, tmp_path / "net.pt2")
    with pytest.raises(SpmlError, match="one of pt2, onnx, safetensors"): export_network(model, tmp_path / "net", "jit")
    save_model(tmp_path / "model.spml", model)
    assert spml_export([str(tmp_path), "--to", "safetensors"]) == 0 and (tmp_path / "network.safetensors").exists()
    assert spml_export([str(tmp_path / "nothing"), "--to", "pt2"]) == 2 and "no such file" in capsys.readouterr().err
    assert spml_export([str(tmp_path)]) == 2 and spml_export([str(tmp_path), "--labels", "voc"]) == 2
    assert (tmp_path / "net.pt2").read_text() == "mine"


@pytest.fixture
def run(tmp_path):
    "A finished run on a folder: pictures of several kinds, one lying on its side, pseudo-labels and predictions"
    root, run = tmp_path / "own", tmp_path / "run"
    (root / "images").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo(30, 40)).save(root / "images" / "a.png")
    Image.fromarray(photo(30, 40, 1)).save(root / "images" / "b.jpg", exif=exif)
    Image.fromarray(photo(20, 24, 2)[..., 0]).save(root / "images" / "c.tif")
    Image.fromarray(photo(30, 40, 3)).save(root / "images" / "d.png")
    (root / "classes.txt").write_text("background\ncat\nblue: dog\n")
    size = dict(a=(30, 40), b=(40, 30), c=(20, 24), d=(30, 40))
    for k, name in enumerate("abc"):
        drawn = np.full(size[name], UNLABELLED, np.uint8)
        drawn[0, 0] = 0
        write_index_png(root / "labels" / f"{name}.png", drawn, TABLE.palette)
        mask = np.zeros(size[name], np.uint8)
        mask[4:12, 5:15], mask[14:18, 2:9], mask[-1] = 1 + k % 2, 1, VOID
        write_index_png(run / "training_masks" / f"{name}.png", mask, TABLE.palette)
    write_index_png(run / "predictions" / "spml_head" / "d.png", np.full(size["d"], 2), TABLE.palette)
    write_json(run / "environment.json", dict(spml_kit=1, experiment="single", parameters=dict(data="folder", root=str(root), size=16, n_train=0, n_valid=0)))
    return run


def truth(run, name): return read_index_png(run / "training_masks" / f"{name}.png")


@pytest.mark.parametrize("to", LAYOUTS)
def test_every_layout_holds_all_pictures_upright(run, tmp_path, to):
    assert export_labels(run, tmp_path / "out", to) == dict(train=3, predicted=1)
    pictures = [p for p in (tmp_path / "out").rglob("*") if p.suffix in (".png", ".jpg", ".tif") and not {"SegmentationClass", "ann_dir", "labels", "masks"} & {*p.parts}]
    assert sorted(p.stem for p in pictures) == ["a", "b", "c", "d"]
    for p in pictures:
        with Image.open(p) as im: assert im.getexif().get(0x0112, 1) == 1 and im.size[::-1] == dict(a=(30, 40), b=(40, 30), c=(20, 24), d=(30, 40))[p.stem]
    assert not [p for p in (tmp_path / "out").rglob("*") if p.name.startswith(".")] and oct((tmp_path / "out").stat().st_mode)[-3:] == "755"


@pytest.mark.parametrize("to, folder", [("voc", "SegmentationClass"), ("mmseg", "ann_dir/train"), ("hf", "train/labels"), ("coco", "masks/train")])
def test_masks_are_those_of_the_run(run, tmp_path, to, folder):
    export_labels(run, tmp_path / "out", to)
    for name in "abc": assert np.array_equal(read_index_png(tmp_path / "out" / folder / f"{name}.png"), truth(run, name))


def test_voc_is_read_as_voc(run, tmp_path):
    export_labels(run, tmp_path / "out", "voc")
    back = VocSet(tmp_path / "out", "train")
    assert back.names == ["a", "b", "c"] and back.classes.names == ("background", "cat", "blue: dog")
    for i, name in enumerate(back.names): assert np.array_equal(back.mask(i), truth(run, name)) and back.image(i).shape[:2] == truth(run, name).shape


def test_coco_comes_back(run, tmp_path):
    export_labels(run, tmp_path / "out", "coco")
    said = json.loads((tmp_path / "out" / "annotations" / "instances_train.json").read_text())
    assert [c["name"] for c in said["categories"]] == ["cat", "blue: dog"] and {a["category_id"] for a in said["annotations"]} == {1, 2}
    area = {i["file_name"]: i["id"] for i in said["images"]}
    for name, file in (("a", "a.png"), ("c", "c.png")):
        for c in (1, 2): assert sum(a["area"] for a in said["annotations"] if a["image_id"] == area[file] and a["category_id"] == c) == (truth(run, name) == c).sum()


def test_yolo_outlines_cover_what_they_outline(run, tmp_path):
    from skimage.draw import polygon2mask
    export_labels(run, tmp_path / "out", "yolo")
    for name in "abc":
        mask = truth(run, name)
        found = np.zeros_like(mask)
        for line in (tmp_path / "out" / "labels" / "train" / f"{name}.txt").read_text().splitlines():
            c, *at = map(float, line.split())
            xy = np.array(at).reshape(-1, 2)*mask.shape[::-1]
            found[polygon2mask(mask.shape, xy[:, ::-1] - .5)] = c + 1
        for c in (1, 2):
            if (mask == c).any(): assert ((found == c) & (mask == c)).sum()/((found == c) | (mask == c)).sum() > .8, (name, c)
    assert 'names:\n  0: "cat"\n  1: "blue: dog"' in (tmp_path / "out" / "data.yaml").read_text()


def test_hf_rows_name_files_that_are_there(run, tmp_path):
    export_labels(run, tmp_path / "out", "hf")
    for split, n in dict(train=3, predicted=1).items():
        rows = [json.loads(r) for r in (tmp_path / "out" / split / "metadata.jsonl").read_text().splitlines()]
        assert len(rows) == n and all((tmp_path / "out" / split / r[k]).is_file() for r in rows for k in ("file_name", "label_file_name"))
    assert json.loads((tmp_path / "out" / "id2label.json").read_text())["2"] == "blue: dog"


def test_nothing_is_written_over_or_half_written(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert spml_export([str(run), "--labels", "voc", "--out", str(tmp_path / "out")]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    write_index_png(run / "training_masks" / "b.png", np.zeros((3, 3)), TABLE.palette)
    before = {*tmp_path.iterdir()}
    assert spml_export([str(run), "--labels", "coco", "--out", str(tmp_path / "new")]) == 2
    assert "3x3, its picture b 40x30" in capsys.readouterr().err and {*tmp_path.iterdir()} == before


@pytest.mark.parametrize("spoil, said", [
    (lambda run: (run / "environment.json").unlink(), "no environment.json"),
    (lambda run: write_json(run / "environment.json", dict(spml_kit=1, experiment="quickstart")), "a run of quickstart"),
    (lambda run: [p.unlink() for p in (run / "training_masks").iterdir()] and (run / "training_masks").rmdir(), "repeat its command"),
    (lambda run: (run / "predictions" / "spml_head").rename(run / "predictions" / "other"), r"there are \['other'\]"),
], ids=["no record", "another experiment", "no masks", "other predictions"])
def test_what_is_no_such_run_is_refused(run, tmp_path, spoil, said):
    spoil(run)
    with pytest.raises(SpmlError, match=said): export_labels(run, tmp_path / "out")


def test_predictions_may_stay_behind(run, tmp_path):
    assert spml_export([str(run), "--labels", "mmseg", "--out", str(tmp_path / "out"), "--predictions", "none"]) == 0
    assert [p.name for p in (tmp_path / "out" / "img_dir").iterdir()] == ["train"]
