"""Image sets, weak sets, augmentation and the stream of batches."""

import numpy as np
import pytest
import torch
from fastai.learner import Learner
from fastai.torch_core import default_device
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn

from spml_kit.core import UNLABELLED, VOC_CLASSES, VOID, Classes, SpmlError, rng_of
from spml_kit.files import write_index_png, write_json
from spml_kit.data.batches import MEAN_COLOUR, RoundLoader, augment, chosen_device, weak_dls
from spml_kit.data.images import FolderSet, SceneSet, VocSet, check_masks, folder_sets, reduce_labels, resize
from spml_kit.data.weak import Sample, WeakSet, check_weak_set, rescale
from spml_kit.data.clicks import animal_clicks
from spml_kit.data.annotations import Boxes, Keypoints, Points, Scribbles, Tags
from spml_kit.data.formats import write_annotation
from spml_kit.regions.oversegment import oversegment, prepare_regions
from spml_kit.infer.scores import score
from spml_kit.data.scenes import SCENE_CLASSES, make_scene

ANIMALS = Classes(('background', 'cat', 'cow', 'dog', 'horse', 'person', 'sheep'))


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

class Poisoned(SceneSet):
    "A set that fails when a mask is looked at"
    def _mask(self, i): raise AssertionError('a mask was opened')
    def mask(self, i): raise AssertionError('a mask was opened')
    def instances(self, i): raise AssertionError('instances were opened')


@pytest.mark.parametrize('kind', ['png', 'json', 'function'])
def test_given_annotation_never_opens_a_mask(tmp_path, kind):
    poisoned, open_ = Poisoned(2, size=64), SceneSet(2, size=64)
    for i, name in enumerate(open_.names):
        if kind == 'png': write_index_png(tmp_path/f'{name}.png', WeakSet(open_, 'scribbles').sample(i).labels)
        if kind == 'json': write_annotation(tmp_path/f'{name}.json', Points([[3, 4], [40, 50]], [0, 2]))
    weak = WeakSet(poisoned, (lambda i: Points([[3, 4], [40, 50]], [0, 2])) if kind == 'function' else tmp_path, regions=10)
    assert check_weak_set(weak)['images'] == 2
    list(weak_dls(weak, open_, bs=2, crop=32, steps=2).train)
    with pytest.raises(AssertionError, match='a mask was opened'): WeakSet(poisoned, 'scribbles').sample(0)


@pytest.mark.parametrize('kind', ['scribbles', 'points', 'full'])
def test_closed_masks_refuse_simulation(kind):
    with pytest.raises(SpmlError, match=f"'{kind}' is made from masks"): WeakSet(SceneSet(2, masks=False), kind)


@pytest.mark.parametrize('kind', ['scribbles', 'points'])
def test_simulated_labels_are_true_and_seeded(kind):
    s = SceneSet(3)
    a, b, c = (WeakSet(s, kind, seed=k) for k in (0, 0, 1))
    for i in range(3):
        labels = a.sample(i).labels
        drawn = labels != UNLABELLED
        assert drawn.any() and np.array_equal(labels[drawn], s.mask(i)[drawn])
        assert np.array_equal(labels, b.sample(i).labels)
        assert np.flatnonzero(a.sample(i).tags).tolist() == np.unique(labels[drawn]).tolist()
    assert any((a.sample(i).labels != c.sample(i).labels).any() for i in range(3))


def test_length_and_width_reach_the_annotator():
    s = SceneSet(3)
    count = lambda **kw: sum((WeakSet(s, 'scribbles', **kw).sample(i).labels != UNLABELLED).sum() for i in range(3))
    assert count(length=0.) < count(length=.5) < count() < count(width=6)


