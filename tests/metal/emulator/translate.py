"""A .metal file as C++ that clang compiles: the same tokens on the same lines, with the few declarations rewritten
that C++ has no syntax for, and a table of the kernels at the end. What it cannot parse is an error with its line.

Rewritten, everywhere else the text stays as it is:

    threadgroup T name[n];                  in a kernel: memory that the runtime hands out
    constant T name [[function_constant]];  a variable that the host sets
    float4(...), vec<T, 4>(...), T(...)     a call of emu::make, since clang's vectors have no constructors
    [[attribute]]                           blanked; template [[host_name("x")]] kernel ... is entered in the table
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from .source import MetalError, Token, closing, joined, split, words

EXTENTS = {  # attribute of a parameter -> member of emu::Thread
    "thread_position_in_grid": "in_grid",
    "thread_position_in_threadgroup": "in_group",
    "threadgroup_position_in_grid": "group",
    "threadgroups_per_grid": "groups",
    "threads_per_grid": "grid",
    "threads_per_threadgroup": "group_size",
    "dispatch_threads_per_threadgroup": "full_group_size",
}
SCALARS = {
    "thread_index_in_threadgroup": "index",
    "thread_index_in_simdgroup": "lane",
    "simdgroup_index_in_threadgroup": "simdgroup",
    "simdgroups_per_threadgroup": "simdgroups",
    "threads_per_simdgroup": "",
}
OTHER_ATTRIBUTES = {"kernel", "host_name", "buffer", "threadgroup", "max_total_threads_per_threadgroup", "maybe_unused",
                    "function_constant", "unroll"}  # fmt: skip
VECTOR = re.compile(r"(float|half|bfloat|int|uint|short|ushort|char|uchar|long|ulong|bool)[234]$")
SPACES = {"device", "constant", "threadgroup", "thread"}


@dataclass
class Parameter:
    text: str  # without its attributes
    name: str
    attribute: str = ""  # "" for a buffer without [[buffer(n)]]
    index: int | None = None
    place: str = ""

    @property
    def space(self) -> str:
        return next((word for word in re.findall(r"\w+", self.text) if word in SPACES), "")

    @property
    def is_buffer(self) -> bool:
        return self.attribute in ("", "buffer")


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    template: str  # "" or the template parameter list
    place: str
    body: tuple[int, int] = (0, 0)  # token indices of its braces
    instances: list[tuple[str, str]] = field(default_factory=list)  # host name, "<arguments>"


@dataclass
class Translation:
    run: str  # C++ to compile
    static: str  # C++ for the address-space pass
    kernels: list[Kernel]
    tokens: list[Token]  # as they were


def attributes(tokens: Sequence[Token]) -> list[tuple[int, int, list[Token]]]:
    """(first index, index past the end, words inside) of each [[...]]; the words of [[a, b]] stay together."""
    found, i = [], 0
    while i + 1 < len(tokens):
        if tokens[i].text == "[" and tokens[i + 1].text == "[":
            end = closing(tokens, i)
            found.append((i, end + 1, words(tokens[i + 2 : end - 1])))
            i = end
        i += 1
    return found


class Translator:
    def __init__(self, tokens: list[Token], only: Sequence[str]) -> None:
        self.tokens = tokens
        self.only = only
        self.run = [token.text for token in tokens]
        self.static = [token.text for token in tokens]
        self.kernels: list[Kernel] = []
        self.constants: list[str] = []
        self.errors: list[str] = []

    def error(self, at: Token | str, what: str) -> None:
        self.errors.append(f"{at if isinstance(at, str) else at.place}: {what}")

    def next(self, i: int) -> int:
        i += 1
        while i < len(self.tokens) and self.tokens[i].kind in ("space", "marker"):
            i += 1
        return i

    def previous(self, i: int) -> int:
        i -= 1
        while i >= 0 and self.tokens[i].kind in ("space", "marker"):
            i -= 1
        return i

    def text(self, i: int) -> str:
        return self.tokens[i].text if 0 <= i < len(self.tokens) else ""

    def blank(self, first: int, end: int) -> None:
        for i in range(first, end):
            if self.tokens[i].kind != "marker":
                keep = "".join(c for c in self.tokens[i].text if c == "\n")
                self.run[i] = self.static[i] = keep or (" " if i == first else "")

    def put(self, first: int, end: int, run: str, static: str) -> None:
        """Replaces tokens; the line breaks among them stay behind the new text."""
        breaks = "".join(c for t in self.tokens[first:end] for c in t.text if c == "\n")
        self.blank(first, end)
        for i in range(first, end):
            if self.tokens[i].kind != "marker":
                self.run[i] = self.static[i] = ""
        self.run[first], self.static[first] = run + breaks, static + breaks

    def translate(self) -> Translation:
        self.find_kernels()
        self.rewrite_threadgroup()
        self.rewrite_constants()
        self.rewrite_constructors()
        for first, end, inside in attributes(self.tokens):
            name = inside[0].text if inside else ""
            if name not in EXTENTS and name not in SCALARS and name not in OTHER_ATTRIBUTES:
                self.error(self.tokens[first], f"attribute: expected one that the emulator knows; got [[{name}]]")
            if self.run[first] == "[":  # not already part of a rewritten declaration
                self.blank(first, end)
        if self.errors:
            raise MetalError("\n".join(self.errors))
        return Translation("".join(self.run) + self.table(), "".join(self.static), self.kernels, self.tokens)

    # kernels

    def find_kernels(self) -> None:
        i = 0
        while i < len(self.tokens):
            if self.text(i) == "kernel" and self.tokens[i].kind == "word":
                i = self.kernel(i)
            i += 1
        for k in self.kernels:
            if not k.template:
                k.instances.insert(0, (k.name, ""))
            elif not k.instances and not self.only:
                self.error(k.place, f"kernel {k.name}: expected an instantiation with a host_name; got none")

    def kernel(self, at: int) -> int:
        """A definition or an explicit instantiation whose word `kernel` is at `at`."""
        start = at
        while self.text(self.previous(start)) not in ("", ";", "}", "{"):
            before = self.previous(start)
            if self.tokens[before].kind == "marker":
                break
            start = before
        before = at if self.text(self.previous(at)) != "[" else self.previous(self.previous(at))  # of [[kernel]]
        head = words(self.tokens[start:before])
        template = self.text(start) == "template"
        host = next((inside[2].text.strip('"') for _, _, inside in attributes(self.tokens[start:before])
                     if len(inside) > 2 and inside[0].text == "host_name"), None)  # fmt: skip
        if template and self.text(self.next(start)) != "<":
            return self.instantiation(start, at, host)
        i = self.next(at)
        while self.text(i) == "]" or self.text(i) == "[":  # [[kernel]], [[max_total_threads...]]
            i = closing(self.tokens, i) if self.text(i) == "[" else i
            i = self.next(i)
        if self.text(i) != "void":
            self.error(self.tokens[at], f"kernel: expected void and a name; got {self.text(i)}")
            return at
        name = self.next(i)
        opening = self.next(name)
        if self.text(opening) != "(":
            self.error(self.tokens[at], f"kernel {self.text(name)}: expected its parameters; got {self.text(opening)}")
            return at
        end = closing(self.tokens, opening)
        brace = self.next(end)
        if self.text(at) == "kernel" and self.text(self.previous(at)) != "[":
            self.blank(at, at + 1)
        if self.text(brace) == ";":  # a declaration only
            return brace
        if self.text(brace) != "{":
            self.error(self.tokens[brace], f"kernel {self.text(name)}: expected its body; got {self.text(brace)}")
            return brace
        parameters = [self.parameter(part) for part in split(self.tokens[opening + 1 : end])]
        list_ = joined(head)[len("template") :].strip() if template else ""
        k = Kernel(self.text(name), parameters, list_, self.tokens[at].place, (brace, closing(self.tokens, brace)))
        self.check_parameters(k)
        self.kernels.append(k)
        return brace

    def instantiation(self, start: int, at: int, host: str | None) -> int:
        """template [[host_name("x")]] kernel R name<args>(types);   or   kernel alias name<args>;"""
        end = at
        while self.text(end) != ";":
            end += 1
        inside = [t for t in words(self.tokens[at + 1 : end])]
        while inside and inside[0].text in "[]":
            inside = inside[closing(inside, 0) + 1 :] if inside[0].text == "[" else inside[1:]
        by_name = {k.name: k for k in self.kernels}
        # decltype(name<args>) comes before the name that is instantiated
        where = [i for i, t in enumerate(inside) if t.text in by_name]
        if host is None or not where:
            self.error(self.tokens[at], "instantiation: expected a host_name, and a kernel defined above")
            return end
        if self.only and host not in self.only:
            self.blank(start, end + 1)
            return end
        name = where[-1]
        arguments = ""
        if name + 1 < len(inside) and inside[name + 1].text == "<":
            arguments = joined(inside[name + 1 : closing(inside, name + 1) + 1])
        by_name[inside[name].text].instances.append((host, arguments))
        if self.text(self.previous(at)) != "[":
            self.blank(at, at + 1)
        return end

    def parameter(self, part: list[Token]) -> Parameter:
        found = attributes(part)
        plain = list(part)
        for first, end, _ in reversed(found):
            del plain[first:end]
        body = words(plain)
        name = next((t.text for t in reversed(body) if t.kind == "word"), "")
        result = Parameter(" ".join(t.text for t in body), name, place=words(part)[0].place)
        if found:
            inside = found[0][2]
            result.attribute = inside[0].text
            if len(inside) > 2 and inside[2].kind == "number":
                result.index = int(inside[2].text)
        return result

    def check_parameters(self, k: Kernel) -> None:
        taken: dict[int, str] = {}
        automatic = 0
        for p in k.parameters:
            where = f"{k.name}: parameter {p.name}"
            if p.is_buffer:
                p.index = automatic if p.index is None else p.index
                automatic = p.index + 1
                if p.index in taken:
                    self.error(p.place, f"{where}: expected a buffer index of its own; got that of {taken[p.index]}")
                taken[p.index] = p.name
                if p.space not in ("device", "constant") or not re.search(r"[*&]", p.text):
                    self.error(p.place, f"{where}: expected device or constant memory, or an attribute; got {p.text}")
            elif p.attribute == "threadgroup":
                if p.index is None or p.space != "threadgroup":
                    self.error(p.place, f"{where}: expected threadgroup T* [[threadgroup(n)]]; got {p.text}")
            elif p.attribute not in EXTENTS and p.attribute not in SCALARS:
                self.error(p.place, f"{where}: expected an attribute that the emulator knows; got [[{p.attribute}]]")

    # declarations

    def kernel_around(self, i: int) -> Kernel | None:
        return next((k for k in self.kernels if k.body[0] < i < k.body[1]), None)

    def rewrite_threadgroup(self) -> None:
        inside_attributes = {i for first, end, _ in attributes(self.tokens) for i in range(first, end)}
        for i, token in enumerate(self.tokens):
            if token.kind != "word" or token.text != "threadgroup" or i in inside_attributes:
                continue
            end, indirect, angle = i + 1, False, 0
            while end < len(self.tokens) and self.text(end) not in (";", "{", "}", ")", "="):
                text = self.text(end)
                angle += {"<": 1, ">": -1}.get(text, 0)
                if text == "[":
                    end = closing(self.tokens, end)
                elif angle <= 0 and text in ("*", "&"):
                    indirect = True
                    break
                if angle < 0 or (angle == 0 and text == ","):
                    break
                end += 1
            if not indirect:
                self.threadgroup_variable(i, end)

    def threadgroup_variable(self, at: int, end: int) -> None:
        token = self.tokens[at]
        if self.text(end) != ";":
            return self.error(token, "threadgroup: expected a pointer, a reference or one array; "
                                     f"got threadgroup {joined(self.tokens[at + 1 : end + 1])}")  # fmt: skip
        if self.text(self.previous(at)) not in ("{", "}", ";"):
            return self.error(token, "threadgroup: expected it at the start of a declaration")
        kernel = self.kernel_around(at)
        if kernel is None:
            return self.error(token, "threadgroup memory: expected its declaration in a kernel; got one elsewhere")
        dims = at + 1
        angle = 0
        while dims < end and (angle or self.text(dims) != "["):
            angle += {"<": 1, ">": -1}.get(self.text(dims), 0)
            dims += 1
        name = self.previous(dims)
        kind = joined(self.tokens[at + 1 : name])
        size = joined(self.tokens[dims:end])
        if self.tokens[name].kind != "word" or not kind:
            return self.error(token, f"threadgroup: expected a type and a name; got {joined(self.tokens[at:end])}")
        n = self.text(name)
        run = (
            f"typedef {kind} emu_type_{n} {size}; static const char emu_key_{n} = 0; emu_type_{n}& {n} = "
            f"*static_cast<emu_type_{n}*>(emu::group_array(&emu_key_{n}, sizeof(emu_type_{n}), alignof(emu_type_{n}), "
            f'"{n}"));'
        )
        static = f"typedef threadgroup {kind} emu_type_{n} {size}; emu_type_{n}& {n} = *(emu_type_{n}*)0;"
        self.put(at, end + 1, run, static)

    def rewrite_constants(self) -> None:
        for first, end, inside in attributes(self.tokens):
            if not inside or inside[0].text != "function_constant":
                continue
            start = first
            while self.text(self.previous(start)) not in (";", "}", ""):
                start = self.previous(start)
            declaration = words(self.tokens[start:first])
            if len(declaration) != 3 or declaration[0].text != "constant" or self.text(self.next(end - 1)) != ";":
                self.error(self.tokens[first], "function constant: expected constant T name [[function_constant(n)]];")
                continue
            _, kind, name = (t.text for t in declaration)
            self.put(start, end, f"{kind} {name}", f"constant {kind} {name} = {kind}()")
            self.constants.append(name)

    def rewrite_constructors(self) -> None:
        parameters = self.type_parameters()
        for i, token in enumerate(self.tokens):
            if token.kind != "word":
                continue
            if token.text == "vec" and self.text(self.next(i)) == "<":
                last = closing(self.tokens, self.next(i))
            elif VECTOR.match(token.text) or token.text in parameters:
                last = i
            else:
                continue
            self.refuse_casts(i, last, token.text in parameters)
            before, after = self.previous(i), self.next(last)
            if self.text(after) != "(" or self.text(before) in (".", "->", "operator", "typename", "class"):
                continue
            if self.text(before) == "::":
                if self.text(self.previous(before)) != "metal":
                    continue
                self.blank(self.previous(before), i)
            elif self.tokens[before].kind == "word" and self.text(before) not in ("return", "else", "case"):
                continue  # a declaration: static T (name)
            kind = "".join(t.text for t in self.tokens[i : last + 1] if t.kind != "marker")
            self.put(i, last + 1, f"emu::make<{kind} >", f"emu::make<{kind} >")

    def refuse_casts(self, first: int, last: int, parameter: bool) -> None:
        """(float4) x and static_cast<float4>(x) reinterpret clang's vectors where Metal converts them."""
        before, after = self.previous(first), self.next(last)
        if self.text(before) == "<" and self.text(self.previous(before)) == "static_cast" and not parameter:
            self.error(self.tokens[first], f"conversion: expected {self.text(first)}(...); got a static_cast")
        if self.text(before) != "(" or self.text(after) != ")" or parameter:
            return
        follows = self.tokens[self.next(after)]
        starts_value = follows.kind in ("word", "number") or follows.text in ("(", "-", "*")
        outer = self.tokens[self.previous(before)]
        if starts_value and (outer.kind == "sign" or outer.text == "return") and outer.text != ">":
            name = self.text(first)
            self.error(self.tokens[first], f"conversion: expected {name}(...); got a cast ({name})")

    def type_parameters(self) -> set[str]:
        names: set[str] = set()
        for i, token in enumerate(self.tokens):
            if token.text == "template" and self.text(self.next(i)) == "<":
                opening = self.next(i)
                for part in split(self.tokens[opening + 1 : closing(self.tokens, opening)]):
                    inside = words(part)
                    if len(inside) >= 2 and inside[0].text in ("typename", "class") and inside[1].kind == "word":
                        names.add(inside[1].text)
        return names

    # the end of the file

    def table(self) -> str:
        lines = ['\n#line 1 "launch table"']
        count = 0
        for k in self.kernels:
            arguments = ", ".join(self.argument(p) for p in k.parameters)
            buffers = max((p.index + 1 for p in k.parameters if p.is_buffer and p.index is not None), default=0)
            for host, instance in k.instances:
                lines.append(
                    f"EMU_LAUNCHER static void emu_launch_{count}(void* const* b) {{ "
                    f"const emu::Thread& t = emu::self(); (void)t; (void)b; "
                    f"[[clang::noinline]] {k.name}{instance}({arguments}); }}\n"  # count.py counts in it, not here
                    f'static emu::Kernel emu_kernel_{count}("{host}", {buffers}, emu_launch_{count});'
                )
                count += 1
        for n in self.constants:
            lines.append(f'static emu::Constant emu_constant_{n}("{n}", &{n}, sizeof({n}));')
        return "\n".join(lines) + "\n"

    def argument(self, p: Parameter) -> str:
        if p.is_buffer:
            return f"emu::Argument{{b[{p.index}]}}"
        if p.attribute == "threadgroup":
            return f"emu::Argument{{emu::group_argument({p.index})}}"
        if p.attribute in EXTENTS:
            return f"emu::Extent{{t.{EXTENTS[p.attribute]}}}"
        return f"t.{SCALARS[p.attribute]}" if SCALARS.get(p.attribute) else "32"


def translate(tokens: list[Token], only: Sequence[str] = ()) -> Translation:
    """`only`: the host names of instances to keep; all if empty."""
    return Translator(tokens, only).translate()
