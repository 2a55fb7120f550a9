"""What was said about images: simulated, given, drawn; at the size of training."""
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_importers import H, SQUARE, W, labelme, picture, shape
from conftest import FIXTURES, photo
from hypothesis import given, settings, strategies as st
from PIL import Image

from spml_kit.core import UNLABELLED, VOID, Classes, SpmlError
from spml_kit.files import write_index_png, write_json
from spml_kit.data.annotations import Boxes, Keypoints, Points, Scribbles, Tags
from spml_kit.data.batches import weak_dls
from spml_kit.data.body_parts import PartScenes
from spml_kit.data.formats import drawn_labels, write_annotation
from spml_kit.data.images import FolderSet, SceneSet, VocSet, folder_sets, reduce_labels, resize
from spml_kit.data.keypoints import scaled, simulate_keypoints
from spml_kit.data.weak import WeakSet, check_weak_set, codes_as_unlabelled, drawn_at, label_file, rescale
from spml_kit.look.drawings import Mark, to_annotations, write_drawing
from spml_kit.regions.oversegment import oversegment, prepare_regions

ANIMALS = Classes(('background', 'cat', 'cow', 'dog', 'horse', 'person', 'sheep'))
THREE = Classes(('background', 'cat', 'dog'))


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
    with pytest.raises(SpmlError, match=r"\['p0.png', 'p0.json'\] for p0; it needs one file"): weak()
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
    with pytest.warns(UserWarning, match='3 of 3 images other marks hide all marks of a class.*p0: b'): check_weak_set(both)
    assert both.sample(0).tags.tolist() == [True, True, True]


@pytest.mark.parametrize('remap, says', [(None, '9[0-9]% of all pixels are 255.*remap255=True.*remap255=False'), (True, None), (False, None), ('yes', "remap255='yes'"), (1, 'remap255=1')])
def test_mostly_void_labels_are_asked_about(folder, remap, says):
    images = FolderSet(folder/'images', classes=['a', 'b', 'c'])
    labels = np.full((24, 32), VOID)
    labels[:2], labels[4:5, :10] = 0, 1
    for name in images.names: write_index_png(folder/'weak'/f'{name}.png', labels)
    if says is None: check_weak_set(WeakSet(images, folder/'weak', remap255=remap)); return
    with pytest.raises(SpmlError, match=says): check_weak_set(WeakSet(images, folder/'weak', remap255=remap))


def test_an_error_of_any_kind_ends_no_check(folder):
    images = FolderSet(folder/'images', classes=['a', 'b', 'c'])
    def labels(i):
        if i == 1: raise ZeroDivisionError('by nought')
        return np.full((24, 32), 99 if i == 2 else 1)
    with pytest.raises(SpmlError, match='2 of 3 images cannot be used: p1: ZeroDivisionError: by nought; .*value 99'): check_weak_set(WeakSet(images, labels))


def test_agreement_is_not_called_miou(folder):
    weak = WeakSet(FolderSet(folder/'images', folder/'masks'), 'scribbles')
    assert weak_dls(weak, weak).score_name == 'agreement' and weak_dls(weak, weak.images).score_name == weak_dls(weak, WeakSet(weak.images, 'full')).score_name == 'miou'


# drawings, at the size of training

def project(root, size, marks, brush=3, labels=None):
    "A folder as the annotator leaves it"
    (root/'images').mkdir(parents=True)
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(root/'images'/'a.png', compress_level=1)
    (root/'classes.txt').write_text('background\ncat\ndog\n')
    said = to_annotations(marks, brush)
    write_drawing(root, 'a', said, drawn_labels(said, size), THREE.palette)
    return said


marks_in = lambda h, w: st.lists(st.tuples(st.sampled_from(['scribbles', 'points', 'boxes']), st.integers(0, 2), st.lists(st.tuples(st.floats(0, w - 1), st.floats(0, h - 1)), min_size=2, max_size=4)), min_size=1, max_size=5).map(
    lambda rows: [Mark(k, c, xy[:1] if k == 'points' else xy if k == 'scribbles' else [xy[0], (xy[0][0] + 3, xy[0][1] + 3)]) for k, c, xy in rows if k != 'boxes' or (xy[0][0] + 3 <= w and xy[0][1] + 3 <= h)]).filter(len)


