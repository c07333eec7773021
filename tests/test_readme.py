"""README's Python runs as it is written, and its options are understood."""

import re
import shlex
from pathlib import Path

import pytest

from rect_lightning.cli import with_shipped_configs
from tests.test_configs import parser  # noqa: F401 - a fixture
from tests.test_end_to_end import cached_model  # noqa: F401 - a fixture

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_python_example(cached_model, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    readme = README.read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["editor"].results["after"]["efficacy/probability"] > 0.8
    assert (tmp_path / "edited" / "model.safetensors").is_file()


def rows_of_options():
    """The options in the left-hand code of README's table of what to add, where they are no command of their own."""
    readme = README.read_text(encoding="utf-8")
    table = readme[readme.index("| to | add |") :].split("\n\n")[0]
    cells = [row.split(" | ", 1)[1].split("(")[0] for row in table.splitlines()[2:]]
    found = [options for cell in cells for options in re.findall(r"`(--(?:config|model|data|trainer).*?)`", cell)]
    assert len(found) > 15
    return found


@pytest.mark.parametrize("options", rows_of_options())
def test_what_there_is_to_add_is_understood(options, parser):  # noqa: F811
    parser.parse_args(with_shipped_configs(["--config", "memit_smollm2.yaml", *shlex.split(options)]))
