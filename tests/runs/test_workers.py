"""Dask workers: who closes a client, a scheduler without workers, a task that kills its workers."""
import sys
from collections import Counter
from types import SimpleNamespace

import dask
import distributed
import pytest

from spml_kit.core import SpmlError
from spml_kit.runs import workers
from spml_kit.runs.workers import await_workers, connected, each_result


@pytest.fixture(scope="module")
def client():
    "Two workers in threads of this process: what a task does can be seen here"
    with distributed.Client(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as client: yield client


def test_a_client_that_was_given_stays_open_and_one_by_address_is_closed(client):
    with connected(client) as same: assert same is client
    assert client.status == "running"
    with connected(client.scheduler.address) as own:
        assert own is not client and own.submit(abs, -3).result() == 3
    assert own.status == "closed" and client.status == "running"


def test_an_address_where_nobody_answers():
    with dask.config.set({"distributed.comm.timeouts.connect": ".2s"}), pytest.raises(SpmlError, match="tcp://127.0.0.1:9: no Dask scheduler answers .*start one with `dask scheduler`"):
        with connected("tcp://127.0.0.1:9"): pass


def test_a_scheduler_has_workers_or_says_how_to_start_some(client, monkeypatch):
    await_workers(client)
    monkeypatch.setattr(workers, "PATIENCE", .2)
    with distributed.Client(n_workers=0, processes=False, dashboard_address=None) as empty:
        with pytest.raises(SpmlError, match=f"{empty.scheduler.address}: .* no workers; start some with `dask worker {empty.scheduler.address}`"): await_workers(empty)


def test_every_item_has_its_own_result_or_error(client):
    found = {item: f.exception() or f.result() for item, f in each_result(client, lambda x: 12/x, [0, 1, 2, 3])}
    assert isinstance(found.pop(0), ZeroDivisionError) and found == {1: 12, 2: 6, 3: 4}


TRIES = Counter()


def dies(x):
    "1 once, 2 whenever it is tried: as the scheduler says it of an item whose workers die"
    TRIES[x] += 1
    if x == 1 and TRIES[x] == 1 or x == 2: raise distributed.KilledWorker(str(x), SimpleNamespace(address="tcp://gone"), 0)
    return x


def test_an_item_whose_worker_died_is_tried_once_more_alone_and_last(client):
    TRIES.clear()
    found = [(item, f.exception() or f.result()) for item, f in each_result(client, dies, [1, 2, 3, 4])]
    assert {item for item, _ in found[:2]} == {3, 4} and {item for item, _ in found[2:]} == {1, 2}
    ended = dict(found)
    assert ended[1] == 1 and isinstance(ended[2], distributed.KilledWorker) and TRIES == {1: 2, 2: 2, 3: 1, 4: 1}


def test_slurm_without_its_package_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(SpmlError, match="pip install dask-jobqueue"):
        with workers.slurm_client(1, "1GB"): pass
