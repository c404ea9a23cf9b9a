"""A cluster on one machine: four nodes with processes, addresses and a network disk of their own, and processes that die.

A node is a set of namespaces: its network joined to the others' by a bridge, its process numbers, its name, and its view of
the shared folder, slow and up to a second old (`slow_disk`). Only the kernel is the same.
"""

import ctypes
import os
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import SMALL_JOB
from PIL import Image
from runs import final_state, forked, in_processes
from slow_disk import slow_disk
from test_annotate_annotators import save_tiny_clip
from test_multiprocess import same

import annotate_vlm
import train_coreg

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

NODES, ANNOTATORS, TRAINERS = 4, 4, 2  # processes of a node
NEW = {"mount": 0x00020000, "name": 0x04000000, "processes": 0x20000000, "network": 0x40000000}
BIND, RECURSIVE, PRIVATE = 4096, 16384, 1 << 18
DIE_WITH_PARENT = 1
SECONDS = 900


def system_call(name, *arguments):
    """Call the C library; OSError where it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no cluster: namespaces cannot be joined here ({done.stderr.strip()})")


@pytest.fixture(scope="module")
def networks():
    """Names of network namespaces on one bridge; node i has the address 10.213.8.(i + 1)."""
    if not shutil.which("ip") or os.geteuid():
        pytest.skip("no cluster: that needs root and the command ip (Debian and Ubuntu: iproute2)")
    names, bridge = [f"coreg-{os.getpid()}-{i}" for i in range(NODES)], f"cgb{os.getpid() % 100000}"
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        for number, name in enumerate(names):
            end = f"cg{os.getpid() % 100000}n{number}"
            ip("netns", "add", name)
            ip("link", "add", end, "type", "veth", "peer", "name", "coreg0", "netns", name)
            ip("link", "set", end, "master", bridge, "up")
            ip("-n", name, "addr", "add", f"10.213.8.{number + 1}/24", "dev", "coreg0")
            for link in ("coreg0", "lo"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)


class Cluster:
    """Runs something on every node at once."""

    def __init__(self, networks, disks, shared, logs):
        self.networks, self.disks, self.shared, self.logs = networks, disks, shared, logs

    def run(self, work):
        """`work(number of the node)` on every node, where `shared` is its network disk; gives exit codes and logs."""
        children = [self._start(number, work) for number in range(NODES)]
        codes, limit = {}, time.monotonic() + SECONDS
        try:
            while len(codes) < NODES and time.monotonic() < limit:
                for number, child in enumerate(children):
                    if number not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                        codes[number] = os.waitstatus_to_exitcode(ended[1])
                time.sleep(0.05)
        finally:
            for number in set(range(NODES)) - set(codes):
                os.kill(children[number], signal.SIGKILL)
                os.waitpid(children[number], 0)
        logs = "".join(file.read_text()[-1500:] for file in sorted(self.logs.glob("*.stderr")))
        return [codes.get(number) for number in range(NODES)], logs

    def _start(self, number, work):
        if child := os.fork():
            return child
        code = 1
        try:
            system_call("prctl", DIE_WITH_PARENT, signal.SIGKILL)
            with open(f"/run/netns/{self.networks[number]}") as network:
                system_call("setns", network.fileno(), NEW["network"])
            system_call("unshare", NEW["mount"] | NEW["name"] | NEW["processes"])
            if grandchild := os.fork():  # the first process of the namespace, with which all others of it end
                code = os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
            else:
                system_call("prctl", DIE_WITH_PARENT, signal.SIGKILL)
                name = f"node{number}".encode()
                system_call("sethostname", name, len(name))
                system_call("mount", b"none", b"/", None, RECURSIVE | PRIVATE, None)
                system_call("mount", b"proc", b"/proc", b"proc", 0, None)
                system_call("mount", os.fsencode(self.disks[number]), os.fsencode(self.shared), None, BIND, None)
                code = work(number)
        except BaseException as error:
            (self.logs / f"node{number}.stderr").write_text(repr(error))
        finally:
            os._exit(code)


@pytest.fixture(scope="module")
def cluster(networks, tmp_path_factory):
    root = tmp_path_factory.mktemp("cluster")
    for name in ("disk", "shared", "logs"):
        (root / name).mkdir()
    mounted, disks = [], []
    try:
        for number in range(NODES):
            try:
                mount = slow_disk(root / "disk", root / f"node{number}")
                disks.append(mount.__enter__())
            except OSError as error:
                pytest.skip(f"no cluster: FUSE cannot be mounted here ({error.strerror})")
            mounted.append(mount)
        yield Cluster(networks, disks, root / "shared", root / "logs")
    finally:
        for mount in mounted:
            mount.__exit__(None, None, None)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Images and a model, beside the shared folder, and the words that annotate them."""
    root, rng = tmp_path_factory.mktemp("job"), np.random.default_rng(0)
    for split, count in (("train", 180), ("test", 20)):
        (root / "images" / split).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{i:03d}.png")
    (root / "images" / "train" / "077.png").write_bytes(b"")
    (root / "classes.txt").write_text("cat\ndog\ncar\n")
    (root / "templates.txt").write_text("a photo of a {}.\na drawing of a {}.\nthe {}.\n")
    clip = save_tiny_clip(root / "clip")
    return [
        "--images", root / "images", "--classes", root / "classes.txt", "--templates", root / "templates.txt", "--vlm",
        f"local-dir:{clip}", "--block_size", 4, "--batch_size", 4, "--workers", 0,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(job, tmp_path_factory):
    """The store as one process makes it on an ordinary disk."""
    root = tmp_path_factory.mktemp("alone") / "ann"
    ended = in_processes(1, annotate_vlm.main, *job, "--output_dir", root)
    assert ended.codes == [0], ended.stderr
    return root


def restarted(node, words, cluster, kills):
    """Annotators that are killed, one every second or two and `kills` in all, and started again until all end well."""
    rng, at, killed = random.Random(node), time.monotonic() + 3, 0
    log = [cluster.logs / f"annotators{node}.{name}" for name in ("stdout", "stderr")]
    start = lambda: forked(annotate_vlm.main, words, log)  # noqa: E731
    running, codes = [start() for _ in range(ANNOTATORS)], []
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in running:
            running.remove(child)
            code = os.waitstatus_to_exitcode(status)
            if code == -signal.SIGKILL:
                running.append(start())
            else:
                codes.append(code)
        if running and killed < kills and time.monotonic() > at:
            os.kill(rng.choice(running), signal.SIGKILL)
            killed, at = killed + 1, time.monotonic() + rng.uniform(1, 2)
        time.sleep(0.02)
    (cluster.logs / f"kills{node}").write_text(str(killed))
    return max(codes)


def content_of(root):
    """The files of a store by name, but for reports, which say where they lie."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.stem != "report"
    }


def test_annotators_that_die_write_what_one_writes_alone(cluster, job, alone):
    words = [*job, "--output_dir", cluster.shared / "ann"]
    codes, logs = cluster.run(lambda node: restarted(node, words, cluster, kills=5))
    assert codes == [0] * NODES, logs
    killed = [int((cluster.logs / f"kills{node}").read_text()) for node in range(NODES)]
    assert sum(killed) >= NODES, killed
    ours, theirs = content_of(cluster.disks[0].parent / "disk" / "ann"), content_of(alone)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    assert len([name for name in ours if name.startswith("blocks/")]) == 50
    assert ours["errors.csv"].count(b"\n") == 2


def trainer(node, words, cluster, dies):
    """The processes of a node; the first of them is killed after the first checkpoint, where the node `dies`."""
    place = {"MASTER_ADDR": "10.213.8.1", "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": "coreg0"}
    place |= {"WORLD_SIZE": str(NODES * TRAINERS), "LOCAL_WORLD_SIZE": str(TRAINERS)}
    children = []
    for local in range(TRAINERS):
        rank = node * TRAINERS + local
        log = [cluster.logs / f"trainer{rank}.{name}" for name in ("stdout", "stderr")]
        children.append(
            forked(train_coreg.main, words, log, environment=place | {"RANK": str(rank), "LOCAL_RANK": str(local)})
        )
    if dies:
        while not list((cluster.shared / "run" / "checkpoints").glob("[0-9]*")):
            time.sleep(0.1)
        os.kill(children[0], signal.SIGKILL)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


def test_training_on_all_nodes_is_that_of_one_process(cluster, alone, tmp_path):
    """A process is killed, the others end by themselves, and the same command goes on to the same end."""
    disk = cluster.disks[0].parent / "disk"
    shutil.copytree(alone, disk / "again")
    more = ["--epochs", "3", "--pixels", "disk"]
    here = ["--annotations", alone, "--output_dir", tmp_path / "run", *SMALL_JOB, *more]
    ended = in_processes(1, train_coreg.main, *here)
    assert ended.codes == [0], ended.stderr[-2000:]
    there = ["--annotations", cluster.shared / "again", "--output_dir", cluster.shared / "run", *SMALL_JOB, *more]
    codes, logs = cluster.run(lambda node: trainer(node, there, cluster, dies=node == 2))
    assert codes == [1, 1, signal.SIGKILL, 1] and "lost contact with process 4" in logs, (codes, logs)
    assert not (disk / "run" / "report.json").exists()
    codes, logs = cluster.run(lambda node: trainer(node, there, cluster, dies=False))
    assert codes == [0] * NODES, logs
    same(final_state(tmp_path / "run"), final_state(disk / "run"))
    ours, theirs = (next(root.glob("pixels/*/pixels.u8")).read_bytes() for root in (disk / "again", alone))
    assert ours == theirs
