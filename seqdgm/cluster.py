"""Tasks over the parts of a panel, here one after the other or on a Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

# Large enough that batched fits lose nothing, small enough that a partition's draws fit in memory.
PARTITION_SIZE = 2000

# Tasks submitted and not collected, for each processor of the cluster: one runs, one waits.
_IN_FLIGHT = 2
# How often a task is run again whose worker process or machine was lost.
_RETRIES = 4


class Rows(NamedTuple):
    """The series from position `first` up to `stop`, exclusive."""

    first: int
    stop: int


def partitions(n_series: int, size: int) -> list[Rows]:
    """Cut a panel into parts of `size` consecutive series, the last of which may have fewer."""
    return [Rows(first, min(first + size, n_series)) for first in range(0, n_series, size)]


class Task(Protocol):
    """What a task must say of itself."""

    @property
    def data(self) -> Hashable:
        """Key of the data it works on; tasks of one key share them."""


T = TypeVar("T", bound=Task)
R = TypeVar("R")


def run_tasks(
    function: Callable[[Any, Any, T], R],
    tasks: Iterable[T],
    *,
    common: Any,
    load: Callable[[Any], Any],
    cluster: str | None = None,
    lost: Callable[[Any, Any, T, str], R] | None = None,
) -> Iterator[tuple[T, R]]:
    """Yield each task with ``function(common, load(task.data), task)``.

    Parameters
    ----------
    function : callable
        Must depend on nothing but its arguments: it runs in any process, more than once if need be.
    tasks : iterable
        Taken one by one, as there is room for them.
    common : object
        What every task needs.
    load : callable
        Makes the data of a key.
    cluster : str, optional
        None runs the tasks in this process, in their order. ``"ray"`` uses the Ray session of this
        process, or else the cluster that ``ray.init()`` finds (``RAY_ADDRESS``, a cluster on this
        machine), or else starts one on this machine until all is done; any other text is the
        address of a cluster, as ``"ray://host:10001"`` or ``"auto"``. `common` and the data of each
        key go into the object store once; at most two tasks for each processor are in flight, in
        the order in which they end; tasks of a lost worker are run again. A task has one processor,
        and Ray gives its numerical libraries as many threads.
    lost : callable, optional
        Makes the result of a task that lost its worker every time, from the arguments of `function`
        and what happened; without it that is an error.

    Raises
    ------
    ImportError
        Without Ray: ``pip install 'seqdgm[cluster]'``.
    RuntimeError
        For a task that lost its worker every time.
    Exception
        What a task raises, as it raised it.
    """
    check_cluster(cluster)
    if cluster is None:
        return _here(function, tasks, common, load)
    return _on_ray(function, tasks, common, load, cluster, lost)


def check_cluster(cluster: Any) -> None:
    """Raise a ValueError for what cannot be a cluster."""
    if cluster is not None and (not isinstance(cluster, str) or not cluster):
        raise ValueError(
            f"cluster={cluster!r} is neither None, 'ray' nor an address as 'ray://host:10001'"
        )


def _here(
    function: Callable[[Any, Any, T], R],
    tasks: Iterable[T],
    common: Any,
    load: Callable[[Any], Any],
) -> Iterator[tuple[T, R]]:
    held: tuple[Hashable, Any] | None = None
    for task in tasks:
        if held is None or held[0] != task.data:
            held = task.data, load(task.data)
        yield task, function(common, held[1], task)


def _on_ray(
    function: Callable[[Any, Any, T], R],
    tasks: Iterable[T],
    common: Any,
    load: Callable[[Any], Any],
    address: str,
    lost: Callable[[Any, Any, T, str], R] | None,
) -> Iterator[tuple[T, R]]:
    with _session(address) as ray:
        remote = ray.remote(num_cpus=1, max_retries=_RETRIES)(function)
        shared = ray.put(common)
        stored: dict[Hashable, Any] = {}
        running: dict[Any, T] = {}

        def collect() -> tuple[T, R]:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            try:
                return running[ready], ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except _lost_workers(ray) as error:
                text = (
                    f"the worker was lost {1 + _RETRIES} times ({type(error).__name__}), perhaps "
                    "for want of memory"
                )
                if lost is None:
                    raise RuntimeError(f"{running[ready]}: {text}") from error
                return running[ready], lost(common, load(running[ready].data), running[ready], text)
            finally:
                del running[ready]

        try:
            for task in tasks:
                if len(running) >= _IN_FLIGHT * max(int(ray.cluster_resources().get("CPU", 1)), 1):
                    yield collect()
                if task.data not in stored:
                    stored[task.data] = ray.put(load(task.data))
                running[remote.remote(shared, stored[task.data], task)] = task
            while running:
                yield collect()
        finally:
            for left in running:
                ray.cancel(left, force=True)


def _lost_workers(ray: Any) -> tuple[type[Exception], ...]:
    names = ("WorkerCrashedError", "OutOfMemoryError", "NodeDiedError")
    return tuple(getattr(ray.exceptions, name) for name in names)


@contextmanager
def _session(address: str) -> Iterator[Any]:
    """Ray, connected; only a connection made here is ended here."""
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            f"cluster={address!r} needs Ray; install it with: pip install 'seqdgm[cluster]'"
        ) from error
    own = not ray.is_initialized()
    if own:
        where = None if address == "ray" else address
        ray.init(where, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield ray
    finally:
        if own:
            ray.shutdown()
