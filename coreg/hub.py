"""The model hub, asked so that without network an error comes within seconds, and never asked for code."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import huggingface_hub

from coreg.errors import UserError
from coreg.plaintext import first_line

NETWORK_SECONDS = 8.0
HUB = "hf-hub:"


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


def push_to_hub(folder: Path, name: str, kind: str, message: str) -> str:
    """Upload a folder, private to whoever does it; gives its address.

    Args:
        name: USER/NAME. kind: `model` or `dataset`. message: of the commit.

    Raises:
        UserError: nobody is logged in, the hub cannot be reached, or it refuses.
    """
    api = huggingface_hub.HfApi()
    try:
        api.whoami()
        api.create_repo(name, private=True, exist_ok=True, repo_type=kind)
        return str(api.upload_folder(repo_id=name, folder_path=folder, repo_type=kind, commit_message=message))
    except Exception as error:  # of the hub, of its client's network library, whichever that is in this version
        raise UserError(
            f"{name} could not be uploaded ({first_line(error)}); check the name, the network and `hf auth login`, then "
            f"try again"
        ) from None


def from_hub(spec: str, files: Sequence[str]) -> Path:
    """The files of a model on the hub, as far as they are of these patterns; those that are here already without network.

    Args:
        spec: `hf-hub:USER/NAME`, or `hf-hub:USER/NAME@REVISION`.

    Raises:
        UserError: there is no such model for whoever asks, or the hub cannot be reached.
    """
    name, _, revision = spec.removeprefix(HUB).partition("@")
    try:
        with cache_only(not hub_answers()):
            folder = huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=list(files))
        return Path(folder)
    except Exception as error:  # as above
        raise UserError(
            f"{spec} could not be loaded ({first_line(error)}); check the name, the network and, of a private model, "
            f"`hf auth login`; or give a folder"
        ) from None


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
