"""Image sets: VOC layouts, folders, their masks and classes."""

import warnings

import numpy as np
import pytest
from test_importers import SQUARE, labelme, picture, shape
from conftest import FIXTURES, photo
from hypothesis import given, settings, strategies as st
from PIL import Image

from spml_kit.core import UNLABELLED, VOID, Classes, SpmlError, voc_palette
from spml_kit.files import write_index_png
from spml_kit.data.images import FolderSet, SceneSet, VocSet, check_masks, folder_sets, reduce_labels, resize
from spml_kit.data.weak import WeakSet
from spml_kit.infer.scores import score
from spml_kit.data.scenes import SCENE_CLASSES, make_scene

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
    refused('p1.png: colour .* belongs to no class', lambda: FolderSet(images, masks, classes=['a', 'b', 'c']).mask(1))
    (masks/'p1.png').unlink()
    refused(r'p1.png: no such mask \(1 of 3 images have none\)')
    whole = (images/'p2.png').read_bytes(); (images/'p2.png').write_bytes(whole[:len(whole)//2])
    refused('p2.png: not a readable image', lambda: FolderSet(images, classes=['a', 'b']).image(2))
    Image.fromarray(photo(24, 32)).save(images/'p0.jpg')
    refused('another image has the same stem')
    (folder/'empty').mkdir()
    refused('empty: no images here', lambda: FolderSet(folder/'empty'))


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
    with pytest.raises(SpmlError, match='train.txt: 1 name occurs more than once, the first is a'): VocSet(voc)


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
    with pytest.raises(SpmlError, match='no mask holds a class other than background.*write 1 instead'): check_masks(FolderSet(tmp_path/'images', tmp_path/'masks'))
    with pytest.raises(SpmlError, match='write 1 instead'): score([np.zeros((24, 32), np.uint8)]*2, FolderSet(tmp_path/'images', tmp_path/'masks'), progress=False)


def test_masks_that_are_void_for_the_most_are_warned_of(folder):
    images = FolderSet(folder/'images', folder/'masks')
    check_masks(images)
    for name in images.names: write_index_png(folder/'masks'/f'{name}.png', np.where(np.arange(24)[:, None] < 9, VOID, np.eye(24, 32)).astype(int))
    with pytest.warns(UserWarning, match='3[0-9]% of the pixels of 3 masks are void'): check_masks(FolderSet(folder/'images', folder/'masks'))


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
    if 'labelmap.txt' in table: Image.fromarray(voc_palette()[mask]).save(tmp_path/masks/'a.png') # as CVAT writes it
    else: write_index_png(tmp_path/masks/'a.png', mask, OWN.palette)
    s = VocSet(tmp_path)
    assert s.names == ['a'] and s.classes.names[1:] == ('screw', 'nut') and np.array_equal(s.mask(0), mask) and s.image(0).shape == (20, 30, 3)
    some = VocSet(tmp_path, classes=Classes((s.classes.names[0], 'nut')))
    assert np.array_equal(some.mask(0), np.array([0, VOID, 1])[mask])


@pytest.mark.parametrize('ends, asked', [([3, 5, 41], True), ([1, 2, 3], True), ([41], True), ([1, 2, 1], False), ([3, 3, 3], False), ([5], False), ([300], True)])
def test_objects_are_not_taken_for_classes(tmp_path, ends, asked):
    (tmp_path/'images').mkdir()
    for k, n in enumerate(ends):
        Image.fromarray(photo(24, 32, k)).save(tmp_path/'images'/f'{k}.png')
        write_index_png(tmp_path/'masks'/f'{k}.png', np.minimum(np.arange(24*32)//2, n).reshape(24, 32))
    make = lambda: FolderSet(tmp_path/'images', tmp_path/'masks')
    if not asked: assert len(make().classes) == max(ends) + 1; return
    with pytest.raises(SpmlError, match=f'masks: the numbers of every mask run from 1 without a gap, up to {max(ends)}. If they count the objects.*classes.txt'): make()
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
    with pytest.raises(SpmlError, match='p0.png: no such mask.*p0.jpg is not a mask, since JPEG changes'): FolderSet(folder/'images', folder/'masks')


@pytest.mark.parametrize('raw, names', [('background\ncat\n', 2), ('\ufeffbackground\r\ncat\r\n', 2), ('# mine\n\nbackground\n\ncat', 2), ('__ignore__\n_background_\ncat\n', 2), ('0 background\n1 cat', 2), ('0: background\n1: cat', 2), ('background\nblack cat\n', 2)])
@pytest.mark.parametrize('name', ['classes.txt', 'class_names.txt', 'labels.txt'])
def test_tables_of_classes_as_they_occur(folder, raw, names, name):
    (folder/name).write_text(raw, encoding='utf-8', newline='')
    table = FolderSet(folder/'images').classes.names
    assert len(table) == names and table[0].strip('_') == 'background' and table[1].endswith('cat')


def test_a_table_in_latin_1(folder):
    (folder/'classes.txt').write_bytes('background\nB\xe4r\n'.encode('latin-1'))
    with pytest.raises(SpmlError, match='classes.txt: byte 13 is not UTF-8 text.*save the file as UTF-8'): FolderSet(folder/'images')


@pytest.mark.parametrize('skip, named, other', [((), [15, 15, 12], 0), (('difficult',), [15, 12], 1), (('difficult', 'truncated'), [12], 2)])
def test_flagged_objects_are_no_background(voc, skip, named, other):
    box = lambda name, x, flag='': f'<object><name>{name}</name>{flag}<bndbox><xmin>{x}</xmin><ymin>3</ymin><xmax>{x + 5}</xmax><ymax>20</ymax></bndbox></object>'
    (voc/'Annotations').mkdir()
    (voc/'Annotations/a.xml').write_text(f"<annotation>{box('person', 2, '<difficult>1</difficult>')}{box('person', 12, '<truncated>1</truncated>')}{box('dog', 22, '<difficult>0</difficult>')}</annotation>")
    images = VocSet(voc, masks=False, skip=skip)
    assert images.boxes(0).classes.tolist() == named and len(images.other_boxes(0)) == other
    labels = WeakSet(images, 'boxes').sample(0).labels
    assert (labels[5, [3, 13, 23]] == UNLABELLED).all() and (labels[5, [0, 9, 30]] == 0).all()


def test_folders_with_files_of_other_tools_name_the_command(tmp_path):
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "classes.txt").write_text("background\ncat\n")
    labelme(tmp_path / "images" / "a.json", shape("cat", "polygon", SQUARE))
    with pytest.raises(SpmlError, match="labels: no such folder.*a.json looks like labelme: spml_import"): folder_sets(tmp_path)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "all.xml").write_text((FIXTURES / "cvat" / "annotations.xml").read_text())
    with pytest.raises(SpmlError, match="all.xml looks like CVAT: spml_import"): folder_sets(tmp_path)
    (tmp_path / "labels" / "a.xml").write_text((FIXTURES / "cvat" / "annotations.xml").read_text().replace("</annotations>", '<image name="b.png"/></annotations>'))
    with pytest.raises(SpmlError, match="looks like CVAT with 2 pictures"): WeakSet(FolderSet(tmp_path / "images"), tmp_path / "labels").sample(0)


def test_memory_has_a_limit(monkeypatch):
    import spml_kit.data.images as d
    monkeypatch.setattr(d, 'CACHE_BYTES', 3*64*64*3)
    s = SceneSet(6, size=64)
    for i in range(6): assert np.array_equal(s.image(i), make_scene(i, 0, 64).image)
    assert 0 < s._memory.bytes <= d.CACHE_BYTES


@pytest.mark.parametrize("size, wanted", [((30, 40), (48, 64)), ((100, 50), (64, 32)), ((64, 64), (64, 64))])
def test_small_images_are_enlarged_where_asked_for(tmp_path, size, wanted):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(tmp_path/"a.png")
    images = FolderSet(tmp_path, classes=("background", "thing"), max_size=64)
    images.enlarge = True
    assert images.image(0).shape[:2] == wanted and images.stored_size(0) == size
    plain = FolderSet(tmp_path, classes=("background", "thing"), max_size=64).image(0).shape[:2]
    assert plain == (wanted if max(size) > 64 else size)


@pytest.mark.parametrize("names, said", [(("background", "cat"), 0), (("_background_", "cat"), 0), (("cat", "dog"), 1)])
def test_a_table_without_a_background_is_told(names, said, tmp_path):
    for folder in ("images", "labels"): (tmp_path / folder).mkdir()
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    Image.fromarray(np.array([[0, 1]*4]*6, np.uint8)).save(tmp_path / "labels" / "a.png")
    (tmp_path / "classes.txt").write_text("\n".join(names))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(2): folder_sets(tmp_path)
    assert [f"the first class, '{names[0]}', is used as background" in str(w.message) for w in heard] == [True]*said
