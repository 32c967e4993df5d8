"""The house: which floor may import which, what the README promises, what is in the wheel."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchtrim

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "torchtrim"
SOURCES = sorted(PACKAGE.rglob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")

# From the top floor down. A file imports from its own floor and from those below.
FLOORS = [
    (
        "cli",
        "cli_bench",
        "cli_data",
        "cli_edits",
        "cli_export",
        "cli_options",
        "cli_prune",
        "cli_rank",
        "cli_recipes",
        "cli_sparsify",
        "cli_trim",
        "cli_verify",
        "demo",
        "__main__",
    ),
    ("recipe",),
    ("models",),
    ("autopilot",),
    ("report",),
    ("search",),
    ("export",),
    ("train",),
    ("checkpoint",),
    ("edits",),
    ("importance",),
    ("channels",),
    ("bench",),
    ("graph",),
    ("errors",),
]
HEIGHT = {name: -level for level, names in enumerate(FLOORS) for name in names}


def imports(source: Path) -> Iterator[str]:
    """What a file imports of torchtrim, wherever in the file: `graph.trace`, or nothing for the package itself."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: a relative import"
            if [alias.name for alias in node.names] == ["__version__"]:
                continue
            names = [node.module or ""]
        else:
            continue
        yield from (name.partition(".")[2] for name in names if name.split(".")[0] == "torchtrim")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(source: Path) -> None:
    own = source.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return  # the public names, each imported when it is used
    assert own in HEIGHT, f"{own} has no floor"
    for name in imports(source):
        floor = name.partition(".")[0]
        if floor:
            assert HEIGHT[floor] <= HEIGHT[own], f"{own} imports {name}, which is above it"
        else:
            assert own in FLOORS[0], f"{own} imports the whole package"


def test_floors_are_checked_at_all(tmp_path: Path) -> None:
    source = tmp_path / "low.py"
    source.write_text("def f():\n    from torchtrim.cli import app\n    import torchtrim.graph.trace\n")
    assert list(imports(source)) == ["cli", "graph.trace"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_holds_one_idea(source: Path) -> None:
    assert source.stem not in {"utils", "util", "helpers", "common", "misc"}
    assert len(source.read_text(encoding="utf-8").splitlines()) <= 450


def test_every_public_name_is_there_and_documented() -> None:
    for name in torchtrim.__all__:
        value = getattr(torchtrim, name)
        assert name.startswith("__") or value.__doc__, f"{name} has no docstring"
    assert set(dir(torchtrim)) >= set(torchtrim.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = torchtrim.no_such_name


def test_importing_torchtrim_costs_nothing() -> None:
    code = "import sys, torchtrim; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == torchtrim.__version__
    assert f"## [{torchtrim.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_cover_what_is_installed_and_name_no_host() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.match(r"[a-z0-9.-]+==\S+( ; .+)?$", pin) for pin in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[<>=\[]", name)[0].replace("_", "-") for name in wanted} - {"torchtrim"}
    assert names <= {pin.partition("==")[0] for pin in pins}


def tour() -> str:
    found = re.search(r"<!-- tour -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found, "the README has no tour"
    return found[1]


def test_the_readme_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len([line for line in tour().splitlines() if line.strip()]) <= 22
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(tour(), "README.md", "exec"), names)
    assert (tmp_path / "net.onnx").is_file()


def test_the_code_in_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "editing.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "editing.md", "exec"), names)
    assert (tmp_path / "net.trim").is_file()


def test_what_the_readme_points_at_exists() -> None:
    places = [*re.findall(r"\]\(([^)#]+)\)", README), *re.findall(r"scripts/\w+\.sh", README)]
    assert any(place.endswith(".png") for place in places)
    for place in places:
        assert place.startswith("http") or (ROOT / place).exists(), place


def test_the_scripts_are_sound() -> None:
    for script in [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"]:
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_wheel_holds_the_package_and_runs(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tables = sorted((PACKAGE / "export" / "kernels").glob("*.json"))
    pages = sorted(path for path in (PACKAGE / "report").iterdir() if path.suffix in (".jinja", ".css", ".js"))
    for path in [
        *PACKAGE.rglob("*.py"),
        *tables,
        *pages,
        *(ROOT / n for n in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE")),
    ]:
        copy = tree / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tree / "torchtrim" / "py.typed").touch()
    (tree / "tests").mkdir()
    (tree / "tests" / "test_nothing.py").touch()
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tree, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"torchtrim-{torchtrim.__version__}-py3-none-any.whl"

    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(unpacked)
    code = {name for name in names if ".dist-info/" not in name}
    assert code == {str(path.relative_to(ROOT)) for path in [*SOURCES, *tables, *pages]} | {"torchtrim/py.typed"}
    assert any(name.endswith("/LICENSE") for name in names)
    command = [sys.executable, "-m", "torchtrim", "--help"]
    answer = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, check=True)
    assert "Exit codes" in answer.stdout