@settings(max_examples=40, deadline=None)
@given(marks_in(240, 320), st.integers(9, 240))
def test_drawings_are_drawn_at_the_size_of_training(tmp_path_factory, marks, size):
    "Against the plain definition: each kind, moved to the smaller image, over the one before; and no class that was drawn is lost"
    root = tmp_path_factory.mktemp('p')
    said = project(root, (240, 320), marks)
    train, _ = folder_sets(root, size)
    s, small = WeakSet(train, root/'labels').sample(0), train.image(0).shape[:2]
    plain = np.full(small, UNLABELLED, np.uint8)
    for kind in ('boxes', 'scribbles', 'points'):
        if kind not in said: continue
        more = rescale(said[kind], (240, 320), small).to_labels(small)
        plain = np.where(more == UNLABELLED, plain, more)
    full = drawn_labels(said, (240, 320)) if {'scribbles', 'points'} & said.keys() else plain
    differs = s.labels != plain
    assert not differs.any() or {*np.unique(s.labels[differs])} <= {*np.unique(full)} - {*np.unique(plain)} # put back
    if small[0]*small[1] >= 200 and {'scribbles', 'points'} & said.keys(): assert {*np.unique(full[full < UNLABELLED])} <= {*np.unique(s.labels)}


@pytest.mark.parametrize('size', [160, 320])
def test_a_photograph_of_12_megapixels_keeps_its_marks(tmp_path, size):
    "The kit's annotator, brush 3: strokes and a dot; and within a second and a half"
    marks = [Mark('points', 2, [(1341, 612)]), Mark('scribbles', 0, [(50, 60), (300, 2900)]), Mark('scribbles', 1, [(610, 905), (3905, 1013)])]
    said = project(tmp_path, (3000, 4000), marks)
    train, _ = folder_sets(tmp_path, size)
    train.image(0)
    begun = time.process_time()
    s = WeakSet(train, tmp_path/'labels').sample(0)
    assert time.process_time() - begun < 6 # a quiet core needs less than one
    small = s.labels.shape
    assert s.tags.all() and (s.labels == drawn_labels({k: rescale(a, (3000, 4000), small) for k, a in said.items()}, small)).all()
    assert (s.labels == 1).sum() >= 2*.8*small[1] # three pixels wide, over four fifths of the picture
    for kind in ('scribbles', 'points'): (tmp_path/kind/'a.json').unlink() # a label map of anybody else
    s = WeakSet(train, tmp_path/'labels').sample(0)
    assert s.tags.all() and all((s.labels == c).any() for c in range(3)) and (s.labels == 1).sum() >= .75*small[1]


def test_a_label_map_that_was_changed_counts_more_than_the_drawing(tmp_path):
    project(tmp_path, (240, 320), [Mark('scribbles', 0, [(5, 5), (200, 5)]), Mark('scribbles', 1, [(5, 100), (200, 100)])])
    other = np.full((240, 320), UNLABELLED, np.uint8); other[200:210], other[:10] = 2, 0
    write_index_png(tmp_path/'labels'/'a.png', other, THREE.palette)
    for broken in (False, True):
        if broken: (tmp_path/'scribbles'/'a.json').write_text('{}')
        s = WeakSet(folder_sets(tmp_path, 80)[0], tmp_path/'labels').sample(0)
        assert np.array_equal(s.labels, reduce_labels(other, (60, 80))) and s.tags.tolist() == [True, False, True]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 60))
def test_dense_maps_are_reduced_by_nearest(seed, h, w):
    labels = np.random.default_rng(seed).choice([0, 1, 2, VOID], (60, 60)).astype(np.uint8)
    assert np.array_equal(drawn_at(labels, (h, w), 'labels/a.png', 'a'), resize(labels, (h, w)))


