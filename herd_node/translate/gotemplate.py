"""The `template` of /api/generate: as much of Go's text/template as Ollama's own templates use. Pure.

Known: text with trim marks, comments, fields, variables, `if`, `range`, `with`, `break`, `continue`, and
pipelines of the functions below. Whatever else stands in a template is refused, never guessed.

How a prompt is made of it (Ollama's rules): a template that speaks of .Messages gets the whole talk; an older
one gets .System and .Prompt, and ends where .Response would stand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import orjson

from herd_node.translate.base import Refusal

Values = Mapping[str, object]

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\\n]|\\.)*")|(?P<raw>`[^`]*`)|(?P<number>-?[0-9]+(?:\.[0-9]+)?)"""
    r"""|(?P<field>\.[A-Za-z_]\w*)|(?P<variable>\$\w*)|(?P<word>[A-Za-z_]\w*)|(?P<mark>:=|[.|(),=]))"""
)
#: Deeper nesting than any template has; it bounds the recursion.
_MAX_DEPTH = 64
#: The limits are far above any real template's; they bound what a caller's own can cost.
_MAX_CHARS = 64 * 1024
_MAX_STEPS = 100_000
_MAX_WRITTEN_CHARS = 64 * 1024 * 1024


class _Broken(Exception):
    pass


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


@dataclass(slots=True)
class _Node:
    """`kind` is text, action, if, range, with, break or continue."""

    kind: str
    text: str = ""
    pipe: list[str] = field(default_factory=list)
    body: list[_Node] = field(default_factory=list)
    otherwise: list[_Node] = field(default_factory=list)


class Template:
    """Raises Refusal (400) for what cannot be read, and while it is rendered for what cannot be done."""

    def __init__(self, written: str) -> None:
        try:
            if len(written) > _MAX_CHARS:
                raise _Broken(f"longer than {_MAX_CHARS} characters")
            parts = _split(written)
            self._nodes, ended_by = _parse(parts, 0)
            if ended_by:
                raise _Broken(f"unexpected {{{{{ended_by}}}}}")
        except _Broken as broken:
            raise _refusal(broken) from None

    def generate(self, system: str, prompt: str, *, think: bool, think_is_set: bool) -> str:
        """The prompt of one turn of /api/generate."""
        thinking: Values = {"Think": think, "IsThinkSet": think_is_set}
        if "Messages" in set(_fields(self._nodes)):
            said = [("system", system)] if system else []
            messages = [{"Role": role, "Content": text} for role, text in [*said, ("user", prompt)]]
            return self._render(self._nodes, {"System": system, "Messages": messages, **thinking})
        nodes, _ = _cut_at_response(self._nodes)
        return self._render(nodes, {"System": system, "Prompt": prompt, **thinking})

    @staticmethod
    def _render(nodes: list[_Node], values: Values) -> str:
        run = _Run(values)
        try:
            run.nodes(nodes, values)
        except _Broken as broken:
            raise _refusal(broken) from None
        except (_Break, _Continue):
            raise _refusal(_Broken("break outside of a range")) from None
        return "".join(run.out)


def _refusal(broken: _Broken) -> Refusal:
    return Refusal(400, f"template: :1: {broken}")


# ---- reading


def _split(written: str) -> list[_Node]:
    """Text and actions in order, white space cut where a mark says so."""
    parts: list[_Node] = []
    at, trim = 0, False
    while (start := written.find("{{", at)) >= 0:
        end = written.find("}}", start)
        if end < 0:
            raise _Broken("unclosed action")
        text, inside = written[at:start], written[start + 2 : end]
        text = text.lstrip() if trim else text
        if inside[:1] == "-" and inside[1:2].isspace():
            text, inside = text.rstrip(), inside[1:]
        trim = inside[-1:] == "-" and inside[-2:-1].isspace()
        inside = (inside[:-1] if trim else inside).strip()
        parts.append(_Node("text", text))
        if not (inside.startswith("/*") and inside.endswith("*/")):
            parts.append(_Node("action", pipe=_tokens(inside)))
        at = end + 2
    text = written[at:]
    return [*parts, _Node("text", text.lstrip() if trim else text)]


def _tokens(inside: str) -> list[str]:
    tokens: list[str] = []
    at = 0
    while at < len(inside):
        match = _TOKEN.match(inside, at)
        if match is None:
            raise _Broken("unexpected character in an action")
        # a field that follows without a space belongs to what stands before it
        glued = match.lastgroup == "field" and at > 0 and match.end() - at == len(match["field"])
        if glued and tokens and (tokens[-1] == ")" or tokens[-1][0] in ".$"):
            tokens[-1] += match["field"]
        else:
            tokens.append(match[0].strip())
        at = match.end()
    if not tokens:
        raise _Broken("missing value for command")
    return tokens


