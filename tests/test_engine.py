"""Test tasks that fail: the others finish, passing causes are retried, nothing runs twice."""

import operator
import pickle
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import dask
import dask.array as da
import numpy as np
import pytest
import torch
from dask import delayed
from distributed import Client, KilledWorker, get_worker
from threadpoolctl import threadpool_info

from inkdask import engine
from inkdask.errors import InkdaskError, UnavailableError
from inkdask.failures import Failure, fallible


@pytest.fixture(params=["threads", "one thread", "cluster"])
def compute_each(request, monkeypatch):
    monkeypatch.setattr(engine, "PAUSE", 0.01)
    if request.param == "cluster":
        with Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None):
            yield engine.compute_each
    else:
        with dask.config.set(num_workers=1 if request.param == "one thread" else None):
            yield engine.compute_each


class Runs:
    """Count how often each number ran, in files, because workers share no memory."""

    def __init__(self, folder):
        self.folder = str(folder)

    def add(self, number):
        with tempfile.NamedTemporaryFile(prefix=f"{number}-", dir=self.folder, delete=False):
            pass
        return self[number]

    def __getitem__(self, number):
        return len(list(Path(self.folder).glob(f"{number}-*")))


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def tens(compute_each, function, count=12):
    """Compute ten times each number by `compute_each`; each pair shares a task."""
    shared = [
        delayed(operator.mul)(10, pair, dask_key_name=f"pair-{pair}") for pair in range(count)
    ]
    tasks = [
        delayed(fallible(function))(number, shared[number // 2], dask_key_name=f"task-{number}")
        for number in range(count)
    ]
    results = {}
    account = compute_each(tasks, results.__setitem__)
    assert account.succeeded == len(results)
    assert all(number == result for number, result in results.items())
    return sorted(results), {number: it.error for number, it in account.failed.items()}


def test_failure_does_not_stop_other_tasks(compute_each, runs):
    def function(number, _):
        runs.add(number)
        if number in (3, 8):
            raise InkdaskError(f"layer {number} is corrupt")
        return number

    results, failed = tens(compute_each, function)
    assert results == [n for n in range(12) if n not in (3, 8)]
    assert {n: str(error) for n, error in failed.items()} == {
        3: "layer 3 is corrupt",
        8: "layer 8 is corrupt",
    }
    assert all(runs[n] == 1 for n in (3, 8))


@pytest.mark.parametrize("error", [UnavailableError, ValueError])
def test_passing_cause_is_retried(compute_each, runs, error):
    def function(number, _):
        run = runs.add(number)
        if number == 5 and run < 3:
            raise error("not now")
        if number == 7:
            raise error("never")
        return number

    results, failed = tens(compute_each, function)
    assert results == [n for n in range(12) if n != 7]
    assert list(failed) == [7]
    assert isinstance(failed[7], error)
    assert runs[5] == runs[7] == engine.TRIES


@fallible
def add(number, block):
    return number + block


@fallible
def corrupt():
    raise InkdaskError("a strip is corrupt")


def test_failure_fails_only_its_dependents(compute_each):
    strip = delayed(corrupt)(dask_key_name="strip")
    tasks = [delayed(add)(n, strip, dask_key_name=f"bad-{n}") for n in range(3)]
    tasks += [delayed(operator.neg)(n, dask_key_name=f"good-{n}") for n in range(5)]
    results = {}
    account = compute_each(tasks, results.__setitem__)
    assert sorted(results.values()) == [-4, -3, -2, -1, 0]
    assert set(account.failed) == {0, 1, 2}


def test_failed_task_is_retried_alone(compute_each, runs):
    """Only some of the tasks may need a block that cannot be read."""
    strip = delayed(corrupt)(dask_key_name="strip")
    tasks = [delayed(add)(n, strip, dask_key_name=f"task-{n}") for n in range(4)]
    tasks.append(delayed(operator.neg)(-4))

    def alone(number):
        runs.add(number)
        return delayed(add)(number, delayed(corrupt)() if number == 1 else 0)

    results = {}
    account = compute_each(tasks, results.__setitem__, alone)
    assert results == {n: n for n in (0, 2, 3, 4)}
    assert list(account.failed) == [1]
    assert [runs[number] for number in range(5)] == [1, 1, 1, 1, 0]


def test_raised_exception_fails_the_remaining_tasks(compute_each):
    """One of Dask's own steps may raise, for example without memory."""

    def broken():
        raise MemoryError("no room")

    account = compute_each([delayed(broken)() for _ in range(3)], print)
    assert [type(it.error) for it in account.failed.values()] == [MemoryError] * 3


def test_failure_pickles_without_unpicklable_parts():
    class LibraryError(Exception):
        def __init__(self):
            super().__init__("of a socket")
            self.lock = threading.Lock()

    @fallible
    def broken():
        raise LibraryError

    failure = broken()
    assert "broken" in failure.trace
    again = pickle.loads(pickle.dumps(failure))
    assert str(again.error) == "LibraryError: of a socket"
    assert (again.cause, again.may_pass) == (failure.cause, True)
    assert failure.error.__traceback__ is None


def test_results_of_fused_tasks_arrive_before_the_end():
    done, seen = [], []

    def write(block, block_id):
        done.append(block_id)
        return np.array([[block_id]], object)

    pieces = da.concatenate([da.ones(1) for _ in range(64)])
    written = da.map_blocks(write, pieces, meta=np.empty((0,), object), enforce_ndim=False)
    with dask.config.set(num_workers=1):
        account = engine.compute_each(
            written.to_delayed().ravel().tolist(), lambda *_: seen.append(len(done))
        )
    assert not account.failed
    assert len(seen) == 64
    assert seen[0] < 32  # results come before the end


def test_client_without_scheduler_yet_is_not_used(monkeypatch):
    """A notebook may make a client while a computation runs in the background."""
    made = SimpleNamespace(scheduler=None, status="connecting")
    monkeypatch.setattr("distributed.default_client", lambda: made)
    assert engine.current_client() is None
    made.scheduler = object()
    assert engine.current_client() is made


def test_threads_follow_the_cores_up_to_a_limit(monkeypatch):
    """Each thread needs memory for a chunk, and a machine may have two hundred cores."""
    monkeypatch.setattr(engine, "CPU_COUNT", 2)
    assert engine.threads() == 3
    monkeypatch.setattr(engine, "CPU_COUNT", 192)
    assert engine.threads() == engine.MOST_THREADS + 1
    with dask.config.set(num_workers=7):
        assert engine.threads() == 7


def test_job_stops_early_when_every_task_fails(compute_each, runs, tmp_path):
    def function(number, _):
        runs.add(number)
        raise RuntimeError("no network")

    results, failed = tens(compute_each, function, count=400)
    assert not results
    assert len(failed) == engine.HOPELESS
    assert len(list(tmp_path.iterdir())) < 200


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            KilledWorker("blend", SimpleNamespace(address="tcp://a:1"), 3),
            "KilledWorker: Attempted to run task 'blend' on 4 ",
        ),
        (RuntimeError("cannot\ndecode."), r"RuntimeError: cannot decode\.$"),
        (UnavailableError("s3://bucket does not answer."), r"s3://bucket does not answer\.$"),
    ],
)
def test_lasting_failure_is_explained(error, says):
    with pytest.raises(InkdaskError, match=f"^{says}") as caught:
        engine.Account({0: Failure(error)}).check()
    assert error in (caught.value, caught.value.__cause__)


