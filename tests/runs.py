"""Runs of the scripts, as tests start, kill and read them; it holds no test."""

import contextlib
import dataclasses
import importlib.util
import inspect
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from threadpoolctl import threadpool_limits

from coreg.errors import UserError
from coreg.learn.partial_options import OPTIONS
from coreg.run import checkpoint
from coreg.store.store import AnnotationStore, StoreWriter, make_manifest
from coreg.weak.noise import uniforms

ROOT = Path(__file__).parents[1]

# the first backward pass of a process says which devices get threads, and exporting a program makes one more device known:
# a process with such threads could not be forked
torch.ones(1, requires_grad=True).sum().backward()


def script(name, folder=ROOT / "baselines"):
    """The module of baselines/NAME.py, or of another folder's."""
    spec = importlib.util.spec_from_file_location(f"{folder.name}_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def with_method(method, **values):
    """`--method` and those of the options that it has, as arguments of baselines/pll.py."""
    has = {field.name for field in dataclasses.fields(OPTIONS[method])}
    return ["--method", method, *(word for key in values if key in has for word in (f"--{key}", str(values[key])))]


def final_state(output):
    """What the last checkpoint of a run holds."""
    return checkpoint.load(output / "checkpoints", checkpoint.latest(output / "checkpoints"))


def same_curves(ours, theirs, limit=1e-10):
    """The curves of two final states, each number within `limit` (times its size, where that is above 1)."""
    for number, (a, b) in enumerate(zip(ours["curves"], theirs["curves"], strict=True)):
        assert list(a) == list(b)
        apart = {name: (a[name], b[name]) for name in a if not abs(a[name] - b[name]) <= limit * max(1, abs(a[name]))}
        assert not apart, f"epoch {number + 1}: {apart}"


def refused(capsys, main, *arguments):
    """The one line of a refused start."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in arguments])
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def error_of(function, *arguments):
    """The one line of the UserError that a call ends with."""
    with pytest.raises(UserError) as raised:
        function(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@dataclasses.dataclass
class Ended:
    """A group of processes that have ended."""

    codes: list[int]  # exit codes in the order of their ranks; minus the number of the signal that ended a process
    stdout: str  # of all of them, one after the other
    stderr: str


def in_processes(count, main, *words, before=None):
    """`main(words)` in processes that form a group like those of a launcher, or in one; each calls `before()` first.

    They are forked from this one, so that nothing has to be imported; tests/test_launch.py has the real launchers, and
    `on_two_processes` can use one. When one of them fails the others have a while to notice, and are killed then.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    where |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    children, codes, limit = {}, {}, time.monotonic() + 300
    with tempfile.TemporaryDirectory() as folder:
        logs = [[Path(folder, f"{name}{rank}") for name in ("stdout", "stderr")] for rank in range(count)]
        for rank in range(count):
            own = where | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            children[rank] = forked(main, words, logs[rank], before, own)
        while len(codes) < count:
            for rank in children.keys() - codes:
                ended, status = os.waitpid(children[rank], os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    limit = min(limit, time.monotonic() + 20) if codes[rank] else limit
                elif time.monotonic() > limit:
                    os.kill(children[rank], signal.SIGKILL)
            time.sleep(0.01)
        texts = ["".join(files[number].read_text() for files in logs) for number in (0, 1)]
    return Ended([codes[rank] for rank in range(count)], *texts)


def forked(main, words, logs, before=None, environment=()):
    """A process that runs `main(words)` after `before()` on the CPU and writes into two `logs`; gives its number."""
    if child := os.fork():
        return child
    code = 1
    try:
        for number, file in enumerate(logs, start=1):
            os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", 1)
        os.environ |= dict(environment) | {"CUDA_VISIBLE_DEVICES": ""}
        # pytest keeps warnings to itself
        warnings.resetwarnings()
        warnings.showwarning = lambda *args: sys.stderr.write(warnings.formatwarning(*args[:4]))
        # threads of the process that was forked are not there, and neither is its device
        torch.set_num_threads(1)
        threadpool_limits(1)
        torch.cuda.is_available = lambda: False
        AcceleratorState._reset_state(reset_partial_state=True)
        if before:
            before()
        code = main([str(word) for word in words]) or 0
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def on_two_processes(main, *words):
    """`main(words)` on two processes of the CPU, which have to end well; gives what they printed.

    Forked ones, or, where REAL_LAUNCHER is set (`make test-multiprocess` and `make test-slow` do), those of accelerate's.
    """
    if "REAL_LAUNCHER" not in os.environ:
        ended = in_processes(2, main, *words)
        assert ended.codes == [0, 0], ended.stderr[-2000:]
        return ended.stdout
    config = ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), "--num_processes", "2"]
    begin = [str(ROOT / "tests" / "launched.py"), inspect.getsourcefile(inspect.unwrap(main)), *map(str, words)]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *config, *begin],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def as_votes(drawn, folder, spec="m"):
    """A store of drawn sets again as the votes and probabilities of an annotator `spec`, one template a candidate."""
    store = AnnotationStore.open(drawn)
    sets, images = store.drawn_sets(), store.images()
    order = uniforms(0, "order", np.arange(len(sets)), sets.shape[1])
    votes = np.where(sets, order, 2.0).argsort(axis=1)[:, : sets.sum(axis=1).max()].astype(np.int16)
    votes[np.arange(votes.shape[1]) >= sets.sum(axis=1, keepdims=True)] = -1
    probs = (sets / sets.sum(axis=1, keepdims=True)).astype(np.float16)
    templates = [f"synthetic candidate {number} ({{}})" for number in range(1, votes.shape[1] + 1)]
    write_store(folder, images, store.class_names, templates, {"votes": votes, "probs": probs}, spec=spec)
    return Path(folder)


def write_store(root, images, class_names, templates, tensors, block_size=40, errors=None, spec="m"):
    """A store of these tensors, with rows for all images; gives it."""
    features = tensors["features"].shape[1] if "features" in tensors else None
    details = {"features": features, "data_root": "data", "preprocessing": None, "versions": {}}
    manifest = make_manifest(images, class_names, templates, {"spec": spec, "weights": "w"}, block_size, **details)
    part = lambda rows: {name: table[rows] for name, table in tensors.items()}  # noqa: E731
    StoreWriter(Path(root), manifest).write_all(images, part, errors)
    return AnnotationStore.open(root)


def zero_shot_accuracy(store, single_template=False):
    """Accuracy of the annotator itself by split, of template 0 alone or of the mean probabilities; unreadable is wrong."""
    named = store.votes()[:, 0].astype(np.int64) if single_template else store.probs().argmax(axis=1)
    right = (named == store.labels) & ~store.unreadable
    rows = {name: (store.split == split) & (store.labels >= 0) for split, name in enumerate(("train", "test"))}
    return {name: float(right[chosen].mean()) for name, chosen in rows.items() if chosen.any()}


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_at(monkeypatch, epoch, step=0):
    """A run inside is killed right after the checkpoint of this moment."""
    whole = checkpoint.save

    def save_then_die(folder, number, state):
        whole(folder, number, state)
        if (state["epoch"], state["step"]) == (epoch, step):
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", save_then_die)
        with pytest.raises(Killed):
            yield


@contextlib.contextmanager
def signalled_after(monkeypatch, steps, number=signal.SIGTERM):
    """A run inside gets a signal in the middle of its step of this number, counted by passes backward."""
    backward, left = torch.Tensor.backward, [steps]

    def backward_then_signal(*args, **kwargs):
        backward(*args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "backward", backward_then_signal)
        yield
