"""Reads a stock wheel's source as syntax trees: what it defines, never what it runs.

`Wheel` answers the contract tests' questions about one release: does a dotted
target exist, with which parameters, and which attributes does a class have.
Nothing of SGLang is imported, so every release is read side by side, without
its dependencies. Names are followed as Python would follow them: base classes
across modules, `from x import y [as z]`, re-exports in `__init__`, star imports.
A name that leaves the wheel (`torch.nn.Module`) ends the search there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


class ContractError(AssertionError):
    """The wheel does not have what a fix relies on."""


@dataclass(frozen=True, eq=False)
class Module:
    """One parsed source file: its top-level definitions, and where other names come from."""

    name: str
    path: Path
    tree: ast.Module

    @cached_property
    def statements(self) -> list[ast.stmt]:
        """Top-level statements, with those below `if`, `try` and `with`."""
        return list(_flat(self.tree.body))

    @cached_property
    def definitions(self) -> dict[str, ast.stmt]:
        """Classes, functions and assignments by name; the last one wins.

        A class rebuilt from itself (`C = defstruct("C", ..., vars(C))`, as
        ServerArgs is from 0.5.20) keeps its methods: the class statement stays.
        """
        found: dict[str, ast.stmt] = {}
        for node in self.statements:
            for name in _bound(node):
                if not (name in found and _mentions(node, name)):
                    found[name] = node
        return found

    @cached_property
    def imports(self) -> dict[str, tuple[str, str | None]]:
        """Local name -> (module, name in it, or None for a module itself)."""
        found: dict[str, tuple[str, str | None]] = {}
        for node in self.statements:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    top = alias.name.partition(".")[0]
                    found[alias.asname or top] = (alias.name if alias.asname else top, None)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.name != "*":
                        found[alias.asname or alias.name] = (self.absolute(node), alias.name)
        return found

    @cached_property
    def stars(self) -> list[str]:
        """Modules whose every name is imported here."""
        return [
            self.absolute(node)
            for node in self.statements
            if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names)
        ]

    def absolute(self, node: ast.ImportFrom) -> str:
        """The absolute name of the module an import statement names."""
        if not node.level:
            return node.module or ""
        package = self.name.split(".")
        if self.path.name != "__init__.py":
            package = package[:-1]
        package = package[: len(package) - (node.level - 1)]
        return ".".join([*package, *([node.module] if node.module else [])])


@dataclass(frozen=True, eq=False)
class Class:
    """A class and the module that defines it."""

    module: Module
    node: ast.ClassDef

    @property
    def name(self) -> str:
        """`module:Class`, as attach points spell it."""
        return f"{self.module.name}:{self.node.name}"

    @cached_property
    def methods(self) -> dict[str, Function]:
        """Functions defined in the class body itself."""
        return {
            node.name: node
            for node in _flat(self.node.body)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }

    @cached_property
    def attributes(self) -> set[str]:
        """Names bound in the body, and attributes its methods assign on their first parameter."""
        found = {name for node in _flat(self.node.body) for name in _bound(node)}
        for method in self.methods.values():
            if receiver := _receiver(method):
                found |= _assigned_on(receiver, method)
        return found


@dataclass(frozen=True, eq=False)
class Found:
    """A resolved function or class: where it is defined, seen from where it was asked for."""

    node: Function | ast.ClassDef
    module: Module
    asked: Class | None = None
    """The class named in the target, None for a module-level target."""
    owner: Class | None = None
    """The class that defines the method: `asked` or one of its bases."""

    @property
    def kind(self) -> str:
        """`class`, `function`, `method`, `staticmethod`, `classmethod` or `property`."""
        if isinstance(self.node, ast.ClassDef):
            return "class"
        if self.owner is None:
            return "function"
        for decorator in self.node.decorator_list:
            name = ast.unparse(decorator).rpartition(".")[2]
            if name in ("staticmethod", "classmethod", "property", "cached_property"):
                return name.removeprefix("cached_")
        return "method"

    @property
    def params(self) -> tuple[str, ...]:
        """Parameter names a caller passes by position, then keyword-only ones."""
        if isinstance(self.node, ast.ClassDef):
            return ()
        args = self.node.args
        names = [a.arg for a in (*args.posonlyargs, *args.args)]
        if self.kind in ("method", "classmethod", "property"):
            names = names[1:]
        return (*names, *(a.arg for a in args.kwonlyargs))

    @property
    def signature(self) -> str:
        """The parameters as written, with defaults and stars, without annotations."""
        if isinstance(self.node, ast.ClassDef):
            return ""
        args = self.node.args
        plain = ast.arguments(
            posonlyargs=[ast.arg(a.arg) for a in args.posonlyargs],
            args=[ast.arg(a.arg) for a in args.args],
            vararg=ast.arg(args.vararg.arg) if args.vararg else None,
            kwonlyargs=[ast.arg(a.arg) for a in args.kwonlyargs],
            kw_defaults=args.kw_defaults,
            kwarg=ast.arg(args.kwarg.arg) if args.kwarg else None,
            defaults=args.defaults,
        )
        return f"({ast.unparse(plain)})"


class Wheel:
    """The unpacked source of one release; modules are parsed on first use."""

    def __init__(self, release: str, root: Path) -> None:
        self.release = release
        self.root = root
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """The module of that dotted name, or None when the wheel has none."""
        if name not in self._modules:
            self._modules[name] = self._parse(name)
        return self._modules[name]

    def find(self, target: str) -> Found:
        """Resolve `module:Qual.name`; `ContractError` says what is missing."""
        module_name, _, qualname = target.partition(":")
        module = self.module(module_name)
        if module is None:
            raise ContractError(f"{self.release}: no module {module_name}")
        *path, name = qualname.split(".")
        if not path:
            where, node = self._lookup(module, name)
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                return Found(node, where)
            raise ContractError(f"{self.release}: {module_name} has no {qualname}")
        asked = self.find_class(module, ".".join(path))
        if asked is None:
            raise ContractError(f"{self.release}: {module_name} has no class {'.'.join(path)}")
        for owner in self.mro(asked):
            if name in owner.methods:
                return Found(owner.methods[name], owner.module, asked, owner)
        raise ContractError(f"{self.release}: {asked.name} has no method {name}")

    def require(
        self, target: str, params: tuple[str, ...] = (), uses: tuple[str, ...] = ()
    ) -> Found:
        """`find`, and check leading parameters and attributes of the class."""
        found = self.find(target)
        if found.params[: len(params)] != params:
            raise ContractError(
                f"{self.release}: {target} takes {found.params}, relied on: {params}"
            )
        missing = set(uses) - (self.attributes(found.asked) if found.asked else set())
        if missing:
            raise ContractError(f"{self.release}: {target}: its class has no {sorted(missing)}")
        return found

    def find_class(self, module: Module, qualname: str) -> Class | None:
        """The class a dotted name means inside a module: own, nested or imported."""
        first, *rest = qualname.split(".")
        where, node = self._lookup(module, first)
        if node is None and rest and (package := self._imported_module(module, qualname)):
            return self.find_class(package[0], package[1])
        for name in rest:
            if not isinstance(node, ast.ClassDef):
                return None
            inner = [n for n in _flat(node.body) if isinstance(n, ast.ClassDef) and n.name == name]
            node = inner[-1] if inner else None
        return Class(where, node) if isinstance(node, ast.ClassDef) else None

    def mro(self, cls: Class) -> list[Class]:
        """The class and its bases inside the wheel, nearest first.

        Depth first, a shared base after all who share it: what C3 gives for
        the inheritance SGLang uses.
        """
        chain = self._chain(cls, ())
        last = {c.node: i for i, c in enumerate(chain)}
        return [c for i, c in enumerate(chain) if last[c.node] == i]

    def attributes(self, cls: Class) -> set[str]:
        """Every attribute the class or one of its bases defines or assigns on self."""
        return set[str]().union(*(c.attributes for c in self.mro(cls)))

    def subclasses(self, base: str, modules: list[str]) -> list[Class]:
        """Classes in those modules which have `module:Base` among their bases."""
        found = []
        for name in modules:
            module = self.module(name)
            for node in module.statements if module else ():
                if isinstance(node, ast.ClassDef) and module:
                    cls = Class(module, node)
                    if any(c.name == base for c in self.mro(cls)):
                        found.append(cls)
        return found

    def _parse(self, name: str) -> Module | None:
        path = self.root.joinpath(*name.split("."))
        for file in (path / "__init__.py", path.with_name(path.name + ".py")):
            if file.is_file():
                return Module(name, file, ast.parse(file.read_bytes(), str(file)))
        return None

    def _lookup(
        self, module: Module, name: str, seen: frozenset[tuple[str, str]] = frozenset()
    ) -> tuple[Module, ast.stmt | None]:
        """Where a module-level name is really defined, through imports."""
        if (module.name, name) in seen:
            return module, None
        seen |= {(module.name, name)}
        if name in module.definitions:
            return module, module.definitions[name]
        if name in module.imports:
            source, attribute = module.imports[name]
            imported = self.module(source)
            if imported is None or attribute is None:
                return module, None
            return self._lookup(imported, attribute, seen)
        for source in module.stars:
            if imported := self.module(source):
                where, node = self._lookup(imported, name, seen)
                if node is not None:
                    return where, node
        return module, None

    def _imported_module(self, module: Module, dotted: str) -> tuple[Module, str] | None:
        """Split `package.mod.Class` at the longest prefix that is an imported module."""
        first, *rest = dotted.split(".")
        source, attribute = module.imports.get(first, ("", None))
        if not source:
            return None
        parts = [*source.split("."), *([attribute] if attribute else []), *rest]
        for cut in range(len(parts) - 1, 0, -1):
            if found := self.module(".".join(parts[:cut])):
                return found, ".".join(parts[cut:])
        return None

    def _chain(self, cls: Class, above: tuple[ast.ClassDef, ...]) -> list[Class]:
        chain = [cls]
        for base in cls.node.bases:
            expression = base.value if isinstance(base, ast.Subscript) else base  # Generic[T]
            found = self.find_class(cls.module, ast.unparse(expression))
            if found and found.node not in (*above, cls.node):
                chain += self._chain(found, (*above, cls.node))
        return chain


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body, entering `if`, `try` and `with`, not functions or classes."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for field in ("body", "orelse", "finalbody"):
                yield from _flat(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from _flat(handler.body)


def _bound(node: ast.stmt) -> Iterator[str]:
    """Names a statement binds, imports apart."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    yield part.id


def _mentions(node: ast.stmt, name: str) -> bool:
    """Whether an assignment's value reads that name."""
    value = getattr(node, "value", None)
    return value is not None and any(
        isinstance(part, ast.Name) and part.id == name for part in ast.walk(value)
    )


def _receiver(method: Function) -> str | None:
    """The name a method gives to its instance or class: usually `self`."""
    args = [*method.args.posonlyargs, *method.args.args]
    return args[0].arg if args else None


def _assigned_on(receiver: str, method: Function) -> set[str]:
    return {
        node.attr
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == receiver
    }