def _parse(parts: list[_Node], depth: int) -> tuple[list[_Node], str]:
    """Takes from `parts` until an `end` or `else` of its own; says which."""
    if depth > _MAX_DEPTH:
        raise _Broken("the template is nested too deeply")
    nodes: list[_Node] = []
    while parts:
        part = parts.pop(0)
        word = part.pipe[0] if part.pipe else ""
        if part.kind == "text":
            nodes.append(part)
        elif word in ("if", "range", "with"):
            nodes.append(_branch(word, part.pipe[1:], parts, depth))
        elif word in ("end", "else"):
            parts.insert(0, part)
            return nodes, word
        elif word in ("break", "continue"):
            nodes.append(_Node(word))
        elif word in ("define", "template", "block"):
            raise _Broken(f"{word} is not supported on this node")
        else:
            nodes.append(part)
    return nodes, ""


def _branch(kind: str, pipe: list[str], parts: list[_Node], depth: int) -> _Node:
    if not pipe:
        raise _Broken(f"missing value for {kind}")
    node = _Node(kind, pipe=pipe)
    node.body, ended_by = _parse(parts, depth + 1)
    if ended_by == "else":
        following = parts.pop(0).pipe[1:]
        if following:  # else if, else with
            node.otherwise = [_branch(following[0], following[1:], parts, depth + 1)]
            return node
        node.otherwise, ended_by = _parse(parts, depth + 1)
    if ended_by != "end":
        raise _Broken("unexpected EOF")
    parts.pop(0)
    return node


def _fields(nodes: Iterable[_Node]) -> Iterable[str]:
    """Every field that the template speaks of."""
    for node in nodes:
        for token in node.pipe:
            if token[0] in ".$":
                yield from (name for name in token.lstrip("$").split(".") if name)
        yield from _fields(node.body)
        yield from _fields(node.otherwise)


def _cut_at_response(nodes: list[_Node]) -> tuple[list[_Node], bool]:
    """Without .Response and everything behind it, on whatever branch that stands."""
    kept: list[_Node] = []
    for node in nodes:
        if node.kind == "action" and "Response" in set(_fields([node])):
            return kept, True
        body, cut = _cut_at_response(node.body)
        otherwise, cut_later = ([], True) if cut else _cut_at_response(node.otherwise)
        kept.append(_Node(node.kind, node.text, node.pipe, body, otherwise))
        if cut or cut_later:
            return kept, True
    return kept, False


# ---- rendering


class _Run:
    def __init__(self, root: Values) -> None:
        self.out: list[str] = []
        self._variables: dict[str, object] = {"$": root}
        self._steps = 0
        self._written_chars = 0

    def nodes(self, nodes: Iterable[_Node], dot: object) -> None:
        for node in nodes:
            self._steps += 1
            if self._steps > _MAX_STEPS:
                raise _Broken("the template does not end")
            self._node(node, dot)

    def _write(self, text: str) -> None:
        self._written_chars += len(text)
        if self._written_chars > _MAX_WRITTEN_CHARS:
            raise _Broken("the template does not end")
        self.out.append(text)

    def _node(self, node: _Node, dot: object) -> None:
        match node.kind:
            case "text":
                self._write(node.text)
            case "break":
                raise _Break
            case "continue":
                raise _Continue
            case "range":
                self._range(node, dot)
            case "action":
                names, pipe = _assigned(node.pipe)
                value = self._pipeline(pipe, dot)
                if names:
                    self._variables[names[0]] = value
                else:
                    self._write(_printed(value))
            case _:
                names, pipe = _assigned(node.pipe)
                value = self._pipeline(pipe, dot)
                for name in names:
                    self._variables[name] = value
                inside = value if node.kind == "with" and _true(value) else dot
                self.nodes(node.body if _true(value) else node.otherwise, inside)

    def _range(self, node: _Node, dot: object) -> None:
        names, pipe = _assigned(node.pipe)
        value = self._pipeline(pipe, dot)
        pairs: list[tuple[object, object]]
        if isinstance(value, Mapping):
            pairs = sorted(value.items(), key=lambda pair: str(pair[0]))
        elif isinstance(value, (list, tuple)):
            pairs = list(enumerate(value))
        elif value is None or value == "":
            pairs = []
        else:
            raise _Broken("range can't iterate over this value")
        if not pairs:
            self.nodes(node.otherwise, dot)
        for key, item in pairs:
            for name, given in zip(names, (item,) if len(names) == 1 else (key, item), strict=False):
                self._variables[name] = given
            try:
                self.nodes(node.body, item)
            except _Break:
                break
            except _Continue:
                continue

    def _pipeline(self, tokens: list[str], dot: object, depth: int = 0) -> object:
        """`a | b c | d`: each value becomes the last argument of the next command."""
        if depth > _MAX_DEPTH:
            raise _Broken("the template is nested too deeply")
        value: list[object] = []
        for command in _parts_of(tokens, "|"):
            value = [self._command(command, value, dot, depth)]
        if not value:
            raise _Broken("missing value for command")
        return value[0]

    def _command(self, tokens: list[str], piped: list[object], dot: object, depth: int) -> object:
        if not tokens:
            raise _Broken("missing value for command")
        function = _FUNCTIONS.get(tokens[0])
        rest = tokens if function is None else tokens[1:]
        operands = [self._operand(operand, dot, depth) for operand in _operands(rest)]
        if function is None:
            if len(operands) != 1 or piped:
                raise _Broken(f"{tokens[0]} is not a function")
            return operands[0]
        try:
            return function(*operands, *piped)
        except (TypeError, IndexError, KeyError, ValueError):
            raise _Broken(f"{tokens[0]} cannot work with these values") from None

    def _operand(self, tokens: list[str], dot: object, depth: int) -> object:
        first = tokens[0]
        if first == "(":
            value = self._pipeline(tokens[1:-1], dot, depth + 1)
            return _member(value, tokens[-1][1:])
        if first[0] == '"':
            try:
                return orjson.loads(first)
            except orjson.JSONDecodeError:
                raise _Broken("a string that cannot be read") from None
        if first[0] == "`":
            return first[1:-1]
        if first[0] == "$":
            name, _, path = first.partition(".")
            if name not in self._variables:
                raise _Broken(f"undefined variable {name}")
            return _member(self._variables[name], path)
        if first[0] == ".":
            return _member(dot, first[1:])
        constants: dict[str, object] = {"true": True, "false": False, "nil": None}
        if first in constants:
            return constants[first]
        if first[0].isdigit() or first[0] == "-":
            return float(first) if "." in first else int(first)
        raise _Broken(f'function "{first}" not defined')


