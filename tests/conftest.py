"""Fixtures and helpers that test files share."""
import gc
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spml_kit.core import VOC_CLASSES, VOID, data_root
from spml_kit.files import write_index_png
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet

from kernels import forking


def pytest_configure(config):
    os.environ["SPML_DEVICE"] = "cpu" # equal bits are asked for; what needs a GPU names it
    config.addinivalue_line("markers", "browser: needs Chromium; run by `make test-browser`")
    config.addinivalue_line("markers", "long: whole commands, half a minute and more each; run by `make test-long`")
    config.addinivalue_line("markers", "faults(kind): what goes wrong on a machine; counted in the last line, and run at "
                            "length by `make faults`")


LONGEST = "test_lessons", "test_single", "test_experiment", "test_pipelines", "test_faults", "test_gpu_benchmark", "test_distributed", "test_project"


def pytest_collection_modifyitems(items):
    rank = {name: k for k, name in enumerate(LONGEST)} # first, lest one process end with them while the other waits
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    for item in items:
        if mark := item.get_closest_marker("faults"): item.user_properties.append(("faults", mark.args[0]))


def pytest_collection_finish():
    gc.freeze() # what was imported stays: else every collection goes through it, and every end of a process


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    "Of the faults that were tried, how many held: the last words of all"
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None: return
    kinds = {}
    for outcome in ("passed", "failed", "error", "skipped"): # a test that passed may fail when it is taken down
        for report in terminal.stats.get(outcome, []):
            kind = dict(getattr(report, "user_properties", ())).get("faults")
            if kind: kinds.setdefault(kind, {}).setdefault(report.nodeid, []).append(outcome)

    def line(name, tests):
        outcomes = [next(o for o in ("failed", "error", "skipped", "passed") if o in of) for of in tests]
        held, skipped = outcomes.count("passed"), outcomes.count("skipped")
        failed = len(outcomes) - held - skipped
        end = f", {skipped} skipped" if skipped else ""
        return f"{name}: {held + failed} tried, {held} held, {failed} failed{end}"
    if not kinds: return
    for kind, tests in kinds.items(): terminal.write_line(line(f"  {kind}", tests.values()))
    terminal.write_line(line("faults", [of for tests in kinds.values() for of in tests.values()]))


@pytest.fixture(scope="session", autouse=True)
def forked_kernels(tmp_path_factory):
    "The kernels that tests start begin at once"
    from jupyter_client.provisioning import local_provisioner
    launch = local_provisioner.launch_kernel
    local_provisioner.launch_kernel, end = forking(launch, tmp_path_factory.mktemp("kernels"))
    yield
    local_provisioner.launch_kernel = launch
    end()


@pytest.fixture(scope="session")
def vectors():
    "Golden vectors by id: {inputs, expected}"
    data = json.loads((Path(__file__).parent / "spml_vectors.json").read_text())
    return {v["id"]: v for v in data["vectors"]}


@pytest.fixture(scope="session")
def voc_animals():
    "Folder of the VOC-layout photographs; skips where they are absent"
    root = data_root("voc_animals", "VOC2012")
    if root is None:
        pytest.skip("photographs absent: set SPML_DATA to a folder that holds voc_animals/VOC2012")
    return root


@pytest.fixture(scope="session")
def deeplab():
    "The paper's VOC network: large, so built once; nobody may change its weights"
    from spml_kit.method.nets import paper_deeplab
    return paper_deeplab()


@pytest.fixture(scope="session")
def net():
    "A real network, small and untrained"
    from spml_kit.method.nets import EmbedNet, SegNet, SoftmaxHead
    torch.manual_seed(0)
    return SegNet(EmbedNet("test_resnet", 8, pretrained=False), SoftmaxHead(8, 13)).eval()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    "What explorers look at: a weak set, held-out scenes, a learner after a few steps and its snapshots"
    from spml_kit.data.batches import weak_dls
    from spml_kit.learn.learner import spml_learner
    from spml_kit.look.embedding import SnapshotCB
    from spml_kit.method.recipes import RECIPES
    size, folder = 64, tmp_path_factory.mktemp("snapshots")
    weak, held_out = WeakSet(SceneSet(6, seed=3, size=size), "scribbles", regions=12), SceneSet(3, seed=3, size=size, start=100)
    recipe = RECIPES["small"].but(embed=dict(backbone="test_resnet", pretrained=False), dim=8, grid=(4, 4), iterations=3, crop=size)
    learn = spml_learner(weak_dls(weak, held_out, bs=3, crop=size, steps=2, device=torch.device("cpu")), recipe=recipe, path=tmp_path_factory.mktemp("run"))
    with learn.no_bar(), learn.no_logging():
        learn.fit_poly(2, cbs=SnapshotCB(folder))
    return weak, held_out, learn, folder


