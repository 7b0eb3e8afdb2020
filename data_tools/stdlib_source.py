"""Functions of the running interpreter's standard library, and the tests that call them, as text: the raw material of `build_stdlib_tasks`."""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

# Not library code: others' packages, generated tables, examples, tests that live inside packages.
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "lib2to3", "idlelib", "turtledemo", "pydoc_data", "encodings", "test", "tests"}
# Folders of Lib/test that are data of tests.
SKIPPED_TEST_FOLDERS = {"__pycache__", "data", "crashers", "leakers", "encoded_modules", "tokenizedata", "typinganndata", "support"}

AnyFunction = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """A function or method that does something, dedented. It has no comment or docstring lines above its `def` or decorator."""

    module: str  # json.decoder
    qualified_name: str  # JSONDecoder.decode
    name: str
    key: str  # hash of what it does: equal for two functions that differ in comments, docstrings, layout or decorators only
    code: str  # without docstring
    head: str  # decorators, signature and docstring as written; "" without docstring
    body: str  # what follows the head; "" without docstring
    docstring: str  # cleaned text; "" without docstring


@dataclass(frozen=True)
class TestMethod:
    """A test method, dedented, with the functions that it calls as (module, name), in the order of the calls."""

    module: str  # test.test_bisect
    qualified_name: str
    code: str
    calls: tuple[tuple[str, str], ...]


@dataclass
class Material:
    """What was found in a part of the library."""

    functions: list[Function] = field(default_factory=list)
    tests: list[TestMethod] = field(default_factory=list)
    files: int = 0
    unparsed_files: int = 0


def read_stdlib(stdlib: Path) -> Material:
    """Every function of the library and every test of it, in the order of file names; no tests where they are not installed."""
    library = [file for file in sorted(stdlib.rglob("*.py")) if not SKIPPED_FOLDERS & set(file.relative_to(stdlib).parts)]
    tests = [file for file in sorted((stdlib / "test").rglob("test_*.py")) if not SKIPPED_TEST_FOLDERS & set(file.relative_to(stdlib).parts)]
    whole = Material()
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=gc.disable) as pool:
        for part in pool.map(_read_file, [stdlib] * len(library + tests), library + tests, chunksize=16):
            whole.functions += part.functions
            whole.tests += part.tests
            whole.files += part.files
            whole.unparsed_files += part.unparsed_files
    return whole


def _read_file(stdlib: Path, file: Path) -> Material:
    parts = file.relative_to(stdlib).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    try:
        # Honours the file's own coding line; some files of the library are not UTF-8.
        with tokenize.open(file) as stream:
            text = stream.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, OSError):
        return Material(unparsed_files=1)
    # Lines as the parser counts them: splitlines() would also split at form feeds inside strings.
    lines = text.split("\n")
    if parts[0] == "test":
        return Material(tests=list(tests_of(module, tree, lines)), files=1)
    return Material(functions=list(functions_of(module, tree, lines)), files=1)


def functions_of(module: str, tree: ast.Module, lines: list[str]) -> Iterator[Function]:
    """Functions and methods in the order of the source. Functions inside functions belong to their outer one."""
    for prefix, node in _definitions(tree.body, ""):
        statements = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
        if not any(_does_something(statement) for statement in statements):
            continue
        parts = _split_at_docstring(node, lines)
        if parts is None:
            continue
        code, head, body = parts
        docstring = inspect.cleandoc(ast.get_docstring(node) or "").strip()
        yield Function(module, prefix + node.name, node.name, meaning_key(node), code, head, body, docstring)


def tests_of(module: str, tree: ast.Module, lines: list[str]) -> Iterator[TestMethod]:
    """Test methods that call functions which their module imports by name or through a module's name."""
    names = _imported_names(tree)
    for prefix, node in _definitions(tree.body, ""):
        if not prefix or not node.name.startswith("test"):
            continue
        calls = dict.fromkeys(call for inner in ast.walk(node) if isinstance(inner, ast.Call) and (call := _resolved(inner.func, names)))
        code = _dedented(lines[_first_line(node) - 1 : node.end_lineno])
        if calls and code is not None:
            yield TestMethod(module, prefix + node.name, code, tuple(calls))


