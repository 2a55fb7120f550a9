"""Body parts: the drawn figures, left and right in the mirror, keypoints as labels, photographs of dressed people."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from spml_kit.data.batches import augment, weak_dls
from spml_kit.core import UNLABELLED, VOID, Classes, SpmlError, data_root, rng_of
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.data.keypoints import scaled, simulate_keypoints
from spml_kit.data.annotations import Boxes, Keypoints
from spml_kit.learn.learner import create_model
from spml_kit.data.body_parts import ClothesSet, DensePoseSet, PartScenes
from spml_kit.infer.views import embed_view
from spml_kit.infer.pseudo import nearest_segment_scores
from spml_kit.method.recipes import RECIPES
from spml_kit.data.scenes import PART_CLASSES, make_scene
from spml_kit.method.segments import make_segments


def test_figures_only_and_every_part():
    figures = PartScenes(12, size=96)
    seen = np.unique([figures.mask(i) for i in range(12)])
    assert set(seen) == set(range(15)) and len(figures.classes) == 15
    assert all((figures.mask(i) > 0).any() and (figures.mask(i)[figures.instances(i) == 0] == 0).all() for i in range(12))
    with pytest.raises(SpmlError, match="without boxes"): figures.boxes(0)
    with pytest.raises(SpmlError, match="closed"): PartScenes(2, masks=False).mask(0)


def test_other_scenes_stay_as_they_are():
    assert make_scene(3).mask.tobytes() == SceneSet(4).mask(3).tobytes() == make_scene(3, only=None).mask.tobytes()
    for i, only, mean in ((3, None, (108.4, 96.1, 108.8)), (2, ("figure", "cat"), (122.1, 120.1, 133.5))):
        np.testing.assert_allclose(make_scene(i, only=only).image.mean((0, 1)), mean, atol=.2) # as they were before figures got clothes of their own
    with pytest.raises(SpmlError, match="nobody can draw 'dragon'"): make_scene(0, only=("dragon",))


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


def test_mirror_exchanges_left_and_right():
    ids, names = PART_CLASSES.mirrored, PART_CLASSES.names
    assert np.array_equal(ids[ids], np.arange(256)) and ids[VOID] == VOID and ids[UNLABELLED] == UNLABELLED
    for k, name in enumerate(names): assert names[ids[k]] == name.replace("right", "?").replace("left", "right").replace("?", "left")
    assert [(a, b) for a, b in enumerate(ids[:15]) if a < b] == [(2, 3), (4, 5), (6, 7), (8, 9), (10, 11), (12, 13)] # the pairs of the paper's set


@pytest.mark.parametrize("flip", [0, 1])
def test_batches_exchange_labels_and_tags(flip):
    weak = WeakSet(PartScenes(4, size=64), "full")
    dls = weak_dls(weak, weak, bs=4, crop=64, steps=1, scale=(1, 1), flip=flip)
    _, labels, _, tags = next(iter(dls.train))
    for one, said in zip(labels.numpy(), tags.numpy()): assert set(np.unique(one)) == set(np.flatnonzero(said))
    s = weak.sample(0)
    a = augment(s, rng_of(0), 64, (1, 1), flip, weak.classes.mirrored)
    assert np.array_equal(a.labels, PART_CLASSES.mirrored[s.labels[:, ::-1]] if flip else s.labels)


def test_classes_without_pairs_stay():
    assert np.array_equal(Classes(("a", "b")).mirrored, np.arange(256))
    for swaps, message in ((((1, 2),), "class '1'"), ((("a", "a"),), "not two classes"), ((("a",),), "not two classes")):
        with pytest.raises(SpmlError, match=message): Classes(("a", "b"), swaps)


@pytest.mark.parametrize("seed", range(6))
def test_gaussians_by_the_definition(seed):
    rng = np.random.default_rng(seed)
    k, (h, w) = 5, (23, 31)
    points = Keypoints(rng.uniform(0, (w - 1, h - 1), (k, 2)), rng.integers(1, 9, k), rng.integers(0, 2, k), rng.uniform(10, 40, k), sigma=.2, labelled=.6, background=.2)
    said = points.to_labels((h, w))
    for y in range(h):
        for x in range(w):
            g = np.exp(-((points.xy - (x, y))**2).sum(1)/(2*(.2*points.scale)**2))
            assert said[y, x] == (points.parts[g.argmax()] if g.max() > .6 else 0 if g.max() < .2 else UNLABELLED)


def test_sizes_of_figures():
    instances = np.zeros((20, 30), int)
    instances[2:12, 3:7], instances[5:9, 20:29] = 4, 7
    points = Keypoints([(4, 3), (5, 9), (22, 6)], [1, 2, 1], [4, 4, 7])
    assert np.allclose(scaled(points, instances).scale, [40**.5, 40**.5, 6])
    assert np.allclose(scaled(points, Boxes([(3, 2, 7, 12), (20, 5, 29, 9)], [1, 1])).scale, [40**.5, 40**.5, 6])
    assert np.allclose(scaled(points, 9).scale, 9)
    with pytest.raises(SpmlError, match="no pixel"): scaled(points, instances*0)


def test_clicks_lie_in_their_parts():
    for i in range(4):
        s = make_scene(i, only=("figure",))
        points = simulate_keypoints(s.parts, s.instances)
        x, y = points.xy.astype(int).T
        assert np.array_equal(s.parts[y, x], points.parts) and np.array_equal(s.instances[y, x], points.instances)
        pairs = {(int(k), int(p)) for k, p in zip(s.instances[s.parts > 0], s.parts[s.parts > 0])}
        assert sorted(pairs) == sorted(zip(points.instances.tolist(), points.parts.tolist()))
        assert np.allclose(points.scale, [((s.instances == k) & (s.parts > 0)).sum()**.5 for k in points.instances])


def test_pieces_without_instances():
    parts = np.zeros((30, 30), np.uint8)
    parts[2:8, 2:8], parts[2:8, 20:28], parts[20:28, 5:9], parts[0, 29] = 1, 1, 2, 2
    points = simulate_keypoints(parts)
    assert sorted(points.parts.tolist()) == [1, 1, 2] # a crumb gets no click
    parts[29, 0], parts[15, 12:14], parts[15, 29], parts[0, 0], parts[29, 29] = 3, 3, 3, 4, 4
    points = simulate_keypoints(parts)
    assert sorted(points.parts.tolist()) == [1, 1, 2, 3, 4] # unless there is nothing else of its part: then the largest does, or one of the largest
    assert points.xy[points.parts == 3][0, 1] == 15 and points.xy[points.parts == 3][0, 0] in (12, 13)
    assert sorted(simulate_keypoints(parts, (parts > 0)*1).parts.tolist()) == [1, 2, 3, 4] # one a part, where figures are known
    empty = simulate_keypoints(np.zeros((9, 9), np.uint8))
    assert len(empty) == 0 and (empty.to_labels((9, 9)) == 0).all()


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
    for settings, message in ((dict(sigmas=.1), "no 'sigmas'; did you mean 'sigma'"), (dict(scale="boxes"), "scale 'boxes' .* did you mean 'box'"), (dict(scale=0), "above 0"),
                              (dict(sigma=0.), "above 0"), (dict(labelled=.05), "background 0.1 and labelled 0.05"), (dict(labeled=.7), "did you mean 'labelled'")):
        with pytest.raises(SpmlError, match=message): WeakSet(images, "keypoints", keypoints=settings)


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
    with pytest.raises(SpmlError, match="SegmentationParts/a.png: no mask$"): ClothesSet(tmp_path).mask(0)
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


def test_spread_by_the_definition():
    "Pixel by pixel: nearest labelled segment, then shares within each segment"
    weak = WeakSet(PartScenes(2, size=64), "keypoints", regions=20)
    model = create_model(RECIPES["small"], 15)
    s = weak.sample(0)
    s.labels[:, 50:] = VOID
    v = embed_view(model, s.image)[0]
    v = torch.nn.functional.interpolate(v[None], (32, 32), mode="bilinear", align_corners=False)
    seg = make_segments(v, *(torch.as_tensor(o[None]) for o in (s.labels, s.regions, s.tags)), (3, 3))
    counts = torch.zeros(len(seg.protos), 15)
    for x, own in zip(seg.v, seg.own):
        cosine = (seg.protos.mu @ x).masked_fill(seg.protos.label >= UNLABELLED, -2)
        counts[own, seg.protos.label[cosine.argmax()]] += 1
    shares = counts/counts.sum(1, keepdim=True)
    half = torch.zeros(32*32, 15)
    half[seg.pixel] = shares[seg.own]
    half = half.T.view(1, 15, 32, 32)
    for stride in (2, 4, 8): # the maximum of a class is 1 where the walk begins, whatever the resize took from it
        want = torch.nn.functional.interpolate(half, (64//stride, 64//stride), mode="bilinear", align_corners=False)[0]
        want = want/want.amax((1, 2), keepdim=True).clamp_min(1e-12)
        want[~torch.as_tensor(s.tags)] = 0
        found = nearest_segment_scores(model, s, (3, 3), stride)
        torch.testing.assert_close(found, want)
        assert not found[..., -(-50//stride):].any() and found.amax((1, 2)).max() == 1 # void
    s.labels[:] = UNLABELLED
    with pytest.raises(SpmlError, match="without any labelled pixel"): nearest_segment_scores(model, s)
