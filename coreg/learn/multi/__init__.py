"""Single-network methods that learn several labels an image, each a small object in `METHODS`.

To add one: derive from `coreg.learn.multi.method.MultiMethod`, say what its loss is and how its tables change, and name it
here and, with its options, in `coreg.learn.multi_options`.
"""

from coreg.learn.multi.method import MultiMethod
from coreg.learn.multi.plain import AN, ASL, EM, EPR, IU, L1R, L2R, LSAN, NLS, PR, WAN, EntMin, Focal
from coreg.learn.multi.tables import EMAPL, LLR, ROLE, VLPL, LLCp, LLCt, Soft

# `bce` and `bce_ls` learn from the true labels
METHODS: dict[str, type[MultiMethod]] = {
    "bce": AN,
    "bce_ls": LSAN,
    "an": AN,
    "wan": WAN,
    "an_ls": LSAN,
    "n_ls": NLS,
    "iu": IU,
    "l1r": L1R,
    "l2r": L2R,
    "pr": PR,
    "epr": EPR,
    "role": ROLE,
    "entmin": EntMin,
    "em": EM,
    "em_apl": EMAPL,
    "focal": Focal,
    "asl": ASL,
    "ll_r": LLR,
    "ll_ct": LLCt,
    "ll_cp": LLCp,
    "vlpl": VLPL,
    "soft": Soft,
}
