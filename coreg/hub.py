"""The model hub, asked so that a machine without network is told within seconds."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import huggingface_hub

NETWORK_SECONDS = 8.0


@contextlib.contextmanager
def cache_only(enabled: bool) -> Iterator[None]:
    """Let huggingface_hub look into its cache only, and other downloads give up soon."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    if enabled:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        socket.setdefaulttimeout(NETWORK_SECONDS)
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before[0]
        socket.setdefaulttimeout(before[1])


def hub_answers() -> bool:
    """Whether the model hub answers at all; in a thread, because a dead name server ignores every timeout."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=NETWORK_SECONDS / 2).close()
        except urllib.error.HTTPError:
            pass  # an answer, if not a friendly one
        except OSError:
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(NETWORK_SECONDS)
    return answered.is_set() and not huggingface_hub.constants.HF_HUB_OFFLINE
