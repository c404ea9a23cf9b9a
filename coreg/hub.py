"""The model hub, asked so that without network an error comes within seconds, and never asked for code."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import NoReturn

import huggingface_hub

NETWORK_SECONDS = 8.0


@contextlib.contextmanager
def cache_only(enabled: bool) -> Iterator[None]:
    """Let huggingface_hub read its cache only, and other downloads give up soon."""
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


@contextlib.contextmanager
def without_foreign_code() -> Iterator[None]:
    """While it is open, transformers neither runs code that a model brings along nor asks on the terminal whether to.

    `trust_remote_code=False` says so where a call of ours passes it on; open_clip loads text towers and tokenizers with
    transformers too, and passes on what a model's configuration says.
    """
    from transformers import dynamic_module_utils as dynamic

    # without seconds to answer in there is no question; the last is the one function that imports a model's own file
    changed = {"TIME_OUT_REMOTE_CODE": 0, "_raise_timeout_error": _refuse_code, "get_class_in_module": _refuse_code}
    before = {name: getattr(dynamic, name) for name in changed}
    for name, value in changed.items():
        setattr(dynamic, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(dynamic, name, value)


def _refuse_code(*args: object, **kwargs: object) -> NoReturn:
    raise RuntimeError("the model asks to run code of its own, which is never done")
