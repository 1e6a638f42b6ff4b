"""`set_up_logging`: what the processes of a deployment log; Ray writes it to files and to whoever deployed."""

from __future__ import annotations

import logging
from typing import Any

# Serve's own words: what goes wrong, and not a line a request.
SERVE_LOGGING: dict[str, Any] = {"log_level": "WARNING", "enable_access_log": False}


def set_up_logging(level: str) -> None:
    """Log to stderr from `level` up; other packages from warnings up."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name in ("jaxserve", "api"):
        logging.getLogger(name).setLevel(level.upper())
