"One file that holds a model: what comes back, what is refused, and that nothing runs."
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spml_kit.core import Classes, SpmlError
from spml_kit.files import load_tensors, save_tensors
from spml_kit.infer.drawn import DrawnNet
from spml_kit.infer.bundle import FORMAT, LabelModel, architecture, create_network, load_model, save_model
from spml_kit.infer.retrieval import SegmentIndex
from spml_kit.infer.scores import predict_head, predict_retrieval
from spml_kit.learn.head import FrozenEmbed
from spml_kit.method.nets import SegNet, SoftmaxHead, create_head
from spml_kit.method.recipes import RECIPES

from conftest import photo

RECIPE = RECIPES["small"].but(embed=dict(backbone="mobilenetv3_small_050", pretrained=False), dim=16)
TABLE = Classes(("background", "left hand", "right hand", "hat"))


def net_of(recipe=RECIPE, seed=0):
    torch.manual_seed(seed)
    return create_network(architecture(recipe), len(TABLE))


def index_of(dim=16, n=40):
    g = torch.Generator().manual_seed(0)
    mu = torch.nn.functional.normalize(torch.randn(n, dim, generator=g), dim=1)
    label = torch.randint(5, (n,), generator=g) # some are no class, and are left out
    return SegmentIndex(mu, label, torch.arange(n)//10, len(TABLE))


@pytest.fixture(scope="module")
def model():
    return LabelModel(net_of(), TABLE, architecture(RECIPE), index_of(), 80, (5, 4), (1., .5), True, tuple("abcd"), dict(data="own", rows=[dict(miou=12.5)]))


@pytest.fixture
def file(model, tmp_path):
    save_model(tmp_path / "model.spml", model)
    return tmp_path / "model.spml"


def changed(file, drop=(), more=None, **meta):
    "The same file with other tensors or metadata"
    tensors, said = load_tensors(file)
    save_tensors(file, {k: v for k, v in tensors.items() if k not in drop} | (more or {}), **said | meta)
    return file


@pytest.mark.parametrize("by", ["head", "retrieval"])
@pytest.mark.parametrize("size", [(60, 70), (130, 97)])
def test_what_comes_back_labels_the_same(model, file, by, size):
    again, image = load_model(file), photo(*size)
    assert np.array_equal(again.predict(image, by=by), model.predict(image, by=by))
    assert torch.equal(again.scores(image, by), model.scores(image, by))
    assert (again.classes, again.size, again.grid, again.scales, again.flip, again.names, again.card) == (model.classes, 80, (5, 4), (1., .5), True, tuple("abcd"), model.card)
    assert torch.equal(again.index.row, model.index.row)


@pytest.mark.parametrize("network, backbone", [("FrozenNet", "mobilenetv3_small_050"), ("EmbedNet", "vit_tiny_patch16_224"), ("FrozenNet", "vit_tiny_patch16_224")])
def test_every_network_comes_back(network, backbone, tmp_path):
    recipe = RECIPE.but(network=network, embed=dict(backbone=backbone, pretrained=False))
    model, image = LabelModel(net_of(recipe), TABLE, architecture(recipe), size=64), photo(64, 50)
    save_model(tmp_path / "model.spml", model)
    assert torch.equal(load_model(tmp_path / "model.spml").scores(image), model.scores(image))


def test_it_labels_as_the_functions_do(model):
    image = photo(80, 72)
    view = dict(scales=(1., .5), flip=True, mirror=TABLE.mirrored)
    assert np.array_equal(model.predict(image), predict_head(model.net, image, **view))
    assert np.array_equal(model.predict(image, by="retrieval", k=3), predict_retrieval(model.net, image, model.index, 4, k=3, grid=(5, 4), **view))
    assert model.predict(photo(200, 100)).shape == (200, 100) and model.reduced(photo(200, 100)).shape == (80, 40, 3)
    assert model.reduced(photo(200, 100), 0).shape == (200, 100, 3)


def test_windows_are_for_larger_pictures(model):
    small, large = photo(64, 50), photo(100, 120)
    assert torch.equal(model.scores(small, window=64), model.scores(small))
    assert not torch.equal(model.scores(large, window=64), model.scores(large))
    for by in ("head", "retrieval"): assert model.predict(large, size=0, window=64, by=by).shape == (100, 120)
    with pytest.raises(SpmlError, match="at least 32"): model.scores(large, window=16)


def test_a_second_head_is_kept_with_its_embedding(tmp_path):
    one = net_of()
    second = SegNet(FrozenEmbed(one.embed), SoftmaxHead(16, 4)).eval()
    save_model(tmp_path / "m", LabelModel(second, TABLE, architecture(RECIPE)))
    again, image = load_model(tmp_path / "m"), photo(64, 64)
    assert np.array_equal(again.predict(image), predict_head(second, image)) and again.index is None
    with pytest.raises(SpmlError, match="no training segments"): again.predict(image, by="retrieval")
    with pytest.raises(SpmlError, match="no training segments"): again.witnesses(image)
    with pytest.raises(SpmlError, match="head or retrieval"): again.scores(image, by="tail")


def test_witnesses_are_those_that_voted(model):
    image = photo(80, 72)
    segments, rows = model.witnesses(image, scales=(1.,), flip=False, k=5)
    winner = model.scores(image, "retrieval", scales=(1.,), flip=False, k=5).argmax(0).numpy()
    for s, votes in rows.groupby("segment"):
        (label,) = np.unique(winner[segments == s])
        count = votes.label.value_counts()
        assert count[TABLE.names[label]] == count.max() and len(votes) == 5 and (votes.pixels == (segments == s).sum()).all()
    assert set(rows.image) <= set("abcd") and (rows.similarity.diff().fillna(-1)[rows["rank"] > 0] <= 1e-6).all()


REFUSED = {
    "an earlier format": (dict(version=0), "format 0; this kit reads 3 and earlier"),
    "a later format": (dict(version=FORMAT + 1), "format 4"),
    "no format": (dict(version=None), "format None"),
    "another kind": (dict(kind="SegmentIndex"), "no model of the kit, SegmentIndex"),
    "classes as text": (dict(classes="a b"), "classes is missing in its metadata, or of a wrong type"),
    "a class too many": (dict(classes=["background", "a", "b", "c", "d"], swaps=[]), "its tensors are not those of the network"),
    "a class of a pair that is gone": (dict(classes=["background", "a", "b", "c"]), "class 'left hand' is not one of"),
    "classes that repeat": (dict(classes=["background", "a", "a", "c"], swaps=[]), "repeat"),
    "swaps of no class": (dict(swaps=[["x", "y"]]), "class 'x'"),
    "no size": (dict(size="big"), "size is missing"),
    "sizes below nothing": (dict(scales=[-1]), "grid, scales or size"),
    "no architecture": (dict(architecture={}), "network is missing"),
    "unknown backbone": (dict(architecture=architecture(RECIPE) | dict(embed=dict(backbone="mobilenetv3_smal_050"))), "did you mean 'mobilenetv3_small_050'"),
    "another backbone": (dict(architecture=architecture(RECIPE) | dict(embed=dict(backbone="mobilenetv3_small_075"))), "its tensors are not those"),
    "unknown network": (dict(architecture=architecture(RECIPE) | dict(network="create_backbone")), "network 'create_backbone' is not one of"),
    "unknown argument": (dict(architecture=architecture(RECIPE) | dict(embed=dict(backbone="mobilenetv3_small_050", nothing=3))), "its architecture makes no network"),
    "code": (dict(architecture=architecture(RECIPE) | dict(embed=dict(backbone="os:getcwd"))), "code outside the kit"),
    "another file": (dict(architecture=architecture(RECIPE) | dict(embed=dict(checkpoint_path="/etc/passwd"))), "would read other files"),
    "weights": (dict(architecture=architecture(RECIPE) | dict(embed=dict(weights="/etc/passwd"))), "would read other files"),
    "another head": (dict(architecture=architecture(RECIPE) | dict(head="linear")), "head 'linear' with None segments"),
    "a head that is no word": (dict(architecture=architecture(RECIPE) | dict(head=["drawn"])), "version of the kit, or was changed"),
    "drawn segments of a head that has none": (dict(architecture=architecture(RECIPE) | dict(segments=3)), "head 'softmax' with 3 segments"),
    "a drawn head on a network that learnt": (dict(version=2, architecture=architecture(RECIPE) | dict(head="drawn", segments=3)), "head 'drawn' with 3 segments on network 'EmbedNet'"),
    "a hub": (dict(architecture=architecture(RECIPE) | dict(embed=dict(backbone="hf-hub/timm/x"))), "has no backbone"),
}


@pytest.mark.parametrize("meta, said", REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(file, meta, said):
    with pytest.raises(SpmlError, match=said): load_model(changed(file, **meta))


def test_tensors_that_are_missing_or_changed_are_named(file, tmp_path, model):
    changed(file, drop=["model.head.4.bias"])
    with pytest.raises(SpmlError, match="1 differ, first head.4.bias"): load_model(file)
    save_model(file, model)
    changed(file, drop=["index.row"])
    with pytest.raises(SpmlError, match="of its training segments only"): load_model(file)
    save_model(file, model)
    with pytest.raises(SpmlError, match="not finite"): load_model(changed(file, more={"model.head.4.bias": torch.full((4,), float("nan"))}))
    save_model(file, model)
    changed(file, more={"index.label": torch.full((len(model.index),), 9)})
    with pytest.raises(SpmlError, match="none of .* segments has a class|classes that it does not name"): load_model(file)


@pytest.mark.parametrize("content, said", [(b"", "not a readable safetensors"), (b"PK\3\4 a pickle", "not a readable safetensors"), (None, "cut short")], ids=["empty", "zip", "short"])
def test_what_is_no_whole_file_is_refused(file, content, said):
    file.write_bytes(file.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(SpmlError, match=said): load_model(file)


def test_other_files_are_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(SpmlError, match="some other safetensors file"): load_model(tmp_path / "other.safetensors")
    with pytest.raises(SpmlError, match="no such file"): load_model(tmp_path / "absent")
    with pytest.raises(SpmlError, match="a folder, not a file"): load_model(tmp_path)


def test_other_readers_find_weights_and_words(file):
    from safetensors import safe_open
    with safe_open(file, "pt") as f: said = json.loads(f.metadata()["meta"])
    assert said["classes"] == list(TABLE.names) and said["palette"] == TABLE.palette[:4].tolist() and len(said["mean"]) == len(said["std"]) == 3
    assert {k.split(".")[0] for k in load_file(file)} == {"model", "index"}


def test_a_head_of_another_kind_is_refused(tmp_path):
    odd = SegNet(net_of().embed, torch.nn.Conv2d(16, 4, 1))
    with pytest.raises(SpmlError, match="head Conv2d"): save_model(tmp_path / "m", LabelModel(odd, TABLE, architecture(RECIPE)))


@pytest.mark.parametrize("second", [False, True])
def test_an_ocr_head_comes_back(second, tmp_path):
    said = architecture(RECIPE, "ocr")
    net = create_network(said, len(TABLE))
    if second:
        frozen = FrozenEmbed(net.embed, joined=False)
        net = SegNet(frozen, create_head("ocr", frozen, RECIPE.dim, len(TABLE))).eval()
    save_model(tmp_path / "m", LabelModel(net, TABLE, said))
    again, image = load_model(tmp_path / "m"), photo(64, 50)
    assert np.array_equal(again.predict(image), predict_head(net, image)) and load_tensors(tmp_path / "m")[1]["version"] == 3
    with pytest.raises(SpmlError, match="head OcrHead"): save_model(tmp_path / "n", LabelModel(net, TABLE, architecture(RECIPE)))


# what strokes taught

@pytest.fixture(scope="module")
def drawn():
    "A network of strokes, with numbers at random"
    torch.manual_seed(0)
    said = dict(network="FrozenNet", dim=6, dropout=0., embed=dict(backbone="mobilenetv3_small_050"), head="drawn", segments=9)
    net = create_network(said, len(TABLE))
    net.base.normal_()
    net.mu, net.label = torch.nn.functional.normalize(torch.randn(9, 6), dim=1), torch.arange(9) % 3
    return LabelModel(net, TABLE, said, size=64, card=dict(drawn_images=2))


@pytest.fixture
def drawn_file(drawn, tmp_path):
    save_model(tmp_path / "model.spml", drawn)
    return tmp_path / "model.spml"


def test_what_strokes_taught_comes_back(drawn, drawn_file):
    again, image = load_model(drawn_file), photo(90, 70)
    assert type(again.net) is DrawnNet and (again.size, again.card, again.said) == (64, drawn.card, drawn.said)
    assert torch.equal(again.scores(image), drawn.scores(image)) and again.predict(image).shape == (90, 70)
    assert np.array_equal(again.predict(image), again.predict(image, crf=True)) # its borders are always those of the CRF
    assert set(np.unique(again.predict(image))) <= {0, 1, 2} # the fourth class was not drawn
    assert "9 drawn segments" in repr(again)


def test_the_format_is_the_first_that_had_such_a_head(model, drawn_file, tmp_path):
    save_model(tmp_path / "other", model)
    assert load_tensors(tmp_path / "other")[1]["version"] == 1 # earlier kits read it
    assert load_tensors(drawn_file)[1]["version"] == 2
    with pytest.raises(SpmlError, match="version is missing"): load_model(changed(drawn_file, version=1))


@pytest.mark.parametrize("how, why", [(dict(by="retrieval"), "no training segments"), (dict(scales=(1., .5)), "leave scales"), (dict(flip=True), "leave scales"), (dict(window=32, size=0), "leave scales")])
def test_a_drawn_model_sees_a_picture_once(drawn, how, why):
    with pytest.raises(SpmlError, match=why): drawn.predict(photo(64, 50), **how)
    with pytest.raises(SpmlError, match="no training segments"): drawn.witnesses(photo(64, 50))
    assert np.array_equal(drawn.predict(photo(64, 50), window=64), drawn.predict(photo(64, 50))) # no larger than a window


@pytest.mark.parametrize("said, why", [(dict(segments=8), "mu|label"), (dict(segments=0), "0 segments"), (dict(segments="9"), "9 segments"), (dict(dim=7), "differ"), (dict(embed=dict(backbone="mobilenetv3_small_075")), "differ"),
    (dict(embed=dict(backbone="os:getcwd")), "outside the kit"), (dict(embed=dict(weights="/etc/passwd")), "would read other files")])
def test_a_drawn_model_that_was_changed_is_refused(drawn, drawn_file, said, why):
    with pytest.raises(SpmlError, match=why): load_model(changed(drawn_file, architecture=drawn.said | said))


def test_drawn_segments_are_of_its_classes(drawn_file):
    for k in (-1, 4):
        with pytest.raises(SpmlError, match="classes that it does not name"): load_model(changed(drawn_file, more={"model.label": torch.full((9,), k)}))


def test_fastai_is_not_needed(model, drawn, drawn_file, tmp_path):
    np.save(tmp_path / "image.npy", photo(40, 50))
    code = """
import sys; sys.modules["fastai"] = None
import numpy as np
from spml_kit.infer.bundle import load_model
for k, (file, by) in enumerate(((1, "head"), (1, "retrieval"), (2, "head"))): np.save(f"{sys.argv[3]}.{k}.npy", load_model(sys.argv[file]).predict(np.load(sys.argv[3]), by=by))
"""
    save_model(tmp_path / "other", model)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path / "other", drawn_file, tmp_path / "image.npy"], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    for k, made in enumerate((model.predict(photo(40, 50)), model.predict(photo(40, 50), by="retrieval"), drawn.predict(photo(40, 50)))): np.testing.assert_array_equal(np.load(tmp_path / f"image.npy.{k}.npy"), made)
