"""The text that mlx.fast.metal_kernel compiles around a body, so that a body can be run where MLX is not installed.

MLX writes the signature from the arrays of a call: each input as `const device T*`, or `const constant T*` where it has
fewer than 8 elements, or a reference where it has no dimensions; each output as `device T*`; and the attributes, sizes
and strides that the body mentions. Template values are a template's parameters of one instance.
tests/python/test_mlx_gpu.py compares it with what MLX itself generates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .translate import EXTENTS, SCALARS

SMALL = 8  # elements: arrays with fewer are constants
TYPES = {name: f"{name}_t" for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")}
TYPES |= {"float32": "float", "float16": "float16_t", "bool": "bool"}
# Stands for the utilities that MLX puts before every kernel.
PRELUDE = """#include <metal_stdlib>
#include <metal_math>
using namespace metal;
typedef half float16_t;
typedef bfloat bfloat16_t;
"""


def type_name(array: np.ndarray | np.generic) -> str:
    name = array.dtype.name
    if name not in TYPES:
        raise TypeError(f"dtype: expected one of {', '.join(TYPES)}; got {name}")
    return TYPES[name]


def kernel_text(
    name: str,
    inputs: Sequence[tuple[str, np.ndarray]],
    outputs: Sequence[tuple[str, np.ndarray]],
    source: str,
    header: str = "",
    template: Sequence[tuple[str, int | bool | str]] = (),
    types: Mapping[str, str] | None = None,
) -> str:
    """Kernel `name`, to be compiled after PRELUDE. `source` and `header` as for mlx.fast.metal_kernel; `template`:
    (name, value), a type by its Metal name; `types`: Metal's names for arrays whose type numpy lacks."""
    types = types or {}
    parameters, index = [], 0
    for label, array in inputs:
        space = "constant" if array.size < SMALL else "device"
        kind = types.get(label) or type_name(array)
        parameters.append(f"  const {space} {kind}{'&' if array.ndim == 0 else '*'} {label} [[buffer({index})]]")
        index += 1
        for suffix, kind in (("shape", "int*"), ("strides", "int64_t*"), ("ndim", "int&")):
            if array.ndim and f"{label}_{suffix}" in source:
                parameters.append(f"  const constant {kind} {label}_{suffix} [[buffer({index})]]")
                index += 1
    for label, array in outputs:
        parameters.append(f"  device {types.get(label) or type_name(array)}* {label} [[buffer({index})]]")
        index += 1
    for attribute in sorted([*EXTENTS, *SCALARS]):
        if attribute in source:
            parameters.append(f"  {'uint3' if attribute in EXTENTS else 'uint'} {attribute} [[{attribute}]]")
    text = header
    if template:
        kinds = ("bool" if isinstance(v, bool) else "int" if isinstance(v, int) else "typename" for _, v in template)
        text += f"template <{', '.join(f'{kind} {n}' for kind, (n, _) in zip(kinds, template, strict=True))}>\n"
    signature = ",\n".join(parameters)
    text += f"[[kernel]] void {name}(\n{signature}) {{\n{source}\n}}\n"
    if template:
        instance = f"{name}<{', '.join(str(int(v)) if isinstance(v, int) else v for _, v in template)}>"
        text += f'\ntemplate [[host_name("{name}")]] [[kernel]] decltype({instance}) {instance};\n'
    return text


def arguments(inputs: Sequence[tuple[str, np.ndarray]], outputs: Sequence[np.ndarray], source: str) -> list:
    """The buffers of a call, in the order of kernel_text's parameters."""
    found: list = []
    for label, array in inputs:
        found.append(array)
        strides = [s // array.itemsize for s in array.strides]
        extra = (
            ("shape", np.array(array.shape, np.int32)),
            ("strides", np.array(strides, np.int64)),
            ("ndim", np.int32(array.ndim)),
        )
        found += [value for suffix, value in extra if array.ndim and f"{label}_{suffix}" in source]
    return found + list(outputs)