def test_xml_by_name_and_void_for_other_classes(voc, tmp_path):
    for name in 'ab':
        (tmp_path/f'{name}.xml').write_text('<annotation><size><width>40</width><height>30</height></size>'
            '<polygon><tag>person</tag><point><X>10</X><Y>10</Y></point><point><X>20</X><Y>10</Y></point></polygon>'
            '<polygon><tag>sofa</tag><point><X>10</X><Y>20</Y></point></polygon><polygon><tag>background</tag><point><X>30</X><Y>25</Y></point></polygon></annotation>')
    labels = WeakSet(VocSet(voc, classes=ANIMALS, masks=False), tmp_path).sample(0).labels
    assert labels[10, 15] == 5 and labels[20, 10] == VOID and labels[25, 30] == 0 and labels[2, 2] == UNLABELLED
    assert WeakSet(VocSet(voc, masks=False), tmp_path).sample(0).labels[20, 10] == 18


@pytest.mark.parametrize('file_ids', [False, True])
def test_ids_of_given_files(voc, tmp_path, file_ids):
    labels = np.full((30, 40), UNLABELLED, np.uint8)
    labels[5:9, 5:9], labels[12:15], labels[20:22] = (15 if file_ids else 5), (18 if file_ids else VOID), 0
    write_index_png(tmp_path/'a.png', labels)
    write_annotation(tmp_path/'b.json', Points([[10, 10]], [15 if file_ids else 5]))
    weak = WeakSet(VocSet(voc, classes=ANIMALS, masks=False), tmp_path, file_ids=file_ids)
    assert np.unique(weak.sample(0).labels).tolist() == [0, 5, UNLABELLED, VOID]
    assert weak.sample(1).labels[10, 10] == 5 and np.flatnonzero(weak.sample(1).tags).tolist() == [5]
    if file_ids:
        with pytest.raises(SpmlError, match='a.png: value 15 .*file_ids=True'): WeakSet(VocSet(voc, classes=ANIMALS), tmp_path).sample(0)


def test_255_for_nothing_drawn(folder):
    labels = np.full((24, 32), VOID, np.uint8); labels[4:8, 4:8], labels[16, 20:24], labels[0] = 1, 2, UNLABELLED
    for k in range(3): write_index_png(folder/'weak'/f'p{k}.png', labels)
    images = FolderSet(folder/'images', classes=['a', 'b', 'c'])
    kept, moved = (WeakSet(images, folder/'weak', remap255=r).sample(0).labels for r in (False, True))
    assert np.array_equal(kept, labels) and np.array_equal(moved, np.where(labels == VOID, UNLABELLED, labels))


def test_given_files_are_checked(folder):
    images = FolderSet(folder/'images', classes=['a', 'b', 'c'])
    weak = lambda: WeakSet(images, folder/'weak').sample(0)
    (folder/'weak').mkdir()
    with pytest.raises(SpmlError, match='weak: no .png, .json or .xml for p0'): weak()
    write_index_png(folder/'weak/p0.png', np.full((24, 32), 3))
    with pytest.raises(SpmlError, match='p0.png: value 3 is not a label: classes are 0..2'): weak()
    write_index_png(folder/'weak/p0.png', np.zeros((32, 24)))
    with pytest.raises(SpmlError, match='p0.png: label map is 32x24, its image 24x32'): weak()
    write_annotation(folder/'weak/p0.json', Points([[1, 1]], [1]))
    with pytest.raises(SpmlError, match=r"\['p0.png', 'p0.json'\] for p0; one is needed"): weak()
    (folder/'weak/p0.png').unlink()
    for xy, c, match in (([40, 1], 1, r'p0.json: point .* outside'), ([-4, 1], 1, r'p0.json: point .* outside'), ([1, 1], 3, 'p0.json: value 3 is not a label')):
        write_annotation(folder/'weak/p0.json', Points([xy], [c]))
        with pytest.raises(SpmlError, match=match): weak()
    with pytest.raises(SpmlError, match="'scribble' is neither"): WeakSet(images, 'scribble')


@pytest.mark.parametrize('bad, match', [(np.zeros((5, 5)), '5x5, its image 24x32'), (np.full((24, 32), 3), 'p0: value 3'), (None, 'two dimensions')])
def test_functions_are_checked(folder, bad, match):
    with pytest.raises(SpmlError, match=match): WeakSet(FolderSet(folder/'images', classes=['a', 'b', 'c']), lambda i: bad).sample(0)


