"""The house stands as docs/house.md draws it: imports go one way, and few files know much."""

import ast
import re
from pathlib import Path

import pvt_ref

PACKAGE = Path(pvt_ref.__file__).parent
HOUSE = (Path(__file__).parents[1] / "docs" / "house.md").read_text(encoding="utf-8")


def imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def room(name: str) -> str:
    """A file, or the folder it lies in, as the tables of house.md name it."""
    first = name.removeprefix("pvt_ref.").split(".")[0]
    return f"{first}/" if (PACKAGE / first).is_dir() else f"{first}.py"


def test_imports_go_down_the_table_only():
    tables = HOUSE.split("Beside the network:")
    order, beside = (re.findall(r"^\| (`.+?) \|", table, flags=re.MULTILINE) for table in tables)
    # every row names its files first
    order = [name for row in order for name in re.findall(r"`(\w+(?:\.py|/))`", row)]
    beside = {name for row in beside for name in re.findall(r"`(\w+(?:\.py|/))`", row)}
    folders = {f"{p.name}/" for p in PACKAGE.iterdir() if p.is_dir() and p.name[0] not in "_."}
    files = {p.name for p in PACKAGE.glob("*.py")} - {"__init__.py"}
    on_disk = folders | files
    assert set(order) | beside == on_disk
    for path in PACKAGE.rglob("*.py"):
        here = room(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        if here not in order:
            continue
        for module in imports(path):
            if module.startswith("pvt_ref"):
                there = room(module)
                below = there in order and order.index(there) >= order.index(here)
                assert below or there in beside, f"{path.name} imports {module}"


def test_only_arrays_knows_cupy_and_nothing_knows_torch():
    for path in PACKAGE.rglob("*.py"):
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & {"torch", "transformers", "jax", "autograd", "sklearn"}
        assert "matplotlib" not in used or path.name == "metrics.py", path  # and there when called
        assert "cupy" not in used or path.name == "arrays.py", path


def public_functions():
    """Every function and method without an underscore: where it is, its tree, its docstring."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        homes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        for node in (node for home in homes for node in home.body):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                where = f"{path.relative_to(PACKAGE)}: {node.name}"
                yield where, node, ast.get_docstring(node) or ""


def test_every_docstring_names_the_errors_that_its_function_raises():
    named = 0
    for where, node, docstring in public_functions():
        for raised in (x.exc for x in ast.walk(node) if isinstance(x, ast.Raise)):
            made = raised.func if isinstance(raised, ast.Call) else raised
            if isinstance(made, ast.Name) and made.id.endswith("Error"):
                assert re.search(rf"Raises:.*\b{made.id}\b", docstring, re.DOTALL), where
                named += 1
    assert named > 100


def test_every_docstring_gives_the_shapes_of_arrays():
    described = 0
    for where, node, docstring in public_functions():
        given = [a.annotation for a in node.args.args + node.args.kwonlyargs]
        arrays = [a for a in (*given, node.returns) if a and re.search("Array", ast.unparse(a))]
        if arrays:
            shaped = r"\((\.\.\.|[A-Z]\w*|[hnmd]|\d)(,[^)]*)?\)|\bshape|\bany array|\barrays\b"
            assert re.search(shaped, docstring), where
            described += 1
    assert described > 70


def test_every_forward_has_its_backward_below_it():
    pairs = 0
    files = [
        p for folder in ("layers", "blocks", "models") for p in (PACKAGE / folder).rglob("*.py")
    ]
    for path in files:
        functions = {
            node.name: node.lineno
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef)
        }
        for name, line in functions.items():
            if name.endswith("_forward") and name != "_stage_forward":
                twin = name.replace("_forward", "_backward")
                assert functions[twin] > line, f"{path.name}: {name}"
                pairs += 1
    assert pairs >= 15
