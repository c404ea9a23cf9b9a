"""`python -m coreg.recipes`: what recipes there are."""

from __future__ import annotations

from coreg.recipes import listing


def main() -> None:
    """Print every recipe with its description, and how to use one."""
    recipes = listing()
    width = max(map(len, recipes))
    for name, description in recipes.items():
        print(f"{name:{width}}  {description}")
    print("\naccelerate launch train_coreg.py --recipe NAME --annotations FOLDER --output_dir FOLDER")
    print(
        "train_coreg.py --recipe NAME --print_config shows all settings of a recipe; a copy of the file is one's own recipe"
    )


if __name__ == "__main__":
    main()