@given(st.integers(20, 60), st.integers(20, 60), st.floats(0, 1), st.floats(0, 1), st.integers(5, 60))
@settings(max_examples=60, deadline=None)
def test_rescaled_points_hit_the_same_place(h, w, a, b, side):
    old = np.array([a*(w - 1), b*(h - 1)])
    new = (max(1, round(h*side/max(h, w))), max(1, round(w*side/max(h, w))))
    moved = rescale(Points([old], [1]), (h, w), new).xy[0]
    want = (old + .5)/[w, h]*[new[1], new[0]] - .5
    assert np.allclose(moved, np.maximum(want, 0)) and (moved <= np.array(new[::-1])).all()


def test_rescale_every_kind():
    old, new = (20, 40), (10, 20)
    assert rescale(Boxes([[4, 6, 20, 18]], [1]), old, new).boxes.tolist() == [[2, 3, 10, 9]]
    s = rescale(Scribbles([[[10, 4], [20, 8]]], [1]), old, new)
    assert s.strokes[0].tolist() == [[4.75, 1.75], [9.75, 3.75]] and s.width == 3
    assert rescale(Keypoints([[10, 4]], [3], [0]), old, new).xy.tolist() == [[4.75, 1.75]]
    assert rescale(Tags([2]), old, new).classes.tolist() == [2]


@pytest.mark.parametrize('ann, tags', [(Tags([1, 2]), [0, 1, 2]), (Boxes([[2, 2, 9, 9]], [2]), [0, 2]), (Keypoints([[3, 3]], [1], [0]), [1])])
def test_tags_name_what_the_annotation_names(folder, ann, tags):
    images = FolderSet(folder/'images', classes=['a', 'b', 'c'])
    assert np.flatnonzero(WeakSet(images, lambda i: ann).sample(0).tags).tolist() == tags
    assert np.flatnonzero(WeakSet(images, lambda i: ann, tags=lambda i: [i, 2]).sample(1).tags).tolist() == [1, 2]


def test_regions_from_count_folder_or_none(tmp_path):
    s = SceneSet(2)
    cache = prepare_regions(s, tmp_path/'r', n=25, progress=False)
    for i in range(2):
        want = oversegment(s.image(i), n=25)
        for how in (25, tmp_path/'r', str(tmp_path/'r'), cache):
            r = WeakSet(s, 'points', regions=how).sample(i).regions
            assert r.dtype == np.int32 and np.array_equal(r, want)
        assert WeakSet(s, 'points').sample(i).regions.max() == 0
    with pytest.raises(SpmlError, match=r'scene_000000.png: regions are 128x128, the image 64x64'): WeakSet(SceneSet(2, size=64), 'points', regions=cache).sample(0)


def test_decoded_once(monkeypatch):
    s = SceneSet(2, size=64)
    painted, paint = [], s._paint
    monkeypatch.setattr(s, '_paint', lambda i: painted.append(i) or paint(i))
    weak = WeakSet(s, 'scribbles', regions=9)
    for _ in range(3): weak.sample(0); weak.sample(1)
    n = len(painted)
    for _ in range(3): weak.sample(0); weak.sample(1)
    assert len(painted) == n


def test_memory_has_a_limit(monkeypatch):
    import spml_kit.data.images as d
    monkeypatch.setattr(d, 'CACHE_BYTES', 3*64*64*3)
    s = SceneSet(6, size=64)
    for i in range(6): assert np.array_equal(s.image(i), make_scene(i, 0, 64).image)
    assert 0 < s._memory.bytes <= d.CACHE_BYTES


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

def test_check_counts(folder):
    images = FolderSet(folder/'images', classes=['a', 'b', 'c'])
    def say(i):
        labels = np.full((24, 32), UNLABELLED)
        if i: labels[0, :5], labels[1, :3] = 0, 2
        return labels
    assert check_weak_set(WeakSet(images, say)) == {'images': 3, 'without labels': 1, 'labelled everywhere': 0, 'pixels': {'a': 10, 'b': 0, 'c': 6}, 'tags': {'a': 2, 'b': 0, 'c': 2}}


