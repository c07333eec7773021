"""Where a run's files go."""

import atexit
import contextlib
import os

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only


class RunFolder(CSVLogger):
    """Lightning's CSVLogger, with a next version that is made at once, so that runs started together share no folder.

    A version that is named may exist: its ``metrics.csv`` is then written anew.
    """

    @property
    def version(self) -> int | str:
        """The version named, or the next number."""
        if self._version is None:
            if rank_zero_only.rank:  # type: ignore[attr-defined]
                return self._get_next_version()  # only to be overruled: the Trainer asks the first process
            os.makedirs(self.root_dir, exist_ok=True)
            while self._version is None:
                version = self._get_next_version()
                folder = os.path.join(self.root_dir, f"version_{version}")
                try:
                    os.mkdir(folder)
                except FileExistsError:
                    continue  # another run was faster
                atexit.register(_remove_if_empty, folder)  # of a run that was refused before it began
                self._version = version
        return self._version


def _remove_if_empty(folder: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(folder)
