"""Jobs of several scripts one after the other in the same processes; tests start it through a launcher, it holds no test.

    python several_jobs.py JOBS         JOBS is JSON: [["coreg", ARGUMENTS], ["pll", ARGUMENTS], ...]

Starting processes and importing torch takes most of the time of a small job.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate.state import AcceleratorState
from runs import script

import train_coreg

if __name__ == "__main__":
    for number, (name, arguments) in enumerate(json.loads(sys.argv[1])):
        # keys of the launcher's store are taken once; as if it had started its processes again
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        AcceleratorState._reset_state(reset_partial_state=True)
        (train_coreg if name == "coreg" else script(name)).main(arguments)
