"""``python -m osqbox``."""

from osqbox.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
