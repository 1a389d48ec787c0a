"""The house stands as docs/house.md draws it: imports go one way, and few files know much."""

import ast
import importlib
import inspect
import re
from pathlib import Path

from operations import READABLE

import pvt_ref
import pvt_ref.train

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
    rows = re.findall(r"^\| (`.+?) \|", HOUSE.split("## What goes where")[0], flags=re.MULTILINE)
    order = [name for row in rows for name in re.findall(r"`(\w+(?:\.py|/))`", row)]
    folders = {f"{p.parent.name}/" for p in PACKAGE.glob("*/*.py")}
    files = {p.name for p in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert set(order) == folders | files
    for path in PACKAGE.rglob("*.py"):
        here = room(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        if here not in order:
            continue
        for module in imports(path):
            if module.startswith("pvt_ref."):
                there = room(module)
                assert order.index(there) >= order.index(here), f"{path} imports {module}"


def test_only_a_networks_own_folder_names_its_types():
    known = re.compile(r"\b(PVT(v2)?Config|PVT(v2)?Params|ViTConfig|ViTParams|pos_embed1)\b")
    for path in PACKAGE.rglob("*.py"):
        inside = "models" in path.parts and path.parent.name != "models"
        if not inside and path != PACKAGE / "__init__.py":
            found = known.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path} names {found[0] if found else ''}"


def test_signatures_are_those_of_the_house():
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| `\((.+?)\)` \|", HOUSE, flags=re.MULTILINE)
    assert {name for name, _, _ in rows} == set(READABLE)
    for name, file, arguments in rows:
        op = READABLE[name]
        module = op.forward.__module__
        assert module == "pvt_ref." + file.removesuffix(".py").replace("/", ".")
        assert getattr(importlib.import_module(module), name) is op
        parameters = inspect.signature(op.forward).parameters
        # commas inside brackets belong to a type
        names = [a.partition(":")[0] for a in re.split(r", (?![^\[]*\])", arguments)]
        assert names == list(parameters), name
        assert names[:3] == ["p", "x", "ops"]
        assert names[-1] == "keep"
        assert parameters["keep"].default is True
        assert list(inspect.signature(op.backward).parameters) == ["p", "cache", "dy", "ops"]


def test_only_arrays_knows_cupy_and_nothing_knows_torch():
    for path in PACKAGE.rglob("*.py"):
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & {"torch", "transformers", "jax", "autograd", "sklearn"}
        assert "matplotlib" not in used or path.name == "metrics.py", path  # and there when called
        assert "cupy" not in used or path.name == "arrays.py", path


#: What a user calls, and where it stands.
PUBLIC = {
    (getattr(getattr(home, name), "__module__", ""), name)
    for home in (pvt_ref, pvt_ref.train)
    for name in home.__all__
}


def public_functions():
    """What a user calls and every operation: where it is, its tree, its docstring.

    These say shapes, errors and source in full. Everything else says in a line what it is for.
    """
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        operations = path.parent.name in ("layers", "blocks", "heads")
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for home in (tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))):
            for node in home.body:
                if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                    continue
                of_class = isinstance(home, ast.ClassDef) and (module, home.name) in PUBLIC
                operation = operations and re.search("_(forward|backward)$", node.name)
                if of_class or operation or (home is tree and (module, node.name) in PUBLIC):
                    where = f"{path.relative_to(PACKAGE)}: {node.name}"
                    yield where, node, ast.get_docstring(node) or ""


def test_every_public_function_describes_its_arguments_and_result():
    described = 0
    for where, node, docstring in public_functions():
        arguments = [a.arg for a in node.args.args + node.args.kwonlyargs if a.arg != "self"]
        if arguments and not any(isinstance(d, ast.Name) for d in node.decorator_list):
            assert all(re.search(rf"^ *{a}: ", docstring, re.MULTILINE) for a in arguments), where
            returns = node.returns and ast.unparse(node.returns) != "None"
            assert not returns or re.search("Returns:|Yields:", docstring), where
            described += 1
    assert described > 60


def docstring_lines(path: Path) -> int:
    """Lines of all docstrings of a file."""
    nodes = [
        n
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)
    ]
    with_docstring = [n.body[0] for n in nodes if ast.get_docstring(n, clean=False) is not None]
    return sum((n.end_lineno or 0) - n.lineno + 1 for n in with_docstring)


def test_docstrings_are_at_most_a_quarter_of_the_package():
    files = list(PACKAGE.rglob("*.py"))
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    assert sum(map(docstring_lines, files)) <= lines / 4


def test_every_docstring_names_the_errors_that_its_function_raises():
    named = 0
    for where, node, docstring in public_functions():
        for raised in (x.exc for x in ast.walk(node) if isinstance(x, ast.Raise)):
            made = raised.func if isinstance(raised, ast.Call) else raised
            if isinstance(made, ast.Name) and re.match(r"[A-Z]\w*Error$", made.id):
                assert re.search(rf"Raises:.*\b{made.id}\b", docstring, re.DOTALL), where
                named += 1
    assert named > 45


def test_every_docstring_gives_the_shapes_of_arrays():
    described = 0
    for where, node, docstring in public_functions():
        given = [a.annotation for a in node.args.args + node.args.kwonlyargs]
        arrays = [a for a in (*given, node.returns) if a and re.search("Array", ast.unparse(a))]
        if arrays:
            shaped = r"\((\.\.\.|[A-Z]\w*|[hnmd]|\d)(,[^)]*)?\)|\bshape|\bany array|\barrays\b"
            assert re.search(shaped, docstring), where
            described += 1
    assert described > 50


def test_every_forward_has_its_backward_below_it():
    pairs = 0
    files = [
        p
        for folder in ("layers", "blocks", "heads", "models")
        for p in (PACKAGE / folder).rglob("*.py")
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
    assert pairs >= 14
