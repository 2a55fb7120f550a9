"""Image sets, weak sets, augmentation and the stream of batches."""

import numpy as np
import pytest
from conftest import photo
import torch
import fastai.callback.progress # noqa: F401, brings no_bar
from fastai.learner import Learner
from fastai.torch_core import default_device
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn

from spml_kit.core import UNLABELLED, VOC_CLASSES, VOID, Classes, SpmlError, rng_of
from spml_kit.files import write_index_png, write_json
from spml_kit.data.batches import MEAN_COLOUR, RoundLoader, augment, chosen_device, weak_dls
from spml_kit.data.images import FolderSet, SceneSet, VocSet, check_masks, folder_sets, reduce_labels, resize
from spml_kit.data.weak import Sample, WeakSet
from spml_kit.data.clicks import animal_clicks
from spml_kit.data.annotations import Points
from spml_kit.infer.scores import score
from spml_kit.data.scenes import SCENE_CLASSES, make_scene

ANIMALS = Classes(('background', 'cat', 'cow', 'dog', 'horse', 'person', 'sheep'))


# image sets

def test_voc_reads_raw_indices_from_both_folders(voc):
    s = VocSet(voc, 'train_aug')
    assert s.names == ['a', 'b', 'c'] and len(s.classes) == 21
    for i in range(3): assert np.unique(s.mask(i)).tolist() == [0, 9 + i, 15, 255]
    assert s.image(0).shape == (30, 40, 3) and s.image(0).dtype == s.mask(0).dtype == np.uint8


def test_voc_some_classes(voc):
    classes = Classes(('background', 'person', 'cow')) # cow is 10 in the files
    s = VocSet(voc, 'train_aug', classes=classes)
    full = VocSet(voc, 'train_aug')
    for i in range(3):
        want = np.full(256, VOID); want[[0, 15, 10]] = 0, 1, 2
        assert np.array_equal(s.mask(i), want[full.mask(i)])
    assert 2 in s.mask(1) and 2 not in s.mask(0)
    with pytest.raises(SpmlError, match="'unicorn' is not one of"): VocSet(voc, classes=Classes(('background', 'unicorn')))


@pytest.mark.parametrize('max_size, size', [(None, (30, 40)), (20, (15, 20)), (400, (30, 40)), (7, (5, 7))])
def test_voc_max_size(voc, max_size, size):
    s = VocSet(voc, max_size=max_size)
    assert s.image(0).shape == (*size, 3) and s.mask(0).shape == size and s.stored_size(0) == (30, 40)
    assert set(np.unique(s.mask(0))) <= {0, 9, 15, 255}


def test_voc_names_what_is_missing(voc):
    with pytest.raises(SpmlError, match=r"val.txt: no such list; there are \['train', 'train_aug'\]"): VocSet(voc, 'val')
    (voc/'SegmentationClass/a.png').unlink(); (voc/'JPEGImages/b.jpg').write_bytes(b'no')
    s = VocSet(voc)
    with pytest.raises(SpmlError, match='a.png: no mask, nor in SegmentationClassAug'): s.mask(0)
    with pytest.raises(SpmlError, match='b.jpg: not a readable image'): s.image(1)
    write_index_png(voc/'SegmentationClass/a.png', np.full((30, 40), 21))
    with pytest.raises(SpmlError, match='a.png: value 21 is not a label'): s.mask(0)
    write_index_png(voc/'SegmentationClass/a.png', np.full((30, 40), UNLABELLED))
    with pytest.raises(SpmlError, match='a.png: value 254'): s.mask(0)


def test_voc_download_goes_through_torchvision(tmp_path, monkeypatch):
    import torchvision.datasets
    calls = []
    monkeypatch.setattr(torchvision.datasets, 'VOCSegmentation', lambda root, year, download: calls.append((root, year, download)))
    assert VocSet.download(tmp_path) == tmp_path/'VOCdevkit'/'VOC2012' and calls == [(str(tmp_path), '2012', True)]


