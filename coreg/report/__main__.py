"""`python -m coreg.report runs/*` is `coreg-report runs/*`."""

from coreg.report.compare import main

main()