def test_check_by_tags(folder):
    images = FolderSet(folder/'images', classes=['a', 'b', 'c'])
    assert check_weak_set(WeakSet(images, lambda i: Tags([2])), by_tags=True)['tags'] == {'a': 3, 'b': 0, 'c': 3}
    with pytest.raises(SpmlError, match="none of 3 images is tagged with a class other than 'a'"): check_weak_set(WeakSet(images, lambda i: Tags([0])), by_tags=True)
    with pytest.raises(SpmlError, match="no pixel is labelled"): check_weak_set(WeakSet(images, lambda i: Tags([2])))


def test_check_names_every_bad_file(folder):
    (folder/'images/p1.png').write_bytes(b'no')
    for k in range(3): write_index_png(folder/'weak'/f'p{k}.png', np.full((24, 32), 77 if k == 2 else 1))
    with pytest.raises(SpmlError, match=r'2 of 3 images cannot be used: .*p1.png: not a readable image.*; .*p2.png: value 77'):
        check_weak_set(WeakSet(FolderSet(folder/'images', classes=['a', 'b', 'c']), folder/'weak'))


@pytest.mark.parametrize('value, match', [(UNLABELLED, 'no pixel is labelled'), (1, "only 'b' is labelled"), (VOID, 'no pixel is labelled.*100% is void.*remap255=True')])
def test_check_refuses_what_cannot_be_learnt(folder, value, match):
    with pytest.raises(SpmlError, match=match): check_weak_set(WeakSet(FolderSet(folder/'images', classes=['a', 'b', 'c']), lambda i: np.full((24, 32), value)))


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

@pytest.mark.parametrize("kind", ["boxes", "tags"])
def test_said_annotation_never_opens_a_mask(kind, voc_animals):
    for images in (SceneSet(3, masks=False), VocSet(voc_animals, "train", masks=False).take(3)):
        weak = WeakSet(images, kind)
        for i in range(3):
            s = weak.sample(i)
            assert s.tags[0] and s.tags[1:].any() and set(np.unique(s.labels)) <= ({UNLABELLED} if kind == "tags" else {0, UNLABELLED})


def test_boxes_of_scenes_are_true():
    images = SceneSet(6)
    weak = WeakSet(images, "boxes")
    for i in range(6):
        s, mask = weak.sample(i), images.mask(i)
        assert (mask[s.labels == 0] == 0).all() # outside all boxes is background
        assert np.flatnonzero(s.tags).tolist() == sorted({0, *np.unique(mask[mask < VOID]).tolist()})
        assert all((mask[y0:y1, x0:x1] == c).any() for (x0, y0, x1, y1), c in zip(weak.boxes(i).boxes.astype(int), weak.boxes(i).classes))


def test_boxes_follow_the_reduction(voc_animals):
    whole, half = (WeakSet(VocSet(voc_animals, "train", size, masks=False).take(4), "boxes") for size in (None, 160))
    for i in range(4):
        ratio = np.array(half.sample(i).labels.shape)/np.array(whole.sample(i).labels.shape)
        assert np.allclose(half.boxes(i).boxes, whole.boxes(i).boxes*np.tile(ratio[::-1], 2))


def test_boxes_that_fill_the_image_do_so_when_it_is_reduced():
    for h in range(150, 501):
        old = (h, 500)
        new = round(h*192/500), 192
        box = rescale(Boxes([[0, 0, 500, h]], [1]), old, new).boxes[0]
        assert box.tolist() == [0, 0, new[1], new[0]]


def test_objects_of_other_classes_are_no_background(voc_animals):
    few = WeakSet(VocSet(voc_animals, "train", classes=Classes(("background", "dog")), masks=False), "boxes")
    i = few.names.index("2007_000063") # a dog before a chair
    s = few.sample(i)
    assert few.boxes(i).classes.tolist() == [1] and np.flatnonzero(s.tags).tolist() == [0, 1]
    assert (s.labels[:240, 48:274] == UNLABELLED).all() and (s.labels[:, :47] == 0).all()