def test_voc_photographs(voc_animals):
    s = VocSet(voc_animals, 'val', max_size=160)
    assert len(s) == 445
    person = next(i for i in range(len(s)) if 15 in s.mask(i)) # raw indices: as luminance 15 would be another number
    raw = np.array(Image.open(voc_animals/'SegmentationClass'/f'{s.names[person]}.png'))
    assert set(np.unique(s.mask(person))) <= set(np.unique(raw)) and max(s.image(person).shape) == 160


def test_scenes():
    s = SceneSet(3, seed=1, size=64, start=5)
    scene = make_scene(6, 1, 64)
    assert np.array_equal(s.image(1), scene.image) and np.array_equal(s.mask(1), scene.mask) and np.array_equal(s.instances(1), scene.instances)
    assert s.classes is SCENE_CLASSES and len(s) == 3 and s.names[1] == 'scene_000006'
    with pytest.raises(SpmlError, match='no images'): SceneSet(0)
    closed = SceneSet(3, masks=False)
    closed.image(0)
    for f in (closed.mask, closed.instances):
        with pytest.raises(SpmlError, match='masks of this set are closed'): f(0)


def test_folder_counts_or_reads_classes(folder):
    assert FolderSet(folder/'images', folder/'masks').classes.names == ('background', 'class_1', 'class_2')
    (folder/'classes.txt').write_text('ground\ncat\n\ndog\nfish\n')
    assert FolderSet(folder/'images', folder/'masks').classes.names == ('ground', 'cat', 'dog', 'fish')
    assert FolderSet(folder/'images').classes.names == ('ground', 'cat', 'dog', 'fish')
    assert FolderSet(folder/'images', classes=['a', 'b', 'c']).classes.names == ('a', 'b', 'c')
    s = FolderSet(folder/'images', folder/'masks', names=['p2', 'p0'])
    assert s.names == ['p2', 'p0'] and np.array_equal(s.image(1), photo(24, 32, 0))


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


def test_pairs_by_name():
    pairs = lambda *names, **kw: Classes(('background', *names), **kw).swaps
    assert pairs('left arm', 'right arm', 'arm', 'leg_right', 'leg_left') == (('left arm', 'right arm'), ('leg_right', 'leg_left'))
    assert pairs('left', 'right') == (('left', 'right'),)
    assert pairs('left arm', 'left leg', 'upright', 'upleft', 'bright', 'righteous', 'lefteous') == () # one of two, or no such word
    assert pairs('Left arm', 'left arm', 'right arm') == (('left arm', 'right arm'),) # nobody is in two pairs
    assert pairs('left arm', 'right arm', swaps=()) == ()
    assert pairs('left', 'right', 'up', swaps=(('left', 'up'),)) == (('left', 'up'),)


