"""What strong views draw from, apart from its code: options are checked before PyTorch is imported."""

from __future__ import annotations

# RandomAugment's fourteen operations, their code is in `coreg.views.augment_ops`: lowest and highest magnitude of the
# uniform draw. Posterize keeps int(magnitude) bits, 4 to 7. Operations without a magnitude have None.
RANDAUGMENT: dict[str, tuple[float, float] | None] = {
    "auto_contrast": None,
    "brightness": (0.05, 0.95),
    "color": (0.05, 0.95),
    "contrast": (0.05, 0.95),
    "equalize": None,
    "identity": None,
    "posterize": (4.0, 8.0),
    "sharpness": (0.05, 0.95),
    "solarize": (0.0, 256.0),
    "rotate": (-30.0, 30.0),
    "shear_x": (-0.3, 0.3),
    "shear_y": (-0.3, 0.3),
    "translate_x": (-0.3, 0.3),
    "translate_y": (-0.3, 0.3),
}
