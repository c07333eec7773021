"""The package as it is built and installed."""

import ast
import configparser
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import rect_lightning

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(rect_lightning.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

if not (ROOT / "setup.cfg").is_file():
    pytest.skip("not a checkout", allow_module_level=True)


@pytest.fixture(scope="module")
def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(text):
    return [line for line in text.strip().splitlines() if line.strip() and not line.startswith("#")]


def requirements(setup):
    found = [Requirement(line) for line in lines(setup["options"]["install_requires"])]
    for extra in setup["options.extras_require"].values():
        found += [Requirement(line) for line in lines(extra) if not line.startswith("%")]
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in found}


def constraints():
    pins = [line.split("==") for line in lines((ROOT / "constraints.txt").read_text())]
    return {name.lower().replace("_", "-"): Version(version) for name, version in pins}


def test_all_packages_are_listed(setup):
    folders = {path.parent for path in PACKAGE.rglob("__init__.py")}
    names = {".".join(folder.relative_to(PACKAGE.parent).parts) for folder in folders}
    listed = lines(setup["options"]["packages"])
    assert set(listed) == names | {"rect_lightning.configs"}
    assert len(listed) == len(set(listed))
    assert lines(setup["options"]["package_dir"]) == ["rect_lightning.configs = configs"]


def test_data_files_are_there_and_all_are_listed(setup):
    folders = {"rect_lightning.configs": ROOT / "configs"}
    listed = set()
    for package, patterns in setup["options.package_data"].items():
        folder = folders.get(package, PACKAGE.parent.joinpath(*package.split(".")))
        for pattern in patterns.split(","):
            files = set(folder.glob(pattern.strip()))
            assert files, f"{package} has no {pattern}"
            listed |= files
    other = {p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert other | {p for p in (ROOT / "configs").rglob("*") if p.is_file()} == listed


def test_the_version_is_one(setup):
    version = setup["metadata"]["version"]
    assert version == "attr: rect_lightning.__version__"
    assert Version(rect_lightning.__version__).release >= (0, 1, 0)
    changelog = ROOT / "CHANGELOG.md"
    if changelog.is_file():
        sections = re.findall(r"^## \[?([^\]\s]+)", changelog.read_text(encoding="utf-8"), re.MULTILINE)
        assert {"Unreleased", rect_lightning.__version__} & set(sections)
    try:
        installed = metadata.version("rect_lightning")
    except metadata.PackageNotFoundError:
        return
    assert installed == rect_lightning.__version__


def test_the_command_is_the_module_s(setup):
    assert lines(setup["options.entry_points"]["console_scripts"]) == ["rect_lightning = rect_lightning.cli:run"]


def test_malicious_releases_are_excluded(setup):
    lightning = requirements(setup)["lightning"].specifier
    assert not lightning.contains("2.6.2")
    assert not lightning.contains("2.6.3")
    assert lightning.contains("2.6.1")
    assert lightning.contains("2.6.6")


def test_constraints_fit_the_bounds_and_cover_them(setup):
    pins, wanted = constraints(), requirements(setup)
    wrong = {name: str(v) for name, v in pins.items() if name in wanted and not wanted[name].specifier.contains(v)}
    assert not wrong
    needed = {Requirement(line).name for line in lines(setup["options"]["install_requires"])}
    assert {name.lower().replace("_", "-") for name in needed} <= pins.keys()
    assert str(pins["pytorch-lightning"]) not in ("2.6.2", "2.6.3")


def test_all_third_party_imports_are_required(setup):
    own = {"rect_lightning", *sys.stdlib_module_names}
    # what requirements bring along under their own bounds
    brought = {"huggingface_hub": "transformers", "numpy": "transformers", "yaml": "jsonargparse"}
    imported = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    needed = {brought.get(name, name).replace("_", "-") for name in imported - own}
    assert needed <= requirements(setup).keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_importing_a_file_imports_nothing_heavy(path):
    """Whatever our requirements may import themselves, ours wait until they are called, so that --help is quick."""

    def at_import(body):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from at_import(node.orelse)
                continue
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield (node.module or "").split(".")[0]
            yield from at_import(ast.iter_child_nodes(node))

    heavy = {"transformers", "datasets", "gguf", "huggingface_hub", "tokenizers", "accelerate"}
    assert not heavy & set(at_import(ast.parse(path.read_text(encoding="utf-8")).body))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_file_names_no_device_and_prints_nothing(path):
    source = path.read_text(encoding="utf-8")
    assert "cuda" not in source
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]


@pytest.mark.parametrize("folder", ["callbacks", "solving", "editors", "models", "data", "metrics"])
def test_imports_go_one_way(folder):
    """Solving knows no Lightning, callbacks know no editor, and nobody knows the command line."""
    forbidden = {"solving": r"^(lightning|rect_lightning\.(editors|callbacks|cli))", "callbacks": r"\.(editors|cli)\b"}
    pattern = re.compile(forbidden.get(folder, r"^rect_lightning\.cli\b"))
    for path in (PACKAGE / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not pattern.search(node.module or ""), f"{path.name} imports {node.module}"
            elif isinstance(node, ast.Import):
                assert not [a.name for a in node.names if pattern.search(a.name)], path.name


def test_the_manual_is_whole():
    """No placeholder is left in it, and what it links to is there."""
    import re

    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"^[A-Z_]{4,}$", text, re.MULTILINE), page
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