def test_folder_names_what_is_wrong(folder):
    images, masks = folder/'images', folder/'masks'
    def refused(match, f=lambda: FolderSet(images, masks)):
        with pytest.raises(SpmlError, match=match): f()
    refused('nowhere: no such folder', lambda: FolderSet(folder/'nowhere'))
    refused('nowhere: no such folder', lambda: FolderSet(images, folder/'nowhere'))
    refused(r'classes.txt: no such file.*or give classes', lambda: FolderSet(images))
    refused('p7: no image of this name', lambda: FolderSet(images, masks, names=['p7', 'p0']))
    refused(r'p0.png: value 2 is not a label: classes are 0..1', lambda: FolderSet(images, masks, classes=['a', 'b']).mask(0))
    refused('p0: the masks of this set are closed', lambda: FolderSet(images, classes=['a', 'b']).mask(0))
    write_index_png(masks/'p1.png', np.zeros((24, 31)))
    refused(r'p1.png: label map is 24x31, its image 24x32', lambda: FolderSet(images, masks).mask(1))
    Image.fromarray(photo(24, 32)).save(masks/'p1.png')
    refused('p1.png: colour .* is no class.s', lambda: FolderSet(images, masks, classes=['a', 'b', 'c']).mask(1))
    (masks/'p1.png').unlink()
    refused(r'p1.png: no such mask \(1 of 3 images have none\)')
    whole = (images/'p2.png').read_bytes(); (images/'p2.png').write_bytes(whole[:len(whole)//2])
    refused('p2.png: not a readable image', lambda: FolderSet(images, classes=['a', 'b']).image(2))
    Image.fromarray(photo(24, 32)).save(images/'p0.jpg')
    refused('another image has the same stem')
    (folder/'empty').mkdir()
    refused('empty: no images here', lambda: FolderSet(folder/'empty'))


# weak sets


# clicks on animals

@pytest.fixture
def clicked(voc):
    write_json(voc/'Points/animal_pose_points.json', {'a': [
        dict(cls='dog', bbox=[10, 8, 25, 20], points=[[12, 9, 'nose'], [20, 18, 'withers']]), dict(cls='cow', bbox=[30, 2, 38, 12], points=[[33, 5, 'nose']])]})
    return voc


def test_clicks_are_points_of_named_classes(clicked):
    p = animal_clicks(VocSet(clicked, classes=Classes(('background', 'dog', 'cat')), masks=False))(0)
    assert p.xy.tolist() == [[12, 9], [20, 18]] and p.classes.tolist() == [1, 1]
    assert len(animal_clicks(VocSet(clicked))(0)) == 3 and len(animal_clicks(VocSet(clicked))(1)) == 0
    with pytest.raises(SpmlError, match="background 'all'"): animal_clicks(VocSet(clicked), background='all')


@pytest.mark.parametrize('seed', range(5))
def test_background_clicks_lie_at_the_border_outside_boxes(clicked, seed):
    p = animal_clicks(VocSet(clicked, masks=False), background='border', seed=seed)(0)
    ground = p.xy[p.classes == 0]
    assert len(ground) == 4
    for x, y in ground:
        assert min(x, y, 39 - x, 29 - y) < 8
        assert not (10 <= x <= 25 and 8 <= y <= 20) and not (30 <= x <= 38 and 2 <= y <= 12)
    assert np.array_equal(p.xy, animal_clicks(VocSet(clicked, masks=False), background='border', seed=seed)(0).xy)


def test_clicks_by_people(voc_animals):
    s, closed = (VocSet(voc_animals, 'val', max_size=160, classes=ANIMALS, masks=m) for m in (True, False))
    weak = WeakSet(closed, animal_clicks(closed, width=1, background='border'))
    right, ground = [], []
    for i in range(0, 445, 15):
        labels, mask = weak.sample(i).labels, s.mask(i)
        right.append((mask == labels)[(labels > 0) & (labels < 7) & (mask != VOID)]); ground.append((mask == 0)[(labels == 0) & (mask != VOID)])
    right, ground = np.concatenate(right), np.concatenate(ground)
    assert len(right) > 200 and right.mean() > .8 and len(ground) > 50 and ground.mean() > .8


# validation


# augmentation

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


# batches

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


# what the images bring along


# what outside files may hold

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 40), st.integers(0, 12), st.integers(2, 7))
def test_marks_survive_reduction(seed, h, w, n, classes):
    "Against the plain definition: nearest where it is labelled, else the most frequent label of the cell, and no class is lost that has a cell to itself"
    rng, (H, W) = np.random.default_rng(seed), (97, 120)
    labels = np.full((H, W), UNLABELLED, np.uint8)
    for _ in range(n): labels[rng.integers(H), rng.integers(W)] = rng.choice([*range(classes), VOID], p=[.9/classes]*classes + [.1])
    out, near, y, x = reduce_labels(labels, (h, w)), resize(labels, (h, w)), np.arange(H)*h//H, np.arange(W)*w//W
    moved, total = 0, set(np.unique(labels[labels < UNLABELLED]))
    for i in range(h):
        for j in range(w):
            votes = np.bincount(labels[np.ix_(y == i, x == j)].ravel(), minlength=256)[:UNLABELLED]
            if out[i, j] == near[i, j] and near[i, j] != UNLABELLED: continue
            if not votes.any(): assert out[i, j] == near[i, j]
            elif near[i, j] != UNLABELLED or votes[out[i, j]] < votes.max(): moved += 1 # a class that had no other place
            assert out[i, j] in (UNLABELLED, VOID) or votes[out[i, j]] or near[i, j] == out[i, j]
    assert moved <= len(total) and set(np.unique(out)) <= total | {UNLABELLED, VOID}
    if h*w >= 400 and n <= 3: assert total <= set(np.unique(out))


