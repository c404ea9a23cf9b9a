"""Single-network methods that learn several labels an image, each a small object in `METHODS`.

To add one: say what each cell loses in `coreg.learn.multi.plain.CELLS`; where there is more to it, derive from
`coreg.learn.multi.method.MultiMethod`, say what its loss is and how its tables change, and name it here. Either way name it
and its options in `coreg.learn.multi_options`.
"""

from coreg.learn.multi.method import MultiMethod
from coreg.learn.multi.plain import CELLS
from coreg.learn.multi.tables import EMAPL, EPR, L1R, L2R, LLR, ROLE, VLPL, LLCp, LLCt, Soft

# `bce` and `bce_ls` learn from the true labels
METHODS: dict[str, type[MultiMethod]] = {
    **{name: type(name, (MultiMethod,), {"cells": name}) for name in CELLS},
    "bce": MultiMethod,
    "bce_ls": type("bce_ls", (MultiMethod,), {"cells": "an_ls"}),
    "l1r": L1R,
    "l2r": L2R,
    "epr": EPR,
    "role": ROLE,
    "em_apl": EMAPL,
    "ll_r": LLR,
    "ll_ct": LLCt,
    "ll_cp": LLCp,
    "vlpl": VLPL,
    "soft": Soft,
}