def test_a_class_lost_all_the_same_is_named(tmp_path):
    labels = np.full((60, 80), UNLABELLED, np.uint8); labels[0, :3] = 0, 1, 2
    write_index_png(tmp_path/'labels'/'a.png', labels, THREE.palette)
    (tmp_path/'images').mkdir(); Image.fromarray(photo(60, 80)).save(tmp_path/'images'/'a.png'); (tmp_path/'classes.txt').write_text('background\ncat\ndog\n')
    weak = WeakSet(folder_sets(tmp_path, 2)[0], tmp_path/'labels')
    assert weak.sample(0).tags.all()
    with pytest.raises(SpmlError, match='only'): check_weak_set(weak)
    write_index_png(tmp_path/'labels'/'a.png', np.where(np.arange(60)[:, None] > 40, 2, labels), THREE.palette)
    weak = WeakSet(folder_sets(tmp_path, 2)[0], tmp_path/'labels')
    with pytest.warns(UserWarning, match='training size: a: (background|cat)'): check_weak_set(weak)


# ids, files, names

@pytest.mark.parametrize('said, bad', [(Tags([1, 7]), 7), (Boxes([[1, 1, 5, 5]], [3]), 3), (Points([[1, 1]], [3]), 3), (Scribbles([[(1, 1)]], [253]), 253), (Keypoints([[1, 1]], [3], [0]), 3)], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize('how', ['file', 'function', 'dictionary'])
def test_ids_outside_of_the_table_are_refused(folder, said, bad, how):
    images, path = FolderSet(folder/'images', classes=['a', 'b', 'c']), folder/'weak'/'p0.json'
    write_annotation(path, said)
    weak = WeakSet(images, {'file': folder/'weak', 'function': lambda i: said, 'dictionary': {'p0': path}}[how])
    where = 'annotation of p0' if how == 'function' else 'p0.json'
    with pytest.raises(SpmlError, match=f'{where}: value {bad} is not a label: classes are 0..2'): weak.sample(0)
    if isinstance(said, Boxes):
        with pytest.raises(SpmlError, match=f'{where}: value {bad}'): weak.boxes(0)


def test_tags_outside_of_the_table_are_refused(folder):
    images = FolderSet(folder/'images', classes=['a', 'b', 'c'])
    with pytest.raises(SpmlError, match='tags of p1: value 5 is not a label'): WeakSet(images, lambda i: Tags([1]), tags=lambda i: [1, 5]).sample(1)


@pytest.mark.parametrize('name', ['p0.png', 'p0.PNG', 'p0.Png', 'p0.tif', 'p0.png.png', 'p0.jpg.png', 'p0.JSON', 'p0.xml', 'p0.XML'])
def test_files_of_any_ending(folder, name):
    path = folder/'weak'/name
    path.parent.mkdir()
    labels = np.full((24, 32), UNLABELLED, np.uint8); labels[3:6, 3:6] = 1
    if name.lower().endswith('json'): write_json(path, Scribbles([[(4, 4)]], [1]).to_json())
    elif name.lower().endswith('xml'): path.write_text('<annotation><object><name>b</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>')
    else: Image.fromarray(labels).save(path)
    weak = WeakSet(FolderSet(folder/'images', classes=['a', 'b', 'c']), folder/'weak')
    assert label_file(folder/'weak', 'p0') == path and weak.sample(0).tags[1]


def test_accents_in_either_form(tmp_path):
    (tmp_path/'images').mkdir(); (tmp_path/'classes.txt').write_text('background\ncat\ndog\n')
    Image.fromarray(photo(24, 32)).save(tmp_path/'images'/'cafe\u0301.png')
    write_index_png(tmp_path/'labels'/'caf\xe9.png', np.eye(24, 32))
    train, _ = folder_sets(tmp_path)
    assert train.names == ['caf\xe9'] and np.array_equal(WeakSet(train, tmp_path/'labels').sample(0).labels, np.eye(24, 32))


def test_two_label_files_and_jpeg_labels(folder):
    (folder/'labels').mkdir(); (folder/'classes.txt').write_text('a\nb\nc\n')
    for name in ('p0.png', 'p0.PNG', 'p1.png'): Image.fromarray(np.eye(24, 32, dtype=np.uint8)).save(folder/'labels'/name)
    with pytest.raises(SpmlError, match=r"labels: \['p0.PNG', 'p0.png'\] for one image; keep one"): folder_sets(folder)
    (folder/'labels'/'p0.PNG').unlink(); (folder/'labels'/'p1.png').rename(folder/'labels'/'p1.jpg')
    with pytest.raises(SpmlError, match='p1.jpg: JPEG changes the values'): check_weak_set(WeakSet(folder_sets(folder)[0], folder/'labels'))
    with pytest.raises(SpmlError, match='p2: no label file is listed'): label_file({}, 'p2')


def test_labels_of_0_and_255_are_asked_about(folder):
    for k in range(3): write_index_png(folder/'weak'/f'p{k}.png', 255*np.eye(24, 32, dtype=int))
    images = FolderSet(folder/'images', classes=['a', 'b', 'c'])
    with pytest.raises(SpmlError, match="only 'a' is labelled .*% is void .255.: if 255 means the object, write its class id"): check_weak_set(WeakSet(images, folder/'weak'))


def test_settings_of_keypoints_reach_the_labels():
    images = PartScenes(2, size=64)
    labels = lambda **settings: WeakSet(images, "keypoints", keypoints=settings).sample(0).labels
    part, ground = (lambda l: ((l > 0) & (l < UNLABELLED))), (lambda l: l == 0)
    usual = labels()
    assert np.array_equal(usual, WeakSet(images, "keypoints").sample(0).labels) and np.array_equal(usual, labels(scale="mask", sigma=.15, labelled=.65, background=.1))
    clicks, owner = simulate_keypoints(images.mask(0), images.instances(0)), np.where(images.mask(0) > 0, images.instances(0), 0)
    corners = [np.argwhere(owner == k) for k in np.unique(owner[owner > 0])]
    boxes = Boxes([(*a.min(0)[::-1], *(a.max(0) + 1)[::-1]) for a in corners], np.ones(len(corners), int))
    for scale, by in (("box", boxes), (25, 25), (12.5, 12.5)):
        said = labels(scale=scale)
        assert np.array_equal(said, scaled(clicks, by).to_labels(owner.shape)) and not np.array_equal(said, usual)
    wide, strict, near = labels(sigma=.25), labels(labelled=.9), labels(background=.4)
    assert (part(wide) >= part(usual)).all() and part(wide).sum() > part(usual).sum() and ground(wide).sum() < ground(usual).sum()
    assert (part(strict) <= part(usual)).all() and part(strict).sum() < part(usual).sum() and np.array_equal(ground(strict), ground(usual))
    assert (ground(near) >= ground(usual)).all() and ground(near).sum() > ground(usual).sum() and np.array_equal(part(near), part(usual))
    for how, message in ((dict(sigmas=.1), "no 'sigmas'; did you mean 'sigma'"), (dict(scale="boxes"), "scale 'boxes' .* did you mean 'box'"), (dict(scale=0), "above 0"),
                              (dict(sigma=0.), "above 0"), (dict(labelled=.05), "background 0.1 and labelled 0.05"), (dict(labeled=.7), "did you mean 'labelled'")):
        with pytest.raises(SpmlError, match=message): WeakSet(images, "keypoints", keypoints=how)


@pytest.mark.parametrize("name, text", [("a.json", json.dumps(dict(spml_kit=1, kind="tags", classes=[1]))), ("a.xml", (FIXTURES / "voc" / "Annotations" / "a.xml").read_text().replace("polygon", "ring")), ("a.xml", (FIXTURES / "scribblesup" / "a.xml").read_text()), ("a.xml", (FIXTURES / "cvat" / "annotations.xml").read_text()), ("a.json", (FIXTURES / "labelme" / "a.json").read_text())])
def test_training_reads_a_file_once(name, text, tmp_path, monkeypatch):
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / name).write_text(text)
    weak = WeakSet(FolderSet(tmp_path / "images", classes=("background", "cat", "dog")), tmp_path / "labels")
    read, count = Path.read_bytes, Counter()
    monkeypatch.setattr(Path, "read_bytes", lambda self: (count.update([self.name]), read(self))[1])
    assert weak.tags(0)[1]
    assert count[name] == 1