@pytest.mark.parametrize('name', ['../JPEGImages/a', '/etc/passwd', r'..\a', 'x/../../a'])
def test_names_of_lists_stay_inside(voc, name):
    (voc/'ImageSets/Segmentation/train.txt').write_text(f'a\n{name}\n')
    with pytest.raises(SpmlError, match='must be a path below its folder'): VocSet(voc)


def test_lists_are_read_as_editors_write_them(voc):
    listed = voc/'ImageSets/Segmentation/train.txt'
    listed.write_bytes('\ufeff# mine\r\na\r\n\r\nb\r\n'.encode())
    assert VocSet(voc).names == ['a', 'b']
    listed.write_text('a\nb\na\n')
    with pytest.raises(SpmlError, match='train.txt: 1 names stand there more than once, the first is a'): VocSet(voc)


def test_labels_without_image_are_named(tmp_path):
    "A misspelt one, one in other letters, one whose image is of another kind"
    for k, name in enumerate(('p0.jpg', 'P1.jpg')):
        (tmp_path/'images').mkdir(exist_ok=True)
        Image.fromarray(photo(24, 32, k)).save(tmp_path/'images'/name)
    (tmp_path/'images'/'p2.heic').write_bytes(b'x')
    (tmp_path/'classes.txt').write_text('background\ncat\n')
    for name in ('p0', 'p1', 'p2', 'zebra', 'cafe\u0301'): write_index_png(tmp_path/'labels'/f'{name}.png', np.eye(24, 32))
    with pytest.warns(UserWarning) as said: folder_sets(tmp_path)
    (text,) = [str(w.message) for w in said if 'belong to no image' in str(w.message)]
    assert '4 of 5 files' in text and 'P1 differs from it in upper and lower case' in text and 'p2.heic: HEIC is not read here: convert it' in text and 'zebra.png' in text


@pytest.mark.parametrize('table', [None, 'background\npolyp\n'])
def test_masks_of_0_and_255_are_refused(tmp_path, table):
    for k in range(2):
        (tmp_path/'images').mkdir(exist_ok=True)
        Image.fromarray(photo(24, 32, k)).save(tmp_path/'images'/f'{k}.png')
        write_index_png(tmp_path/'masks'/f'{k}.png', 255*np.eye(24, 32, dtype=int))
    if table: (tmp_path/'classes.txt').write_text(table)
    with pytest.raises(SpmlError, match='no mask holds a class other than background.*write 1 in its place'): check_masks(FolderSet(tmp_path/'images', tmp_path/'masks'))
    with pytest.raises(SpmlError, match='write 1 in its place'): score([np.zeros((24, 32), np.uint8)]*2, FolderSet(tmp_path/'images', tmp_path/'masks'), progress=False)


def test_masks_that_are_void_for_the_most_are_warned_of(folder):
    images = FolderSet(folder/'images', folder/'masks')
    check_masks(images)
    for name in images.names: write_index_png(folder/'masks'/f'{name}.png', np.where(np.arange(24)[:, None] < 9, VOID, np.eye(24, 32)).astype(int))
    with pytest.warns(UserWarning, match='3[0-9]% of the pixels of 3 masks are void'): check_masks(FolderSet(folder/'images', folder/'masks'))


