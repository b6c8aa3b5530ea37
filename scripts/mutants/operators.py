"""The mutants of a source file: one changed place each."""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
}
# Layout and progress bars. `strict` of zip is an assertion of ours, as `assert` is: neither is mutated.
COSMETIC_KEYWORDS = {
    "indent",
    "stacklevel",
    "encoding",
    "desc",
    "disable",
    "unit",
    "leave",
    "help",
    "strict",
}
SIMPLE_STATEMENTS = (
    ast.Expr,
    ast.Assign,
    ast.AugAssign,
    ast.AnnAssign,
    ast.Return,
    ast.Raise,
    ast.Delete,
)


@dataclass(frozen=True)
class Mutant:
    """One changed place: bytes `start` to `end` of a file are replaced by `text`."""

    file: str  # relative to the tree, with slashes
    function: str  # qualified name, or <module>
    line: int
    lines: tuple[
        int, int
    ]  # first and last line of the statement, or of the expression where a block follows it
    at_import: bool  # runs when the module is imported, not when a function is called
    start: int
    end: int
    text: str
    original: str  # the whole lines before and after, on one line each
    mutated: str
    number: int = 1  # of the mutants of this function that read the same

    @property
    def identity(self) -> str:
        """Stays the same when other lines are added or removed."""
        again = f" ({self.number})" if self.number > 1 else ""
        return f"{self.file} | {self.function}{again} | {self.original} -> {self.mutated}"

    def apply(self, source: bytes) -> bytes:
        """The file with the mutant in it."""
        return source[: self.start] + self.text.encode() + source[self.end :]


def mutants_of(file: str, source: bytes) -> list[Mutant]:
    """All mutants of a file, in the order of its lines; each compiles."""
    finder = _Finder(file, source)
    finder.visit(ast.parse(source))
    seen: Counter[str] = Counter()
    numbered = []
    for mutant in sorted(finder.found, key=lambda m: (m.start, m.end, m.text)):
        try:
            compile(mutant.apply(source), file, "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            continue
        seen[mutant.identity] += 1
        numbered.append(Mutant(**{**mutant.__dict__, "number": seen[mutant.identity]}))
    return numbered


class _Finder(ast.NodeVisitor):
    """Walks a module; keeps track of the function and the statement that it is in."""

    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source = file, source
        self.offsets = [0]
        for line in source.splitlines(keepends=True):
            self.offsets.append(self.offsets[-1] + len(line))
        self.scope: list[str] = []
        self.called = 0  # how many function bodies surround the node
        self.statement: ast.stmt | None = None
        self.found: list[Mutant] = []

    def add(self, node: ast.expr | ast.stmt, text: str) -> None:
        """Note a mutant whose node is replaced by `text`."""
        last = node.end_lineno or node.lineno
        start = self.offsets[node.lineno - 1] + node.col_offset
        end = self.offsets[last - 1] + (node.end_col_offset or 0)
        whole = self.statement if isinstance(self.statement, SIMPLE_STATEMENTS) else node
        stop = self.offsets[last]
        if whole.end_lineno == last:  # without the comment behind it
            stop = self.offsets[last - 1] + (whole.end_col_offset or 0)
        if whole is node and isinstance(node, ast.expr):  # the rest of an `if`, `for` or `with`
            stop = self.offsets[last]
        before, after = self.source[self.offsets[node.lineno - 1] : start], self.source[end:stop]
        mutant = Mutant(
            file=self.file,
            function=".".join(self.scope) or "<module>",
            line=node.lineno,
            lines=(whole.lineno, whole.end_lineno or whole.lineno),
            at_import=self.called == 0,
            start=start,
            end=end,
            text=text,
            original=_one_line(before + self.source[start:end] + after),
            mutated=_one_line(before + text.encode() + after),
        )
        if mutant.original != mutant.mutated:
            self.found.append(mutant)

    def replace(self, node: ast.expr, other: ast.expr) -> None:
        """Note a mutant whose expression is another one."""
        text = ast.unparse(other)
        self.add(
            node,
            text
            if isinstance(other, ast.Constant | ast.Name | ast.Call | ast.Subscript)
            else f"({text})",
        )

    def visit(self, node: ast.AST) -> None:
        """Visit a node, note its own mutants and those of its children."""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            self._visit_definition(node)
            return
        if _is_left_alone(node):
            return
        outer = self.statement
        if isinstance(node, ast.stmt):
            self.statement = node
        for change in _changes(node):
            if (
                isinstance(change, ast.Call)
                and not isinstance(self.statement, ast.Expr)
                and _lost(node, change) == "out"
            ):
                continue  # the result is used: where it is stored is of no effect
            if isinstance(change, str):
                assert isinstance(node, ast.stmt)
                self.add(node, change)
            else:
                assert isinstance(node, ast.expr)
                self.replace(node, change)
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            self.negate(node.test)
        if isinstance(node, ast.comprehension):
            for condition in node.ifs:
                self.negate(condition)
        for child in _children(node):
            self.visit(child)
        self.statement = outer

    def negate(self, condition: ast.expr) -> None:
        """Note the mutant with the opposite condition, where no other operator changes the condition as a whole."""
        if isinstance(condition, ast.Name | ast.Attribute | ast.Call | ast.Subscript):
            self.replace(condition, ast.UnaryOp(ast.Not(), condition))

    def _visit_definition(
        self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    ) -> None:
        is_class = isinstance(node, ast.ClassDef)
        self.scope.append(node.name)
        outer, self.statement = self.statement, None
        if not isinstance(node, ast.ClassDef):
            for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d)]:
                self.visit(default)
        self.called += not is_class
        for child in node.body:
            self.visit(child)
        self.called -= not is_class
        self.statement = outer
        self.scope.pop()


