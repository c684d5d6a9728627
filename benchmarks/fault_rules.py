"""The rules by which `mutants.py` draws faults. Each changes one expression or statement.

The rules never change what no test should depend on: docstrings, annotations, imports, decorators,
assertions, f-strings, the arguments of exceptions and messages, and the keywords in IGNORED.
"""

import ast
import bisect
import itertools
import re
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import Any, NamedTuple

COMPARISONS = {
    "<": ("<=", ">="),
    "<=": ("<", ">"),
    ">": (">=", "<"),
    ">=": (">", "<="),
    "==": ("!=",),
    "!=": ("==",),
    "is": ("is not",),
    "is not": ("is",),
    "in": ("not in",),
    "not in": ("in",),
}
OPERATORS = {
    ast.Add: ("+", ("-",)),
    ast.Sub: ("-", ("+",)),
    ast.Mult: ("*", ("/",)),
    ast.Div: ("/", ("*",)),
    ast.FloorDiv: ("//", ("/", "*")),
    ast.Mod: ("%", ("//",)),
    ast.Pow: ("**", ("*",)),
    ast.BitOr: ("|", ("&",)),
    ast.BitAnd: ("&", ("|",)),
    ast.BitXor: ("^", ("|",)),
    ast.LShift: ("<<", (">>",)),
    ast.RShift: (">>", ("<<",)),
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PAIRS = (
    "min max, any all, floor ceil, minimum maximum, argmin argmax, mean sum, sin cos, zeros ones, "
    "startswith endswith, lstrip rstrip, partition rpartition, split rsplit, exp expm1, log log1p, "
    "zeros_like ones_like, removeprefix removesuffix, keys values, append extend, psum pmean, "
    "logical_and logical_or, cumsum cumprod"
)
FUNCTIONS = {a: b for pair in _PAIRS.split(", ") for a, b in (pair.split(), pair.split()[::-1])}
METHODS = _words(  # methods m: x.m() may be replaced by x, which has the same type
    "strip lstrip rstrip lower upper casefold removeprefix removesuffix astype copy resolve "
    "expanduser absolute clip squeeze ravel reshape sort"
)
KEPT = _words(  # functions f: f(x) is never replaced by x, which has another type
    "len range isinstance issubclass open iter next enumerate type super getattr hasattr vars dict "
    "id repr str map filter zip print fields is_dataclass namedtuple"
)
SYMMETRIC = _words(
    "max min maximum minimum gcd lcm logical_and logical_or add multiply isclose allclose union "
    "intersection array_equal"
)
MESSAGES = _words("say warn _say _report")  # functions that print or log
# Keyword arguments that are checks, or that make no difference on usual platforms.
IGNORED = _words("strict stacklevel encoding errors help frozen kw_only slots init repr eq")
TYPES = _words(
    "Callable Literal Annotated Mapping Sequence Iterable Iterator Generator Collection Union "
    "Optional Any tuple list dict set type frozenset ClassVar Float Int Bool UInt8 Array Shaped Num"
)
AXES = ("axis", "axes", "dim", "dims")
_SKIPPED = (
    *(ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal, ast.Pass, ast.Assert),
    *(ast.JoinedStr, ast.NamedExpr),
)


class Statement(NamedTuple):
    """A statement; of a compound one, only its header."""

    function: str  # qualified name of the function or class around it, or "<module>"
    start: int  # byte offsets
    end: int
    first: int  # line numbers
    last: int
    at_import: bool  # whether it runs when the module is imported


class Candidate(NamedTuple):
    """A fault: replaces the bytes from `start` to `end` by `new`."""

    rule: str
    statement: Statement
    start: int
    end: int
    new: bytes


class File:
    """A source file and its syntax tree."""

    def __init__(self, source: str) -> None:
        self.source = source.encode()
        self.tree = ast.parse(self.source)
        lengths = (len(line) for line in self.source.splitlines(keepends=True))
        self._starts = list(itertools.accumulate(lengths, initial=0))

    def start(self, node: Any) -> int:
        return self._starts[node.lineno - 1] + node.col_offset

    def end(self, node: Any) -> int:
        return self._starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: Any) -> bytes:
        return self.source[self.start(node) : self.end(node)]

    def line(self, offset: int) -> int:
        return bisect.bisect_right(self._starts, offset)

    def statement(self, node: ast.stmt, function: str, at_import: bool) -> Statement:
        """Return a statement; a compound one ends before its first inner statement."""
        body = getattr(node, "body", None) or [x.body[0] for x in getattr(node, "cases", ())]
        start, end = self.start(node), self.end(node)
        if body:
            decorators = getattr(body[0], "decorator_list", [])
            end = self.start(body[0]) if not decorators else self.start(decorators[0]) - 1
            end = start + len(self.source[start:end].rstrip())
        return Statement(function, start, end, node.lineno, self.line(end - 1), at_import)


