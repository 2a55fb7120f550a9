"""Augmentation, greys and blurs, and the stream of batches."""
import fastai.callback.progress  # noqa: F401, brings no_bar
import numpy as np
import pytest
import torch
from fastai.learner import Learner
from fastai.torch_core import default_device
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from conftest import photo
from spml_kit.core import VOC_CLASSES, VOID, SpmlError, rng_of
from spml_kit.data.annotations import Points
from spml_kit.data.batches import MEAN_COLOUR, RoundLoader, augment, chosen_device, recolour, weak_dls
from spml_kit.data.body_parts import PartScenes
from spml_kit.data.images import FolderSet, SceneSet
from spml_kit.data.scenes import PART_CLASSES, SCENE_CLASSES
from spml_kit.data.weak import Sample, WeakSet
from spml_kit.files import write_index_png


@pytest.mark.parametrize("flip", [0, 1])
def test_batches_exchange_labels_and_tags(flip):
    weak = WeakSet(PartScenes(4, size=64), "full")
    dls = weak_dls(weak, weak, bs=4, crop=64, steps=1, scale=(1, 1), flip=flip)
    _, labels, _, tags = next(iter(dls.train))
    for one, said in zip(labels.numpy(), tags.numpy()): assert set(np.unique(one)) == set(np.flatnonzero(said))
    s = weak.sample(0)
    a = augment(s, rng_of(0), 64, (1, 1), flip, weak.classes.mirrored)
    assert np.array_equal(a.labels, PART_CLASSES.mirrored[s.labels[:, ::-1]] if flip else s.labels)


@pytest.mark.parametrize('names', ['ground\nleft hand\nright hand', 'ground\nhand_right\nhand_left', 'ground\nRight-Hand2\nleft-hand2'])
def test_left_and_right_of_a_folder_change_places_in_the_mirror(folder, names):
    (folder/'classes.txt').write_text(names)
    rng = np.random.default_rng(0)
    for path in (folder/'masks').iterdir(): write_index_png(path, rng.integers(0, 3, np.array(Image.open(path)).shape), VOC_CLASSES.palette)
    weak = WeakSet(FolderSet(folder/'images', folder/'masks'), 'full')
    masks, ids = [weak.images.mask(i) for i in range(3)], np.r_[0, 2, 1]
    assert np.array_equal(weak.classes.mirrored[:3], ids)
    for flip in (0, 1):
        for _, labels, _, _ in weak_dls(weak, weak, bs=1, crop=32, steps=3, scale=(1, 1), flip=flip).train:
            shown = labels[labels != VOID].view(24, 32).numpy()
            assert any(np.array_equal(shown, ids[m[:, ::-1]] if flip else m) for m in masks)


def coordinates(h, w):
    "Every map holds the x coordinate (the image also y)"
    x, y = np.meshgrid(np.arange(w), np.arange(h))
    return Sample(np.stack([x, y, x], 2).astype(np.uint8), x.astype(np.uint8), (x + 1000*y).astype(np.int32), np.array([True]))


