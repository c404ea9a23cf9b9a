"""Co-Reg: train small classifiers on the noisy candidate sets that vision-language models give to unlabelled images.

What one takes from here in Python is imported when it is first asked for, so that `import coreg` stays fast.
"""

import importlib
from typing import Any

from coreg.interrupt import answer_for_program

__version__ = "0.1.0"

answer_for_program()

_HOMES = {
    "coreg.weak.rules": ("candidate_sets",),
    "coreg.store.store": ("AnnotationStore",),
    "coreg.views.augment": ("Augmentation",),
    "coreg.data.decode": ("decode",),
    "coreg.data.sources": ("open_images",),
    "coreg.learn.coreg": ("CoRegBatch", "CoRegLearner", "WarmUpBatch"),
    "coreg.learn.division": ("align", "divide", "division_loss"),
    "coreg.learn.memory": ("Prototypes",),
    "coreg.learn.options": ("CoRegOptions",),
    "coreg.learn.pseudo": ("rescale",),
    "coreg.nets.model": ("Model", "create_backbone"),
    "coreg.export.predict": ("Classifier", "load_classifier"),
    "coreg.learn.two_nets": ("Verdict", "co_train_batch"),
    "coreg.views.resident": ("TrainingImages",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
