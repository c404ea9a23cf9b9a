"""The run folder and its checkpoints: claimed once, atomic, checksummed, refused clearly."""

import json
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from coreg.errors import UserError
from coreg.files import write_atomically
from coreg.learn.two_nets import Divisions, Verdict
from coreg.records import RecordError
from coreg.run import checkpoint
from coreg.run.folder import RunFolder
from coreg.run.state import take_state
from coreg.run.training import Training


def test_a_folder_is_claimed_once_and_then_belongs_to_the_job(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.claim({"lr": 0.1, "ops": ("a", "b"), "store": "abc"})
        folder.claim({"lr": 0.1, "ops": ("a", "b"), "store": "abc"})
        with pytest.raises(UserError, match=r"lr was 0.1 and is 0.2; store was abc and is abd"):
            folder.claim({"lr": 0.2, "ops": ("a", "b"), "store": "abd"})
    assert json.loads((tmp_path / "run" / "job.json").read_text())["lr"] == 0.1
    assert not folder.finished


def test_looking_at_a_free_folder_writes_nothing(tmp_path):
    RunFolder(tmp_path / "run").refuse_other({"lr": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["file", "other", "damaged"])
def test_what_is_no_run_is_refused(tmp_path, content):
    root = tmp_path / "run"
    if content == "file":
        root.write_text("x")
    else:
        root.mkdir()
        (root / ("job.json" if content == "damaged" else "photo.png")).write_text("{")
    with pytest.raises(UserError, match={"file": "is a file", "other": "photo.png", "damaged": "is damaged"}[content]):
        RunFolder(root).refuse_other({"lr": 1})


def test_the_lock_is_exclusive_and_ends_with_its_holder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.locked(), pytest.raises(UserError, match="another job is running"), RunFolder(tmp_path / "run").locked():
        pass
    with folder.locked():
        pass


def test_a_failed_write_leaves_the_file_before_it(tmp_path):
    target = tmp_path / "report.json"
    write_atomically(target, "old")
    with pytest.raises(UserError, match="cannot write"):
        write_atomically(tmp_path / "missing" / "report.json", "new")
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["report.json"]


STATE = {"weights": {"a": torch.arange(4.0)}, "epoch": 3, "curves": [{"loss": 0.5}], "none": None}


def test_a_checkpoint_comes_back_and_the_last_two_stay(tmp_path):
    assert checkpoint.latest(tmp_path / "c") is None
    for number in (1, 2, 3):
        checkpoint.save(tmp_path / "c", number, STATE | {"epoch": number})
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["00000002", "00000003"]
    assert checkpoint.latest(tmp_path / "c") == 3
    loaded = checkpoint.load(tmp_path / "c", 3)
    assert loaded["epoch"] == 3 and torch.equal(loaded["weights"]["a"], torch.arange(4.0)) and loaded["none"] is None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no checksum", "gone", "a pipe"])
def test_a_damaged_checkpoint_falls_back_with_a_warning(tmp_path, damage):
    for number in (1, 2):
        checkpoint.save(tmp_path, number, STATE)
    file = tmp_path / "00000002" / "state.pt"
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[:-10])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "gone":
        file.unlink()
    elif damage == "a pipe":  # which nobody writes to
        file.unlink()
        os.mkfifo(file)
    else:
        (tmp_path / "00000002" / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match="falling back"):
        assert checkpoint.latest(tmp_path) == 1


def test_nothing_readable_is_an_error_and_not_a_fresh_start(tmp_path):
    checkpoint.save(tmp_path, 1, STATE)
    (tmp_path / "00000001" / "state.pt").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="delete"):
        checkpoint.latest(tmp_path)


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    checkpoint.save(tmp_path, 1, STATE)
    (tmp_path / ".00000002.tmp").mkdir()
    assert checkpoint.latest(tmp_path) == 1


def test_a_failed_save_keeps_the_earlier_ones(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, STATE)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    with pytest.raises(UserError, match=r"No space left on device.*intact"):
        checkpoint.save(tmp_path, 2, STATE)
    assert checkpoint.latest(tmp_path) == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("pwned",))

    checkpoint.save(tmp_path, 1, {"x": Evil()})
    with pytest.raises(Exception, match=r"[Ww]eights"):
        checkpoint.load(tmp_path, 1)