@given(st.integers(8, 200), st.integers(8, 200), st.integers(8, 120), st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_maps_stay_aligned(h, w, crop, seed):
    a = augment(coordinates(h, w), rng_of(seed), crop)
    assert a.image.shape == (crop, crop, 3) and a.labels.shape == a.regions.shape == (crop, crop)
    assert a.image.dtype == a.labels.dtype == np.uint8 and a.regions.dtype == np.int32
    inside = a.labels != VOID
    assert inside.any()
    assert np.array_equal(a.labels[inside], a.regions[inside] % 1000)
    assert (np.abs(a.image[inside][:, 0].astype(int) - a.labels[inside]) <= 2).all() # bilinear against nearest
    assert (np.abs(a.image[inside][:, 1].astype(int) - a.regions[inside]//1000) <= 2).all()
    assert (a.image[~inside] == MEAN_COLOUR).all() and (a.regions[~inside] == 0).all()
    rows, cols = inside.any(1).sum(), inside.any(0).sum()
    assert inside[:rows, :cols].all() and not inside[rows:].any() and not inside[:, cols:].any() # padding at the bottom and right


@pytest.mark.parametrize('size, crop', [((64, 64), 64), ((40, 70), 64), ((64, 64), 40)])
def test_no_change_at_ratio_one(size, crop):
    s = coordinates(*size)
    a = augment(s, rng_of(0), crop, scale=(1, 1), flip=0)
    y0, x0 = divmod(int(a.regions[0, 0]), 1000)
    h, w = min(crop, size[0]), min(crop, size[1])
    for k in ('image', 'labels', 'regions'): assert np.array_equal(getattr(a, k)[:h, :w], getattr(s, k)[y0:y0 + h, x0:x0 + w])
    assert (x0 == 0 or crop < size[1]) and (y0 == 0 or crop < size[0])


def test_flip_is_a_flip():
    s = coordinates(32, 32)
    a = augment(s, rng_of(0), 32, scale=(1, 1), flip=1)
    for k in ('image', 'labels', 'regions'): assert np.array_equal(getattr(a, k), getattr(s, k)[:, ::-1])


@pytest.mark.parametrize('ratio', [.5, .75, 1.5, 2.])
def test_scaling_follows_opencv(ratio):
    "src = floor(dst/ratio) for maps; src = (dst + 1/2)/ratio - 1/2 for the image"
    s = coordinates(40, 40)
    a = augment(s, rng_of(0), int(ratio*40), scale=(ratio, ratio), flip=0)
    at = np.arange(int(ratio*40))
    assert np.array_equal(a.labels[0], (at/ratio).astype(int))
    assert np.array_equal(a.image[0, :, 0], np.rint(np.clip((at + .5)/ratio - .5, 0, 39)).astype(np.uint8))


def test_windows_and_ratios_vary():
    seen = [augment(coordinates(64, 64), rng_of(k), 32) for k in range(200)]
    starts = np.array([a.regions[0].min() for a in seen])
    step = np.array([abs(int(a.labels[0, 16]) - int(a.labels[0, 0])) for a in seen]) # 16/ratio
    flips = np.mean([a.labels[0, 0] > a.labels[0, 16] for a in seen])
    assert len(np.unique(starts)) > 50 and step.min() <= 12 and step.max() >= 28 and .35 < flips < .65


def batches(dl): return [tuple(o.cpu() for o in b) for b in dl]


def same(a, b): return len(a) == len(b) and all(torch.equal(s, t) for x, y in zip(a, b) for s, t in zip(x, y))


@pytest.fixture(scope='module')
def weak(): return WeakSet(SceneSet(7, size=48), 'scribbles', regions=12)


def dls_of(weak, **kw): return weak_dls(weak, SceneSet(3, size=48, start=50), **{**dict(bs=4, crop=32, steps=3, device='cpu'), **kw})


def test_batch_types(weak):
    dls = dls_of(weak)
    image, labels, regions, tags = dls.one_batch()
    assert image.shape == (4, 3, 32, 32) and image.dtype == torch.float32 and 0 <= image.min() and .5 < image.max() <= 1
    assert labels.shape == regions.shape == (4, 32, 32) and labels.dtype == regions.dtype == torch.int64
    assert tags.shape == (4, 13) and tags.dtype == torch.bool
    assert dls.c == 13 and dls.classes is SCENE_CLASSES and dls.n_inp == 1 and len(dls.train) == 3 and len(dls.valid) == 1


@pytest.mark.parametrize('workers', [1, 2, 3])
def test_batches_do_not_depend_on_workers(weak, workers):
    plain, many = dls_of(weak), dls_of(weak, num_workers=workers)
    for _ in range(2): assert same(batches(plain.train), batches(many.train))
    assert plain.train.round == many.train.round == 2


def test_workers_stay_from_round_to_round(weak):
    "With what they have read, whatever else is asked of the loader in between; and a set round is the round that they make"
    plain, many, ids = dls_of(weak).train, dls_of(weak, num_workers=2).train, set()
    for r in 0, 1, 5:
        plain.round = many.round = r
        assert same(batches(plain), batches(many)) and plain.round == many.round == r + 1
        next(iter(many)) # given up
        assert same([many.one_batch()], [plain.one_batch()])
        ids |= {w.pid for w in many._kept._iterator._workers}
    assert len(ids) == 2
    many.process = plain.process = 1, 2
    assert same(batches(plain), batches(many))


def test_random_numbers_do_not_depend_on_workers(weak):
    drawn = []
    for workers in 0, 2:
        dl = dls_of(weak, num_workers=workers).train
        torch.manual_seed(3)
        for _ in range(3): batches(dl)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize('name', ['', 'cpu', 'cuda:9', 'gpu', '1.5'])
def test_the_environment_names_the_device(monkeypatch, name):
    monkeypatch.setenv('SPML_DEVICE', name)
    if name in ('', 'cpu'): assert chosen_device() == (default_device() if not name else torch.device('cpu'))
    else:
        with pytest.raises(SpmlError, match=f"device '{name}'"): chosen_device()


def test_batches_depend_on_seed_and_round_alone(weak):
    torch.manual_seed(1); np.random.seed(1)
    a = dls_of(weak); rounds = [batches(a.train) for _ in range(3)]
    torch.manual_seed(2); np.random.seed(2)
    b = dls_of(weak); b.train.round = 2
    assert same(batches(b.train), rounds[2]) and b.train.round == 3
    assert not same(rounds[0], rounds[1]) and not same(rounds[0], batches(dls_of(weak, seed=1).train))


def test_looking_does_not_move_the_stream(weak):
    dl = dls_of(weak).train
    first = dl.one_batch()
    next(iter(dl)) # given up after one batch
    assert dl.round == 0 and same([first], batches(dl)[:1]) and dl.round == 1


def test_stream_is_a_sequence_of_permutations(weak):
    dl = dls_of(weak).train
    items = []
    for dl.round in range(7): items += dl.get_idxs()
    assert [p for p, _ in items] == list(range(7*12))
    passes = np.array([i for _, i in items]).reshape(12, 7)
    assert (np.sort(passes, 1) == np.arange(7)).all() and len({tuple(p) for p in passes}) > 6


def test_new_loader_goes_on_alike(weak):
    dl = dls_of(weak).train
    dl.round = 1
    other = dl.new()
    assert isinstance(other, RoundLoader) and same(batches(other), batches(dl))


def test_validation_pads_and_scores_on_masks(folder):
    Image.fromarray(photo(10, 40)).save(folder/'images/p3.png')
    write_index_png(folder/'masks/p3.png', np.full((10, 40), 2))
    s = FolderSet(folder/'images', folder/'masks')
    (image, labels, regions, tags), = batches(weak_dls(WeakSet(s, 'points'), s, bs=4, crop=16, steps=1, device='cpu').valid)
    assert image.shape == (4, 3, 24, 40)
    for i in range(4):
        h, w = s.mask(i).shape
        assert np.array_equal(labels[i, :h, :w], s.mask(i)) and (labels[i, h:] == VOID).all() and (labels[i, :, w:] == VOID).all()
        assert np.array_equal((image[i, :, :h, :w]*255).round().byte().permute(1, 2, 0), s.image(i))
        assert np.flatnonzero(tags[i]).tolist() == np.unique(s.mask(i)).tolist()


def test_validation_without_masks(folder):
    closed = FolderSet(folder/'images', classes=['a', 'b', 'c'])
    weak = WeakSet(closed, lambda i: Points([[5, 5], [20, 17]], [1, 2]))
    with pytest.raises(SpmlError, match='give a WeakSet'): weak_dls(weak, closed)
    (_, labels, _, _), = batches(weak_dls(weak, weak, bs=3, device='cpu').valid)
    assert labels.unique().tolist() == [1, 2, VOID] # what is unlabelled is not scored


def test_classes_must_agree(weak, folder):
    with pytest.raises(SpmlError, match='are not those of validation'): weak_dls(weak, FolderSet(folder/'images', folder/'masks'))


class Net(nn.Module):
    "Colour to class, pixel by pixel"
    def __init__(self): super().__init__(); self.layers = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 13, 1))
    def forward(self, x): return self.layers(x)


def test_trains_in_a_fastai_learner(weak):
    torch.manual_seed(0)
    def loss(pred, labels, regions, tags):
        return nn.functional.cross_entropy(pred, torch.where(labels < 13, labels, -100))
    dls = dls_of(weak, steps=8)
    learn = Learner(dls, Net(), loss_func=loss, lr=1e-2)
    with learn.no_bar(), learn.no_logging(): learn.fit(6)
    losses = [float(v) for v in learn.recorder.losses]
    assert len(losses) == 48 and dls.train.round == 6
    assert np.mean(losses[-8:]) < .8*np.mean(losses[:3])
    assert len(learn.recorder.values) == 6 and np.isfinite(learn.recorder.values[-1]).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_greys_and_blurs_by_the_plain_definition(seed, grey, blur):
    image = np.random.default_rng(seed).integers(0, 256, (9, 11, 3)).astype(np.uint8)
    rng = np.random.default_rng(seed)
    sigma = [rng.random(), rng.random(), rng.uniform(.1, 5)][2]
    wanted = image.astype(float)
    if grey: wanted = np.repeat((wanted*[.3, .59, .11]).sum(2, keepdims=True), 3, 2)
    if blur:
        x = np.arange(-2, 3)
        kernel = np.exp(-(x[:, None]**2 + x**2)/sigma**2)
        wide = np.pad(wanted, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        wanted = sum(k*wide[i:i + 9, j:j + 11] for (i, j), k in np.ndenumerate(kernel/kernel.sum()))
    made = recolour(image, np.random.default_rng(seed), float(grey), float(blur))
    assert made.dtype == np.uint8 and np.abs(made - wanted).max() <= .51
