"""`python -m coreg.recipes`: what recipes there are."""

from __future__ import annotations

from coreg.recipes import listing
from coreg.scripts import launched


def main() -> None:
    """Print every recipe with its description, and how to use one."""
    recipes = listing()
    width = max(map(len, recipes))
    for name, description in recipes.items():
        print(f"{name:{width}}  {description}")
    print(f"\n{launched('train_coreg.py')} --recipe NAME --annotations FOLDER --output_dir FOLDER")
    print(
        "coreg-train --recipe NAME --print_config > mine.yaml writes all settings of a recipe: the beginning of one's own"
    )


if __name__ == "__main__":
    main()
