"""Running programs that a model wrote, which nobody has read.

A program runs in a process of its own, in an empty folder, with limits on time, memory and the
size of files. That stops accidents, not malice: it can still read what the user can read, and use
the network.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile

SECONDS = 10
"""A program that is not done by then has failed."""

MEMORY_BYTES = 4 * 2**30
"""Address space of a program."""

FILE_BYTES = 2**24
"""The most that a program can write into one file."""

# The limits are set by the program's own process: a hook between fork and exec may hang in a
# process with threads, which JAX has.
_LIMITED = f"""
import resource, sys
for kind, limit in (("AS", {MEMORY_BYTES}), ("FSIZE", {FILE_BYTES}), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (limit, limit))
exec(compile(sys.stdin.read(), "program", "exec"), {{"__name__": "__main__"}})
"""


def check_allowed(allowed: bool) -> None:
    """Raises ValueError unless generated programs may run."""
    if not allowed:
        raise ValueError(
            "humaneval runs programs that the model writes, unread and with your rights on this "
            "machine: allow it with --run-generated-code, best in a container"
        )


def succeeds(program: str, *, seconds: float = SECONDS) -> bool:
    """Whether a Python program ends by itself, in time and without an error.

    Args:
        program: the source text.
        seconds: wall-clock time that it has.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            # Isolated: neither the user's packages nor Python's variables count.
            [sys.executable, "-I", "-X", "utf8", "-c", _LIMITED],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder},
            start_new_session=True,
        )
        try:
            process.communicate(program.encode(errors="replace"), timeout=seconds)
            return process.returncode == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the program and whatever else runs in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
