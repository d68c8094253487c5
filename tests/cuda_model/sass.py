"""SASS as ``cuobjdump -sass`` prints it: instructions with operands and scheduling control, and a kernel's loops.

The control bits of Maxwell and later (Jia et al., arXiv 1804.06826, section 2.1) are bits 41 to 57 of the second word:
cycles to stall, a scoreboard that a result sets, one that reads of operands set, and the scoreboards to wait for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

NO_SCOREBOARD = 7
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_WORD = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/$")
_GUARD = re.compile(r"^@(!?)(UP|P)(\w+)\s+")


@dataclass(frozen=True)
class Operand:
    """Describes an operand: a register, a predicate, a constant, memory, or a number as it is printed."""

    text: str
    kind: str  # is reg, ureg, pred, upred, const, mem, number or other
    index: int = 0
    offset: int = 0
    negative: bool = False
    inverted: bool = False  # is ~ of a register, ! of a predicate
    absolute: bool = False
    half: int | None = None  # is 0 for H0_H0, 1 for H1_H1


@dataclass(frozen=True)
class Instruction:
    """Describes an instruction. `modifiers` follow the opcode, as in LDG.E.128."""

    address: int
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Operand | None = None
    stall: int = 1
    sets: int = NO_SCOREBOARD
    reads: int = NO_SCOREBOARD
    waits: tuple[int, ...] = ()

    def has(self, modifier: str) -> bool:
        """Return whether the instruction has a modifier."""
        return modifier in self.modifiers

    @property
    def name(self) -> str:
        """Return the opcode and its modifiers."""
        return ".".join((self.opcode, *self.modifiers))

    @property
    def target(self) -> int | None:
        """Return where a branch or a call goes."""
        if self.opcode in ("BRA", "CALL", "BSSY"):
            return next((o.offset for o in reversed(self.operands) if o.kind == "number"), None)
        return None


def _number(text: str) -> int | None:
    match = re.fullmatch(r"(-?)0x([0-9a-f]+)", text)
    if match is None:
        return int(text) if re.fullmatch(r"-?\d+", text) else None
    return -int(match[2], 16) if match[1] else int(match[2], 16)


def parse_operand(text: str) -> Operand:
    """Parse ``-R4.reuse``, ``!P0``, ``c[0x0][0x210]``, ``desc[UR4][R2.64+0x8]``, ``0x1f``, ``1.5`` and the like."""
    shown = text
    text = text.replace(".reuse", "")
    negative = inverted = absolute = False
    number = _number(text)
    if number is not None:
        return Operand(shown, "number", offset=number)
    if text[0] == "!":
        inverted, text = True, text[1:]
    if text[0] in "-~" and not text[1:2].isdigit() and text[1:4] not in ("INF", "QNA"):
        negative, inverted, text = text[0] == "-", text[0] == "~", text[1:]
    if text[0] == "|" and text[-1] == "|":
        absolute, text = True, text[1:-1]
    flags = {"negative": negative, "inverted": inverted, "absolute": absolute}
    half = next((n for n in (0, 1) if text.endswith(f".H{n}_H{n}")), None)
    text = re.sub(r"\.(H\d_H\d|64|U32|F32|B\d|ROW|COL|U64)$", "", text)
    if match := re.fullmatch(r"c\[0x([0-9a-f]+)\]\[0x([0-9a-f]+)\]", text):
        return Operand(shown, "const", int(match[1], 16), int(match[2], 16), **flags, half=half)
    if match := re.fullmatch(r"(U?)R(\d+|Z)", text):
        index = (63 if match[1] else 255) if match[2] == "Z" else int(match[2])
        return Operand(shown, "ureg" if match[1] else "reg", index, **flags, half=half)
    if match := re.fullmatch(r"(U?)P(\d|T)", text):
        index = 7 if match[2] == "T" else int(match[2])
        return Operand(shown, "upred" if match[1] else "pred", index, **flags)
    if match := re.fullmatch(r"B(\d+)", text):
        return Operand(shown, "barrier", int(match[1]))
    if "[" in text:
        return Operand(shown, "mem")
    return Operand(shown, "other")


def parse_control(word: int) -> dict[str, object]:
    """Return the scheduling control in the second word of an instruction."""
    bits = word >> 41
    waits = tuple(n for n in range(6) if bits >> 11 >> n & 1)
    return {"stall": bits & 15, "sets": bits >> 5 & 7, "reads": bits >> 8 & 7, "waits": waits}


def parse_instruction(text: str, address: int = 0, word: int | None = None) -> Instruction:
    """Parse one instruction, ``@!P0 LDG.E R2, desc[UR4][R2.64]``."""
    guard = None
    if match := _GUARD.match(text):
        index = 7 if match[3] == "T" else int(match[3])
        guard = Operand(match[0], "upred" if match[2] == "UP" else "pred", index, inverted=bool(match[1]))
        text = text[match.end() :]
    name, _, rest = text.partition(" ")
    opcode, *modifiers = name.split(".")
    pieces = [p.strip() for p in re.split(r",\s*(?![^\[]*\])", rest) if p.strip()]
    if opcode in ("RET", "BAR", "BSSY", "BRA") and pieces:  # as in RET.REL.NODEC R2 0x0
        pieces = [word for piece in pieces for word in piece.split()]
    control = {} if word is None else parse_control(word)
    return Instruction(address, opcode, tuple(modifiers), tuple(parse_operand(p) for p in pieces), guard, **control)


def parse_function(code: str) -> list[Instruction]:
    """Parse the instructions of one function."""
    instructions, pending = [], None
    for line in code.splitlines():
        if match := _LINE.search(line):
            pending = int(match[1], 16), match[2]
        elif pending is not None and (match := _WORD.match(line)):
            instructions.append(parse_instruction(pending[1], pending[0], int(match[1], 16)))
            pending = None
    return instructions


def functions_of(sass: str) -> dict[str, str]:
    """Return the text of each symbol's code, from what cuobjdump prints."""
    parts = re.split(r"Function : (\S+)", sass)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


