"""Train two small networks together on the noisy candidate sets that a vision-language model gave to images.

    accelerate launch train_coreg.py                                # built-in digits, annotated by a built-in tiny CLIP
    accelerate launch train_coreg.py --annotations ann --output_dir runs/a
    accelerate launch --config_file accelerate_configs/cpu.yaml train_coreg.py --annotations ann --recipe folder

The run folder is the job: the same command again goes on where it stopped, and a finished run says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import tqdm
from timm.utils import distribute_bn

from annotate_vlm import AnnotateConfig, annotate
from coreg.annotate.candidates import parse_rule
from coreg.annotate.store import AnnotationStore
from coreg.config import as_settings, as_yaml, parse
from coreg.data.order import ShuffledRows, n_batches
from coreg.errors import UserError, exits_with_one_line
from coreg.export import export
from coreg.learn.coreg import CoRegBatch, WarmUpBatch, cosine_lr, ramp
from coreg.learn.division import Division, align, divide, division_loss
from coreg.learn.options import PRESETS, CoRegOptions
from coreg.learn.pseudo import rescale
from coreg.nets.model import check_backbone, parse_backbone_args
from coreg.report.metrics import accuracy, collapse_warnings, division_health
from coreg.report.report import build_report, summary, write_known_labels, write_labels
from coreg.run import checkpoint
from coreg.run.batches import TrainingImages, Verdict, co_train_batch, warm_up_batch
from coreg.run.folder import RunFolder, write_atomically
from coreg.run.process import build_accelerator, follow_launcher, main_process_decides
from coreg.run.task import Task, known_labels, predict, prepare
from coreg.run.training import Training, build_training
from coreg.run.watch import EXIT_INTERRUPTED, GOES_ON, STOP, Watch
from coreg.settings import ImageConfig, JobConfig, check

# settings that may change between two starts of the same job; what the store holds is compared by its hash
NOT_THE_JOB = (
    "output_dir",
    "annotations",
    "labels",
    "workers",
    "report_to",
    "print_config",
    "checkpoint_minutes",
    "timeout_minutes",
)


def divide_by(task: Task, training: Training, number: int) -> tuple[Division, Verdict, np.ndarray]:
    """Let network `number` (0 or 1) split the training set; also gives its (N, C) log probabilities before alignment."""
    method = task.method
    net, size = training.nets[number], 4 * task.job.batch_size
    logits, features = predict(net, task.data, method.division_view, ("division", training.epoch, number), size)
    log_p = torch.log_softmax(logits.double(), dim=1).cpu().numpy()
    if not np.isfinite(log_p).all():
        raise UserError(
            f"network {number + 1} predicts no numbers any more in epoch {training.epoch + 1}; start anew in another "
            f"--output_dir with a smaller --lr (now {task.job.lr}); the checkpoints before it are kept"
        )
    aligned = log_p if method.alignment == "none" else align(log_p, task.prior)
    history = [*training.losses[number], division_loss(aligned, task.candidates)][-method.history :]
    training.losses[number] = history
    smallest = min(task.job.batch_size, len(task.usable))
    fitted = task.usable & (task.known < 0)
    # fitted on one process and sent to the others: two fits might differ in the last bit, and then in a whole image
    division = main_process_decides(
        task.accelerator,
        lambda: divide(np.stack(history), fitted, task.job.seed, method.threshold, smallest, method.monotone),
    )
    # a person's labels are trusted whatever their loss
    division.weight[task.known >= 0], division.trusted[task.known >= 0] = 1.0, True
    targets = rescale(torch.from_numpy(np.exp(aligned)), torch.from_numpy(task.candidates))
    like = {"device": task.accelerator.device, "dtype": task.data.dtype}
    verdict = Verdict(torch.from_numpy(division.weight).to(**like), targets.to(**like), division.trusted)
    if method.guesses == "epoch":
        again, _ = predict(net, task.data, "weak", ("guess", training.epoch, number), size)
        verdict.guess, verdict.features = (logits.softmax(1) + again.softmax(1)) / 2, features
    return division, verdict, log_p


def warm_up(task: Task, training: Training) -> tuple[int, Callable[[int], WarmUpBatch]]:
    """Steps of the present network's warm-up epoch and how to make each one's batch.

    Images that no template could name teach nothing and are left out.
    """
    key = (training.epoch, training.number)
    rows = ShuffledRows(np.flatnonzero(task.usable), 2 * task.job.batch_size, (task.job.seed, "warm-up", *key))
    full = task.candidates.all(axis=1) & task.method.skip_full_sets

    def batch(step: int) -> WarmUpBatch:
        chosen = rows.batch(step)
        informative = int((~full[chosen]).sum())
        return warm_up_batch(task.data, chosen, task.table, key, task.method.warmup_view, informative)

    return rows.per_round, batch


def co_train(task: Task, training: Training) -> tuple[int, Callable[[int], CoRegBatch]]:
    """Steps of the present network's epoch on the split that the other one made, and how to make each one's batch."""
    epoch, number, job, method = training.epoch, training.number, task.job, task.method
    own, verdict = training.verdicts[number], training.verdicts[1 - number if method.co_pseudo_labels else number]
    key = (job.seed, epoch, number)
    trusted = np.concatenate([np.flatnonzero(verdict.trusted), task.repeated])
    x = ShuffledRows(trusted, job.batch_size, ("P", *key))
    u = ShuffledRows(np.flatnonzero(~verdict.trusted & method.use_unlabeled), job.batch_size, ("U", *key))
    labelled = ShuffledRows(task.extra, job.batch_size, ("labelled", *key))
    gate_epoch = method.warmup_epochs + method.contrast_after + 1
    # keys made long before the gate opens will have left the queue by then
    fill_queue = epoch >= gate_epoch - n_batches(method.queue_size, len(x.rows))

    def batch(step: int) -> CoRegBatch:
        extra = labelled.batch(step)
        return co_train_batch(
            task.data,
            x.batch(step),
            u.batch(step),
            verdict,
            key=(epoch, number, step),
            mixup_alpha=method.mixup_alpha,
            ramp=ramp(epoch - method.warmup_epochs + step / x.per_round, method.rampup_epochs),
            gate=epoch >= gate_epoch,
            fill_queue=fill_queue,
            own=own if method.guesses == "epoch" else None,
            labelled=(extra, task.known[extra]) if len(extra) else None,
        )

    return x.per_round, batch


def test(task: Task, training: Training) -> dict[str, float]:
    """Accuracy of both networks and their ensemble (sum of logits) on the test images, where there are labelled ones."""
    if task.test is None or (task.test_labels < 0).all():
        return {}
    logits = [predict(net, task.test, "plain", (), 4 * task.job.batch_size)[0] for net in training.nets]
    predictions = {"net1": logits[0], "net2": logits[1], "ensemble": logits[0] + logits[1]}
    return {f"test/{name}": accuracy(p.argmax(1).cpu().numpy(), task.test_labels) for name, p in predictions.items()}


def divide_training_set(task: Task, training: Training) -> None:
    """Both networks divide before either of them trains."""
    if task.method.key_reset == "epoch":
        for learner in training.learners:
            learner.reset_keys()
    divisions, verdicts, log_ps = zip(*(divide_by(task, training, number) for number in (0, 1)))
    training.verdicts, training.weights = list(verdicts), [division.weight for division in divisions]
    training.partial = division_health(divisions, log_ps, task.candidates, task.annotator, task.labels)


def one_epoch(task: Task, training: Training, bar: tqdm, at_boundary: Callable[[], None]) -> dict[str, float]:
    """The rest of the present epoch: warm up, or divide and co-train, then agree on statistics and test.

    Gives the epoch's curves. `at_boundary` is called between steps; whatever it saves, this function can go on from.
    """
    job = task.job
    rate = cosine_lr(training.epoch, job.lr, job.lr_floor, job.lr_horizon or job.epochs)
    for optimizer in training.optimizers:
        optimizer.param_groups[0]["lr"] = rate
    warming_up = training.epoch < task.method.warmup_epochs
    if not warming_up and not training.verdicts:
        divide_training_set(task, training)
    while training.number < 2:
        count, batch = (warm_up if warming_up else co_train)(task, training)
        while training.step < count:
            accumulated = job.gradient_accumulation_steps
            update = (training.step + 1) % accumulated == 0 or training.step + 1 == count
            made = batch(training.step)
            training.optimise(task.accelerator, made, update, accumulated)
            training.images_seen += made.size
            # never past its end by a rounding error, about which tqdm would complain
            bar.update(min(0.5 / count, bar.total - bar.n))
            if update:
                at_boundary()
        training.finish_network()
    if task.accelerator.num_processes > 1:
        # without SyncBatchNorm, processes have seen different rows: agree on the mean statistics
        for net in training.nets:
            distribute_bn(net, task.accelerator.num_processes, reduce=True)
    return training.finish_epoch({"lr": rate} | test(task, training))


def train(task: Task, training: Training, folder: RunFolder, watch: Watch) -> None:
    """All epochs from where `training` stands, with a checkpoint after each and whenever `watch` asks for one.

    Raises:
        UserError: a loss is no number any more; the last good checkpoint stays.
        SystemExit: a signal came; a checkpoint was written at the step boundary behind it.
    """
    accelerator, job = task.accelerator, task.job
    mark = time.perf_counter()

    def save() -> None:
        nonlocal mark
        training.seconds, mark = training.seconds + time.perf_counter() - mark, time.perf_counter()
        main_process_decides(
            accelerator, lambda: checkpoint.save(folder.checkpoints, training.serial, training.state_dict())
        )
        watch.saved()

    def at_boundary() -> None:
        due = watch.due()
        if due != GOES_ON:
            save()
        if due == STOP:
            accelerator.print(f"\nStopped by a signal in epoch {training.epoch + 1}; the same command goes on from here.")
            raise SystemExit(EXIT_INTERRUPTED)

    layout = "{desc} {percentage:3.0f}%|{bar}| epoch {n:.1f}/{total} [{elapsed}<{remaining}{postfix}]"
    with tqdm(total=job.epochs, initial=training.epoch, desc="Co-Reg", bar_format=layout) as bar:
        while training.epoch < job.epochs:
            curves = one_epoch(task, training, bar, at_boundary)
            broken = [name for name, value in curves.items() if not math.isfinite(value)]
            if broken:
                raise UserError(
                    f"{broken[0]} became {curves[broken[0]]} in epoch {training.epoch}; the checkpoints before it are kept "
                    f"in {folder.checkpoints}: start anew in another --output_dir with a smaller --lr (now {job.lr})"
                )
            accelerator.log(curves, step=training.epoch)
            bar.update(training.epoch - bar.n)
            shown = {"P": curves.get("division/trusted"), "test": curves.get("test/ensemble")}
            bar.set_postfix_str(", ".join(f"{name} {value:.1%}" for name, value in shown.items() if value is not None))
            save()


def finish(task: Task, training: Training, folder: RunFolder, command: str, wall_seconds: float) -> dict[str, Any]:
    """Purified labels, exported networks and the report, written by the main process; gives the report."""
    job, look, store = task.job, task.look, task.store

    def logits(images: TrainingImages | None) -> dict[str, np.ndarray]:
        if images is None:
            return {}
        first, second = (predict(net, images, "plain", (), 4 * job.batch_size)[0].cpu().numpy() for net in training.nets)
        return {"ensemble": first + second, "net1": first, "net2": second}

    on_train, on_test = logits(task.data), logits(task.test)

    def write() -> dict[str, Any]:
        paths = [store.paths[row] for row in task.data.samples.tolist()]
        needs_review = write_labels(
            folder.root / "labels.csv", store.class_names, paths, on_train, training.weights, task.annotator
        )
        views = task.data.augmentation
        export(
            folder.export,
            [net.backbone for net in training.nets],
            look.backbone,
            parse_backbone_args(look.backbone_args),
            class_names=store.class_names,
            image_size=look.image_size,
            channels=look.channels,
            mean=views.mean,
            std=views.std,
        )
        report = build_report(
            method="Co-Reg",
            store=store,
            seed=job.seed,
            candidates=task.candidates,
            samples={"train": task.data.samples.numpy(), "test": [] if task.test is None else task.test.samples.numpy()},
            predictions={
                split: {name: rows.argmax(axis=1) for name, rows in found.items()}
                for split, found in (("train", on_train), ("test", on_test))
            },
            labels_used=int((task.known >= 0).sum()),
            needs_review=needs_review,
            warnings=collapse_warnings(on_train["ensemble"].argmax(axis=1), store.class_names),
            last_epoch=training.curves[-1],
            parameters=sum(p.numel() for p in training.nets[0].backbone.parameters()),
            images_per_second=training.images_seen / training.seconds,
            training_seconds=training.seconds,
            wall_seconds=wall_seconds,
            processes=task.accelerator.num_processes,
            command=command,
        )
        write_atomically(folder.report, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        return report

    return main_process_decides(task.accelerator, write)


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, annotate where there is no store yet, train, report."""
    started = time.perf_counter()
    argv = list(sys.argv[1:] if argv is None else argv)
    own_images = any(word.split("=")[0] == "--annotations" for word in argv)
    job, look, method = parse(
        JobConfig,
        ImageConfig,
        CoRegOptions,
        argv=argv,
        default_recipe="folder" if own_images else "digits",
        presets=PRESETS,
        prog="train_coreg.py",
        description=__doc__,
    )
    follow_launcher(job)
    if job.print_config:
        print(as_yaml(as_settings(job, look, method)), end="")
        return
    check(job, method)
    look.augmentation()
    parse_rule(job.candidates)
    check_backbone(look.backbone, look.backbone_args)
    folder = RunFolder(job.output_dir)
    identity = {k: v for k, v in as_settings(job, look, method).items() if k not in NOT_THE_JOB}
    accelerator = build_accelerator(job.mixed_precision, job.report_to, job.output_dir, job.timeout_minutes)
    main_process_decides(accelerator, lambda: folder.refuse_other(identity))
    with contextlib.ExitStack() as held:
        if job.annotations:
            store = AnnotationStore.open(job.annotations)
        else:
            main_process_decides(accelerator, lambda: held.enter_context(folder.locked()))
            store = annotate(AnnotateConfig(output_dir=str(folder.root / "annotations")), accelerator)
        known = known_labels(job, store)
        identity |= {"store": store.hash, "known_labels": hashlib.sha256(known.tobytes()).hexdigest()}
        main_process_decides(accelerator, lambda: folder.refuse_other(identity))
        if main_process_decides(accelerator, lambda: folder.finished):
            report = json.loads(folder.report.read_text(encoding="utf-8"))
            accelerator.print(summary(report, folder.root))
            accelerator.print(f"\nThis run is finished; choose another --output_dir, or delete {folder.root} to repeat it.")
            return
        task = prepare(accelerator, job, look, method, store, known)
        training = build_training(accelerator, job, look, method, len(store.class_names))
        if job.annotations:
            main_process_decides(accelerator, lambda: held.enter_context(folder.locked()))
        main_process_decides(accelerator, lambda: folder.claim(identity))
        newest = main_process_decides(accelerator, lambda: checkpoint.latest(folder.checkpoints))
        if newest is not None:
            training.load_state_dict(checkpoint.load(folder.checkpoints, newest), accelerator.device)
            accelerator.print(f"Going on with {folder.root} behind epoch {training.epoch} of {job.epochs}.")
        if accelerator.is_main_process:
            write_atomically(folder.root / "config.yaml", as_yaml(as_settings(job, look, method)))
            if (known >= 0).any():
                write_known_labels(folder.root / "known_labels.csv", store, known)
        accelerator.init_trackers("tensorboard", config={k: str(v) for k, v in identity.items()})
        before = training.seconds
        watch = Watch(accelerator, job.checkpoint_minutes, job.timeout_minutes)
        with watch.listening(), watch.naming_the_lost():
            train(task, training, folder, watch)
        command = shlex.join(["train_coreg.py", *argv])
        report = finish(task, training, folder, command, before + time.perf_counter() - started)
        accelerator.end_training()
        accelerator.print(summary(report, folder.root))


if __name__ == "__main__":
    main()