def labelled_project(root, *shapes, names="background\ncat\ndog\n"):
    picture(root / "images" / "a.jpg")
    (root / "classes.txt").write_text(names)
    return labelme(root / "labels" / "a.json", *shapes)


def test_training_reads_a_file_of_one_picture_where_it_lies(tmp_path):
    labelled_project(tmp_path, shape("cat", "polygon", SQUARE), shape("background", "linestrip", [[3, 3], [3, 56]]))
    for size in (None, 40):
        s = WeakSet(folder_sets(tmp_path, size)[0], tmp_path / "labels").sample(0)
        assert abs((s.labels == 1).sum()/s.labels.size - 900/4800) < .01 and s.tags.tolist() == [True, True, False] and (s.labels == 0).any()
    labelme(tmp_path / "labels" / "a.json", shape("dog", "rectangle", [[10, 10], [40, 40]]))
    weak = WeakSet(folder_sets(tmp_path)[0], tmp_path / "labels")
    assert weak.boxes(0) == Boxes([(10, 10, 40, 40)], [2]) and weak.tags(0).tolist() == [True, False, True]
    (tmp_path / "labels" / "a.json").write_text(next((FIXTURES / "qupath").glob("*.geojson")).read_text())
    assert (WeakSet(folder_sets(tmp_path)[0], tmp_path / "labels").sample(0).labels == 1).sum() == 900