def _assigned(pipe: list[str]) -> tuple[list[str], list[str]]:
    """`$a, $b := pipeline` → the names, and the pipeline."""
    for mark in (":=", "="):
        if mark in pipe[:4]:
            at = pipe.index(mark)
            names = [token for token in pipe[:at] if token != ","]
            if all(name.startswith("$") for name in names) and pipe[at + 1 :]:
                return names, pipe[at + 1 :]
            raise _Broken("an assignment that cannot be read")
    return [], pipe


def _parts_of(tokens: list[str], mark: str) -> Iterable[list[str]]:
    part: list[str] = []
    depth = 0
    for token in tokens:
        depth += (token == "(") - (token[0] == ")")
        if token == mark and depth == 0:
            yield part
            part = []
        else:
            part.append(token)
    yield part


def _operands(tokens: list[str]) -> Iterable[list[str]]:
    """Single tokens, and parenthesised pipelines as one."""
    at = 0
    while at < len(tokens):
        end, depth = at, 0
        while True:
            if end >= len(tokens):
                raise _Broken("unclosed left paren")
            depth += (tokens[end] == "(") - (tokens[end][0] == ")")
            end += 1
            if depth == 0:
                break
        if tokens[at][0] == ")":
            raise _Broken("unexpected right paren")
        yield tokens[at:end]
        at = end


def _member(value: object, path: str) -> object:
    """`.A.B` of a value; what is not there is nothing."""
    for name in path.split(".") if path.strip(".") else ():
        if name:
            value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _true(value: object) -> bool:
    return bool(value)


def _printed(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return ""
    if isinstance(value, (str, int, float)):
        return str(value)
    return orjson.dumps(value).decode()


def _and(first: object, *others: object) -> object:
    value = first
    for other in others:
        if not _true(value):
            return value
        value = other
    return value


def _or(first: object, *others: object) -> object:
    value = first
    for other in others:
        if _true(value):
            return value
        value = other
    return value


def _ordered(compare: Callable[[float, float], bool]) -> Callable[[object, object], bool]:
    def function(one: object, other: object) -> bool:
        if isinstance(one, (int, float)) and isinstance(other, (int, float)):
            return compare(one, other)
        raise TypeError

    return function


def _index(value: object, *keys: object) -> object:
    for key in keys:
        if isinstance(value, (list, tuple, str)) and isinstance(key, int) and key >= 0:
            value = value[key]
        elif isinstance(value, Mapping):
            value = value.get(key)
        else:
            raise TypeError
    return value


def _slice(value: object, start: int = 0, end: int | None = None) -> object:
    if not isinstance(value, (list, str)):
        raise TypeError
    return value[start : len(value) if end is None else end]


def _length(value: object) -> int:
    if not isinstance(value, (str, list, tuple, Mapping)):
        raise TypeError
    return len(value.encode()) if isinstance(value, str) else len(value)


def _refuse(name: str) -> Callable[..., NoReturn]:
    def function(*_given: object) -> NoReturn:
        raise _Broken(f"{name} is not supported on this node")

    return function


_FUNCTIONS: dict[str, Callable[..., object]] = {
    "and": _and,
    "or": _or,
    "not": lambda value: not _true(value),
    "eq": lambda one, *others: any(one == other for other in others),
    "ne": lambda one, other: one != other,
    "lt": _ordered(lambda one, other: one < other),
    "le": _ordered(lambda one, other: one <= other),
    "gt": _ordered(lambda one, other: one > other),
    "ge": _ordered(lambda one, other: one >= other),
    "len": _length,
    "index": _index,
    "slice": _slice,
    "print": lambda *values: "".join(map(_printed, values)),
    "println": lambda *values: " ".join(map(_printed, values)) + "\n",
    "json": lambda value: orjson.dumps(value).decode(),
    **{name: _refuse(name) for name in ("printf", "html", "js", "urlquery", "call")},
}
