"""Co-Reg: train small classifiers on the noisy candidate sets that vision-language models give to unlabelled images.

What one takes from here in Python is imported when it is first asked for, so that `import coreg` stays fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from coreg.interrupt import answer_for_program

__version__ = "0.1.0"

answer_for_program()

if TYPE_CHECKING:  # for type checkers and editors, the same as below
    from coreg.data.decode import decode as decode
    from coreg.data.sources import open_images as open_images
    from coreg.export.predict import Classifier as Classifier
    from coreg.export.predict import load_classifier as load_classifier
    from coreg.learn.coreg import CoRegBatch as CoRegBatch
    from coreg.learn.coreg import CoRegLearner as CoRegLearner
    from coreg.learn.coreg import WarmUpBatch as WarmUpBatch
    from coreg.learn.division import align as align
    from coreg.learn.division import divide as divide
    from coreg.learn.division import division_loss as division_loss
    from coreg.learn.memory import Prototypes as Prototypes
    from coreg.learn.options import CoRegOptions as CoRegOptions
    from coreg.learn.pseudo import rescale as rescale
    from coreg.learn.two_nets import Verdict as Verdict
    from coreg.learn.two_nets import co_train_batch as co_train_batch
    from coreg.nets.model import Model as Model
    from coreg.nets.model import create_backbone as create_backbone
    from coreg.store.store import AnnotationStore as AnnotationStore
    from coreg.views.augment import Augmentation as Augmentation
    from coreg.views.resident import TrainingImages as TrainingImages
    from coreg.weak.rules import candidate_sets as candidate_sets

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
