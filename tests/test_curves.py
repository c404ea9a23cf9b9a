"""Curves are means over the global batch, whatever the number of processes: those of every script, compared in float64.

In the quick tests, curves of the other scripts are compared where their weights are.
"""

import json
import os

import pytest
from accelerate.state import AcceleratorState
from conftest import SMALL_JOB
from runs import final_state, in_processes, same_curves, script, with_method
from test_annotate_annotators import save_tiny_clip

import train_coreg
from coreg.learn.partial import METHODS

pytestmark = pytest.mark.multiprocess

NET = [
    *SMALL_JOB[: SMALL_JOB.index("--warmup_epochs")], "--batch_size", "13", "--workers", "0", "--report_to", "none",
    "--epochs", "2", "--few_shot", "2", "--label_mode", "extra_ce",
]  # fmt: skip
CONTRAST = ["--queue_size", "50", "--projection_dim", "8"]
TUNED = [
    "--dtype",
    "float64",
    "--epochs",
    "2",
    "--shots",
    "7",
    "--batch_size",
    "4",
    "--workers",
    "0",
    "--report_to",
    "none",
]
JOBS = {
    "coreg": [*NET, *CONTRAST, "--warmup_epochs", "1", "--contrast_after", "-1"],
    "dividemix": [*NET, "--warmup_epochs", "1"],
    "distill": [*NET[: NET.index("--few_shot")], "--kd_temperature", "2"],
    "coop": [*TUNED, "--context_tokens", "2"],
    "lora": TUNED,
    **{
        method: [*NET, *with_method(method, queue_size=50, projection_dim=8, correction_margin=0, noise_rate=0.2)]
        for method in METHODS
    },
}
# parts of the loss in the last epoch; what stands on the left has them
PARTS = {
    "coreg": {"total", "trusted", "distrusted", "prototype", "contrast", "supervised"},
    "dividemix": {"total", "trusted", "distrusted", "penalty", "supervised"},
    "distill": {"total", "divergence"},
    "coop": {"total", "accuracy"},
    "lora": {"total", "accuracy"},
    "alim_scale": {"total", "classification", "contrast", "mixup", "supervised"},
    "lws": {"total", "supervised"},
    "pico_plus": {"total", "mixup", "reliable", "guessed", "contrast", "supervised"},
    "cr_dpll": {"total", "consistency", "complement", "supervised"},
}


def run_all(words):
    """Jobs one after the other."""
    for number, (name, arguments) in enumerate(json.loads(words[0])):
        # keys of the group's store are taken once; as if a launcher had started the processes again
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        AcceleratorState._reset_state(reset_partial_state=True)
        (train_coreg if name == "coreg" else script(name)).main(arguments)


@pytest.fixture(scope="module")
def states_of(small_annotated, tmp_path_factory):
    """(jobs, processes) -> their final states by name; each is trained once."""
    root, done = tmp_path_factory.mktemp("curves"), {}
    clip = ["--vlm", f"local-dir:{save_tiny_clip(root / 'clip')}"]

    def arguments(name, output):
        tuned = clip if name in ("coop", "lora") else []
        return ["--annotations", str(small_annotated), "--output_dir", str(output), *JOBS[name], *tuned]

    def ask(names, processes):
        new = [name for name in names if (name, processes) not in done]
        jobs = [("pll" if name in METHODS else name, arguments(name, root / str(processes) / name)) for name in new]
        ended = in_processes(processes, run_all, json.dumps(jobs))
        assert ended.codes == [0] * processes, ended.stderr[-3000:]
        for name in new:
            output = root / str(processes) / name
            report = json.loads((output / "report.json").read_text())
            done[name, processes] = final_state(output)
            assert report["last_epoch"] == done[name, processes]["curves"][-1] and report["processes"] == processes
        return {name: done[name, processes] for name in names}

    return ask


def same(alone, several):
    for name, state in alone.items():
        last = state["curves"][-1]
        parts = {key.removeprefix("loss/net1/") for key in last if key.startswith("loss/net1/")}
        assert parts == PARTS.get(name, parts), name
        same_curves(state, several[name])


def test_two_processes_have_the_curves_of_one(states_of):
    names = ["distill", "alim_scale"]
    same(states_of(names, 1), states_of(names, 2))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_have_the_curves_of_one(states_of, processes):
    same(states_of(list(JOBS), 1), states_of(list(JOBS), processes))
