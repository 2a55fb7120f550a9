"""Body parts: the drawn figures, photographs of dressed people, the layout of DensePose."""
import json

import numpy as np
import pytest
from PIL import Image

from spml_kit.core import UNLABELLED, VOID, SpmlError, data_root
from spml_kit.data.weak import WeakSet
from spml_kit.data.body_parts import ClothesSet, DensePoseSet, PartScenes
from spml_kit.data.scenes import PART_CLASSES, make_scene


def test_figures_only_and_every_part():
    figures = PartScenes(12, size=96)
    seen = np.unique([figures.mask(i) for i in range(12)])
    assert set(seen) == set(range(15)) and len(figures.classes) == 15
    assert all((figures.mask(i) > 0).any() and (figures.mask(i)[figures.instances(i) == 0] == 0).all() for i in range(12))
    with pytest.raises(SpmlError, match="without boxes"): figures.boxes(0)
    with pytest.raises(SpmlError, match="closed"): PartScenes(2, masks=False).mask(0)


def shares_of_alike_clothes(only):
    "Of the figures: those whose trunk has the colour of a third of the ground; of those in company: those whose trunk has the colour of another's clothes"
    torso, thighs = PART_CLASSES.id("torso"), [PART_CLASSES.id(f"{s} thigh") for s in ("left", "right")]
    ground, others = [], []
    for i in range(40):
        s = make_scene(i, only=only)
        image, bare = s.image.astype(int), s.image[s.instances == 0].astype(int)
        worn = {(k, name): np.median(image[at], 0) for k in np.unique(s.instances[s.parts > 0]) for name, ids in (("trunk", [torso]), ("hose", thighs))
                if (at := (s.instances == k) & np.isin(s.parts, ids)).any()}
        for (k, name), colour in worn.items():
            if name == "hose": continue
            ground.append((abs(bare - colour).max(1) <= 30).mean() > 1/3)
            company = [abs(c - colour).max() for (j, _), c in worn.items() if j != k]
            if company: others.append(min(company) <= 30)
    return np.mean(ground), np.mean(others) if others else 0


def test_clothes_share_colours_with_ground_and_neighbours():
    ground, others = shares_of_alike_clothes(PartScenes.only)
    assert .15 < ground < .5 and others > .4, (ground, others)
    assert shares_of_alike_clothes(("figure", "car"))[0] < .05 # elsewhere bodies keep away from the ground


def clothes(folder, names=("background", "hair", "skin")):
    for sub in ("JPEGImages", "SegmentationParts", "ImageSets/Segmentation"): (folder/sub).mkdir(parents=True)
    (folder/"labels.json").write_text(json.dumps(dict(parts=list(names))))
    (folder/"ImageSets/Segmentation/train.txt").write_text("a")
    Image.fromarray(np.full((20, 16, 3), 90, np.uint8)).save(folder/"JPEGImages/a.jpg")
    mask = np.zeros((20, 16), np.uint8)
    mask[3:9, 3:9], mask[10:18, 3:9] = 1, 2
    Image.fromarray(mask).save(folder/"SegmentationParts/a.png")
    return mask


def test_folder_of_dressed_people(tmp_path):
    mask = clothes(tmp_path)
    s = ClothesSet(tmp_path)
    assert s.classes.names == ("background", "hair", "skin") and np.array_equal(s.mask(0), mask)
    labels = WeakSet(s, "keypoints").sample(0).labels
    assert {1, 2} <= set(np.unique(labels))
    with pytest.raises(SpmlError, match="without boxes"): s.boxes(0)
    (tmp_path/"SegmentationParts/a.png").unlink()
    with pytest.raises(SpmlError, match="SegmentationParts/a.png: no mask; add it$"): ClothesSet(tmp_path).mask(0)
    for said in ("[]", '{"parts": "hat"}', "{}"):
        (tmp_path/"labels.json").write_text(said)
        with pytest.raises(SpmlError, match="labels.json: no list 'parts'"): ClothesSet(tmp_path)
    (tmp_path/"labels.json").unlink()
    with pytest.raises(SpmlError, match="labels.json: no such file"): ClothesSet(tmp_path)


def test_photographs_of_dressed_people():
    root = data_root("ccp_parts")
    if root is None: pytest.skip("no photographs: ccp_parts is not at hand")
    weak = WeakSet(ClothesSet(root, "val", 160).take(8), "keypoints")
    said, true = (np.concatenate([f(i).ravel() for i in range(8)]) for f in (lambda i: weak.sample(i).labels, weak.images.mask))
    part = (said > 0) & (said < UNLABELLED)
    assert part.any() and (said == true)[part].mean() > .5 and (true == 0)[said == 0].mean() > .8


@pytest.fixture
def people(tmp_path):
    "Two images of the paper's layout, and what their files hold"
    rng = np.random.default_rng(0)
    for folder in ("images", "masks", "points"): (tmp_path/folder).mkdir()
    held = []
    for name in ("a", "b"):
        mask, points = rng.integers(0, 15, (20, 30)).astype(np.uint8), rng.integers(0, 256, (20, 30)).astype(np.uint8)
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(tmp_path/f"images/{name}.jpg")
        for folder, values in (("masks", mask), ("points", points)): Image.fromarray(values).save(tmp_path/f"{folder}/{name}.png")
        held.append((mask, points))
    for folder in ("masks", "points"): (tmp_path/f"{folder}.txt").write_text("".join(f"/images/{n}.jpg /{folder}/{n}.png\n" for n in "ab") + "\n")
    return tmp_path, held


def test_densepose_layout(people):
    root, held = people
    full, given = DensePoseSet(root, "masks.txt"), DensePoseSet(root, "points.txt", masks=False)
    assert full.names == given.names == ["a", "b"] and full.classes is PART_CLASSES
    for i, (mask, points) in enumerate(held):
        assert np.array_equal(full.mask(i), mask)
        said = given.points(i)
        assert np.array_equal(said[points < 15], points[points < 15]) and (said[points == 255] == VOID).all() and (said[(points > 14) & (points < 255)] == UNLABELLED).all()
        assert np.array_equal(WeakSet(given, given.points).sample(i).labels, said)
    with pytest.raises(SpmlError, match="points/a.png"): DensePoseSet(root, "points.txt").mask(0) # codes of unknown pixels are no parts
    Image.fromarray(held[0][1][:-1]).save(root/"points/a.png")
    with pytest.raises(SpmlError, match="points/a.png: label map is 19x30, its image 20x30"): DensePoseSet(root, "points.txt", masks=False).points(0)
    (root/"images/b.jpg").unlink()
    with pytest.raises(SpmlError, match="b.jpg"): DensePoseSet(root, "masks.txt").image(1)
    with pytest.raises(SpmlError, match="no such list"): DensePoseSet(root, "images")
    (root/"twice.txt").write_text("/images/a.jpg /masks/a.png\n/points/a.png /masks/b.png\n")
    with pytest.raises(SpmlError, match="twice.txt, line 2: a second image named 'a'"): DensePoseSet(root, "twice.txt")