def test_names_in_files_of_other_tools_are_those_of_the_set(tmp_path):
    "A set that keeps some classes, in another order: names decide, not numbers"
    labelled_project(tmp_path, shape("dog", "polygon", SQUARE))
    for file_ids in (False, True):
        weak = WeakSet(FolderSet(tmp_path / "images", classes=("background", "dog", "cat")), tmp_path / "labels", file_ids=file_ids)
        assert (weak.sample(0).labels == 1).sum() == 900


@pytest.mark.parametrize("write, says", [
    (lambda p: labelme(p, shape("cow", "polygon", SQUARE)), r"a.json: class 'cow' is not one of"), (lambda p: labelme(p), r"a.json: the annotation is empty"), (lambda p: labelme(p, shape("cat", "polygon", SQUARE), size=(W, H)), r"a.json: drawn on a picture of 60x80, .*EXIF"),
    (lambda p: p.write_text('{"lasso": 1}'), r"a.json: not an annotation of this kit"), (lambda p: labelme(p, shape("cat", "point", [[900, 1]])), r"a.json: the annotation is empty \(1 point outside the picture\)"),
    (lambda p: p.write_text((FIXTURES / "coco" / "instances.json").read_text().replace('"images": [', '"images": [{"id": 8, "file_name": "b.png"},')), r"a.json: looks like COCO with 2 pictures: spml_import .*a.json --out PROJECT")])
def test_files_that_training_cannot_read_are_named(write, says, tmp_path):
    write(labelled_project(tmp_path, shape("cat", "polygon", SQUARE)))
    with pytest.raises(SpmlError, match=says): WeakSet(folder_sets(tmp_path)[0], tmp_path / "labels").sample(0)


def test_boxes_as_files_have_them(voc):
    "Counted from 0, beyond the border, without a size; no object at all"
    (voc/'Annotations').mkdir()
    (voc/'Annotations/a.xml').write_text('<annotation><object><name>person</name><bndbox><xmin>0</xmin><ymin>3</ymin><xmax>41</xmax><ymax>20</ymax></bndbox></object></annotation>')
    (voc/'Annotations/b.xml').write_text('<annotation><filename>b.jpg</filename></annotation>')
    weak = WeakSet(VocSet(voc, masks=False), 'boxes')
    assert weak.boxes(0).boxes.tolist() == [[0, 3, 40, 20]] and (weak.sample(0).labels[3:20] == UNLABELLED).all() and (weak.sample(1).labels == 0).all()
    assert np.flatnonzero(weak.sample(1).tags).tolist() == [0]


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 200), st.integers(0, 255), st.integers(0, 255))
def test_codes(n, low, high):
    every = np.arange(256).reshape(16, 16)
    if n <= low <= high < VOID:
        made = codes_as_unlabelled(every, f"{low}..{high}", n, "")
        assert all(m == (UNLABELLED if low <= v <= high else v) for v, m in zip(every.ravel(), made.ravel()))
    else:
        with pytest.raises(SpmlError, match="give codes from C"): codes_as_unlabelled(every, f"{low}..{high}", n, "")
    assert np.array_equal(codes_as_unlabelled(every, "C..253", n, ""), np.where((every >= n) & (every < 254), 254, every))
    assert codes_as_unlabelled(every, "", n, "") is every
