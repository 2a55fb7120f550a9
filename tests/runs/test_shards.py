"""Prototypes and pseudo-labels by the shard: equal to the serial ones, resumed, mended, and complete whichever worker dies."""
import json
import os
import pickle
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from spml_kit.data.batches import weak_dls
from spml_kit.core import SpmlError, UNLABELLED, VOID
from spml_kit.files import load_tensors, save_tensors
from spml_kit.data.images import SceneSet
from spml_kit.data.weak import WeakSet
from spml_kit.method.nets import EmbedNet, SegNet, SoftmaxHead
from spml_kit.learn.learner import spml_learner
from spml_kit.data.body_parts import PartScenes
from spml_kit.runs.pipelines import Pipeline
from spml_kit.learn.head import head_learner
from spml_kit.infer.pseudo import pseudo_labels
from spml_kit.infer.scores import training_index
from spml_kit.method.recipes import RECIPES
from spml_kit.runs import shards
from spml_kit.runs.shards import load_shards, sharded_index, sharded_pseudo_labels, trained_model
from spml_kit.runs.workers import local_client

N, C = 10, 13
GRID = dict(grid=(4, 4), progress=False)
WALK = dict(steps=4, refine=("regions",), progress=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "As the workers have: more threads may round otherwise"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return SegNet(EmbedNet("test_resnet", 8, pretrained=False), SoftmaxHead(8, C)).eval()


@pytest.fixture(scope="module")
def labels():
    "Bands of classes, with unlabelled and void parts; image 3 holds neither class nor tag"
    maps = [(np.arange(4096).reshape(64, 64)//1024 + i) % C for i in range(N)]
    for i, m in enumerate(maps): m[:20, :20], m[50:, 50:] = UNLABELLED, VOID
    maps[3][:] = UNLABELLED
    return [m.astype(np.uint8) for m in maps]


def weak_set(labels, look=lambda i: None, n=N):
    "`look` is told of every image that somebody asks for"
    def annotate(i):
        look(i)
        return labels[i]
    return WeakSet(SceneSet(n, size=64, masks=False), annotate, regions=12)


@pytest.fixture(scope="module")
def serial(net, labels):
    "The index and the label maps that shards must equal"
    weak = weak_set(labels)
    return training_index(net, weak.images, labels, C, grid=(4, 4)), pseudo_labels(net, weak, progress=False, steps=4, refine=("regions",))


def same(a, b):
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("mu", "label", "image", "row"))


def same_maps(maps, wanted):
    return all((maps(i) == m).all() and maps(i).dtype == np.uint8 for i, m in enumerate(wanted))


def stamps(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != "settings.json"}


def changed(folder, before):
    now = stamps(folder)
    return {k for k in now.keys() | before.keys() if now.get(k) != before.get(k)}


# one process

@pytest.mark.parametrize("per", [1, 3, 10, 99])
def test_any_size_of_shard_gives_the_serial_result(net, labels, serial, tmp_path, per):
    assert same(sharded_index(net, weak_set(labels), tmp_path/"index", per=per, **GRID), serial[0])
    assert same_maps(sharded_pseudo_labels(net, weak_set(labels), tmp_path/"labels", per=per, **WALK), serial[1])
    assert len(list((tmp_path/"index").glob("shard_*.safetensors"))) == len(list((tmp_path/"labels").glob("shard_*.json"))) == -(-N//per)


@pytest.mark.parametrize("more", [dict(scales=(.5, 1.)), dict(crop=32), dict(grid=(2, 3))])
def test_settings_reach_the_work(net, labels, tmp_path, more):
    index = sharded_index(net, weak_set(labels), tmp_path, per=4, **(GRID | more))
    assert same(index, training_index(net, weak_set(labels).images, labels, C, **(dict(grid=(4, 4)) | more)))


@pytest.mark.parametrize("more", [dict(refine=()), dict(refine=("crf", "regions")), dict(stride=16, scales=(.5,)), dict(crop=32)])
def test_settings_reach_the_labels(net, labels, tmp_path, more):
    more = dict(steps=4, refine=("regions",), progress=False) | more
    weak = weak_set(labels, n=2)
    assert same_maps(sharded_pseudo_labels(net, weak, tmp_path, per=4, **more), pseudo_labels(net, weak, **more))


def test_keypoints_by_the_shard_are_those_of_the_pipeline(tmp_path):
    "The walk starts from the nearest labelled segments, and says so in the folder"
    weak, recipe = WeakSet(PartScenes(3, size=64), "keypoints", regions=12), RECIPES["small"].but(bs=2, crop=64, warmup=1, infer_grid=(5, 5))
    p = Pipeline(weak, PartScenes(1, size=64, start=900), "keypoints", tmp_path/"run", recipe, rounds=1, steps=2, walk_stride=8, progress=False).run(only=("embedding", "walk"))
    more = dict(start="nearest", grid=recipe.infer_grid, stride=8, progress=False)
    wanted = [p.maps_of("walk")(i) for i in range(3)]
    assert same_maps(sharded_pseudo_labels(p.model, weak, tmp_path/"labels", per=2, **more), wanted)
    assert same_maps(lambda i, maps=pseudo_labels(p.model, weak, **more): maps[i], wanted)
    assert not same_maps(sharded_pseudo_labels(p.model, weak, tmp_path/"head", stride=8, progress=False), wanted)
    assert "start" not in json.loads((tmp_path/"head"/"settings.json").read_text()) # as in folders of before
    for other, message in ((dict(start="head"), "start was 'nearest'"), (dict(grid=(6, 6)), "grid was"), (dict(start="neerest"), "start 'neerest' is not one of")):
        with pytest.raises(SpmlError, match=message): sharded_pseudo_labels(p.model, weak, tmp_path/"labels", per=2, **(more | other))
    narrow = WeakSet(weak.images, "keypoints", regions=12, keypoints=dict(sigma=.1))
    with pytest.raises(SpmlError, match="keypoints was None"): sharded_pseudo_labels(p.model, narrow, tmp_path/"labels", per=2, **more)


def test_done_is_done(net, labels, serial, tmp_path):
    sharded_index(net, weak_set(labels), tmp_path/"index", per=4, **GRID)
    sharded_pseudo_labels(net, weak_set(labels), tmp_path/"labels", per=4, **WALK)
    before, seen = [stamps(tmp_path/k) for k in ("index", "labels")], []
    weak = weak_set(labels, seen.append)
    assert same(sharded_index(net, weak, tmp_path/"index", client="nobody:1", per=4, **GRID), serial[0]) # no scheduler is asked either
    assert same_maps(sharded_pseudo_labels(net, weak, tmp_path/"labels", per=4, **WALK), serial[1])
    assert seen == [] and weak.images._memory.kept == {} and [stamps(tmp_path/k) for k in ("index", "labels")] == before


def test_a_shard_that_another_worker_finished_meanwhile(net, labels, tmp_path):
    sharded_index(net, weak_set(labels), tmp_path, per=4, **GRID)
    before, seen = stamps(tmp_path), []
    weak = weak_set(labels, seen.append)
    weak.regions = None # as `sharded_index` leaves them out
    work = shards._Prototypes(net, weak, tmp_path, 4, "cpu", 1, True, dict(scales=[1.], grid=[4, 4], crop=None))
    work.do(1)
    assert seen == [] and stamps(tmp_path) == before
    (tmp_path/"shard_000001.safetensors").unlink()
    work.do(1)
    assert seen == [4, 5, 6, 7] and changed(tmp_path, before) == {"shard_000001.safetensors"}


@pytest.mark.parametrize("make", ["index", "labels"])
def test_an_interrupted_run_goes_on(net, labels, serial, tmp_path, make):
    def stop(i):
        if i == 6: raise KeyboardInterrupt
    run = dict(index=lambda w: sharded_index(net, w, tmp_path, per=4, **GRID), labels=lambda w: sharded_pseudo_labels(net, w, tmp_path, per=4, **WALK))[make]
    with pytest.raises(KeyboardInterrupt): run(weak_set(labels, stop))
    seen, before = [], stamps(tmp_path)
    result = run(weak_set(labels, seen.append))
    assert min(seen) == (4 if make == "index" else 6) # images 4 and 5 of the second shard have their label map, their prototypes were not written yet
    assert not any(n in before for n in changed(tmp_path, before))
    assert same(result, serial[0]) if make == "index" else same_maps(result, serial[1])


DAMAGE = dict(cut=lambda p: p.write_bytes(p.read_bytes()[:-20]), emptied=lambda p: p.write_bytes(b""), other=lambda p: p.write_bytes(b"no such thing at all"), removed=lambda p: p.unlink())


@pytest.mark.parametrize("file", ["index/shard_000001.safetensors", "labels/shard_000001.json", "labels/scene_000005.png"])
def test_a_broken_file_is_made_again(net, labels, serial, tmp_path, file):
    runs = dict(index=lambda w: sharded_index(net, w, tmp_path/"index", per=4, **GRID), labels=lambda w: sharded_pseudo_labels(net, w, tmp_path/"labels", per=4, **WALK))
    path, run = tmp_path/file, runs[file.split("/")[0]]
    run(weak_set(labels))
    whole = path.read_bytes()
    for name, damage in DAMAGE.items():
        before, seen = stamps(path.parent), []
        damage(path)
        result = run(weak_set(labels, seen.append))
        assert same(result, serial[0]) if path.suffix == ".safetensors" else same_maps(result, serial[1])
        assert set(seen) == {".safetensors": {4, 5, 6, 7}, ".json": set(), ".png": {5}}[path.suffix], name
        assert path.read_bytes() == whole and changed(path.parent, before) <= {path.name, "shard_000001.json"}


def torn(*which):
    def look(i):
        if i in which: raise OSError(f"photo {i} is torn")
    return look


@pytest.mark.parametrize("client", [None, "workers"])
def test_one_bad_image_is_named_and_the_rest_is_kept(net, labels, serial, tmp_path, client, request):
    client = client and request.getfixturevalue(client)
    index = lambda weak, **kw: sharded_index(net, weak, tmp_path/"index", client, per=4, **GRID, **kw)
    maps = lambda weak, **kw: sharded_pseudo_labels(net, weak, tmp_path/"labels", client, per=4, **WALK, **kw)
    for run in index, maps:
        with pytest.raises(SpmlError, match=r"1 of 10 images and 0 of 3 shards .*scene_000005: OSError: photo 5 is torn.*strict=False"): run(weak_set(labels, torn(5)))
    before = stamps(tmp_path/"labels")
    with pytest.warns(UserWarning, match="scene_000005"): rest = index(weak_set(labels, torn(*range(N))), strict=False) # all that can be had is there
    with pytest.warns(UserWarning, match="scene_000005"): there = maps(weak_set(labels, torn(*range(N))), strict=False)
    kept = serial[0].image != 5
    assert torch.equal(rest.mu, serial[0].mu[kept]) and torch.equal(rest.label, serial[0].label[kept]) and torch.equal(rest.image, serial[0].image[kept])
    assert all((there(i) == m).all() for i, m in enumerate(serial[1]) if i != 5)
    with pytest.raises(SpmlError, match="scene_000005.png: no such file"): there(5)
    assert same(index(weak_set(labels)), serial[0]) # mended
    assert same_maps(maps(weak_set(labels)), serial[1]) and changed(tmp_path/"labels", before) == {"shard_000001.json", "scene_000005.png"}


def test_a_shard_may_fail_as_a_whole(net, labels, serial, tmp_path):
    with pytest.warns(UserWarning, match="4 of 10 images"): rest = sharded_index(net, weak_set(labels, torn(4, 5, 6, 7)), tmp_path, per=4, strict=False, **GRID)
    assert torch.equal(rest.mu, serial[0].mu[(serial[0].image < 4) | (serial[0].image > 7)])
    with pytest.raises(SpmlError, match="10 of 10 images"): sharded_index(net, weak_set(labels, torn(*range(N))), tmp_path/"none", per=4, **GRID)
    with pytest.raises(SpmlError, match="none of 0 segments"), pytest.warns(UserWarning): sharded_index(net, weak_set(labels, torn(*range(N))), tmp_path/"none", per=4, strict=False, **GRID)


def test_an_image_that_nobody_labelled_is_no_error(net, tmp_path):
    nothing = [np.full((64, 64), UNLABELLED, np.uint8)]*2
    assert same_maps(sharded_pseudo_labels(net, weak_set(nothing, n=2), tmp_path/"labels", **WALK), nothing)
    with pytest.raises(SpmlError, match="none of 32 segments has a class"): sharded_index(net, weak_set(nothing, n=2), tmp_path/"index", **GRID)


@pytest.mark.parametrize("change, words", [(dict(per=3), "per was 4, is 3"), (dict(grid=(3, 3)), "grid was"), (dict(scales=(2.,)), "scales was"), (dict(n=9), "images was 10, is 9"),
                                           (dict(model=None), "model was"), (dict(per=0), "at least one image")])
def test_other_settings_want_another_folder(net, labels, tmp_path, change, words):
    sharded_index(net, weak_set(labels), tmp_path, per=4, **GRID)
    other, before = SegNet(EmbedNet("test_resnet", 8, pretrained=False), SoftmaxHead(8, C)), stamps(tmp_path)
    weak = weak_set(labels, n=change.pop("n", N))
    with pytest.raises(SpmlError, match=words): sharded_index(change.pop("model", net) or other, weak, tmp_path, **(dict(per=4) | GRID | change))
    assert stamps(tmp_path) == before


def test_a_folder_of_something_else(net, labels, tmp_path):
    sharded_pseudo_labels(net, weak_set(labels, n=1), tmp_path, **WALK)
    with pytest.raises(SpmlError, match="kind was 'pseudo-labels'"): sharded_index(net, weak_set(labels, n=1), tmp_path, **GRID)
    with pytest.raises(SpmlError, match="holds pseudo-labels, not prototypes"): load_shards(tmp_path)
    with pytest.raises(SpmlError, match="settings.json: no such file"): load_shards(tmp_path/"nothing")


# prototypes on disk

def fill(folder, label, per=50):
    "A folder as if `sharded_index` had filled it: one segment an image"
    (folder).mkdir(exist_ok=True)
    (folder/"settings.json").write_text(json.dumps(dict(kind="prototypes", images=len(label), per=per, classes=4)))
    for n, lo in enumerate(range(0, len(label), per)):
        part = torch.as_tensor(label[lo:lo + per]).byte()
        mu = torch.nn.functional.normalize(torch.randn(len(part), 5, generator=torch.Generator().manual_seed(n)), dim=1)
        save_tensors(shards._shard_file(folder, n), dict(mu=mu, label=part, image=torch.arange(lo, lo + len(part)).int(), row=torch.arange(len(part)).int()), segments=len(part), failed={})


@pytest.mark.parametrize("per_class", [1, 7, 100, 10_000])
def test_at_most_so_many_of_each_class(tmp_path, per_class):
    label = np.random.default_rng(0).choice(4, 500, p=[.9, .05, .05, 0])
    fill(tmp_path, label)
    whole, few, other = load_shards(tmp_path), load_shards(tmp_path, per_class=per_class), load_shards(tmp_path, per_class=per_class, seed=1)
    assert len(whole) == 500 and torch.equal(whole.row, torch.arange(500))
    assert torch.equal(few.label.bincount(minlength=4), whole.label.bincount(minlength=4).clamp(max=per_class))
    assert torch.equal(few.mu, whole.mu[few.row]) and torch.equal(few.label, whole.label[few.row]) and torch.equal(few.image, few.row) # still what they were, in order
    assert (few.row.diff() > 0).all() and same(few, load_shards(tmp_path, per_class=per_class))
    assert same(few, other) == (per_class >= label.tolist().count(0))


@pytest.mark.parametrize("most", [1, 60, 500, 10_000])
def test_so_many_of_all(tmp_path, most):
    fill(tmp_path, np.random.default_rng(0).choice(4, 500, p=[.9, .05, .05, 0]))
    whole, few = load_shards(tmp_path), load_shards(tmp_path, most)
    assert len(few) == min(most, 500) and torch.equal(few.mu, whole.mu[few.row]) and (few.row.diff() > 0).all()
    assert same(few, load_shards(tmp_path, most)) and same(few, load_shards(tmp_path, most, seed=1)) == (most >= 500)
    with pytest.raises(SpmlError, match="give one of the two"): load_shards(tmp_path, most, most)


@pytest.mark.parametrize("draw", ["max_prototypes", "per_class"])
def test_every_prototype_has_the_same_chance(tmp_path, draw):
    fill(tmp_path, np.zeros(60, int), per=25)
    taken = Counter(int(r) for seed in range(90) for r in load_shards(tmp_path, **{draw: 20}, seed=seed).row)
    assert len(taken) == 60 and abs(np.array([taken[i] for i in range(60)]) - 30).max() < 5*np.sqrt(90*2/9) # five standard deviations


def test_files_are_as_small_as_can_be(net, labels, serial, tmp_path):
    sharded_index(net, weak_set(labels), tmp_path, per=4, **GRID)
    rows, meta = load_tensors(tmp_path/"shard_000000.safetensors")
    assert {k: v.dtype for k, v in rows.items()} == dict(mu=torch.float32, label=torch.uint8, image=torch.int32, row=torch.int32)
    assert (rows["label"] < C).all() and meta["segments"] > len(rows["mu"]) # unlabelled and void segments are counted, not kept


# what travels

def test_what_was_read_stays_behind(labels):
    weak = weak_set(labels)
    fresh = len(shards._packed(weak))
    for i in range(N): weak.sample(i)
    assert weak.images._memory.bytes > 1e5 and len(shards._packed(weak)) < fresh + 20*N # but for the images' sizes
    again = pickle.loads(shards._packed(weak.relabel(lambda i: labels[i])))
    assert again.images._memory.kept == {} and (again.sample(2).labels == labels[2]).all() and (again.sample(2).tags == weak.sample(2).tags).all()


def test_what_must_not_travel_is_refused(net, labels, tmp_path, monkeypatch):
    lock = threading.Lock()
    with pytest.raises(SpmlError, match="cannot be sent .*lock"): shards._packed(weak_set(labels, lambda i: lock.locked()))
    monkeypatch.setattr(shards, "SENT_BYTES", 1 << 20)
    ballast = np.zeros(1 << 21, np.uint8)
    with pytest.raises(SpmlError, match="has 2 MB.*folder of label PNGs"): shards._packed(weak_set(labels, lambda i: ballast[i]))


# networks from runs

def test_the_network_of_a_run(tmp_path):
    scenes = SceneSet(2, size=64)
    recipe = RECIPES["small"].but(embed=dict(backbone="test_resnet", pretrained=False), dim=8, warmup=1, bs=2, crop=64)
    dls = weak_dls(WeakSet(scenes, "scribbles", regions=12), SceneSet(1, size=64, start=50), bs=2, crop=64, steps=1, device="cpu")
    first = spml_learner(dls, recipe=recipe, path=tmp_path/"first")
    second = head_learner(dls, first.model, recipe, path=tmp_path/"second")
    for learn in first, second:
        learn.logger = lambda row: None
        with learn.no_bar(): learn.fit_poly(1, checkpoint=True)
        model, x = trained_model(learn.path/"checkpoint.safetensors"), torch.rand(1, 3, 64, 64)
        with torch.no_grad(): assert all(torch.equal(a, b) for a, b in zip(model(x), learn.model.eval()(x)))
    a, b = (sharded_index(m, WeakSet(scenes, "full"), tmp_path/"index", **GRID) for m in (first.model, tmp_path/"first"/"checkpoint.safetensors"))
    assert same(a, b) # one folder: the same network
    save_tensors(tmp_path/"bank.safetensors", dict(mu=torch.eye(3)))
    with pytest.raises(SpmlError, match="bank.safetensors: not the checkpoint"): trained_model(tmp_path/"bank.safetensors")


# workers

@pytest.fixture(scope="module")
def workers():
    "Two processes, forked from one that has imported the kit: quicker than two imports"
    import dask
    import distributed
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        distributed.utils.get_mp_context().set_forkserver_preload(["distributed", "spml_kit.runs.shards"])
        with local_client(2) as client: yield client


def test_workers_give_the_serial_result(workers, net, labels, serial, tmp_path):
    assert same(sharded_index(net, weak_set(labels), tmp_path/"index", workers, per=2, **GRID), serial[0])
    address = workers.scheduler.address
    assert same_maps(sharded_pseudo_labels(net, weak_set(labels), tmp_path/"labels", address, per=2, **WALK), serial[1])
    assert set(workers.run(torch.get_num_threads).values()) == {max(1, os.cpu_count()//2)}
    left = workers.run(lambda dask_worker: [n for n in dask_worker.plugins if n.startswith("shards")])
    assert len(left) == 2 and not any(left.values()) # nothing stays with them


def test_workers_are_left_to_their_work(workers):
    from dask import config
    sampled = "distributed.worker.profile.enabled"
    assert not any(workers.run(config.get, sampled).values())
    assert config.get(sampled) # Dask's own setting stays for the caller's other work


def test_a_worker_dies(workers, net, labels, serial, tmp_path):
    log, folder, per = tmp_path/"seen", tmp_path/"index", 1
    def slow(i):
        with open(log, "a") as f: f.write(f"{os.getpid()} {i}\n")
        time.sleep(.4)
    seen = lambda: [tuple(map(int, l.split())) for l in log.read_text().splitlines()] if log.exists() else []
    killed = []
    def kill():
        deadline = time.time() + 100
        while time.time() < deadline:
            before, begun = {int(p.stem[6:]) for p in folder.glob("shard_*")}, seen()
            if len(before) >= 2 and begun[-1][1] not in before: break # somebody is at this image
            time.sleep(.02)
        killed.extend([*begun[-1], before])
        os.kill(begun[-1][0], signal.SIGKILL)
    killer = threading.Thread(target=kill)
    killer.start()
    index = sharded_index(net, weak_set(labels, slow), folder, workers, per=per, **GRID)
    killer.join()
    pid, i, before = killed
    assert same(index, serial[0]) # nothing lost, nothing doubled
    assert 2 <= len(before) < N and i not in before
    assert pid not in workers.run(os.getpid).values()
    looked = Counter(k for _, k in seen())
    assert looked[i] == 2 and all(looked[k] == 1 for k in before) and set(looked) == set(range(N)) # its shard was begun again, those that were done were not


def test_an_image_that_kills_its_worker(workers, net, labels, serial, tmp_path, monkeypatch):
    monkeypatch.setattr(workers.cluster.scheduler, "allowed_failures", 0)
    def deadly(i):
        if i == 4: os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(SpmlError, match=r"0 of 10 images and 1 of 5 shards .*shard 2 \(scene_000004 to scene_000005\): .*call again"):
        sharded_index(net, weak_set(labels, deadly), tmp_path, workers, per=2, **GRID)
    assert len(list(tmp_path.glob("shard_*"))) == 4
    assert same(sharded_index(net, weak_set(labels), tmp_path, per=2, **GRID), serial[0])


def test_nobody_answers(net, labels, tmp_path, monkeypatch):
    import dask
    import distributed
    with pytest.raises(SpmlError, match="no Dask scheduler answers"), dask.config.set({"distributed.comm.timeouts.connect": ".5s"}):
        sharded_index(net, weak_set(labels), tmp_path, "tcp://127.0.0.1:9", **GRID)
    monkeypatch.setattr("spml_kit.runs.workers.PATIENCE", .2)
    with distributed.Client(n_workers=0, processes=False, dashboard_address="127.0.0.1:0") as client:
        with pytest.raises(SpmlError, match="has no workers; start some with `dask worker"): sharded_index(net, weak_set(labels), tmp_path, client, **GRID)
