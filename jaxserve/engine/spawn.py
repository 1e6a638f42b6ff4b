"""`spawn`: starts an engine process, which waits for its order; imports little, so that it can come first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from jaxserve.config import API_KEY_VARIABLE


def spawn(core: str | None = None) -> subprocess.Popen[bytes]:
    """The process; its standard input wants a `LaunchOrder`, and its end without one ends the process.

    `core`, as "module:attribute", is imported meanwhile: that takes as long as all that its parent does until then.
    """
    # The child imports from where its parent does; without -P it would look into the working directory first.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path)}
    environment.pop(API_KEY_VARIABLE, None)  # keys are the API's business alone
    command = [sys.executable, "-P", "-m", "jaxserve.engine.process", *([core] if core else [])]
    # Ctrl-C reaches the whole group, and the child inherits what this thread blocks: it waits until `process.main`
    # ignores it, where it would end the child's imports with a traceback.
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