def statements(file: File) -> list[Statement]:
    """List all statements of a file."""
    return [statement for _, statement in _walk(file, file.tree.body, "", at_import=True)]


def candidates(file: File) -> list[Candidate]:
    """List every fault that the rules allow in a file, in the order of its code."""
    rows = _walk(file, file.tree.body, "", at_import=True)
    return [x for node, statement in rows for x in _of_statement(file, node, statement)]


def changed(file: File, candidate: Candidate) -> str | None:
    """Return the file's text with a fault; None if it does not compile, or to the same bytecode."""
    start, end = candidate.start, candidate.end
    source = file.source[:start] + candidate.new + file.source[end:]
    try:
        code = compile(source, "file", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None
    before = compile(file.source, "file", "exec", dont_inherit=True)
    return None if _meaning(code) == _meaning(before) else source.decode()


def _meaning(code: CodeType) -> tuple[Any, ...]:
    """Return everything of a code object except positions."""
    constants = [_meaning(x) if isinstance(x, CodeType) else repr(x) for x in code.co_consts]
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return (code.co_name, code.co_code, code.co_flags, *names, *constants)


# ------------------------------------------------------------------ statements


def _walk(
    file: File, body: Sequence[ast.stmt], function: str, *, at_import: bool
) -> Iterator[tuple[ast.stmt, Statement]]:
    """Yield each statement that may get a fault, as a syntax node and as a `Statement`."""
    for node in body:
        if isinstance(node, _SKIPPED) or _is_left_out(node):
            continue
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        name = function
        if is_function or isinstance(node, ast.ClassDef):
            name = f"{function}.{node.name}".lstrip(".")
        yield node, file.statement(node, name or "<module>", at_import)
        inside = at_import and not is_function
        for block in ("body", "orelse", "finalbody"):
            yield from _walk(file, getattr(node, block, ()), name, at_import=inside)
        for block in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
            yield from _walk(file, block.body, name, at_import=inside)


def _is_left_out(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring, or an ellipsis
    if isinstance(node, ast.If):
        condition = ast.unparse(node.test)
        return condition.endswith("TYPE_CHECKING") or condition.startswith("__name__ ==")
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"


def _of_statement(file: File, node: ast.stmt, statement: Statement) -> Iterator[Candidate]:
    """Yield the faults of a statement and of its expressions."""

    def fault(rule: str, start: int, end: int, new: str | bytes) -> Candidate:
        new = new.encode() if isinstance(new, str) else new
        # Keep the number of line breaks, so that later lines keep their numbers. Those before a
        # closing parenthesis do not end the statement.
        breaks = b"\n" * (file.source[start:end].count(b"\n") - new.count(b"\n"))
        new = new[:-1] + breaks + b")" if new.endswith(b")") else new + breaks
        return Candidate(rule, statement, start, end, new)

    def of_node(rule: str, x: ast.AST, new: str | bytes) -> Candidate:
        return fault(rule, file.start(x), file.end(x), new)

    match node:
        case ast.Raise():
            yield of_node("removed statement", node, "pass")
            return
        case ast.Expr(ast.Call() as call) | ast.Expr(ast.Await(ast.Call() as call)):
            if _name(call.func) in MESSAGES:
                return
            yield of_node("removed call", node, "pass")
        case ast.Break() | ast.Continue() | ast.Delete() | ast.AugAssign():
            yield of_node("removed statement", node, "pass")
            if isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
                sign, others = OPERATORS[type(node.op)]
                between = file.source[file.end(node.target) : file.start(node.value)]
                at = file.end(node.target) + between.index(f"{sign}=".encode())
                yield from (fault("arithmetic", at, at + len(sign), x) for x in others)
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            if not statement.function.endswith("__init__"):
                yield of_node("removed statement", node, "pass")
        case ast.If():
            yield of_node("condition", node.test, b"not (" + file.text(node.test) + b")")
    for expression in _expressions(node):
        yield from _of_expression(file, expression, fault)


def _expressions(node: ast.stmt) -> list[ast.expr]:
    """Return the expressions of a statement's header, without annotations and targets."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return [*node.args.defaults, *filter(None, node.args.kw_defaults)]
        case ast.ClassDef() | ast.Try() | ast.Match():
            return []
        case ast.If() | ast.While():
            return [node.test]
        case ast.For() | ast.AsyncFor():
            return [node.iter]
        case ast.With() | ast.AsyncWith():
            return [item.context_expr for item in node.items]
        case ast.Assign(targets=[ast.Name(id=name)]) if _is_type(node.value) and name[0].isupper():
            return []
        case ast.Expr() | ast.Return() | ast.Assign() | ast.AugAssign() | ast.AnnAssign():
            return [node.value] if node.value else []
    return []


def _is_type(node: ast.AST) -> bool:
    """Return whether an expression is a type, such as `tuple[int, ...]`."""
    match node:
        case ast.Subscript():
            return _name(node.value) in TYPES
        case ast.BinOp(op=ast.BitOr()):
            return _is_type(node.left) or _is_type(node.right)
    return False


def _name(node: ast.AST) -> str:
    """Return the last part of a dotted name; empty for another expression."""
    return getattr(node, "attr", None) or getattr(node, "id", "")


# ------------------------------------------------------------------ expressions


def _of_expression(file: File, node: ast.AST, fault: Any) -> Iterator[Candidate]:
    """Yield the faults of an expression and of the expressions in it."""
    if isinstance(node, _SKIPPED) or _is_type(node):
        return
    rule = _RULES.get(type(node))
    if rule:
        yield from rule(file, node, fault)
    for inner in _inside(node):
        yield from _of_expression(file, inner, fault)


def _inside(node: ast.AST) -> list[ast.AST]:
    match node:
        case ast.Call():
            if _name(node.func) in MESSAGES or _name(node.func).endswith(("Error", "Var")):
                return []
            keywords = [x.value for x in node.keywords if x.arg not in IGNORED]
            return [node.func, *node.args, *keywords]
        case ast.Lambda():
            return [*node.args.defaults, *filter(None, node.args.kw_defaults), node.body]
        case ast.Dict():
            return [x for pair in zip(node.keys, node.values, strict=True) for x in pair if x]
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
            loops = [x for loop in node.generators for x in (loop.iter, *loop.ifs)]
            made = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
            return [*made, *loops]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant()):
            return []
    return [x for x in ast.iter_child_nodes(node) if isinstance(x, ast.expr | ast.Slice)]


def _enclosed(text: bytes) -> bytes:
    return text if re.fullmatch(rb"[\w.]+", text) else b"(" + text + b")"


def _without(
    file: File, items: Sequence[Any], index: int, fault: Any, rule: str, new: str = ""
) -> Candidate:
    """Return the fault that removes one of several expressions, with its separator."""
    if index + 1 < len(items):
        return fault(rule, file.start(items[index]), file.start(items[index + 1]), new)
    return fault(rule, file.end(items[index - 1]), file.end(items[index]), new)


def _compare(file: File, node: ast.Compare, fault: Any) -> Iterator[Candidate]:
    operands = [node.left, *node.comparators]
    for left, right in itertools.pairwise(operands):
        start, end = file.end(left), file.start(right)
        pattern = rb"not\s+in\b|is\s+not\b|[<>=!]=|[<>]|\bin\b|\bis\b"
        if sign := re.search(pattern, file.source[start:end]):
            for other in COMPARISONS[" ".join(sign[0].decode().split())]:
                yield fault("comparison", start + sign.start(), start + sign.end(), other)


def _arithmetic(file: File, node: ast.BinOp, fault: Any) -> Iterator[Candidate]:
    texts = any(_is_text(x) for x in (node.left, node.right))
    mappings = any(isinstance(x, ast.Dict | ast.Set) for x in (node.left, node.right))
    start, end = file.end(node.left), file.start(node.right)
    if type(node.op) in OPERATORS and not texts and not mappings:
        sign, others = OPERATORS[type(node.op)]
        at = start + file.source[start:end].index(sign.encode())
        yield from (fault("arithmetic", at, at + len(sign), other) for other in others)
    if not isinstance(node.op, ast.Div) or not texts:
        sides = (node.left,) if isinstance(node.op, ast.Mod | ast.Pow) else (node.left, node.right)
        for side in sides:
            text = _enclosed(file.text(side))
            yield fault("operand", file.start(node), file.end(node), text)


def _is_text(node: ast.AST) -> bool:
    is_constant = isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    return is_constant or isinstance(node, ast.JoinedStr)


def _boolean(file: File, node: ast.BoolOp, fault: Any) -> Iterator[Candidate]:
    sign, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
    for index, (left, right) in enumerate(itertools.pairwise(node.values)):
        start, end = file.end(left), file.start(right)
        if at := re.search(rf"\b{sign}\b".encode(), file.source[start:end]):
            yield fault("boolean", start + at.start(), start + at.end(), other)
        yield _without(file, node.values, index, fault, "boolean")
    yield _without(file, node.values, len(node.values) - 1, fault, "boolean")


def _unary(file: File, node: ast.UnaryOp, fault: Any) -> Iterator[Candidate]:
    start, end, text = file.start(node), file.end(node), _enclosed(file.text(node.operand))
    if isinstance(node.op, ast.Not):
        yield fault("not", start, end, text)
    elif isinstance(node.op, ast.USub):
        constant = isinstance(node.operand, ast.Constant)
        yield fault("constant" if constant else "arithmetic", start, end, text)


def _constant(file: File, node: ast.Constant, fault: Any) -> Iterator[Candidate]:
    start, end, value = file.start(node), file.end(node), node.value
    match value:
        case bool():
            yield fault("constant", start, end, str(not value))
        case int():
            others = {value + 1, abs(value - 1)} if value <= 10 else {2 * value, value // 2}
            yield from (fault("constant", start, end, str(x)) for x in sorted(others - {value}))
        case float():
            others = (2 * value, value / 2) if value else (1.0,)
            yield from (fault("constant", start, end, repr(x)) for x in others)
        case str() if re.fullmatch(r"[A-Za-z_][\w./-]{0,30}", value):
            yield fault("text", start, end, repr(f"{value}_"))
        case str() if "->" in value and re.fullmatch(r"[\w\s(),.>-]+", value):
            _, _, right = value.partition("->")
            names = re.findall(r"[a-zA-Z]\w*" if " " in right.strip() else r"[a-zA-Z]", right)
            if len(names) > 1:
                a, b, once = names[0], names[1], iter((names[1], names[0]))
                pattern = rf"\b(?:{a}|{b})\b" if " " in right.strip() else f"[{a}{b}]"
                swapped = re.sub(pattern, lambda x: next(once, x[0]), right)
                text = file.source[start:end].decode()
                if right in text:
                    yield fault("axes", start, end, text.replace(right, swapped))


def _call(file: File, node: ast.Call, fault: Any) -> Iterator[Candidate]:
    name, start, end = _name(node.func), file.start(node), file.end(node)
    if name in MESSAGES or name.endswith(("Error", "Var")):
        return
    if name in FUNCTIONS:
        yield fault(
            "function", file.end(node.func) - len(name), file.end(node.func), FUNCTIONS[name]
        )
    plain = not any(isinstance(x, ast.Starred) for x in node.args)
    if plain and name not in SYMMETRIC:
        for a, b in itertools.pairwise(node.args):
            between = file.source[file.end(a) : file.start(b)]
            if file.text(a) != file.text(b):
                swapped = file.text(b) + between + file.text(a)
                yield fault("argument order", file.start(a), file.end(b), swapped)
    items = sorted([*node.args, *node.keywords], key=file.start)
    for index, item in enumerate(items):
        if isinstance(item, ast.keyword) and item.arg and item.arg not in IGNORED:
            if len(items) > 1:
                yield _without(file, items, index, fault, "keyword")
            else:
                yield fault("keyword", file.start(item), file.end(item), "")
            if item.arg in AXES:
                yield from _axes(file, item.value, fault)
    if name == "stop_gradient" or name in ("transpose", "swapaxes", "moveaxis"):
        rule = "stop_gradient" if name == "stop_gradient" else "axes"
        inner = node.args[0] if node.args else getattr(node.func, "value", node)
        yield fault(rule, start, end, _enclosed(file.text(inner)))
    elif plain and len(node.args) == 1 and name and name not in KEPT and not name[0].isupper():
        yield fault("removed call", start, end, _enclosed(file.text(node.args[0])))
    elif name in METHODS and isinstance(node.func, ast.Attribute):
        yield fault("removed call", start, end, _enclosed(file.text(node.func.value)))


def _axes(file: File, node: ast.expr, fault: Any) -> Iterator[Candidate]:
    start, end = file.start(node), file.end(node)
    match node:
        case ast.Constant(value=int(value)):
            yield fault("axes", start, end, str(1 - value if value in (0, 1) else value - 1))
        case ast.UnaryOp(operand=ast.Constant(value=int(value))):
            yield fault("axes", start, end, str(-value - 1 if value == 1 else 1 - value))
        case ast.Tuple(elts=[first, second, *_]):
            swapped = file.text(second) + b", " + file.text(first)
            yield fault("axes", file.start(first), file.end(second), swapped)


def _attribute(file: File, node: ast.Attribute, fault: Any) -> Iterator[Candidate]:
    if node.attr in ("T", "mT"):
        yield fault("axes", file.start(node), file.end(node), _enclosed(file.text(node.value)))


def _slice(file: File, node: ast.Slice, fault: Any) -> Iterator[Candidate]:
    for bound in (node.lower, node.upper, node.step):
        if bound is not None:
            yield fault("slice", file.start(bound), file.end(bound), "")


def _elements(file: File, node: ast.List | ast.Set | ast.Tuple, fault: Any) -> Iterator[Candidate]:
    if len(node.elts) >= (4 if isinstance(node, ast.Tuple) else 2):
        for index in range(len(node.elts)):
            yield _without(file, node.elts, index, fault, "element")


def _items(file: File, node: ast.Dict, fault: Any) -> Iterator[Candidate]:
    if len(node.keys) > 1 and all(node.keys):
        for index in range(len(node.keys) - 1):
            yield _without(file, node.keys, index, fault, "element")
        last = len(node.keys) - 1
        yield fault("element", file.end(node.values[last - 1]), file.end(node.values[last]), "")


def _choice(file: File, node: ast.IfExp, fault: Any) -> Iterator[Candidate]:
    test = node.test
    yield fault("condition", file.start(test), file.end(test), b"not (" + file.text(test) + b")")


def _filter(file: File, node: Any, fault: Any) -> Iterator[Candidate]:
    for loop in node.generators:
        for condition in loop.ifs:
            yield fault("filter", file.start(condition), file.end(condition), "True")


def _await(file: File, node: ast.Await, fault: Any) -> Iterator[Candidate]:
    yield fault("await", file.start(node), file.end(node), _enclosed(file.text(node.value)))


_RULES: dict[type, Any] = {
    ast.Compare: _compare,
    ast.BinOp: _arithmetic,
    ast.BoolOp: _boolean,
    ast.UnaryOp: _unary,
    ast.Constant: _constant,
    ast.Call: _call,
    ast.Attribute: _attribute,
    ast.Slice: _slice,
    ast.List: _elements,
    ast.Set: _elements,
    ast.Tuple: _elements,
    ast.Dict: _items,
    ast.IfExp: _choice,
    ast.ListComp: _filter,
    ast.SetComp: _filter,
    ast.GeneratorExp: _filter,
    ast.DictComp: _filter,
    ast.Await: _await,
}
