"""Every launcher configuration, loaded by the real launcher; the Slurm script, with stand-ins for Slurm's commands."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import SMALL_JOB

from coreg import process
from coreg.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "accelerate_configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def resolved(name, *more):
    """What the launcher makes of a configuration."""
    words = ["--config_file", str(CONFIGS / f"{name}.yaml"), *more, "train_coreg.py"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


def launch(name, *more, script=None, arguments=()):
    """`accelerate launch` as a user types it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml"), *more]
    command += [str(script or ROOT / "train_coreg.py"), *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


def test_all_promised_configurations_are_there():
    assert set(NAMES) == {"cpu", "single_gpu", "multi_gpu", "multi_node", "bf16", "compile"}


def test_processes_that_do_not_see_each_other_are_one_line_that_can_be_followed(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(process, "Accelerator", lambda **options: SimpleNamespace(num_processes=1))
    with pytest.raises(UserError, match="2 processes but this one sees 1") as refused:
        process.build_accelerator()
    words = str(refused.value).split()
    assert Path(words[words.index("--config_file") + 1]).samefile(CONFIGS / "cpu.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_is_short_and_shows_its_own_command(name):
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    keys = [line for line in lines if line and not line.lstrip().startswith("#")]
    assert 5 <= len(keys) <= 15
    header = [line for line in lines[:4] if line.startswith("#")]
    assert any(f"accelerate launch --config_file accelerate_configs/{name}.yaml" in line for line in header)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu", {"multi_gpu": True, "num_processes": 2, "num_machines": 1, "main_process_port": 0}),
        ("single_gpu", {"multi_gpu": False, "num_processes": 1, "num_machines": 1}),
        ("multi_gpu", {"multi_gpu": True, "num_processes": 8, "num_machines": 1, "gpu_ids": "all"}),
        ("multi_node", {"multi_gpu": True, "num_processes": 16, "num_machines": 2, "main_process_port": 29500}),
        ("bf16", {"multi_gpu": False, "num_processes": 1, "mixed_precision": "bf16"}),
        ("compile", {"multi_gpu": False, "num_processes": 1, "dynamo_backend": "INDUCTOR"}),
    ],
)
def test_the_launcher_understands_a_configuration(name, expected):
    """MULTI_CPU, or a key that the launcher does not know, would show here."""
    settings = vars(resolved(name))
    assert {key: settings[key] for key in expected} == expected
    assert settings["mixed_precision"] == expected.get("mixed_precision", "no")
    assert str(settings["dynamo_backend"]).upper() == expected.get("dynamo_backend", "NO")


@pytest.mark.parametrize("name", NAMES)
def test_no_key_of_a_configuration_is_ignored(name):
    """The launcher drops some keys without a word: those whose option has a default of its own."""
    settings = vars(resolved(name))
    written = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    nested = written.pop("dynamo_config", {})
    for key in ("compute_environment", "distributed_type"):
        written.pop(key)
    assert {key: settings[key] for key in written | nested} == written | nested


@pytest.mark.parametrize("name", ["bf16", "compile"])
def test_options_of_one_gpu_extend_to_several(name):
    settings = resolved(name, "--multi_gpu", "--num_processes", "8")
    assert settings.multi_gpu and settings.num_processes == 8 and settings.num_machines == 1


PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from coreg.process import build_accelerator
accelerator = build_accelerator()
backend = dist.get_backend() if dist.is_initialized() else "none"
# one write, so that the processes' lines do not run into each other
sys.stdout.write(f"PROBE {accelerator.process_index} {accelerator.num_processes} {backend}\\n")
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("name", "more", "processes"),
    [
        ("cpu", (), 2),
        pytest.param("multi_gpu", ("--num_processes", "3"), 3, marks=pytest.mark.slow),
        pytest.param(
            "multi_node",
            ("--num_machines", "1", "--num_processes", "2", "--main_process_port", "0"),
            2,
            marks=pytest.mark.slow,
        ),
        # with no setting of processes that the others have not
        pytest.param("bf16", ("--multi_gpu", "--num_processes", "2"), 2, marks=pytest.mark.slow),
    ],
)
def test_several_processes_see_each_other(tmp_path, name, more, processes):
    """Not each one alone, writing into the same folder."""
    (tmp_path / "probe.py").write_text(PROBE)
    done = launch(name, *more, script=tmp_path / "probe.py", arguments=[str(ROOT)])
    assert done.returncode == 0, done.stderr[-2000:]
    lines = sorted(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("PROBE"))
    assert lines == [[str(rank), str(processes), "gloo"] for rank in range(processes)]


