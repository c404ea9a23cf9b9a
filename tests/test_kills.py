"""Jobs that are killed, stopped, starved of disk or started twice: real processes, real signals, the same end."""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL_JOB
from runs import final_state, forked, in_processes, same_curves
from signalled_job import follow

import train_coreg
from coreg.run import checkpoint
from coreg.run.watch import EXIT_INTERRUPTED

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).parents[1]
SIGNALLED = Path(__file__).with_name("signalled_job.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def arguments(store, output, *more):
    return ["--annotations", str(store), "--output_dir", str(output), *SMALL_JOB, *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a job in a process of its own: (plan, arguments) to its exit code (or minus the signal) and what it printed."""
    folder, count, stopped = tmp_path_factory.mktemp("logs"), itertools.count(), []

    def ask(plan, args):
        """`plan` None: let the job that was stopped go on; no arguments then."""
        log = folder / f"{next(count)}.log"
        log.touch()
        if plan is None:
            os.kill(child := stopped.pop(), signal.SIGCONT)
        else:
            child = forked(train_coreg.main, args, (log, log), lambda: follow(plan))
        _, status = os.waitpid(child, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            stopped.append(child)
            return -os.WSTOPSIG(status), log.read_text()
        return os.waitstatus_to_exitcode(status), log.read_text()

    return ask


def launched(processes, plan, args, launcher="accelerate", more=()):
    """The job in several processes, started by a real launcher; gives the finished launcher."""
    if launcher == "accelerate":
        config = ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), "--num_processes", str(processes)]
        start = [sys.executable, "-m", "accelerate.commands.launch", *config, *more]
    else:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *more]
    command = [*start, str(SIGNALLED), json.dumps(plan), *args]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


def differences(ours, theirs, path=""):
    """Names of everything in two checkpoints that is not equal in every bit."""
    if isinstance(ours, torch.Tensor):
        same = isinstance(theirs, torch.Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        return [] if same else [path]
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        compared = [key for key in ours if key not in ("seconds", "making_seconds")]
        return [name for key in compared for name in differences(ours[key], theirs[key], f"{path}/{key}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [name for i, (a, b) in enumerate(zip(ours, theirs)) for name in differences(a, b, f"{path}/{i}")]
    return [] if ours == theirs else [path]


@pytest.fixture(scope="module")
def whole(run, small_store, tmp_path_factory):
    """The uninterrupted job: its final state, and its events in order."""
    folder = tmp_path_factory.mktemp("whole")
    code, log = run({"events": str(folder / "events")}, arguments(small_store, folder / "run"))
    assert code == 0, log
    return final_state(folder / "run"), (folder / "events").read_text().split()


@pytest.fixture(scope="module")
def whole_of_two(small_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = launched(2, {}, arguments(small_store, folder / "run"))
    assert done.returncode == 0, done.stderr[-2000:]
    return final_state(folder / "run")


def test_differences_sees_one_bit():
    state = {"a": [torch.zeros(3), 1.0], "seconds": 1}
    other = {"a": [torch.tensor([0.0, 0.0, 1e-300]), 1.0], "seconds": 2}
    assert differences(state, state) == [] and differences(state, other) == []  # 1e-300 is 0 in float32
    other["a"][0][2] = 1e-30
    assert differences(state, other) == ["/a/0"]
    assert differences(state, {"a": [torch.zeros(3), 1.5], "seconds": 1}) == ["/a/1"]


def kills(events):
    """24 seeded events: steps of warm-up and training, divisions, and checkpoints half and wholly written."""
    rng = random.Random(0)
    wanted = {"warm-up": 6, "division": 4, "training": 9, "save": 3, "saved": 2}
    places = {name: [i for i, event in enumerate(events, 1) if event == name] for name in wanted}
    return sorted((at, name) for name, count in wanted.items() for at in rng.sample(places[name], count))


def lost(run, store, tmp_path, whole, chosen, minutes):
    """SIGKILL at every chosen event in a folder of its own, then the same command again: what is not as in `whole`."""
    outcomes = {}
    for place in chosen:
        args = arguments(store, tmp_path / str(place[0]), "--checkpoint_minutes", minutes)
        assert run({"signal": "SIGKILL", "at": place[0]}, args)[0] == -signal.SIGKILL
        code, log = run({}, args)
        outcomes[place] = log if code else differences(whole, final_state(tmp_path / str(place[0])))
    return {place: problem for place, problem in outcomes.items() if problem}


def test_killed_anywhere_and_started_again_ends_the_same(run, small_store, whole, tmp_path):
    kinds = ("warm-up", "division", "training", "save")
    chosen = [next(place for place in kills(whole[1]) if place[1] == name) for name in kinds]
    assert lost(run, small_store, tmp_path, whole[0], chosen, "10") == {}


@pytest.mark.slow
@pytest.mark.parametrize("minutes", ["10", "0"], ids=["a checkpoint an epoch", "a checkpoint a step"])
def test_24_kills_over_the_whole_job(run, small_store, whole, tmp_path, minutes):
    state, events = whole
    if minutes == "0":
        args = arguments(small_store, tmp_path / "often", "--checkpoint_minutes", "0")
        assert run({"events": str(tmp_path / "events")}, args)[0] == 0
        events = (tmp_path / "events").read_text().split()
        assert events.count("saved") == events.count("warm-up") + events.count("training") + 3
    chosen = kills(events)
    assert len(set(chosen)) == 24
    assert lost(run, small_store, tmp_path, state, chosen, minutes) == {}


@pytest.mark.parametrize(
    ("name", "kind", "which"), [("SIGTERM", "warm-up", 2), ("SIGUSR1", "training", 7), ("SIGINT", "training", 4)]
)
def test_a_signal_stops_at_the_next_step_and_nothing_is_done_twice(run, small_store, whole, tmp_path, name, kind, which):
    """A checkpoint in the middle of the epoch, then exactly the steps that are left."""
    state, events = whole
    at = [i for i, event in enumerate(events, 1) if event == kind][which]
    args, left = arguments(small_store, tmp_path / "run"), tmp_path / "events"
    code, log = run({"signal": name, "at": at}, args)
    assert code == EXIT_INTERRUPTED and "Traceback" not in log, log
    assert "Stopped by a signal" in log and "same command" in log
    code, log = run({"events": str(left)}, args)
    assert code == 0 and "Going on with" in log, log
    assert left.read_text().split() == events[at:]
    assert differences(state, final_state(tmp_path / "run")) == []


def left_over(folder):
    """Names of what is half-written."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if "tmp" in path.name]


@pytest.mark.parametrize(
    "place",
    ["coreg.run.pixels:decode", "coreg.export.ensemble:load_export", "coreg.run.results:model_card", "json:dumps"],
    ids=["images are decoded", "an export is half there", "the end is half done", "the first file is written"],
)
def test_ctrl_c_outside_of_training_is_one_line_and_leaves_nothing_half_written(run, small_store, tmp_path, place):
    args = arguments(small_store, tmp_path / "run", "--epochs", "1")
    code, log = run({"signal": "SIGINT", "before": place}, args)
    assert code == -signal.SIGINT and log.splitlines()[-1] == "Stopped by Ctrl-C; the same command goes on.", log
    assert log.count("Stopped") == 1 and "Traceback" not in log
    assert not left_over(tmp_path) and not (tmp_path / "run" / "report.json").exists()
    code, log = run({}, args)
    assert code == 0 and (tmp_path / "run" / "report.json").exists(), log


@pytest.fixture(scope="module")
def often(run, small_store, tmp_path_factory):
    """The folder of a job that wrote a checkpoint after every step and was killed; nobody writes into it."""
    folder = tmp_path_factory.mktemp("often")
    args = arguments(small_store, folder, "--checkpoint_minutes", "0")
    assert run({"signal": "SIGKILL", "at": 40}, args)[0] == -signal.SIGKILL
    return folder


def cut(checkpoint_folder):
    file = checkpoint_folder / "state.pt"
    file.write_bytes(file.read_bytes()[:-1000])


def flip(checkpoint_folder):
    content = bytearray((checkpoint_folder / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint_folder / "state.pt").write_bytes(content)


@pytest.mark.parametrize(
    "damage", [cut, flip, lambda folder: (folder / "state.json").unlink()], ids=["cut off", "one bit", "no checksum"]
)
def test_a_damaged_newest_checkpoint_falls_back(run, small_store, whole, often, tmp_path, damage):
    shutil.copytree(often, tmp_path, dirs_exist_ok=True)
    args = arguments(small_store, tmp_path)
    newest = max(path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    damage(newest)
    code, log = run({}, args)
    assert code == 0 and f"{newest.name} is damaged" in log and "falling back" in log, log
    assert differences(whole[0], final_state(tmp_path)) == []


def test_a_full_disk_is_a_clear_error_and_the_checkpoints_before_it_stay(run, small_store, whole, tmp_path):
    """Room for two checkpoints and a half: the third one cannot be written. With more room the job goes on."""
    disk, saved = tmp_path / "disk", tmp_path / "size"
    checkpoint.save(saved, 1, whole[0])
    with small_disk(disk) as resize:
        resize(int(2.5 * (saved / "00000001" / "state.pt").stat().st_size))
        code, log = run({}, arguments(small_store, disk / "run"))
        lines = [line for line in log.splitlines() if line.startswith("error:")]
        assert code == 2 and len(lines) == 1 and "Traceback" not in log, log
        assert "No space left on device" in lines[0] and "the earlier ones are intact" in lines[0]
        assert final_state(disk / "run")["epoch"] == 2
        assert not list((disk / "run").rglob("*.tmp*"))
        resize("16m")
        code, log = run({}, arguments(small_store, disk / "run"))
        assert code == 0, log
        assert differences(whole[0], final_state(disk / "run")) == []


@contextlib.contextmanager
def small_disk(folder):
    """A file system of its own at `folder`; gives what sets its size in bytes."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def ends_on_a_full_disk(run, store, whole, tmp_path, kilobytes):
    """Every space left after the last epoch: one line, nothing half-written; with more space the same end."""
    trained = tmp_path / "trained"
    last = len(whole[1])  # the checkpoint of the last epoch
    assert run({"signal": "SIGKILL", "at": last}, arguments(store, trained))[0] == -signal.SIGKILL
    codes, disk = [], tmp_path / "disk"
    with small_disk(disk) as resize:
        for room in kilobytes:
            resize("64m")
            shutil.rmtree(disk / "run", ignore_errors=True)
            shutil.copytree(trained, disk / "run")
            status = os.statvfs(disk)
            resize((status.f_blocks - status.f_bfree) * status.f_bsize + 1024 * room)
            code, log = run({}, arguments(store, disk / "run"))
            codes.append(code)
            if code == 0:
                continue
            lines = [line for line in log.splitlines() if line.startswith("error:")]
            assert code == 2 and len(lines) == 1 and "Traceback" not in log and "Exception" not in log, (room, log)
            assert "No space left on device" in lines[0] and "free some space" in lines[0], (room, log)
            assert not left_over(disk) and not (disk / "run" / "report.json").exists(), room
        resize("64m")
        code, log = run({}, arguments(store, disk / "run"))
        assert code == 0 and (disk / "run" / "report.json").exists(), log
        assert differences(whole[0], final_state(disk / "run")) == []
    return codes


def test_a_disk_that_fills_at_the_end_is_one_line(run, small_store, whole, tmp_path):
    assert ends_on_a_full_disk(run, small_store, whole, tmp_path, [8, 96, 320]) == [2, 2, 2]


@pytest.mark.slow
def test_disks_of_many_sizes_at_the_end(run, small_store, whole, tmp_path):
    codes = ends_on_a_full_disk(run, small_store, whole, tmp_path, [0, 4, 12, 32, 64, 128, 192, 256, 384, 512, 640, 4096])
    assert codes[:8] == [2] * 8 and codes[-1] == 0


def test_a_second_job_and_a_changed_one_are_refused(run, small_store, whole, tmp_path):
    args = arguments(small_store, tmp_path / "run")
    assert run({"signal": "SIGSTOP", "at": 12}, args)[0] == -signal.SIGSTOP  # holds the folder meanwhile
    elsewhere = str(tmp_path / "run" / ".." / "run")
    for more, message in (
        ([], "another job is running"),
        (["--output_dir", elsewhere], "another job is running"),
        (["--lr", "0.5"], "lr was 0.03 and is 0.5"),
        (["--batch_size", "14"], "batch_size was 13 and is 14"),
        (["--candidates", "votes:1", "--seed", "1"], "seed was 0 and is 1"),
    ):
        code, log = run({}, [*args, *more])
        assert code == 2 and [line for line in log.splitlines() if line.startswith("error:") and message in line], log
    assert run(None, [])[0] == 0
    assert differences(whole[0], final_state(tmp_path / "run")) == []


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_as_two_or_as_one(run, small_store, whole, whole_of_two, tmp_path):
    """The launcher gets SIGTERM and passes it on; both processes leave one checkpoint in the middle of an epoch."""
    at = whole[1].index("training") + 5
    done = launched(2, {"signal": "SIGTERM", "at": at, "to": "launcher"}, arguments(small_store, tmp_path / "two"))
    assert done.returncode != 0 and done.stdout.count("Stopped by a signal in epoch 2") == 1, done.stderr[-2000:]
    assert final_state(tmp_path / "two")["step"] > 0
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    again = launched(2, {}, arguments(small_store, tmp_path / "two"))
    assert again.returncode == 0, again.stderr[-2000:]
    assert differences(whole_of_two, final_state(tmp_path / "two")) == []
    code, log = run({}, arguments(small_store, tmp_path / "one"))
    assert code == 0, log
    within_rounding(whole[0], final_state(tmp_path / "one"))


def within_rounding(ours, theirs, limit=1e-9):
    """Whole numbers equal, everything else within `limit` of the largest entry."""
    for a, b in zip(ours["learners"], theirs["learners"]):
        for name in a:
            if a[name].is_floating_point():
                assert (a[name] - b[name]).abs().max() <= limit * a[name].abs().max().clamp_min(1e-3), name
            else:
                assert torch.equal(a[name], b[name]), name
    for key in ("losses", "weights"):
        for a, b in zip(ours["divisions"][key], theirs["divisions"][key]):
            torch.testing.assert_close(a, b, rtol=limit, atol=limit)
    same_curves(ours, theirs)


@pytest.mark.slow
def test_torchrun_names_the_exit_code_of_a_job_that_was_stopped(small_store, whole, tmp_path):
    plan = {"signal": "SIGUSR1", "at": whole[1].index("training") + 3, "rank": 1}
    done = launched(2, plan, arguments(small_store, tmp_path / "run"), launcher="torchrun")
    assert done.returncode == 1 and f"exitcode  : {EXIT_INTERRUPTED}" in done.stderr, done.stderr[-3000:]
    assert done.stdout.count("Stopped by a signal in epoch 2") == 1


def test_one_of_two_gets_the_signal_and_both_stop_with_the_exit_code(run, small_store, whole, tmp_path):
    """Each has a part of the tables, and the job goes on in one process, which has all rows."""
    plan = {"signal": "SIGUSR1", "at": whole[1].index("training") + 3, "rank": 1}
    words = arguments(small_store, tmp_path / "run")
    ended = in_processes(2, train_coreg.main, *words, "--tables", "sharded", before=lambda: follow(plan))
    assert ended.codes == [EXIT_INTERRUPTED] * 2, ended.stderr
    assert ended.stdout.count("Stopped by a signal in epoch 2") == 1
    code, log = run({}, arguments(small_store, tmp_path / "run"))
    assert code == 0, log
    within_rounding(whole[0], final_state(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (3, 1)])
def test_stopped_within_an_epoch_it_goes_on_in_another_number_of_processes(small_store, whole, tmp_path, before, after):
    """The loss parts up to the signal are part of the epoch's curves; then each process has a part of the tables."""
    args = arguments(small_store, tmp_path / "run")
    done = launched(before, {"signal": "SIGTERM", "at": whole[1].index("training") + 3}, args, launcher="torchrun")
    assert done.stdout.count("Stopped by a signal in epoch 2") == 1, done.stderr[-2000:]
    sums = final_state(tmp_path / "run")["sums"]
    assert len(sums) > 3 and all(shares.shape == (before,) for shares in sums.values())
    done = launched(after, {}, [*args, "--tables", "sharded"])
    assert done.returncode == 0, done.stderr[-2000:]
    within_rounding(whole[0], final_state(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_is_started_again(small_store, whole, whole_of_two, tmp_path, launcher, rank):
    plan = {"signal": "SIGKILL", "at": whole[1].index("training") + 4, "rank": rank, "once": str(tmp_path / "killed")}
    # no waiting for a peer that has gone
    args = arguments(small_store, tmp_path / "run", "--timeout_minutes", "1")
    done = launched(2, plan, args, launcher=launcher, more=["--max_restarts", "1"])
    assert (tmp_path / "killed").exists()
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Going on with" in done.stdout
    assert differences(whole_of_two, final_state(tmp_path / "run")) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rank"), [("SIGSTOP", 1), ("SIGSTOP", 0), ("SIGKILL", 1)])
def test_a_process_that_hangs_or_dies_ends_the_job_by_name(small_store, whole, tmp_path, name, rank):
    plan = {"signal": name, "at": whole[1].index("training") + 4, "rank": rank}
    # 12 seconds of silence, 10 to ask who is there, 30 that the launcher gives its processes to end
    done = launched(2, plan, arguments(small_store, tmp_path / "run", "--timeout_minutes", "0.2"))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith(f"error: process {1 - rank} lost contact")]
    assert len(lines) == 1 and re.search(rf"(?i)lost contact.* (ranks?|process) {rank}\b", lines[0]), done.stderr[-3000:]
    assert "the checkpoints are intact" in lines[0]
    assert final_state(tmp_path / "run")["epoch"] == 1


@pytest.fixture(scope="module")
def ended(run, small_store, tmp_path_factory):
    """The folder of a finished run; nobody writes into it."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    code, log = run({}, arguments(small_store, folder))
    assert code == 0, log
    return folder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "it is no JSON"),
        (b'{"schema": 1}', "there is no 'method'"),
        (None, "its checksum is wrong"),
    ],
    ids=["nested", "empty", "one digit"],
)
def test_a_damaged_report_of_a_finished_run_is_one_line_and_can_be_had_anew(
    run, small_store, ended, tmp_path, content, message
):
    shutil.copytree(ended, tmp_path / "run")
    report, args = tmp_path / "run" / "report.json", arguments(small_store, tmp_path / "run")
    whole = json.loads(report.read_text())
    report.write_bytes(content or report.read_bytes().replace(b'"mean_candidates": 1.', b'"mean_candidates": 2.'))
    code, log = run({}, args)
    (line,) = [line for line in log.splitlines() if line.startswith("error:")]
    assert code == 2 and "Traceback" not in log and message in line and "delete it, and the same command" in line, log
    if content is None:
        report.unlink()
        code, log = run({}, args)
        assert code == 0 and json.loads(report.read_text())["accuracy"] == whole["accuracy"], log


WRONG = [lambda state: {"x": 1}, lambda state: state | {"divisions": state["divisions"] | {"weights": [torch.zeros(3)]}}]


@pytest.mark.parametrize("change", WRONG)
def test_a_checkpoint_with_a_right_hash_and_wrong_content_is_one_line(run, small_store, ended, tmp_path, change):
    shutil.copytree(ended, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    number = checkpoint.latest(tmp_path / "run" / "checkpoints")
    checkpoint.save(tmp_path / "run" / "checkpoints", number, change(final_state(tmp_path / "run")))
    code, log = run({}, arguments(small_store, tmp_path / "run"))
    (line,) = [line for line in log.splitlines() if line.startswith("error:")]
    assert code == 2 and "Traceback" not in log and f"{number:08d} does not hold this training" in line, log
