"""Small data sets on disk that test files share."""
import numpy as np
import pytest
from PIL import Image

from spml_kit.core import VOC_CLASSES, VOID
from spml_kit.files import write_index_png


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
