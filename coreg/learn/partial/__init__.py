"""Single-network methods that learn from candidate sets, each a small object in `METHODS`.

To add one: derive from `coreg.learn.partial.method.PartialMethod`, say which views it wants, what its loss is and how its
tables change, and name it here and, with its options, in `coreg.learn.partial_options`.
"""

from coreg.learn.partial.average import ABSGCE, ABSMAE, CAVL, POP
from coreg.learn.partial.dependent import ABLE, IDGP
from coreg.learn.partial.imbalanced import HTC, RECORDS
from coreg.learn.partial.method import PartialMethod
from coreg.learn.partial.noisy import ALIMOnehot, ALIMScale, IRNet
from coreg.learn.partial.pico import PiCO, PiCOPlus
from coreg.learn.partial.plain import CC, CRDPLL, LWC, LWS, PRODEN, RC
from coreg.learn.partial.solar import SoLar

METHODS: dict[str, type[PartialMethod]] = {
    "cc": CC,
    "rc": RC,
    "proden": PRODEN,
    "abs_mae": ABSMAE,
    "abs_gce": ABSGCE,
    "cavl": CAVL,
    "pop": POP,
    "lws": LWS,
    "lwc": LWC,
    "cr_dpll": CRDPLL,
    "pico": PiCO,
    "pico_plus": PiCOPlus,
    "irnet": IRNet,
    "alim_onehot": ALIMOnehot,
    "alim_scale": ALIMScale,
    "able": ABLE,
    "idgp": IDGP,
    "solar": SoLar,
    "records": RECORDS,
    "htc": HTC,
    "supervised": CC,
}