def test_the_lock_of_a_killed_trainer_is_free_at_once_though_its_workers_live_on(tmp_path):
    code = (
        "import multiprocessing, os, sys, time\n"
        "from coreg.run.folder import RunFolder\n"
        "def work():\n"
        # by the worker itself: one that has only just been forked holds the lock until it runs for the first time
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(100)\n"
        "with RunFolder(sys.argv[1]).locked():\n"
        "    multiprocessing.get_context('fork').Process(target=work).start()\n"
        "    time.sleep(100)\n"
    )
    root = str(tmp_path / "run")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, root]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as trainer:
        worker = int(trainer.stdout.readline())
        with pytest.raises(UserError, match="another job is running"), RunFolder(root).locked():
            pass
        trainer.kill()
        trainer.wait()
    try:
        os.kill(worker, 0)  # it lives
        with RunFolder(root).locked():
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


# ---- damage ---------------------------------------------------------------------------------------------------------


def other(rng):
    """Something that may stand where something else should."""
    odd = [None, True, -1, 7, 0.5, float("nan"), 10**30, "", "x", [], {}, [1], {"a": 1}, torch.zeros(2, 3), torch.zeros(())]
    return rng.choice(odd)


def mutated(value, rng):
    """The value with one of its parts, at any depth, replaced by something else or gone."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        return {k: mutated(v, rng) if k == key else v for k, v in value.items() if k != key or rng.random() < 0.8}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        return [mutated(v, rng) if i == place else v for i, v in enumerate(value)]
    return other(rng)


def training():
    """Two networks in the middle of an epoch that have divided 5 images of 3 classes, and what a checkpoint holds of it."""
    torch.manual_seed(0)
    nets = [torch.nn.Linear(2, 3) for _ in range(2)]
    divisions = Divisions(nets, 5)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, 0.9) for net in nets]
    made = Training(Accelerator(cpu=True), nets, optimizers, divisions)
    for net, optimizer in zip(nets, optimizers):
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    divisions.losses = [[np.zeros(5)], [np.ones(5)]]
    divisions.weights = [np.zeros(5), np.ones(5)]
    divisions.verdicts = [Verdict(torch.ones(5), torch.ones(5, 3), np.ones(5, bool)) for _ in nets]
    divisions.health = {"division/trusted": 0.5}
    made.epoch, made.curves, made.step = 1, [{"lr": 0.1}], 2
    divisions.consider(1, 0.5)
    return made


def test_of_a_mapped_checkpoint_nothing_stays_in_the_file_but_verdicts(tmp_path):
    made = training()
    checkpoint.save(tmp_path, 1, made.state_dict())
    state, whole = checkpoint.load(tmp_path, 1, mapped=True), checkpoint.load(tmp_path, 1)
    new = training()
    new.divisions.sharded = True
    take_state(new, state)
    file = tmp_path / "00000001" / "state.pt"
    with file.open("r+b") as there:  # what is mapped would change with it
        there.write(bytes(file.stat().st_size))
    verdicts = state["divisions"].pop("verdicts")
    assert not verdicts[0]["targets"].any()
    whole["divisions"].pop("verdicts")
    torch.testing.assert_close(state, whole, rtol=0, atol=0)
    assert (new.divisions.verdicts[0].targets.rows == 1).all() and (new.divisions.verdicts[1].weight == 1).all()
    assert new.divisions.verdicts[0].trusted.all()


def test_a_state_comes_back_as_it_was():
    state, new = training().state_dict(), training()
    new.epoch, new.divisions.weights = 0, []
    take_state(new, state)
    assert new.epoch == 1 and (new.divisions.weights[1] == 1).all() and new.divisions.verdicts[0].trusted.all()
    assert new.divisions.health == {"division/trusted": 0.5} and new.divisions.chosen["score"] == 0.5


def test_a_state_of_other_kernels_of_the_same_optimiser_comes_back():
    def adam(fused):
        net = torch.nn.Linear(2, 3)
        net(torch.ones(1, 2)).sum().backward()
        made = Training(Accelerator(cpu=True), [net], [torch.optim.AdamW(net.parameters(), 0.1, fused=fused)], None)
        made.optimizers[0].step()
        return made

    old, new = adam(None), adam(True)
    take_state(new, old.state_dict())
    torch.testing.assert_close(new.optimizers[0].state_dict()["state"], old.optimizers[0].state_dict()["state"])
    new.optimizers[0].step()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("divisions"), "no 'divisions'"),
        (lambda s: s["divisions"].pop("weights"), "divisions has no 'weights'"),
        (
            lambda s: s["divisions"]["weights"].__setitem__(0, torch.zeros(4)),
            r"weights\[0\] has the shape \(4,\), expected 5 images",
        ),
        (lambda s: s.__setitem__("epoch", -1), "epoch is -1"),
        (lambda s: s.__setitem__("curves", []), "curves has 0 entries, expected 1"),
        (lambda s: s["learners"].pop(), "learners has 1 entries, expected 2"),
        (lambda s: s["learners"][0].__setitem__("bias", torch.zeros(4)), r"learners\[0\].bias is torch.float32 \(4,\)"),
        (lambda s: s["optimizers"][1]["param_groups"][0].__setitem__("momentum", 0.5), "momentum is 0.5, expected 0.9"),
        (
            lambda s: s["optimizers"][1]["state"][0].__setitem__("momentum_buffer", torch.zeros(9)),
            "momentum_buffer has the",
        ),
        (
            lambda s: s["divisions"]["verdicts"][0].__setitem__("targets", torch.zeros(4, 3)),
            r"verdicts\[0\].targets has the shape",
        ),
    ],
)
def test_a_state_of_another_training_is_named(change, message):
    state = training().state_dict()
    change(state)
    with pytest.raises(RecordError, match=message):
        take_state(training(), state)


def test_whatever_stands_in_a_checkpoint_with_a_right_hash_is_one_line_or_taken(tmp_path):
    rng, refused = random.Random(0), 0
    for number in range(1, 151):
        state = mutated(training().state_dict(), rng)
        checkpoint.save(tmp_path, number, state)
        try:
            take_state(training(), checkpoint.load(tmp_path, number))
        except RecordError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


@pytest.mark.parametrize("name", ["job.json", "checkpoints/00000001/state.json"])
def test_damaged_records_of_a_run_are_one_line_or_the_same_run(tmp_path, name):
    """Bytes flipped, files cut off, parts replaced, folders and nonsense in their place."""
    rng, folder, identity = random.Random(0), RunFolder(tmp_path), {"script": "train_coreg.py", "lr": 0.1, "ops": ["a"]}
    folder.claim(identity)
    checkpoint.save(folder.checkpoints, 1, STATE)
    file = tmp_path / name
    whole = file.read_bytes()
    nonsense = [b"[" * 100_000, b"\xff\xfe", b"", b"1" * 5000, b'{"schema": ' + b"9" * 5000 + b"}", b"null"]
    for number in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        replaced = json.dumps(mutated_json(json.loads(whole), rng)).encode()
        file.write_bytes([damaged, damaged[: rng.randrange(len(damaged))], replaced, rng.choice(nonsense)][number % 4])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                folder.refuse_other(identity)
                assert checkpoint.latest(folder.checkpoints) == 1
            except UserError as error:
                assert "\n" not in str(error)
    file.unlink()
    file.mkdir()
    with warnings.catch_warnings(), pytest.raises(UserError):
        warnings.simplefilter("ignore")
        folder.refuse_other(identity)
        checkpoint.latest(folder.checkpoints)


def mutated_json(value, rng):
    """As `mutated`, of what JSON knows."""
    while True:
        try:
            changed = mutated(value, rng)
            json.dumps(changed)
            return changed
        except TypeError:
            continue


def test_folders_that_only_resemble_checkpoints_are_passed_over(tmp_path):
    for name in ("²", "1" * 200, "old", "00000001.bak"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path) is None