@pytest.mark.parametrize('name', [r'$\frac{bad$', 'a\nb', 'a\tb', '', ' ', 'a\x00', '\ufeffa', 5])
def test_class_names_that_no_picture_bears(name):
    with pytest.raises(SpmlError, match='class name'): Classes(('background', name))


# classes and files of one's own

OWN = Classes(('background', 'screw', 'nut'))


@pytest.mark.parametrize('table', [{'labelmap.txt': '# label:color_rgb:parts:actions\nbackground:0,0,0::\nscrew:128,0,0::\nnut:0,128,0::\n'}, {'class_names.txt': '_background_\nscrew\nnut\n'}, {'classes.txt': 'background\nscrew\nnut\n'}], ids=lambda t: [*t][0])
@pytest.mark.parametrize('masks', ['SegmentationClass', 'SegmentationClassPNG', 'SegmentationClassAug'])
@pytest.mark.parametrize('suffix', ['jpg', 'JPG', 'png', 'tif'])
def test_voc_layout_with_classes_of_ones_own(tmp_path, table, masks, suffix):
    for f in ('JPEGImages', masks, 'ImageSets/Main'): (tmp_path/f).mkdir(parents=True)
    for name, text in table.items(): (tmp_path/name).write_text(text)
    (tmp_path/'ImageSets/Main/train.txt').write_text('a 1\nb -1\n')
    Image.fromarray(photo(20, 30)).save(tmp_path/'JPEGImages'/f'a.{suffix}')
    mask = np.random.default_rng(0).integers(0, 3, (20, 30), dtype=np.uint8)
    if 'labelmap.txt' in table: Image.fromarray(OWN.palette[mask]).save(tmp_path/masks/'a.png') # as CVAT writes it
    else: write_index_png(tmp_path/masks/'a.png', mask, OWN.palette)
    s = VocSet(tmp_path)
    assert s.names == ['a'] and s.classes.names[1:] == ('screw', 'nut') and np.array_equal(s.mask(0), mask) and s.image(0).shape == (20, 30, 3)
    some = VocSet(tmp_path, classes=Classes((s.classes.names[0], 'nut')))
    assert np.array_equal(some.mask(0), np.array([0, VOID, 1])[mask])


def test_boxes_as_files_have_them(voc):
    "Counted from 0, beyond the border, without a size; no object at all"
    (voc/'Annotations').mkdir()
    (voc/'Annotations/a.xml').write_text('<annotation><object><name>person</name><bndbox><xmin>0</xmin><ymin>3</ymin><xmax>41</xmax><ymax>20</ymax></bndbox></object></annotation>')
    (voc/'Annotations/b.xml').write_text('<annotation><filename>b.jpg</filename></annotation>')
    weak = WeakSet(VocSet(voc, masks=False), 'boxes')
    assert weak.boxes(0).boxes.tolist() == [[0, 3, 40, 20]] and (weak.sample(0).labels[3:20] == UNLABELLED).all() and (weak.sample(1).labels == 0).all()
    assert np.flatnonzero(weak.sample(1).tags).tolist() == [0]