def _one_line(text: bytes) -> str:
    return " ".join(text.decode().split())


def _is_left_alone(node: ast.AST) -> bool:
    """Messages, assertions, type hints, logs: nothing there is behaviour that a test should notice."""
    if isinstance(node, ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return True
    if isinstance(node, ast.Expr):
        if isinstance(node.value, ast.Constant):
            return True
        return isinstance(node.value, ast.Call) and ast.unparse(node.value.func).startswith(
            ("logger.", "warnings.")
        )
    if isinstance(node, ast.Assign):
        return any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        )
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _children(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Raise):
        return
    for name, value in ast.iter_fields(node):
        if name == "annotation":
            continue
        if name == "keywords":
            value = [keyword for keyword in value if keyword.arg not in COSMETIC_KEYWORDS]
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child


def _lost(node: ast.AST, change: ast.Call) -> str | None:
    """The keyword that a changed call has no more."""
    left = {keyword.arg for keyword in change.keywords}
    return (
        next((k.arg for k in node.keywords if k.arg not in left), None)
        if isinstance(node, ast.Call)
        else None
    )


def _with(node: ast.expr, **fields: object) -> ast.expr:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _changes(node: ast.AST) -> Iterator[ast.expr | str]:
    """What a node is replaced by, per mutant: an expression, or the text of a statement."""
    yield from _statement_changes(node)
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            ops = [*node.ops[:place], COMPARISONS[type(operator)](), *node.ops[place + 1 :]]
            yield _with(node, ops=ops)
    elif (
        isinstance(node, ast.BinOp)
        and type(node.op) in ARITHMETIC
        and not (_is_text(node.left) or _is_text(node.right))
    ):
        yield _with(node, op=ARITHMETIC[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.Constant):
        yield from (ast.Constant(value) for value in _other_constants(node.value))
    elif isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg and keyword.arg not in COSMETIC_KEYWORDS:
                yield _with(node, keywords=[k for k in node.keywords if k is not keyword])
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice):
        for bound in ("lower", "upper", "step"):
            if getattr(node.slice, bound):
                part = copy.copy(node.slice)
                setattr(part, bound, None)
                yield _with(node, slice=part)


def _statement_changes(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Return) and node.value and not _is_none(node.value):
        yield "return None"
    elif isinstance(node, ast.AugAssign):
        yield "pass"
        if type(node.op) in ARITHMETIC and not _is_text(node.value):
            changed = copy.copy(node)
            changed.op = ARITHMETIC[type(node.op)]()
            yield ast.unparse(changed)
    elif isinstance(node, ast.Assign):
        if all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            yield "pass"
    elif isinstance(node, ast.Delete):
        if not all(
            isinstance(target, ast.Name) for target in node.targets
        ):  # `del name` only frees memory
            yield "pass"
    elif isinstance(node, ast.Raise | ast.Break) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Await)
    ):
        yield "pass"
    elif isinstance(node, ast.Continue):
        yield "break"


def _other_constants(value: object) -> list[bool | int | float]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1] if value == 0 else [value + 1, value - 1]
    if isinstance(value, float):
        return [1.0] if value == 0 else [2 * value, value / 2]
    return []


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
