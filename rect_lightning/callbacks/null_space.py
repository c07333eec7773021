"""AlphaEdit's projection (Fang et al. 2024) as a Lightning callback, for any editor."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from rect_lightning.cache import cache_dir
from rect_lightning.callbacks.linear import LinearRegulariser
from rect_lightning.solving import moment_files
from rect_lightning.solving.corpus import Moments
from rect_lightning.solving.moments import second_moments
from rect_lightning.solving.null_space import null_space_projector
from rect_lightning.solving.orientation import keeps_in_out


class NullSpace(LinearRegulariser):
    """Project each update on the null space of the layer's keys: ``ΔW ← ΔW P``, so that ``ΔW k ≈ 0`` for keys from before.

    Definition and source: `rect_lightning.solving.null_space`. AlphaEdit puts P inside of its solve, so that the edit is the
    best one within the null space; projecting the update of another method afterwards leaves a shorter edit, and no step makes
    up for it, unless a later layer does.

    Under an editor, the second moments are those of the clean model's keys at each edited layer, from the same cache as the
    editor's own. Elsewhere they are read from ``files``. P is kept on the CPU, 8 bytes for each of in × in entries.

    Args:
        moments: Under an editor, where second moments come from; null for the editor's own ``moments`` or, where it has none,
            for text that the model samples.
        files: In other modules, the file of each weight's second moments ``C = E[k kᵀ]``, by parameter name: ``.npz`` as the
            authors of ROME and MEMIT publish them, or ``.safetensors`` with a tensor ``C`` of ``[in, in]``. The other
            parameters are left as they are.
        threshold: Take eigenvectors of C with eigenvalues below this, 0.02 as published.
        energy: Instead, take as many of the smallest as together hold at most this share of C's trace.
        **options: See `Regulariser`.

    Raises:
        ValueError: energy is no share, or there is no threshold either.
    """

    own_options = ("threshold", "energy", "files", "moments")

    def __init__(
        self,
        *,
        moments: Moments | None = None,
        files: dict[str, str] | None = None,
        threshold: float | None = 0.02,
        energy: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if threshold is None and energy is None:
            raise ValueError("NullSpace takes a threshold of the eigenvalues or an energy; got neither.")
        if energy is not None and not 0 < energy < 1:
            raise ValueError(f"NullSpace's energy is a share of the trace between 0 and 1, such as 0.01; got {energy}.")
        self.moments, self.files, self.threshold, self.energy = moments, files, threshold, energy
        self._projectors: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights, and compute their projectors.

        Raises:
            ValueError: There are no second moments, they do not fit a weight, or no eigenvalue is small enough.
            FileNotFoundError: A file is not there.
        """
        super().on_fit_start(trainer, pl_module)
        self._projectors = {}
        for name, c in self._second_moments(pl_module).items():
            try:
                self._projectors[name] = null_space_projector(c, threshold=self.threshold, energy=self.energy)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

    def project(self, name: str, update: Tensor, before: Tensor) -> Tensor | None:
        """The update times P."""
        if name not in self._projectors:
            return None
        return update.double() @ self._projectors[name].to(update.device)

    def _second_moments(self, module: Any) -> dict[str, Tensor]:
        if self.files is not None:
            return {name: self._read(name, path) for name, path in self.files.items()}
        if not hasattr(module, "clean_weights"):
            raise ValueError(
                f"{type(module).__name__} is no editor, whose layers' keys are known: give NullSpace `files` of second moments."
            )
        moments = self.moments or getattr(module, "moments", None) or Moments()
        with module.clean_weights():
            found = second_moments(
                module.model,
                module.layers,
                moments,
                fingerprint=module.fingerprint,
                cache=cache_dir(),
                show_progress=module.show_progress,
                processes=module.processes,
            )
        weights = {layer: module.model.weight(layer) for layer in found}
        return {self._names[weights[layer]]: c for layer, c in found.items() if weights[layer] in self._names}

    def _read(self, name: str, path: str) -> Tensor:
        if name not in self._linear:
            raise ValueError(f"files has {name}, which is none of the chosen weights: {', '.join(self._linear)}.")
        c = moment_files.matrix(path)
        layer: Any = self._linear[name]
        width = layer.weight.shape[0 if keeps_in_out(layer) else 1]
        if c.shape != (width, width):
            raise ValueError(f"{path}: the second moment is {list(c.shape)}, but {name} has keys of width {width}.")
        return c