# --- control flow -----------------------------------------------------------------------------------------------------


@dataclass
class Loop:
    """Describes a natural loop: the instructions of its blocks, and the loops inside it."""

    head: int
    body: set[int]  # holds indices of instructions
    inner: list[Loop] = field(default_factory=list)

    def own(self) -> set[int]:
        """Return the instructions that are in no inner loop."""
        return self.body.difference(*(loop.body for loop in self.inner)) if self.inner else self.body


def _successors(instructions: list[Instruction]) -> list[list[int]]:
    at = {instruction.address: n for n, instruction in enumerate(instructions)}
    result: list[list[int]] = []
    for n, instruction in enumerate(instructions):
        always = instruction.guard is None and not any(o.kind in ("pred", "upred") for o in instruction.operands)
        behind = [n + 1] if n + 1 < len(instructions) else []
        if instruction.opcode == "BRA":
            target = at.get(instruction.target if instruction.target is not None else -1)
            own = [] if target is None else [target]
            result.append(own if always and not instruction.has("DIV") else own + behind)
        elif instruction.opcode in ("EXIT", "RET"):
            result.append([] if instruction.guard is None else behind)
        else:
            result.append(behind)
    return result


def loops(instructions: list[Instruction]) -> list[Loop]:
    """Return the outermost natural loops in the order of their heads, with those inside them.

    An edge to a smaller address closes a loop; its body is what reaches the edge without passing the head.
    """
    following = _successors(instructions)
    before: list[list[int]] = [[] for _ in instructions]
    for n, targets in enumerate(following):
        for target in targets:
            before[target].append(n)
    bodies: dict[int, set[int]] = {}
    for n, targets in enumerate(following):
        for head in targets:
            if head > n or (head == n and instructions[n].guard is None):  # BRA to itself is padding behind the end
                continue
            body, stack = bodies.setdefault(head, {head}), [n]
            while stack:
                here = stack.pop()
                if here not in body and here > head:
                    body.add(here)
                    stack.extend(before[here])
    found = [Loop(head, body) for head, body in sorted(bodies.items(), key=lambda item: -len(item[1]))]
    roots: list[Loop] = []
    for loop in found:
        _insert(roots, loop)
    return sorted(roots, key=lambda loop: loop.head)


def _insert(among: list[Loop], loop: Loop) -> None:
    for other in among:
        if loop.head in other.body and loop.body <= other.body:
            return _insert(other.inner, loop)
    among.append(loop)
    among.sort(key=lambda other: other.head)
    return None


def every_loop(roots: Iterable[Loop]) -> Iterator[Loop]:
    """Yield all loops, an outer one before those inside it."""
    for loop in roots:
        yield loop
        yield from every_loop(loop.inner)


def count(instructions: list[Instruction], where: Iterable[int], opcode: str) -> int:
    """Return how many instructions have an opcode, or begin with opcode and modifiers: "HGMMA", "LDG.E.128"."""
    wanted = opcode.split(".")
    names = ([i.opcode, *i.modifiers] for i in (instructions[n] for n in where))
    return sum(all(part in name for part in wanted) for name in names)


def unconditional(instructions: list[Instruction], loop: Loop) -> set[int]:
    """Return the instructions of a loop that every iteration executes, without those of loops inside it.

    Without such an instruction the head cannot reach itself again.
    """
    return _on_every_path(_successors(instructions), loop.body, loop.head) & loop.own()


def straight(instructions: list[Instruction]) -> set[int]:
    """Return the instructions outside of loops that every execution of the function reaches."""
    following = _successors(instructions)
    for n, instruction in enumerate(instructions):
        if instruction.opcode == "EXIT" and instruction.guard is None:
            following[n] = [0]
    looping = {n for loop in loops(instructions) for n in loop.body}
    return _on_every_path(following, set(range(len(instructions))), 0) - looping


def _on_every_path(following: list[list[int]], body: set[int], head: int) -> set[int]:
    """Return the instructions of a body that all paths from the head back to it pass."""
    leaders = {head} | {t for n in body if following[n] != [n + 1] for t in (*following[n], n + 1)} & body

    def closes_without(gone: int) -> bool:
        seen, stack = {head}, [head]
        while stack:
            for target in following[stack.pop()]:
                if target == head:
                    return True
                if target in body and target not in seen and target != gone:
                    seen.add(target)
                    stack.append(target)
        return False

    certain: set[int] = set()
    for leader in leaders:
        if leader != head and closes_without(leader):
            continue
        n = leader
        while n in body and (n == leader or n not in leaders):
            certain.add(n)
            n += 1
    return certain
