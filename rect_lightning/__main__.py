"""``python -m rect_lightning``."""

from rect_lightning.cli import main

if __name__ == "__main__":
    main()
