"""What a launcher starts for tests: `main` of the Python file that is named first, with the other words."""

import sys
from pathlib import Path

from runs import script

if __name__ == "__main__":
    place = Path(sys.argv[1])
    sys.exit(script(place.stem, place.parent).main(sys.argv[2:]))
