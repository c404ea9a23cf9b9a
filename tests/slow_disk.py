"""A slow file system with an old picture of what others do, as network disks are; it holds no test.

A folder seen through FUSE, by the kernel's own interface, without a library: every request waits, and what a file is
called and how large it is may be a second old; what is in it is read anew when it is opened. Several such mounts of
one folder are what several machines with one network disk see.
"""

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK = range(1, 7)
MKDIR, UNLINK, RMDIR, RENAME, LINK, OPEN, READ, WRITE, STATFS, RELEASE = range(9, 19)
FSYNC, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, FSYNCDIR, CREATE, INTERRUPT = 20, 25, 26, 27, 28, 29, 30, 35, 36
DESTROY, BATCH_FORGET, RENAME2 = 38, 42, 45
LARGEST = 1 << 17  # bytes of a write


class SlowDisk:
    """Answers the kernel's requests for one mount."""

    def __init__(self, channel, root, seconds, valid):
        self.channel, self.root, self.seconds, self.valid = channel, os.fsencode(root), seconds, valid
        self.path_of, self.node_of, self.lock = {1: b""}, {b"": 1}, threading.Lock()

    def serve(self):
        """Until the folder is unmounted."""
        threads = [threading.Thread(target=self._answer, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _answer(self):
        while True:
            try:
                request = os.read(self.channel, LARGEST + (1 << 14))
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                return  # unmounted
            _, operation, unique, node = struct.unpack_from("<IIQQ", request)
            if operation in (FORGET, BATCH_FORGET, INTERRUPT):
                continue
            failed, content = 0, b""
            try:
                if operation not in (INIT, READ, WRITE):
                    time.sleep(self.seconds)
                content = self._done(operation, node, request[40:])
            except OSError as error:
                failed = error.errno or errno.EIO
            with contextlib.suppress(OSError):  # who asked was killed
                os.write(self.channel, struct.pack("<IiQ", 16 + len(content), -failed, unique) + content)

    # ---- names ------------------------------------------------------------------------------------------------------

    def _place(self, path):
        return os.path.join(self.root, path) if path else self.root

    def _below(self, node, name):
        folder = self.path_of[node]
        return folder + b"/" + name if folder else name

    def _entry(self, path):
        status = os.lstat(self._place(path))
        with self.lock:
            node = self.node_of.get(path)
            if node is None:
                node = self.node_of[path] = len(self.path_of) + 1
                self.path_of[node] = path
        seconds, part = int(self.valid), int(self.valid % 1 * 1e9)
        return struct.pack("<QQQQII", node, 0, seconds, seconds, part, part) + self._attributes(node, status)

    def _attributes(self, node, status):
        times = [status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns]
        return struct.pack(
            "<QQQQQQIIIIIIIIII",
            node, status.st_size, status.st_blocks, *(t // 10**9 for t in times), *(t % 10**9 for t in times),
            status.st_mode, status.st_nlink, status.st_uid, status.st_gid, 0, 4096, 0,
        )  # fmt: skip

    def _gone(self, path):
        with self.lock:
            self.node_of.pop(path, None)  # a file that is open keeps its number

    def _moved(self, old, new):
        with self.lock:
            self.node_of.pop(new, None)
            for path in [p for p in self.node_of if p == old or p.startswith(old + b"/")]:
                node, there = self.node_of.pop(path), new + path[len(old) :]
                self.node_of[there], self.path_of[node] = node, there

    # ---- requests ---------------------------------------------------------------------------------------------------

    def _done(self, operation, node, body):
        path = self.path_of.get(node, b"")
        if operation == INIT:
            _, minor, ahead, _ = struct.unpack_from("<IIII", body)
            return struct.pack("<IIIIHHIIHHII24x", 7, min(minor, 31), ahead, 1 << 5, 12, 9, LARGEST, 1, 0, 0, 0, 0)
        if operation == LOOKUP:
            return self._entry(self._below(node, body[:-1]))
        if operation in (OPEN, OPENDIR, CREATE, READ, WRITE, READDIR, RELEASE, RELEASEDIR, FLUSH, FSYNC, FSYNCDIR):
            return self._with_file(operation, node, path, body)
        if operation in (GETATTR, SETATTR):
            if operation == SETATTR:
                self._set(self._place(path), body)
            elif struct.unpack_from("<I", body)[0] & 1:  # of an open file
                return self._attr_out(node, os.fstat(struct.unpack_from("<8xQ", body)[0]))
            return self._attr_out(node, os.lstat(self._place(path)))
        if operation == STATFS:
            status = os.statvfs(self.root)
            counts = status.f_blocks, status.f_bfree, status.f_bavail, status.f_files, status.f_ffree
            return struct.pack("<QQQQQIII28x", *counts, status.f_bsize, 255, status.f_frsize)
        return self._with_names(operation, node, path, body)

    def _attr_out(self, node, status):
        return struct.pack("<QII", int(self.valid), int(self.valid % 1 * 1e9), 0) + self._attributes(node, status)

    def _set(self, place, body):
        valid, fh, size = struct.unpack_from("<I4xQQ", body)
        mtime, mtimensec, mode = struct.unpack_from("<40xQ8x4xI4xI", body)
        if valid & 1:
            os.chmod(place, stat.S_IMODE(mode))
        if valid & 8:
            os.truncate(fh if valid & 64 else place, size)
        if valid & 48:
            now = time.time_ns()
            os.utime(place, ns=(now, now if valid & 256 else mtime * 10**9 + mtimensec))

    def _with_file(self, operation, node, path, body):
        if operation == OPENDIR:
            return struct.pack("<QII", 0, 0, 0)
        if operation == OPEN:
            flags = struct.unpack_from("<I", body)[0] & ~(os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_APPEND)
            return struct.pack("<QII", os.open(self._place(path), flags), 0, 0)
        if operation == CREATE:
            flags, mode = struct.unpack_from("<II", body)
            there = self._below(node, body[16:-1])
            descriptor = os.open(self._place(there), (flags | os.O_CREAT) & ~os.O_APPEND, mode)
            return self._entry(there) + struct.pack("<QII", descriptor, 0, 0)
        fh, offset, size = struct.unpack_from("<QQI", body.ljust(20, b"\0"))
        if operation == READ:
            return os.pread(fh, size, offset)
        if operation == WRITE:
            return struct.pack("<II", os.pwrite(fh, body[40 : 40 + size], offset), 0)
        if operation == READDIR:
            listed = b""
            names = [b".", b"..", *sorted(os.listdir(self._place(path)))]
            for number, name in enumerate(names[offset:], start=offset + 1):
                entry = struct.pack("<QQII", number, number, len(name), 0) + name
                entry += bytes(-len(entry) % 8)
                if len(listed) + len(entry) > size:
                    break
                listed += entry
            return listed
        if operation == RELEASE:
            os.close(fh)
        if operation == FSYNC:
            os.fsync(fh)
        return b""

    def _with_names(self, operation, node, path, body):
        if operation == MKDIR:
            there = self._below(node, body[8:-1])
            os.mkdir(self._place(there), struct.unpack_from("<I", body)[0])
            return self._entry(there)
        if operation in (UNLINK, RMDIR):
            there = self._below(node, body[:-1])
            (os.unlink if operation == UNLINK else os.rmdir)(self._place(there))
            self._gone(there)
            return b""
        if operation in (RENAME, RENAME2):
            old, new = body[8 if operation == RENAME else 16 : -1].split(b"\0")
            old, new = self._below(node, old), self._below(struct.unpack_from("<Q", body)[0], new)
            os.rename(self._place(old), self._place(new))
            self._moved(old, new)
            return b""
        if operation == READLINK:
            return os.readlink(self._place(path))
        if operation == SYMLINK:
            name, target = body[:-1].split(b"\0")
            os.symlink(target, self._place(self._below(node, name)))
            return self._entry(self._below(node, name))
        raise OSError(errno.ENOSYS, "")


@contextlib.contextmanager
def slow_disk(root, place, seconds=0.002, valid=1.0):
    """The folder `root` seen at `place` by a process of its own, slowly; OSError where that is not permitted here.

    Args:
        seconds: that each request waits. valid: seconds for which names and sizes are not asked for again.
    """
    channel = os.open("/dev/fuse", os.O_RDWR)
    try:
        Path(place).mkdir()
        libc = ctypes.CDLL(None, use_errno=True)
        options = f"fd={channel},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions".encode()
        if libc.mount(b"slow", os.fsencode(place), b"fuse.slow", 0, options):
            raise OSError(ctypes.get_errno(), "cannot mount")
        try:
            command = [sys.executable, __file__, str(channel), str(root), str(seconds), str(valid)]
            serving = subprocess.Popen(command, pass_fds=[channel])
            yield Path(place)
        finally:
            subprocess.run(["umount", "-l", str(place)], check=False)
    finally:
        os.close(channel)
    serving.wait(timeout=60)
    shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    SlowDisk(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4])).serve()
