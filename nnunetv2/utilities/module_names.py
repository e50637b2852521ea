"""Tell from a module's source whether it can have an attribute.

The module is not imported.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_DYNAMIC_WORDS = re.compile(r"import\s*\(?\s*\*|__getattr__|\bglobals\b|\bvars\b|\bsetattr\b|\bexec\b|\bsys\.modules\b")
_NEW_SCOPES = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.Lambda,
    ast.ClassDef,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)


@dataclass(frozen=True)
class ModuleNames:
    """The attributes that a module's source tells of."""

    bound: frozenset[str]
    """Names that statements of the module bind: definitions, imports, assignments."""

    is_dynamic: bool
    """Whether the module may have further attributes: star imports, `__getattr__`, `globals()` and the like."""


def may_bind(module_file: Path, name: str) -> bool:
    """Tell whether importing the module can yield an attribute `name`.

    False is certain; True means that the module must be imported to know. A module without readable source, or whose
    source does not parse but contains the name, counts as one that can.
    """
    try:
        status = module_file.stat()
    except OSError:  # compiled modules
        return True
    return _may_bind(module_file, status.st_mtime_ns, status.st_size, name)


@lru_cache(maxsize=4096)
def _may_bind(module_file: Path, _mtime_ns: int, _size: int, name: str) -> bool:
    source = module_file.read_text(encoding="utf-8", errors="replace")
    # Most modules do not contain the word at all: parsing is saved for the rest.
    if name not in source and _DYNAMIC_WORDS.search(source) is None:
        return False
    if re.search(rf"^class {re.escape(name)}\b", source, re.MULTILINE):  # so the module is imported in any case
        return True
    try:
        names = read_module_names(source)
    except SyntaxError:
        return name in source
    return name in names.bound or names.is_dynamic


def read_module_names(source: str) -> ModuleNames:
    """Collect the names that a module's source binds at module level, in all branches.

    Raises:
        SyntaxError: The source does not parse.
    """
    bound: set[str] = set()
    is_dynamic = False
    pending: list[ast.AST] = list(ast.parse(source).body)
    while pending:
        node = pending.pop()
        bound.update(_names_bound_by(node))
        is_dynamic = is_dynamic or _is_dynamic(node)
        if isinstance(node, _NEW_SCOPES):
            # A function that declares a name global binds it when it is called.
            bound.update(name for inner in ast.walk(node) if isinstance(inner, ast.Global) for name in inner.names)
            pending.extend(getattr(node, "decorator_list", []))
        else:
            pending.extend(ast.iter_child_nodes(node))
    return ModuleNames(frozenset(bound), is_dynamic or "__getattr__" in bound)


def _names_bound_by(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.alias):
        return [node.asname or node.name.split(".")[0]]
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, (ast.MatchAs, ast.MatchStar)) and node.name:
        return [node.name]
    return []


def _is_dynamic(node: ast.AST) -> bool:
    """Tell whether a node at module level can bind names that do not stand in the source."""
    if isinstance(node, ast.alias):
        return node.name == "*"
    if isinstance(node, ast.Name):
        return node.id in ("globals", "vars", "setattr", "exec")
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.modules"
