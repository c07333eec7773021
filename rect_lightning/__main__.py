"""``python -m rect_lightning``."""

from rect_lightning.cli import run

if __name__ == "__main__":
    run()
