"""``python -m sardonyx`` is ``sardonyx``."""

from sardonyx.cli import main

if __name__ == "__main__":
    main()
