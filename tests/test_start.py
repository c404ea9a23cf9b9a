"""A wrong option is refused at once: nothing that takes seconds to import has been imported by then."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SLOW = ("torch", "timm", "transformers", "open_clip", "sklearn", "accelerate")
# runs a script as the main program and tells which of the slow packages it had imported when it ended
SPY = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported:", *[name for name in {SLOW} if name in sys.modules], file=sys.stderr)
"""


def start(*arguments):
    """Exit code, stdout and the lines of stderr."""
    done = subprocess.run([sys.executable, "-c", SPY, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr.strip().split("\n")


BASELINES = [f"baselines/{name}.py" for name in ("coop", "distill", "dividemix", "lora", "pll", "zero_shot")]


@pytest.mark.parametrize("script", ["annotate_vlm.py", "train_coreg.py", *BASELINES])
def test_help_groups_options_and_shows_defaults_and_an_example(script):
    code, out, err = start(script, "--help")
    assert code == 0 and err == ["imported:"]
    assert f"accelerate launch {script}" in out and "(default:" in out
    for title in (
        ("job:", "labels:", "optimiser:", "backbone:", "images:", "views:", "Co-Reg:") if script == "train_coreg.py" else ()
    ):
        assert f"\n{title}\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("annotate_vlm.py", "--image", "photos"), "unknown option --image, did you mean --images?"),
        (("annotate_vlm.py", "--batch_size", "0"), "--batch_size is 0"),
        (("train_coreg.py", "--epoch", "3"), "unknown option --epoch, did you mean --epochs?"),
        (("train_coreg.py", "--lr", "fast"), "invalid float value: 'fast'"),
        (("train_coreg.py", "--recipe", "cifar"), "unknown recipe cifar"),
        (("train_coreg.py", "--epochs", "0"), "--epochs is 0"),
        (("train_coreg.py", "--threshold", "2"), "--threshold is 2.0"),
        (("train_coreg.py", "--strong_ops", "rotates"), "unknown --strong_ops rotates"),
        (("train_coreg.py", "--candidates", "best"), "unknown candidate rule 'best'"),
        *(((script, "--annotation", "ann"), "unknown option --annotation, did you mean") for script in BASELINES),
        (("baselines/coop.py", "--context_tokens", "0"), "--context_tokens is 0"),
        (("baselines/coop.py", "--annotations", "absent"), "absent"),
        (("baselines/distill.py", "--kd_temperature", "0"), "--kd_temperature is 0.0"),
        (("baselines/dividemix.py", "--warmup_epochs", "31"), "--warmup_epochs is 31, of 30 --epochs"),
        (("baselines/lora.py", "--rank", "0"), "--rank is 0"),
        (("baselines/lora.py", "--crop", "2"), "--crop is 2.0"),
        (("baselines/pll.py", "--method", "pico_plus", "--pure_ratio", "0"), "--pure_ratio is 0.0"),
        (("baselines/pll.py", "--pure_ratio", "0"), "--pure_ratio is no option of --method proden"),
        (("baselines/pll.py", "--channels", "2"), "--channels is 2"),
        (("baselines/zero_shot.py", "--variant", "best"), "invalid choice: 'best'"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_slow_is_imported(arguments, message):
    code, _, err = start(*arguments)
    assert code == 2 and err[-1] == "imported:" and len(err) == 2
    assert err[0].startswith("error: ") and message in err[0]


def test_the_spy_sees_what_is_imported():
    _, _, err = start("coreg/learn/pseudo.py")
    assert err[-1] == "imported: torch"