@pytest.mark.parametrize('ends, asked', [([3, 5, 41], True), ([1, 2, 3], True), ([41], True), ([1, 2, 1], False), ([3, 3, 3], False), ([5], False), ([300], True)])
def test_objects_are_not_taken_for_classes(tmp_path, ends, asked):
    (tmp_path/'images').mkdir()
    for k, n in enumerate(ends):
        Image.fromarray(photo(24, 32, k)).save(tmp_path/'images'/f'{k}.png')
        write_index_png(tmp_path/'masks'/f'{k}.png', np.minimum(np.arange(24*32)//2, n).reshape(24, 32))
    make = lambda: FolderSet(tmp_path/'images', tmp_path/'masks')
    if not asked: assert len(make().classes) == max(ends) + 1; return
    with pytest.raises(SpmlError, match=f'masks: the numbers of every mask run from 1 without a gap, up to {max(ends)}. Are they objects.*classes.txt'): make()
    (tmp_path/'classes.txt').write_text('\n'.join(f'c{k}' for k in range(50)))
    assert len(make().classes) == 50


def test_numbers_with_gaps_are_classes(tmp_path):
    (tmp_path/'images').mkdir()
    for k in range(3):
        Image.fromarray(photo(24, 32, k)).save(tmp_path/'images'/f'{k}.png')
        write_index_png(tmp_path/'masks'/f'{k}.png', np.where(np.arange(24)[:, None] < 9, 4*k + 2, np.zeros((24, 32), int)))
    assert len(FolderSet(tmp_path/'images', tmp_path/'masks').classes) == 11


@pytest.mark.parametrize('mask', ['p0.PNG', 'p0.tif', 'p0.bmp', 'p0.jpg.png'])
def test_masks_of_any_ending(folder, mask):
    true = FolderSet(folder/'images', folder/'masks').mask(0)
    (folder/'masks/p0.png').unlink(); Image.fromarray(true).save(folder/'masks'/mask)
    assert np.array_equal(FolderSet(folder/'images', folder/'masks').mask(0), true)
    Image.fromarray(true).save(folder/'masks'/'p0.png')
    with pytest.raises(SpmlError, match='a second mask of one image'): FolderSet(folder/'images', folder/'masks')
    for name in (mask, 'p0.png'): (folder/'masks'/name).unlink()
    Image.fromarray(true).save(folder/'masks'/'p0.jpg')
    with pytest.raises(SpmlError, match='p0.png: no such mask.*p0.jpg is no mask, since JPEG changes'): FolderSet(folder/'images', folder/'masks')


@pytest.mark.parametrize('raw, names', [('background\ncat\n', 2), ('\ufeffbackground\r\ncat\r\n', 2), ('# mine\n\nbackground\n\ncat', 2), ('__ignore__\n_background_\ncat\n', 2), ('0 background\n1 cat', 2), ('0: background\n1: cat', 2), ('background\nblack cat\n', 2)])
@pytest.mark.parametrize('name', ['classes.txt', 'class_names.txt', 'labels.txt'])
def test_tables_of_classes_as_they_occur(folder, raw, names, name):
    (folder/name).write_text(raw, encoding='utf-8', newline='')
    table = FolderSet(folder/'images').classes.names
    assert len(table) == names and table[0].strip('_') == 'background' and table[1].endswith('cat')


def test_a_table_in_latin_1(folder):
    (folder/'classes.txt').write_bytes('background\nB\xe4r\n'.encode('latin-1'))
    with pytest.raises(SpmlError, match='classes.txt: byte 13 is no UTF-8 text.*save the file as UTF-8'): FolderSet(folder/'images')


@pytest.mark.parametrize('skip, named, other', [((), [15, 15, 12], 0), (('difficult',), [15, 12], 1), (('difficult', 'truncated'), [12], 2)])
def test_flagged_objects_are_no_background(voc, skip, named, other):
    box = lambda name, x, flag='': f'<object><name>{name}</name>{flag}<bndbox><xmin>{x}</xmin><ymin>3</ymin><xmax>{x + 5}</xmax><ymax>20</ymax></bndbox></object>'
    (voc/'Annotations').mkdir()
    (voc/'Annotations/a.xml').write_text(f"<annotation>{box('person', 2, '<difficult>1</difficult>')}{box('person', 12, '<truncated>1</truncated>')}{box('dog', 22, '<difficult>0</difficult>')}</annotation>")
    images = VocSet(voc, masks=False, skip=skip)
    assert images.boxes(0).classes.tolist() == named and len(images.other_boxes(0)) == other
    labels = WeakSet(images, 'boxes').sample(0).labels
    assert (labels[5, [3, 13, 23]] == UNLABELLED).all() and (labels[5, [0, 9, 30]] == 0).all()