def job(small_store, output):
    return ["--annotations", str(small_store), "--output_dir", str(output), *SMALL_JOB, "--epochs", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single_gpu", "bf16"])
def test_one_process_trains_as_the_configuration_says(small_store, tmp_path, name):
    done = launch(name, arguments=[*job(small_store, tmp_path / "run"), "--dtype", "float32"])
    assert done.returncode == 0, done.stderr[-2000:]
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["mixed_precision"] == ("bf16" if name == "bf16" else "no")
    assert settings["compile"] is False


@pytest.mark.slow
def test_compiled_training(small_store, tmp_path):
    done = launch("compile", arguments=job(small_store, tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["compile"] is True
    # compiled once or twice for each shape, not anew for every step's numbers
    assert "recompile_limit" not in done.stderr


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("multi_gpu", ("--num_processes", "2")),
        ("multi_node", ("--num_machines", "1", "--num_processes", "2", "--main_process_port", "0")),
    ],
)
def test_several_processes_train(small_store, tmp_path, name, more):
    done = launch(name, *more, arguments=job(small_store, tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["processes"] == 2


# Stand-ins for Slurm's commands. srun starts the tasks of one node side by side and ends with the highest exit code; both
# write down what they were asked.
COMMANDS = {
    "scontrol": """
        if [ "$1 $2" = "show hostnames" ]; then echo localhost; echo other; else echo "scontrol $*" >> "$CALLS"; fi
    """,
    "srun": """
        echo "srun $* MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT WORLD_SIZE=$WORLD_SIZE" >> "$CALLS"
        while [ "${1#-}" != "$1" ]; do shift; done
        highest=0; tasks=""
        for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
            SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & tasks="$tasks $!"
        done
        for task in $tasks; do wait "$task"; code=$?; [ $code -gt $highest ] && highest=$code; done
        exit $highest
    """,
}


@pytest.fixture
def slurm(tmp_path):
    """Runs slurm.sh as Slurm would, in `tasks` tasks of one node; gives the finished script and the calls it made."""
    (tmp_path / "bin").mkdir()
    for name, body in COMMANDS.items():
        command = tmp_path / "bin" / name
        command.write_text("#!/bin/bash\n" + body)
        command.chmod(command.stat().st_mode | stat.S_IEXEC)

    def run(python, tasks, *arguments):
        calls = tmp_path / "calls"
        calls.write_text("")
        variables = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls), "PYTHON": str(python),
            "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": str(tasks),
        }  # fmt: skip
        done = subprocess.run(
            ["bash", str(CONFIGS / "slurm.sh"), *arguments],
            cwd=ROOT, env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        return done, calls.read_text().splitlines()

    return run


def test_the_slurm_script_is_valid_and_asks_for_the_warning_and_the_queue():
    checked = subprocess.run(["bash", "-n", str(CONFIGS / "slurm.sh")], capture_output=True, text=True, check=False)
    assert checked.returncode == 0 and not checked.stderr
    options = [line.split()[1] for line in (CONFIGS / "slurm.sh").read_text().splitlines() if line.startswith("#SBATCH")]
    # without `B:` the signal goes to the tasks, not to the script
    assert "--signal=USR1@300" in options and "--requeue" in options
    # Slurm reads options up to the first command only
    lines = (CONFIGS / "slurm.sh").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (2, False), (1, False), (137, False)])
def test_only_an_interrupted_job_goes_back_into_the_queue(slurm, tmp_path, code, requeued):
    fake = tmp_path / "python"
    fake.write_text(
        f"#!/bin/bash\necho RANK=$RANK LOCAL_RANK=$LOCAL_RANK WORLD_SIZE=$WORLD_SIZE $*\n[ $RANK != 1 ] || exit {code}\n"
    )
    fake.chmod(0o755)
    done, calls = slurm(fake, 3, "--output_dir", "runs/with a blank")
    assert done.returncode == code
    assert calls[0].endswith("MASTER_ADDR=localhost MASTER_PORT=23456 WORLD_SIZE=3")
    assert calls[1:] == (["scontrol requeue 123456"] if requeued else [])
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("RANK"))
    assert lines == [
        f"RANK={rank} LOCAL_RANK={rank} WORLD_SIZE=3 -m train_coreg --output_dir runs/with a blank" for rank in range(3)
    ]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_slurm_job_is_warned_goes_back_into_the_queue_and_ends(slurm, small_store, tmp_path):
    """Two real tasks; the first attempt gets SIGUSR1 in its ninth step, the second one finishes."""
    plan = {"signal": "SIGUSR1", "at": 9, "once": str(tmp_path / "warned")}
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/bash\nshift 2\nexec '{sys.executable}' '{ROOT}/tests/signalled_job.py' '{json.dumps(plan)}' \"$@\"\n"
    )
    python.chmod(0o755)
    arguments = ["--annotations", str(small_store), "--output_dir", str(tmp_path / "run"), *SMALL_JOB]
    done, calls = slurm(python, 2, *arguments)
    assert done.returncode == 75, done.stderr[-2000:]
    assert calls[1:] == ["scontrol requeue 123456"]
    done, calls = slurm(python, 2, *arguments)
    assert done.returncode == 0 and len(calls) == 1, done.stderr[-2000:]
    assert "Going on with" in done.stdout
    assert json.loads((tmp_path / "run" / "report.json").read_text())["processes"] == 2
