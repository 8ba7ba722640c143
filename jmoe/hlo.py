"""Reading the text of a compiled TPU program: how much work, and how many bytes between devices, one run of it is.

XLA's own `cost_analysis` counts the body of a loop once. Here each instruction counts as often as it runs: a loop's
trip count stands in its condition, a comparison of a counter with a constant. Of the branches of a condition the
costlier counts. Pallas kernels are counted by the estimate that they carry, or by a function that the caller has.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
COLLECTIVES = (
    *("all-gather", "reduce-scatter", "all-reduce", "all-to-all"),
    *("ragged-all-to-all", "collective-permute", "collective-broadcast"),
)
UNKNOWN_CYCLES = 2**63 - 1
IDLE = "further_rounds"
"""scope of loops that do not run while experts are balanced (`jmoe.model.expert_parallel`); they count for nothing"""


@dataclass
class Work:
    """Of one device in one run; a part of a program or all of it."""

    products: float = 0.0
    """FLOPs of XLA's matrix products, a multiply-add as 2"""
    kernels: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """FLOPs of Pallas kernels by name"""
    unknown_kernels: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """runs of kernels whose FLOPs nobody tells"""
    claims: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """FLOPs of Pallas kernels by name, as they tell the compiler themselves"""
    moved: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """bytes that a device receives, by kind of collective"""
    collectives: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """runs of each kind of collective"""
    cycles: float = 0.0
    """sum of the compiler's estimates for its own fusions, the only instructions it estimates"""
    unknown_loops: int = 0
    """loops whose trip count could not be read; their body counts once"""

    @property
    def flops(self) -> float:
        """FLOPs of matrix products, in kernels or not."""
        return self.products + sum(self.kernels.values())

    def add(self, other: "Work", times: int = 1) -> None:
        """Adds `times` runs of another part."""
        for name in ("products", "cycles", "unknown_loops"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for name in ("kernels", "unknown_kernels", "claims", "moved", "collectives"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for key, value in theirs.items():
                mine[key] += times * value


class Shape(NamedTuple):
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> float:
        """Without padding."""
        bits = re.fullmatch(r"[a-z]+(\d+)\w*", self.dtype)
        return float(math.prod(self.dims) * BYTES.get(self.dtype, int(bits[1]) / 8 if bits else 0))


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str
    """the text between the parentheses, which for a constant is its value"""


Computation = dict[str, Instruction]
Kernel = Callable[[str, Sequence[Shape]], float]


def work(text: str, kernels: Mapping[str, Kernel] | None = None) -> Work:
    """The work of a program.

    Args:
      text: of the optimised module, as `compiled.as_text()` gives it.
      kernels: FLOPs, from name and operands, of Pallas kernels whose name begins with the key.
    """
    computations, entry = parse(text)
    devices = re.search(r"num_partitions=(\d+)", text)
    return _Counting(computations, int(devices[1]) if devices else 1, kernels or {}).of(entry)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of the one it enters by."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    entry = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif line.startswith("  ") and " = " in line:
            instruction = _instruction(line.strip())
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction:
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shapes, rest = rest[:end], rest[end:].lstrip()
    opcode, rest = rest.split("(", 1)
    end = _closing("(" + rest) - 1
    inside = rest[: end - 1]
    arrays = re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", shapes)
    dims = (tuple(int(size) for size in re.findall(r"\d+", of)) for _, of in arrays)
    parts = tuple(Shape(dtype, of) for (dtype, _), of in zip(arrays, dims, strict=True))
    return Instruction(name.lstrip("%"), parts, opcode, tuple(re.findall(r"%([\w.-]+)", inside)), rest[end:], inside)


def _closing(text: str) -> int:
    """One past the parenthesis that closes the first of `text`."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place + 1
    raise ValueError(f"no closing parenthesis in {text[:80]}")


class _Counting:
    def __init__(self, computations: dict[str, Computation], devices: int, kernels: Mapping[str, Kernel]):
        self.computations, self.devices, self.kernels = computations, devices, kernels
        self.known: dict[str, Work] = {}

    def of(self, name: str) -> Work:
        if name not in self.known:
            total = Work()
            for instruction in self.computations[name].values():
                self.count(instruction, self.computations[name], total, scatters="all-reduce-scatter" in name)
            self.known[name] = total
        return self.known[name]

    def count(self, instruction: Instruction, computation: Computation, total: Work, scatters: bool) -> None:
        opcode, attributes = instruction.opcode, instruction.attributes
        kind = opcode.removesuffix("-start")
        if cycles := re.search(r'"estimated_cycles":"(\d+)"', attributes):
            total.cycles += int(cycles[1]) if int(cycles[1]) < UNKNOWN_CYCLES else 0
        if opcode in ("convolution", "dot"):
            of = convolution_flops if opcode == "convolution" else dot_flops
            left, right = (computation[operand].shapes[0] for operand in instruction.operands[:2])
            total.products += of(instruction.shapes[0], left, right, attributes)
        elif kind in COLLECTIVES:
            # TPUs write a reduce-scatter as an all-reduce of which each device keeps its part.
            kind = "reduce-scatter" if scatters and kind == "all-reduce" else kind
            sizes = [shape.bytes for name in instruction.operands for shape in computation[name].shapes]
            # A ragged one names its rows, the buffer that takes them, and offsets: as if the smaller of the two moved.
            operands = min(sizes[:2]) if kind == "ragged-all-to-all" else sum(sizes)
            # A collective that is under way in several fusions is named by each; the one without a flag stands for all.
            if not re.search(r'"async_collective_fusion_config":\{"flag_start":"\d', attributes):
                total.moved[kind] += operands * _received(kind, group_size(attributes, self.devices))
                total.collectives[kind] += 1.0
        elif opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in attributes:
            self.count_kernel(instruction, computation, total)
        elif opcode == "while" and not re.search(rf'op_name="[^"]*{IDLE}/while"', attributes):
            condition, body = (re.search(rf"{part}=%?([\w.-]+)", attributes) for part in ("condition", "body"))
            assert condition and body
            trips = trip_count(self.computations[condition[1]], self.computations[body[1]], attributes)
            total.unknown_loops += trips is None
            total.add(self.of(body[1]), 1 if trips is None else trips)
        elif opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", attributes)
            names = (
                branches[1] if branches else " ".join(re.findall(r"(?:true|false)_computation=%?[\w.-]+", attributes))
            )
            works = [self.of(name) for name in re.findall(r"%([\w.-]+)", names)]
            total.add(max(works, key=lambda work: (work.flops, sum(work.moved.values()), work.cycles)))
        elif not opcode.endswith(("-done", "-update")):
            for called in re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", attributes):
                called_work = self.of(called)
                # A fusion's estimate is that of the whole.
                total.add(Work(**{**vars(called_work), "cycles": 0.0 if opcode == "fusion" else called_work.cycles}))

    def count_kernel(self, instruction: Instruction, computation: Computation, total: Work) -> None:
        name = re.sub(r"[.\d]+$", "", instruction.name)
        operands = [shape for operand in instruction.operands for shape in computation[operand].shapes]
        estimate = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.attributes)
        if estimate:
            total.claims[name] += float(estimate[1])
        known = [flops for prefix, flops in self.kernels.items() if name.startswith(prefix)]
        if known:
            total.kernels[name] += known[0](name, operands)
        elif estimate:
            total.kernels[name] += float(estimate[1])
        else:
            total.unknown_kernels[name] += 1.0


def _received(kind: str, group: int) -> float:
    """Bytes that a device receives, over the bytes of its operand: by rings, which none can beat."""
    others = (group - 1) / group
    return {
        "all-gather": group - 1.0,
        "all-reduce": 2 * others,
        "collective-permute": 1.0,
        "collective-broadcast": 1.0,
    }.get(kind, others)


def group_size(attributes: str, devices: int) -> int:
    """How many devices take part in a collective together; the three ways in which XLA writes the groups."""
    if named := re.search(r"replica_groups=\w+\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if tiled := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]", attributes):
        return int(tiled[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(listed[1].split(",")) if listed else devices


def trip_count(condition: Computation, body: Computation, attributes: str = "") -> int | None:
    """How often a loop runs whose counter goes up from 0; None if it cannot be read."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', attributes):
        return int(known[1])
    compared = [instruction for instruction in condition.values() if instruction.opcode == "compare"]
    bounds = [i for i in condition.values() if i.opcode == "constant" and i.shapes and not i.shapes[0].dims]
    if len(compared) == 1 and "direction=LT" in compared[0].attributes and len(bounds) == 1:
        return math.ceil(int(bounds[0].literal) / _step(condition[compared[0].operands[0]], body))
    return None


def _step(counter: Instruction, body: Computation) -> int:
    """What the body of a loop adds to its counter: 2 where XLA has put two rounds into one; 1 if it cannot be read."""
    place, result = re.search(r"index=(\d+)", counter.attributes), list(body.values())[-1]
    if place is None or result.opcode != "tuple":
        return 1
    added = body[result.operands[int(place[1])]]
    terms = [body[term] for term in added.operands] if added.opcode == "add" else []
    return next((int(term.literal) for term in terms if term.opcode == "constant"), 1)


def dot_flops(out: Shape, left: Shape, right: Shape, attributes: str) -> float:
    """Of a `dot`: two for each element of the result and each contracted place."""
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
    places = [int(place) for place in contracted[1].split(",") if place] if contracted else []
    return 2.0 * math.prod(out.dims) * math.prod(left.dims[place] for place in places)


def convolution_flops(out: Shape, left: Shape, right: Shape, attributes: str) -> float:
    """Of a `convolution`, as which TPU programs write matrix products: batch dimensions have become spatial ones, with
    windows that slide over zeros; only what meets an element counts."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels
    of = dict(zip(("left", "right", "out"), labels.groups(), strict=True))
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", attributes) or [""])[0]))
    flops = 2.0 * out.dims[of["out"].index("b")] * out.dims[of["out"].index("f")] * right.dims[of["right"].index("i")]

    def setting(name, place, default):
        return window[name].split("x")[place] if name in window else default

    for place in range(sum(label.isdigit() for label in of["out"])):
        size_in, size_out = left.dims[of["left"].index(str(place))], out.dims[of["out"].index(str(place))]
        size, stride = int(setting("size", place, "1")), int(setting("stride", place, "1"))
        low = int(setting("pad", place, "0_0").split("_")[0])
        spread, apart = int(setting("lhs_dilate", place, "1")), int(setting("rhs_dilate", place, "1"))
        flops *= sum(
            0 <= (at := o * stride + k * apart - low) <= (size_in - 1) * spread and at % spread == 0
            for o in range(size_out)
            for k in range(size)
        )
    return flops