def test_interrupt_is_raised_and_not_a_failure(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.compute_each([delayed(operator.neg)(1)], stop)


def test_failed_task_is_retried_on_another_worker(monkeypatch):
    """One worker may have a broken network."""
    monkeypatch.setattr(engine, "PAUSE", 0.01)

    def function(number):
        from distributed import get_worker

        if get_worker().name == 0:
            raise OSError("no route")
        return number

    with Client(processes=False, n_workers=3, threads_per_worker=1, dashboard_address=None):
        results = {}
        tasks = [delayed(fallible(function))(n) for n in range(9)]
        assert not engine.compute_each(tasks, results.__setitem__).failed
    assert results == {n: n for n in range(9)}


def running_key(block):
    key = np.empty((1, 1), object)
    key[0, 0] = get_worker().get_current_task()
    return key


def test_step_that_does_the_work_of_a_task_is_known_by_it():
    """What a worker runs may be the step before a task, whose other name the task is."""
    reaching = da.map_overlap(operator.neg, da.ones((8, 4), chunks=4), depth=1, boundary="none")
    keys = reaching.map_blocks(running_key, chunks=(1, 1), meta=np.empty((0, 0), object))
    tasks = dict(enumerate(keys.to_delayed().ravel()))
    with Client(processes=False, dashboard_address=None) as client:
        ran = [key.item() for key in client.gather(client.compute([*tasks.values()]))]
    assert not {task.key for task in tasks.values()}.intersection(ran)
    assert [engine.last_steps(tasks)[key] for key in ran] == [0, 1]


def test_products_of_tasks_on_threads_take_one_thread_each():
    def threads():
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    before, seen = threads(), []
    engine.compute_each([delayed(threads)()], lambda _, result: seen.append(result))
    assert seen == [{1}]
    assert threads() == before


def test_failures_after_a_success_do_not_stop_the_job(monkeypatch):
    monkeypatch.setattr(engine, "PAUSE", 0.01)

    def function(number):
        if 0 < number <= engine.HOPELESS:
            raise InkdaskError(f"layer {number} is corrupt")
        return number

    tasks = [delayed(fallible(function))(n, dask_key_name=f"task-{n:02d}") for n in range(30)]
    results = {}
    with dask.config.set(num_workers=1):
        account = engine.compute_each(tasks, results.__setitem__)
    assert results == {n: n for n in (0, *range(engine.HOPELESS + 1, 30))}
    assert len(account.failed) == engine.HOPELESS


def test_many_failures_of_one_cause_do_not_stop_the_job(monkeypatch):
    monkeypatch.setattr(engine, "PAUSE", 0.01)

    strip = delayed(corrupt)(dask_key_name="a-strip")
    bad = [delayed(add)(n, strip, dask_key_name=f"a-bad-{n}") for n in range(engine.HOPELESS)]
    good = [delayed(operator.neg)(n, dask_key_name=f"z-good-{n}") for n in range(5)]
    results = {}
    with dask.config.set(num_workers=1):
        account = engine.compute_each([*bad, *good], results.__setitem__)
    assert sorted(results.values()) == [-4, -3, -2, -1, 0]
    assert len(account.failed) == engine.HOPELESS


def test_error_of_the_receiver_is_raised(compute_each):
    """It is no failure of a task: tried again, or lost with the last task, it would go unseen."""
    ran = []

    def full(_, result):
        ran.append(result)
        raise InkdaskError("no space is left")

    with pytest.raises(InkdaskError, match="no space is left"):
        compute_each([delayed(operator.neg)(1)], full)
    assert ran == [-1]


@pytest.mark.parametrize(("driver", "torch_sees", "expected"), [
    (False, True, False), (True, False, False), (True, True, True)
])  # fmt: skip
def test_gpus_of_this_process_need_a_driver_and_torch(monkeypatch, driver, torch_sees, expected):
    def load(name):
        if not driver:
            raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(engine.ctypes, "CDLL", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_sees)
    monkeypatch.setattr(engine, "current_client", lambda: None)
    assert engine.has_gpus("threads") is expected
    assert engine.has_gpus("cuda")
    assert not engine.has_gpus("tcp://host:8786")


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        ({}, False),
        ({"a": {"gpu": {}}, "b": {"gpu": {}}}, True),
        ({"a": {"gpu": {}}, "b": {}}, False),
    ],
)
def test_gpus_of_a_client_are_those_of_its_workers(monkeypatch, workers, expected):
    class Client:
        @staticmethod
        def scheduler_info(n_workers):
            return {"workers": workers}

    monkeypatch.setattr(engine, "current_client", Client)
    assert engine.has_gpus("threads") is expected
