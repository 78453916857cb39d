"""Options of commands that several processes run together, and how these find each other."""

from __future__ import annotations

import argparse
import os
import sys

from h1bjax.cli.options import positive

_HEARTBEAT_SECONDS = 30
_SHUTDOWN_SECONDS = 15


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Adds --mesh, and the options by which processes find each other."""
    group = parser.add_argument_group(
        "many devices", "Every process runs the same command; the first one prints."
    )
    group.add_argument(
        "--mesh",
        metavar="SIZES",
        help="devices along each axis, such as batch=2,tensor=4,sequence=1: rows, heads, tokens",
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join the other processes, as TPU pods, SLURM and MPI describe them",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where the first process can be reached; elsewhere than on those, with the next two",
    )
    group.add_argument("--processes", type=positive, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which this is, from 0")


def join_processes(options: argparse.Namespace) -> bool:
    """Joins the other processes if there are any; stdout of all but the first leads nowhere then.

    Returns:
        Whether this is the first process.

    Raises:
        ValueError: only some of the options that belong together are given, or --process is none
            of --processes.
        RuntimeError: the others did not come.
    """
    named = (options.coordinator, options.processes, options.process)
    if all(option is None for option in named):
        if not options.distributed:
            return True
    elif None in named:
        raise ValueError("--coordinator, --processes and --process belong together")
    elif not 0 <= options.process < options.processes:
        raise ValueError(f"--process {options.process} is none of 0 to {options.processes - 1}")
    import jax

    jax.distributed.initialize(
        options.coordinator,
        options.processes,
        options.process,
        # A process that is lost must not leave the others waiting for minutes.
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
    first = jax.process_index() == 0
    if not first:
        # The descriptor rather than the stream: Gloo writes to it, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return first


def are_joined() -> bool:
    """Whether this is one of several processes that found each other."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()
