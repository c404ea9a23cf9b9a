"""`python -m coreg.export --run runs/a ...` is `coreg-export --run runs/a ...`."""

from coreg.export.ensemble import main

main()
