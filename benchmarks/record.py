"""What results are: one hash for each, of every script on the built-in digits, to see whether a change kept every bit.

    python -m benchmarks.record [--only NAME ...] > before.txt        # on the old version; some minutes on one core
    python -m benchmarks.record > after.txt && diff before.txt after.txt

Hashes hold for one machine, one version of the packages and one thread. Each line names a run, what of it is hashed, and
the hash: `weights` of the exported networks, prompts or adapters; `tables`, all tensors of the last checkpoint whatever
their names; `labels`, the purified labels; `report`, its numbers without times, sizes and versions; `store`, all blocks;
`predictions`, those of coreg-predict from the networks and from ONNX.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SHORT = ["--workers", "0", "--report_to", "none", "--epochs", "2"]
EXACT = [
    "--dtype", "float64", "--backbone_args", '{"norm": "group", "widths": [8, 16], "depths": [1, 1]}',
    "--contrast_after", "-1", "--queue_size", "50", "--batch_size", "64", "--warmup_epochs", "1",
]  # fmt: skip
METHODS = (
    "cc rc proden abs_mae abs_gce cavl pop lws lwc cr_dpll pico pico_plus irnet alim_onehot alim_scale able idgp solar "
    "records htc supervised".split()
)
NUMBERS = (
    "accuracy", "per_class_accuracy", "annotator", "labels_used", "parameters", "trainable_parameters", "last_epoch",
    "temperature", "chosen", "needs_review",
)  # fmt: skip


def digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[:16]


def bytes_of(tensor: torch.Tensor) -> bytes:
    described = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return described + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensors_in(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for one in inner for tensor in tensors_in(one)]


class Record:
    """Runs scripts one after another below a folder, and prints the hashes of what they leave."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, folder / "ann"
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}

    def start(self, *words: str | Path, processes: int = 1) -> None:
        """A script of the checkout or a module as `-m NAME`; its output is shown when it fails."""
        launcher = [sys.executable]
        if processes > 1:
            config = str(ROOT / "accelerate_configs" / "cpu.yaml")
            launcher += ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(processes)]
        done = subprocess.run(
            [*launcher, *map(str, words)], cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(
                f"{' '.join(map(str, words))}\nended with {done.returncode}:\n{done.stdout[-500:]}{done.stderr[-3000:]}"
            )

    def say(self, name: str, what: str, *parts: bytes) -> None:
        print(f"{name:24} {what:12} {digest(*parts)}", flush=True)

    def show(self, name: str) -> None:
        """The hashes of a finished run folder."""
        run = self.folder / name
        weights = sorted(path for path in run.rglob("*.safetensors") if {"export", "prompt", "adapter"} & set(path.parts))
        if weights:
            loaded = [load_file(path) for path in weights]
            self.say(name, "weights", *(bytes_of(state[key]) for state in loaded for key in sorted(state)))
        checkpoints = sorted(path for path in (run / "checkpoints").glob("*/state.pt"))
        if checkpoints:
            state = torch.load(checkpoints[-1], map_location="cpu", weights_only=True)
            self.say(name, "tables", *sorted(bytes_of(tensor) for tensor in tensors_in(state)))
        for labels in sorted(run.rglob("labels.csv")):
            self.say(name, "labels", labels.read_bytes())
        for file in sorted(run.rglob("report.json")):
            report = json.loads(file.read_text(encoding="utf-8"))
            numbers = json.dumps({key: report[key] for key in NUMBERS if key in report}, sort_keys=True)
            self.say(name, "report", numbers.encode())

    def train(self, name: str, script: str, *more: str, processes: int = 1) -> None:
        output = self.folder / name
        self.start(script, "--annotations", self.store, "--output_dir", output, *more, processes=processes)
        self.show(name)

    def stopped(self, name: str, script: str, *more: str) -> None:
        """A run that a signal stops in the middle, and the same command again."""
        words = [
            script,
            "--annotations",
            self.store,
            "--output_dir",
            self.folder / name,
            *more,
            "--checkpoint_minutes",
            "0",
        ]
        with subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            while process.poll() is None and len(list((self.folder / name / "checkpoints").glob("[0-9]*"))) < 2:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
        self.train(name, script, *more)


def jobs(record: Record) -> dict[str, Callable[[], None]]:
    """Every job by its name, in order; the store comes first."""
    folder, store = record.folder, record.store
    digits = ["--recipe", "digits", "--refine", "none"]

    def show_store(name: str) -> None:
        record.say(name, "store", *(file.read_bytes() for file in sorted((folder / name / "blocks").iterdir())))

    def rescored() -> None:
        templates = folder / "templates.txt"
        templates.write_text("a photo of the digit {}\nthe number {}\n")
        record.start("annotate_vlm.py", "--rescore", store, "--templates", templates, "--output_dir", folder / "rescored")
        show_store("rescored")

    def predicted() -> None:
        export = folder / "coreg" / "export"
        images = folder / "images"
        record.start("-m", "coreg.annotate", "export", store, "--output", images)
        for kind in ("onnx", "torch_export"):
            record.start("-m", "coreg.export", "--run", folder / "coreg", "--format", kind)
        for model in (export, export / "model.onnx"):
            output = folder / f"{model.name}.csv"
            record.start(
                "-m", "coreg.export.predict", "--model", model, "--images", images, "--output", output, "--workers", "0"
            )
            record.say(f"predict {model.name}", "predictions", output.read_bytes())
        record.say(
            "export torch_export", "weights", *map(bytes_of, torch.export.load(export / "model.pt2").state_dict.values())
        )

    def train(name: str, script: str, *more: str, **options: int) -> Callable[[], None]:
        return lambda: record.train(name, script, *SHORT, *more, **options)

    co_training = ["--warmup_epochs", "1", "--contrast_after", "0"]
    few = ["--few_shot", "2", *digits, *co_training]
    tuned = ["--preset", "digits", "--shots", "1"]
    return {
        "annotate": lambda: (record.start("annotate_vlm.py", "--workers", "0", "--output_dir", store), show_store("ann")),
        "rescore": rescored,
        "zero_shot": lambda: record.train("zero_shot", "baselines/zero_shot.py"),
        "coreg": train("coreg", "train_coreg.py", *digits, *co_training),
        "stopped": lambda: record.stopped("stopped", "train_coreg.py", *SHORT, *digits, *co_training),
        "two": train("two", "train_coreg.py", *digits, *EXACT, processes=2),
        **{f"few {mode}": train(f"few_{mode}", "train_coreg.py", *few, "--label_mode", mode)
           for mode in ("replace", "replace+repeat", "extra_ce")},
        **{method: train(method, "baselines/pll.py", *digits, "--method", method) for method in METHODS},
        "dividemix": train("dividemix", "baselines/dividemix.py", *digits, "--warmup_epochs", "1"),
        "distill": train("distill", "baselines/distill.py", *digits),
        "coop": train("coop", "baselines/coop.py", *tuned),
        "lora": train("lora", "baselines/lora.py", *tuned),
        "predict": predicted,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line for each result; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="jobs to run beside `annotate`, by name (predict needs coreg)")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="record"))
    try:
        for name, job in jobs(Record(folder)).items():
            if not args.only or name in (*args.only, "annotate"):
                job()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