@pytest.fixture(scope="session")
def retrieval(world):
    "The explorer of nearness, and the masks that its votes come from"
    from spml_kit.look.nearness import explore_retrieval
    weak, held_out, learn, _ = world
    masks = [weak.images.mask(i) for i in range(len(weak))]
    return explore_retrieval(learn, weak, held_out, masks, grid=(4, 4)), masks


def quiet(learn):
    "Without bar and table"
    learn.remove_cb(learn.progress)
    learn.logger = lambda row: None
    return learn


def weights(learn):
    return {k: v.clone() for k, v in learn.model.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for k in one: assert torch.equal(one[k], other[k]), k


def random_batch(seed=0, n_images=3, dim=5, size=(9, 8), n_classes=4, annotated=.4, void=.1, regions=4, dtype=torch.float64):
    "emb (B,D,h,w), labels (B,h,w) with unlabelled and void pixels, regions (B,h,w), tags (B,C): what `make_segments` takes"
    g, shape = torch.Generator().manual_seed(seed), (n_images, *size)
    emb = torch.randn(n_images, dim, *size, generator=g, dtype=torch.float64).to(dtype)
    labels = torch.randint(n_classes, shape, generator=g)
    chance = torch.rand(shape, generator=g)
    labels[chance > annotated] = 254
    labels[chance > 1 - void] = 255
    tags = torch.rand(n_images, n_classes, generator=g) < .4
    return emb, labels, torch.randint(regions, shape, generator=g), tags


def stroked_project(root, size):
    "Eight scenes in a folder: six with strokes, two with masks to score on"
    scenes = SceneSet(8, seed=3, size=size)
    weak = WeakSet(scenes, "scribbles")
    (root / "images").mkdir()
    (root / "classes.txt").write_text("\n".join(scenes.classes.names))
    for i, name in enumerate(scenes.names):
        Image.fromarray(scenes.image(i)).save(root / "images" / f"{name}.png")
        kind, labels = ("labels", weak.sample(i).labels) if i < 6 else ("masks", scenes.mask(i))
        write_index_png(root / kind / f"{name}.png", labels, scenes.classes.palette)
    return root


FIXTURES = Path(__file__).parent / "fixtures" / "importers" # files of other tools


def photo(h, w, seed=0): return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


@pytest.fixture
def voc(tmp_path):
    "A VOC layout of three images; the mask of 'c' lies in the second folder"
    root = tmp_path/'VOC2012'
    for f in ('JPEGImages', 'ImageSets/Segmentation', 'SegmentationClass', 'SegmentationClassAug'): (root/f).mkdir(parents=True)
    for k, name in enumerate('abc'):
        Image.fromarray(photo(30, 40, k)).save(root/'JPEGImages'/f'{name}.jpg')
        mask = np.zeros((30, 40), np.uint8)
        mask[5:15, 5:35], mask[20:25], mask[0] = 15, 9 + k, VOID
        write_index_png(root/('SegmentationClassAug' if name == 'c' else 'SegmentationClass')/f'{name}.png', mask, palette=VOC_CLASSES.palette)
    (root/'ImageSets/Segmentation/train.txt').write_text('a\nb\n')
    (root/'ImageSets/Segmentation/train_aug.txt').write_text('a\nb\nc\n')
    return root


@pytest.fixture
def folder(tmp_path):
    "Three images and their masks of classes 0..2"
    for k in range(3):
        (tmp_path/'images').mkdir(exist_ok=True)
        Image.fromarray(photo(24, 32, k)).save(tmp_path/'images'/f'p{k}.png')
        mask = np.zeros((24, 32), np.uint8)
        mask[4:12, 4:12], mask[14:20, 16:28] = 1, 2
        write_index_png(tmp_path/'masks'/f'p{k}.png', mask)
    return tmp_path
