"""``torchdiffeq-symplectic``, or ``python -m torchdiffeq_symplectic``."""

import sys

__all__ = ["main"]

EXTRA = {"matplotlib", "pandas", "rich", "seaborn", "sklearn", "tabulate", "typer"}  # modules that the extra cli brings


def main() -> None:
    """Run the command line, or say which extra it lacks."""
    try:
        from torchdiffeq_symplectic.cli import app

        app(prog_name="torchdiffeq-symplectic")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        sys.exit(f'error: {error.name} is missing; pip install "torchdiffeq-symplectic[cli]"')


if __name__ == "__main__":
    main()
