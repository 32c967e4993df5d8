"""Run a function in a process of its own, limited in memory and time; what it reported before its end is kept."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from threading import Event
from typing import Any

import psutil

Report = Callable[[str, dict[str, Any]], None]


def run_each(
    function: Callable[[str, Report], None],
    names: Iterable[str],
    *,
    jobs: int,
    memory_gb: float,
    seconds: float,
    preload: list[str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Call `function(name, report)` for each name, each in its own process; yields what was reported, as they end.

    The result of one is `{step: reported}`; where the process was stopped or died, `"ended"` says why.
    """
    context = multiprocessing.get_context(
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(preload)  # slow imports are made once
    stop = Event()
    pool = ThreadPoolExecutor(jobs)
    try:
        waiting = {pool.submit(_run, context, function, name, memory_gb, seconds, stop): name for name in names}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    finally:  # also where the caller was interrupted: nothing runs on
        stop.set()
        pool.shutdown(cancel_futures=True)


def _run(context: Any, function: Any, name: str, memory_gb: float, seconds: float, stop: Event) -> dict[str, Any]:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(function, name, theirs), daemon=True)
    began = time.monotonic()
    process.start()
    theirs.close()
    found: dict[str, Any] = {}
    watched = psutil.Process(process.pid)
    why = None
    while why is None:
        try:
            if ours.poll(0.2):
                step, reported = ours.recv()
                found[step] = reported
            elif watched.memory_info().rss > memory_gb * 1e9:
                why = f"stopped: more than {memory_gb:g} GB"
            elif time.monotonic() - began > seconds:
                why = f"stopped: more than {seconds:g} s"
            elif stop.is_set():
                why = "stopped"
        except (EOFError, psutil.NoSuchProcess):
            break
    if why is not None:
        process.kill()
    process.join()
    ours.close()
    if why is None and process.exitcode != 0:
        why = f"died with exit code {process.exitcode}"
    return found if why is None else {**found, "ended": {"error": why}}


def _child(function: Callable[[str, Report], None], name: str, connection: Connection) -> None:
    function(name, lambda step, reported: connection.send((step, reported)))
    connection.close()
