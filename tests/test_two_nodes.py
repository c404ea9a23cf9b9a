"""Two nodes on one machine: network namespaces joined by a cable, each with a launcher of its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL_JOB
from runs import final_state

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
SIGNALLED = Path(__file__).with_name("signalled_job.py")
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*words, namespace=None):
    inside = ["-n", namespace] if namespace else []
    return subprocess.run(["ip", *inside, *words], capture_output=True, text=True, check=False)


@pytest.fixture
def nodes():
    """Names of two namespaces whose only way to each other is a veth pair, coreg0 at both ends."""
    if not shutil.which("ip"):
        pytest.skip("no two nodes: the command ip is missing (Debian and Ubuntu: iproute2)")
    names = [f"coreg-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            made = ip("netns", "add", name)
            if made.returncode:
                pytest.skip(f"no two nodes: network namespaces are not permitted here ({made.stderr.strip()})")
        ends = [f"cg{os.getpid() % 100000}{i}" for i in range(2)]
        steps = [ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])]
        for name, end, address in zip(names, ends, ADDRESSES):
            steps += [
                ip("link", "set", end, "netns", name, "name", "coreg0"),
                ip("addr", "add", f"{address}/24", "dev", "coreg0", namespace=name),
                ip("link", "set", "coreg0", "up", namespace=name),
                ip("link", "set", "lo", "up", namespace=name),
            ]
        problems = [step.stderr.strip() for step in steps if step.returncode]
        if problems:
            pytest.skip(f"no two nodes: the namespaces cannot be joined here ({problems[0]})")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def start(node, rank, plan, arguments, more=()):
    """The launcher of one node, as the header of multi_node.yaml says, with one process for each node."""
    config = ["--config_file", str(ROOT / "accelerate_configs" / "multi_node.yaml"), "--num_processes", "2"]
    place = ["--machine_rank", str(rank), "--main_process_ip", ADDRESSES[0], *more]
    command = ["ip", "netns", "exec", node, sys.executable, "-m", "accelerate.commands.launch", *config, *place]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "coreg0"}
    pipe = subprocess.PIPE
    # a session of its own: a lost node takes all of its processes with it
    return subprocess.Popen(
        [*command, str(SIGNALLED), json.dumps(plan), *arguments],
        env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True,
    )  # fmt: skip


def finish(launchers, timeout):
    """(exit code, stdout, stderr) of every launcher; none of them outlives the test."""
    try:
        limit = time.monotonic() + timeout
        outputs = [launcher.communicate(timeout=max(limit - time.monotonic(), 1)) for launcher in launchers]
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                launcher.send_signal(signal.SIGTERM)
    return [(launcher.returncode, *output) for launcher, output in zip(launchers, outputs)]


def alone(arguments):
    command = [sys.executable, str(ROOT / "train_coreg.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def same(ours, theirs, limit=1e-10):
    for a, b in zip(ours["learners"], theirs["learners"]):
        for name in a:
            if a[name].is_floating_point():
                assert (a[name] - b[name]).abs().max() <= limit * a[name].abs().max().clamp_min(1e-3), name
            else:
                assert torch.equal(a[name], b[name]), name
    for a, b in zip(ours["divisions"]["weights"], theirs["divisions"]["weights"]):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_two_nodes_train_like_one_process(nodes, small_store, tmp_path):
    arguments = ["--annotations", str(small_store), *SMALL_JOB, "--output_dir"]
    launchers = [start(node, rank, {}, [*arguments, str(tmp_path / "two")]) for rank, node in enumerate(nodes)]
    alone([*arguments, str(tmp_path / "one")])
    for code, _, errors in finish(launchers, 240):
        assert code == 0, errors[-3000:]
    assert json.loads((tmp_path / "two" / "report.json").read_text())["processes"] == 2
    same(final_state(tmp_path / "one"), final_state(tmp_path / "two"))


@pytest.mark.parametrize("lost", [1, 0])
def test_a_node_that_falls_silent_ends_the_job_by_name_and_the_same_command_goes_on(nodes, small_store, tmp_path, lost):
    """In the middle of training the cable is cut: nothing says goodbye, only the timeout of 12 seconds helps."""
    arguments = ["--annotations", str(small_store), *SMALL_JOB, "--timeout_minutes", "0.2", "--output_dir"]
    # it stops itself so that the cable is cut at a known step
    plan = {"signal": "SIGSTOP", "at": 14, "rank": lost, "once": str(tmp_path / "reached")}
    launchers = [start(node, rank, plan, [*arguments, str(tmp_path / "two")]) for rank, node in enumerate(nodes)]
    limit = time.monotonic() + 120
    while not (tmp_path / "reached").exists():
        assert time.monotonic() < limit and all(launcher.poll() is None for launcher in launchers)
        time.sleep(0.2)
    assert ip("link", "set", "coreg0", "down", namespace=nodes[lost]).returncode == 0
    try:
        # 12 s of silence, 10 to ask who is there, and what the launcher takes
        _, errors = launchers[1 - lost].communicate(timeout=90)
    finally:
        for node in nodes:
            for pid in subprocess.run(
                ["ip", "netns", "pids", node], capture_output=True, text=True, check=False
            ).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
    launchers[lost].communicate()
    assert launchers[1 - lost].returncode != 0
    lines = [line for line in errors.splitlines() if line.startswith(f"error: process {1 - lost} lost contact")]
    assert len(lines) == 1 and re.search(rf"(?i)lost contact.* (ranks?|process) {lost}\b", lines[0]), errors[-3000:]
    # the cable is back
    ip("link", "set", "coreg0", "up", namespace=nodes[lost])
    again = [start(node, rank, {}, [*arguments, str(tmp_path / "two")]) for rank, node in enumerate(nodes)]
    alone([*arguments, str(tmp_path / "one")])
    for code, _, errors in finish(again, 240):
        assert code == 0, errors[-3000:]
    same(final_state(tmp_path / "one"), final_state(tmp_path / "two"))
