"""The house rules: what a method may touch, who may import whom, what the README names.

By the source's syntax trees, so that what no other test runs is seen as well.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import gwpf_baseline
from gwpf_baseline.config import config_dir
from gwpf_baseline.learning.server_optimizer import OPTIMIZERS
from gwpf_baseline.methods import method_files
from gwpf_baseline.model import MODELS

PACKAGE = Path(gwpf_baseline.__file__).parent
REPOSITORY = config_dir().parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
# What other libraries have subclasses use.
FOREIGN = {"_conv_forward", "_NormBase"}


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


# ---- a method needs nobody's private parts ------------------------------------------


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def _defined(tree: ast.Module) -> set[str]:
    """Return the names that a file gives to something of its own."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.Attribute(value=ast.Name(id="self"), ctx=ast.Store()):
                names.add(node.attr)
    return names


def _touched(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield each private member that a file asks something for, and the line."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute():
                names = [node.attr]
            case ast.ImportFrom():
                names = [alias.name for alias in node.names]
            case ast.Call(func=ast.Name(id="getattr" | "setattr" | "hasattr")):
                values = [a.value for a in node.args if isinstance(a, ast.Constant)]
                names = [value for value in values if isinstance(value, str)]
            case _:
                continue
        yield from ((node.lineno, name) for name in names if _is_private(name))


def _trespasses(tree: ast.Module) -> list[tuple[int, str]]:
    allowed = _defined(tree) | FOREIGN
    return [(line, name) for line, name in _touched(tree) if name not in allowed]


@pytest.mark.parametrize(
    "file",
    sorted((PACKAGE / "methods").rglob("*.py")),
    ids=lambda file: str(file.relative_to(PACKAGE / "methods")),
)
def test_a_method_touches_no_private_member_of_another_file(file: Path) -> None:
    """What a method needs of the rest is public: that is the contract."""
    assert _trespasses(_parsed(file)) == []


def test_a_private_member_of_another_file_would_be_seen() -> None:
    """However it is reached; one of the file's own is none."""
    source = """
from elsewhere import _hidden, shown

class Method(Base):
    def __init__(self, other):
        self._mine = other.__dict__
        self._mine, other._stored = self._helper(), 1

    def _helper(self):
        return self._inherited or getattr(self, "_by_name") or self._mine
"""
    found = [name for _, name in _trespasses(ast.parse(source))]
    assert sorted(found) == ["_by_name", "_hidden", "_inherited", "_stored"]


# ---- nobody needs himself -----------------------------------------------------------


def _modules(root: Path) -> dict[str, Path]:
    """Return a package's modules by their names."""
    modules = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


def _imported(tree: ast.Module, module: str, is_package: bool) -> Iterator[str]:
    """Yield what a module imports anywhere in it; of names, what they may be in."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                source = node.module or ""
                if node.level:
                    above = module.split(".")
                    above = above[: len(above) - node.level + is_package]
                    source = ".".join([*above, *filter(None, [node.module])])
                yield source
                yield from (f"{source}.{alias.name}" for alias in node.names)
            case ast.Call(args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(node.func).endswith(("import_module", "__import__")):
                    yield name


def _import_graph(root: Path) -> dict[str, set[str]]:
    """Return, by module, the other modules of its package that run before it can."""
    modules = _modules(root)
    graph: dict[str, set[str]] = {}
    for module, file in modules.items():
        needs = set()
        for name in _imported(_parsed(file), module, file.stem == "__init__"):
            # Packages run before what is in them.
            parts = name.split(".")
            needs |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        # But for those that the module is in: they run before it anyway.
        within = {module[: dot.start()] for dot in re.finditer(r"\.|$", module)}
        graph[module] = (needs & modules.keys()) - within
    return graph


def test_no_module_needs_itself() -> None:
    """Not in the least circle, not by way of an import within a function."""
    graph = _import_graph(PACKAGE)
    assert "gwpf_baseline.strategy" in graph["gwpf_baseline.methods.gwpf_paper"]
    assert len(graph) > 40
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    "back",
    [
        "import house.cellar",
        "from house import cellar",
        "from . import cellar",
        "from .cellar import wine",
        "def late():\n    from house.cellar import wine",
        "import importlib\nimportlib.import_module('house.cellar')",
    ],
)
def test_a_circle_would_be_seen(tmp_path: Path, back: str) -> None:
    """However it is closed."""
    root = tmp_path / "house"
    root.mkdir()
    (root / "__init__.py").write_text('"""A house."""\n')
    (root / "attic.py").write_text(f"{back}\n")
    cellar = root / "cellar.py"
    cellar.write_text("wine = 1\n")
    order = list(TopologicalSorter(_import_graph(root)).static_order())
    assert order.index("house.cellar") < order.index("house.attic")
    cellar.write_text("def climb():\n    import house.attic\n\nwine = 1\n")
    with pytest.raises(CycleError):
        list(TopologicalSorter(_import_graph(root)).static_order())


# ---- whatever can be chosen stands in the README ------------------------------------


def _choices(group: str) -> list[str]:
    return sorted(file.stem for file in config_dir().glob(f"{group}/*.yaml"))


def _table(head: str) -> str:
    """Return the README's table whose first column has this head."""
    _, found, rest = README.partition(f"\n| {head} |")
    assert found
    return rest.partition("\n\n")[0]


def _in_first_column(table: str) -> set[str]:
    """Return what stands in backticks in a table's first column."""
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    return {name for cell in rows for name in re.findall("`([^`]+)`", cell)}


@pytest.mark.parametrize("variant", _choices("method"))
def test_every_method_stands_in_the_readmes_table(variant: str) -> None:
    """Under the name by which it is chosen."""
    assert variant in _in_first_column(_table("`method=`"))


def test_the_readmes_table_names_no_method_that_is_gone() -> None:
    """Every name in it can be chosen."""
    assert _in_first_column(_table("`method=`")) <= set(_choices("method"))


@pytest.mark.parametrize("name", method_files())
def test_every_method_has_a_page_that_the_readme_links(name: str) -> None:
    """A page that links the method's file; FedAvg is all in its docstring."""
    pages = {REPOSITORY / page for page in re.findall(r"\]\((docs/\w+\.md)\)", README)}
    about = f"(../gwpf_baseline/methods/{name}.py)"
    texts = [page.read_text(encoding="utf-8") for page in sorted(pages)]
    assert any(about in text for text in texts) or name == "fedavg"


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_stands_in_the_readmes_table(name: str) -> None:
    """Under the name by which it is chosen, and with a file of its own."""
    assert name in _in_first_column(_table("`model=`"))
    assert name in _choices("model")


@pytest.mark.parametrize("name", _choices("dataset"))
def test_every_dataset_stands_in_the_readme(name: str) -> None:
    """Under the name by which it is chosen."""
    paragraph = README.partition("**Datasets:**")[2].partition("\n\n")[0]
    assert f"`{name}`" in paragraph


@pytest.mark.parametrize("group", ["server_optimizer", "partition"])
def test_every_other_choice_stands_in_the_readme(group: str) -> None:
    """Under the name by which it is chosen."""
    for name in _choices(group):
        assert f"`{name}`" in README, name


def test_every_server_optimizer_has_a_file_of_its_own() -> None:
    """Else it could not be chosen."""
    assert sorted(OPTIMIZERS) == _choices("server_optimizer")