def meaning_key(node: AnyFunction) -> str:
    """SHA-256 of a function's name, signature and statements. Comments, layout, docstring and decorators do not count."""
    bare = type(node)(**{field: getattr(node, field) for field in node._fields})
    bare.decorator_list = []
    if ast.get_docstring(node, clean=False) is not None:
        bare.body = node.body[1:]
    return hashlib.sha256(ast.dump(bare).encode()).hexdigest()


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, AnyFunction]]:
    """Functions of a module or class body, also under `if` and `try`, with the dotted prefix of the classes around them."""
    for node in body:
        if isinstance(node, AnyFunction):
            yield prefix, node
        elif isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):
            handlers = [statement for handler in getattr(node, "handlers", []) for statement in handler.body]
            yield from _definitions([*node.body, *handlers, *node.orelse, *getattr(node, "finalbody", [])], prefix)


def _does_something(node: ast.stmt) -> bool:
    """Whether a statement is more than a place holder: pass, ..., a string, `raise NotImplementedError`, a bare return."""
    match node:
        case ast.Pass() | ast.Expr(value=ast.Constant()) | ast.Return(value=None | ast.Constant()):
            return False
        case ast.Raise(exc=ast.Name(id="NotImplementedError") | ast.Call(func=ast.Name(id="NotImplementedError"))):
            return False
    return True


def _first_line(node: AnyFunction) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _split_at_docstring(node: AnyFunction, lines: list[str]) -> tuple[str, str, str] | None:
    """(code without docstring, head, body); None where they cannot be told apart by lines, as in one-liners."""
    first, last = _first_line(node), node.end_lineno or node.lineno
    if ast.get_docstring(node, clean=False) is None:
        code = _dedented(lines[first - 1 : last])
        return None if code is None else (code, "", "")
    string, following = node.body[0], node.body[1]
    before = lines[first - 1 : string.lineno - 1]
    if not before or not before[-1].split("#")[0].rstrip().endswith(":") or following.lineno <= (string.end_lineno or 0):
        return None
    after = lines[(string.end_lineno or 0) : last]
    while not after[0].strip():
        after = after[1:]
    whole, code = _dedented(lines[first - 1 : last]), _dedented(before + after)
    if whole is None or code is None:
        return None
    whole_lines, head_length = whole.split("\n"), (string.end_lineno or 0) - first + 1
    return code, "\n".join(whole_lines[:head_length]), "\n".join(whole_lines[head_length:]).strip("\n")


def _dedented(lines: list[str]) -> str | None:
    """The lines moved to the left margin; None where a string's text stands left of the code and forbids it."""
    text = textwrap.dedent("\n".join(line.rstrip() for line in lines)).strip("\n")
    return None if text[:1].isspace() or not text else text


def _imported_names(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Name in a test module -> (module, function), or (module, "") for a module."""
    names = {}
    # Imports of the module itself and of conditions around them; names that one test imports for itself do not hold in the others.
    pending = list(tree.body)
    for node in pending:
        if isinstance(node, ast.If | ast.Try):
            pending += [*node.body, *node.orelse]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name] = alias.name, ""
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = node.module, alias.name
    return names


def _resolved(called: ast.expr, names: dict[str, tuple[str, str]]) -> tuple[str, str] | None:
    """What `f(...)` or `module.f(...)` calls, as (module, function name)."""
    if isinstance(called, ast.Name) and called.id in names:
        module, function = names[called.id]
        return (module, function) if function else None
    if isinstance(called, ast.Attribute):
        owner = ast.unparse(called.value) if isinstance(called.value, ast.Name | ast.Attribute) else ""
        if owner in names:
            module, function = names[owner]
            return (f"{module}.{function}" if function else module), called.attr
    return None