def test_relabelled_set_shares_images_regions_and_tags(monkeypatch):
    weak = WeakSet(SceneSet(2), "tags", regions=20)
    regions = weak.sample(0).regions
    monkeypatch.setattr("spml_kit.data.weak.oversegment", None) # regions are not made anew
    other = weak.relabel(lambda i: np.full((128, 128), i))
    assert (other.sample(0).regions == regions).all() and (other.sample(0).labels == 0).all()
    assert (other.sample(0).tags == weak.sample(0).tags).all() and (weak.sample(0).labels == UNLABELLED).all()


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


@pytest.mark.parametrize('size', [40, 160, 320])
def test_a_class_that_was_drawn_is_there_at_any_size(tmp_path, size):
    "Dots of 6 pixels and thin strokes on a large picture, in a label PNG"
    labels = np.full((1500, 2000), UNLABELLED, np.uint8)
    labels[700:706, 903:909], labels[1203, 50:1900], labels[20:1400, 1777] = 1, 0, 2
    write_index_png(tmp_path/'labels'/'a.png', labels)
    (tmp_path/'images').mkdir()
    Image.fromarray(photo(1500, 2000)).save(tmp_path/'images'/'a.jpg')
    (tmp_path/'classes.txt').write_text('background\ncat\ndog\n')
    s = WeakSet(folder_sets(tmp_path, size)[0], tmp_path/'labels').sample(0)
    assert s.tags.all() and [(s.labels == c).any() for c in range(3)] == [True]*3
    assert (s.labels[:, round(1777/2000*size) - 1:round(1777/2000*size) + 1] == 2).sum() >= .85*s.labels.shape[0]


def test_marks_that_lie_under_others_are_told(folder):
    images = FolderSet(folder/'images', classes=['a', 'b', 'c'])
    both = WeakSet(images, lambda i: Points([[5, 5], [5, 5], [20, 20]], [1, 2, 0]))
    with pytest.warns(UserWarning, match='3 of 3 images all marks of a class lie under others.*p0: b'): check_weak_set(both)
    assert both.sample(0).tags.tolist() == [True, True, True]


@pytest.mark.parametrize('remap, says', [(None, '9[0-9]% of all pixels are 255.*remap255=True.*remap255=False'), (True, None), (False, None), ('yes', "remap255='yes'"), (1, 'remap255=1')])
def test_mostly_void_labels_are_asked_about(folder, remap, says):
    images = FolderSet(folder/'images', classes=['a', 'b', 'c'])
    labels = np.full((24, 32), VOID)
    labels[:2], labels[4:5, :10] = 0, 1
    for name in images.names: write_index_png(folder/'weak'/f'{name}.png', labels)
    if says is None: check_weak_set(WeakSet(images, folder/'weak', remap255=remap)); return
    with pytest.raises(SpmlError, match=says): check_weak_set(WeakSet(images, folder/'weak', remap255=remap))


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
    assert '4 of 5 files' in text and 'P1 differs from it in upper and lower case' in text and 'p2.heic is of a kind that is not read here' in text and 'zebra.png' in text


def test_an_error_of_any_kind_ends_no_check(folder):
    images = FolderSet(folder/'images', classes=['a', 'b', 'c'])
    def labels(i):
        if i == 1: raise ZeroDivisionError('by nought')
        return np.full((24, 32), 99 if i == 2 else 1)
    with pytest.raises(SpmlError, match='2 of 3 images cannot be used: p1: ZeroDivisionError: by nought; .*value 99'): check_weak_set(WeakSet(images, labels))


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


def test_agreement_is_not_called_miou(folder):
    weak = WeakSet(FolderSet(folder/'images', folder/'masks'), 'scribbles')
    assert weak_dls(weak, weak).score_name == 'agreement' and weak_dls(weak, weak.images).score_name == weak_dls(weak, WeakSet(weak.images, 'full')).score_name == 'miou'
