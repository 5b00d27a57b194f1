"""The model hub out of reach: noticed within seconds, not after minutes of retries."""

from __future__ import annotations

import socket
import sys
from functools import lru_cache
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

PATIENCE = 3.0  # seconds for one connection


@lru_cache
def prepare() -> bool:
    """Switch the hub's libraries to what is cached here if the hub can't be reached.

    They would try again for half a minute, for every file. Behind a proxy only the proxy knows, and
    nothing is switched. Once for a process.

    Returns:
        Whether the hub can be reached, as far as is known.
    """
    if constants.HF_HUB_OFFLINE or getproxies():
        return not constants.HF_HUB_OFFLINE

    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), PATIENCE).close()
        return True
    except OSError:
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return False
