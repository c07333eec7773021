"""README's Python runs as it is written."""

import re
from pathlib import Path

import pytest

from tests.test_end_to_end import cached_model  # noqa: F401 - a fixture


@pytest.mark.slow
def test_the_python_example(cached_model, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["editor"].results["after"]["efficacy/probability"] > 0.8
    assert (tmp_path / "edited" / "model.safetensors").is_file()
