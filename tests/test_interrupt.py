"""Ctrl-C: one line, no traceback, nothing half-written; real programs, real signals."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coreg.interrupt import LINE

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
PROGRAM = """
import multiprocessing, signal, sys, time
import coreg.interrupt
from coreg.errors import exits_with_one_line
from coreg.files import making_folder, replacing
coreg.interrupt.answer()

@exits_with_one_line
def main():
    {work}

{begin}
main()
"""
WAIT = "print('ready', flush=True); time.sleep(100)"


def program(work=WAIT, begin=""):
    return [sys.executable, "-c", PROGRAM.format(work=work.replace("\n", "\n    "), begin=begin)]


def pressed(command, ready, cwd=ROOT, times=1, pause=0.0):
    """The keys are pressed, for the whole group as a terminal does, once `ready(process)` holds; gives code and stderr."""
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # tests may themselves run where Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while not ready(process) and process.poll() is None:
            time.sleep(0.002)
        for _ in range(times):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(pause)
        return process.wait(120), process.stderr.read()


def is_ready(process):
    return process.stdout.readline() == "ready\n"


def test_while_libraries_are_imported_it_is_one_line():
    assert pressed(program(begin=WAIT), is_ready) == (-signal.SIGINT, f"\n{LINE}\n")


def test_what_is_half_written_is_removed_and_forked_processes_say_nothing(tmp_path):
    work = f"""
process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,))
process.start()
with replacing({str(tmp_path / "file")!r}) as file, making_folder({str(tmp_path / "folder")!r}) as folder:
    file.write_text("half")
    (folder / "inner").write_text("half")
    {WAIT}
"""
    assert pressed(program(work), is_ready) == (-signal.SIGINT, f"\n{LINE}\n")
    assert not list(tmp_path.iterdir())


def test_a_press_within_a_destructor_lets_the_program_tidy_up(tmp_path):
    """Python forgets an exception there: the press is to be felt by what runs when the destructor has ended."""
    work = f"""
class Destroyed:
    def __del__(self):
        {WAIT}

with replacing({str(tmp_path / "file")!r}) as file:
    file.write_text("half")
    Destroyed()
    time.sleep(100)
"""
    assert pressed(program(work), is_ready) == (-signal.SIGINT, f"\n{LINE}\n")
    assert not list(tmp_path.iterdir())


def test_one_press_that_a_launcher_passes_on_lets_the_program_tidy_up(tmp_path):
    work = f"""
try:
    {WAIT}
finally:
    time.sleep(0.2)
    open({str(tmp_path / "tidied")!r}, "w").close()
"""
    assert pressed(program(work), is_ready, times=2, pause=0.05) == (-signal.SIGINT, f"\n{LINE}\n")
    assert (tmp_path / "tidied").exists()


def test_a_second_press_leaves_at_once_whatever_holds_the_program():
    work = """
print("ready", flush=True)
while True:
    try:
        time.sleep(100)
    except BaseException:
        pass
"""
    assert pressed(program(work), is_ready, times=2, pause=1.5) == (-signal.SIGINT, f"\n{LINE}\n")


def test_an_error_that_comes_of_it_in_a_library_is_not_shown():
    work = f"""
try:
    {WAIT}
except KeyboardInterrupt:
    raise RuntimeError("a callback failed")
"""
    assert pressed(program(work), is_ready) == (-signal.SIGINT, f"\n{LINE}\n")


def test_only_the_programs_of_this_package_are_answered_for():
    """From Python one gets what Python does, a `KeyboardInterrupt`."""
    code = f"import time\nfrom coreg.errors import exits_with_one_line\n@exits_with_one_line\ndef main(): {WAIT}\nmain()"
    code, output = pressed([sys.executable, "-c", code], is_ready)
    assert code == -signal.SIGINT and output.rstrip().endswith("KeyboardInterrupt") and LINE not in output


@pytest.mark.parametrize(("before", "answered"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_an_installed_command_is_answered_for_unless_its_caller_ignores_the_keys(tmp_path, before, answered):
    """As in the background of a script."""
    command = tmp_path / "coreg-anything"
    command.write_text("import coreg, signal\nprint(getattr(signal.getsignal(signal.SIGINT), '__module__', None))\n")
    done = subprocess.run(
        [sys.executable, command],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, before),
    )
    assert (done.stdout == "coreg.interrupt\n") == answered


SCRIPTS = ["train_coreg.py", "annotate_vlm.py", *(str(p.relative_to(ROOT)) for p in (ROOT / "baselines").glob("*.py"))]
MODULES = ["export.predict", "export", "annotate", "annotate.view", "weak", "baselines.pll"]


@pytest.mark.multiprocess
@pytest.mark.parametrize("words", [*([s] for s in SCRIPTS), *(["-m", f"coreg.{m}"] for m in MODULES)], ids=" ".join)
def test_every_program_answers_from_its_first_imports_on(words):
    def imports_numpy(process):
        return "_multiarray_umath" in Path(f"/proc/{process.pid}/maps").read_text()

    assert pressed([sys.executable, *words], imports_numpy) == (-signal.SIGINT, f"\n{LINE}\n")


@pytest.mark.multiprocess
def test_annotating_with_decoding_processes(tmp_path):
    """Their tracebacks would show, and so would what they left."""
    command = [sys.executable, "annotate_vlm.py", "--output_dir", str(tmp_path / "ann"), "--workers", "2"]
    children = "/proc/{0}/task/{0}/children"

    def has_workers(process):
        return len(Path(children.format(process.pid)).read_text().split()) >= 2

    code, output = pressed(command, has_workers)
    lines = [line for line in output.splitlines() if line and not line.startswith("annotating:")]
    assert (code, lines) == (-signal.SIGINT, [LINE])
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.name or "partial" in path.name]
    assert not list(itertools.chain(tmp_path.rglob("*.alive"), tmp_path.rglob("*.claim")))
