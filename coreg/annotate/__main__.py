"""`python -m coreg.annotate COMMAND ann ...`: see `coreg.annotate.tools`."""

from coreg.annotate.tools import main

raise SystemExit(main())
