"""docs/architecture.md: its diagram is that of the imports, which have no cycle and point downwards.

python tests/test_architecture.py     # prints the arrows as they are
"""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
FOLDERS = ("bookkeeping", "data", "infra", "report")
EVERYWHERE = ("options.py", "labels.py", "label_files.py")  # which nearly all files import: not drawn, as infra/ is not


def files() -> dict[str, Path]:
    """Module -> path of all files of the project but tests and benchmarks."""
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]
    found = {}
    for path in paths:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name != "__init__.py":
            found[name] = path
    return found


def imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """The project's files that a file imports anywhere, as paths from the root."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {str(modules[name].relative_to(ROOT)) for name in names if name in modules}
    return found


def graph() -> dict[str, set[str]]:
    """File -> the files that it imports."""
    modules = files()
    return {str(path.relative_to(ROOT)): imports(path, modules) for path in modules.values()}


def is_drawn(name: str) -> bool:
    return name not in EVERYWHERE and not name.startswith("infra/")


def arrows() -> set[tuple[str, str]]:
    """The arrows that the diagram is to have."""
    found = graph().items()
    return {(file, other) for file, others in found for other in others if is_drawn(file) and is_drawn(other)}


def drawn() -> tuple[set[tuple[str, str]], dict[str, int]]:
    """The arrows of the diagram, and the level of each file: that of its box, from the top."""
    [diagram] = re.findall(r"```mermaid\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = dict(re.findall(r'(\w+)\["?([\w/.]+\.py)"?\]', diagram))
    found = set()
    for start, ends in re.findall(r"^ *(\w+) --> ([\w &]+)$", diagram, re.MULTILINE):
        found |= {(names[start], names[end.strip()]) for end in ends.split("&")}
    levels = {}
    for level, box in enumerate(re.findall(r"subgraph(.*?)\bend\b", diagram, re.DOTALL)):
        for _, name in re.findall(r'(\w+)\["?([\w/.]+\.py)"?\]', box):
            levels[name] = level
    return found, levels


def test_the_diagram_shows_the_imports():
    found, levels = drawn()
    assert found == arrows()
    assert set(levels) == {name for name in graph() if is_drawn(name)}


def test_no_arrow_goes_upwards():
    found, levels = drawn()
    assert [(a, b) for a, b in found if levels[a] > levels[b]] == []


def test_imports_have_no_cycle():
    TopologicalSorter(graph()).prepare()  # raises CycleError


def test_what_everything_stands_on_imports_nothing_above_it():
    for file, others in graph().items():
        if not is_drawn(file):
            assert not any(is_drawn(other) for other in others), file


def test_every_file_is_named_on_the_page():
    text = PAGE.read_text()
    assert [name for name in graph() if f"{name}" not in text] == []


if __name__ == "__main__":
    for arrow in sorted(arrows()):
        print(*arrow)
