"""The contents of a checkpoint against the hashes of its run, and against its source quantized once more."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.backends.fp8 import NonFiniteWeight, transpose
from pipeline.backends.registry import Scheme, of_result
from pipeline.checkpoint.reader import read_tensor
from pipeline.checkpoint.result import CALIBRATION, FILES, JOURNAL
from pipeline.checkpoint.sidecars import changed_files
from pipeline.checkpoint.source import DTYPE_BYTES, FLOAT_DTYPES, Checkpoint, Tensor, read_json
from pipeline.checkpoint.values import FORMATS
from pipeline.formats.base import FP8, Format
from pipeline.formats.methods import is_cache_scale
from pipeline.journal import Digest, read_identity, read_pieces
from pipeline.machine.system import default_threads
from pipeline.model.fused import fused_groups
from pipeline.model.selection import Selection, expected_modules, select
from pipeline.verify.distance import FAR, distance_from, packed_names
from pipeline.verify.other_source import by_contents
from pipeline.verify.report import Report

CHUNK = 16 << 20
SMALL = 1000  # codes; a share of fewer says little
COARSE = 1.05  # times what a weight reaches: scales that are BF16 numbers, rounded up, are within 2^-7
MOST_OTHER = 0.1  # of a tensor's codes that another device may round otherwise; about 3% were seen


def check_hashes(result: Checkpoint, report: Report, stop: threading.Event | None = None) -> str | None:
    """Every byte against the SHA-256 that the run recorded while writing it; given up when `stop` is set."""
    try:
        pieces = read_pieces(result.root)
    except ValueError:
        report.add("journal-damaged", JOURNAL, f"{JOURNAL}: it is damaged")
        return None
    if pieces is None:
        return "no hashes were recorded for this checkpoint"
    _check_files(result, report)
    begins: dict[str, int] = {}  # of each tensor in the run's file; a copy may be laid out anew
    for piece in pieces:
        begins[piece.tensor] = min(piece.offset, begins.get(piece.tensor, piece.offset))
    covered: Counter[str] = Counter()

    def differs(piece: Digest) -> bool:
        digest, tensor = hashlib.sha256(), result.tensors[piece.tensor]
        for start in range(0, piece.nbytes, CHUNK):
            if stop is not None and stop.is_set():
                return False
            count = min(CHUNK, piece.nbytes - start)
            digest.update(read_tensor(result, tensor, piece.offset - begins[piece.tensor] + start, count))
        return digest.hexdigest() != piece.sha256

    here = []
    for piece in pieces:
        tensor = result.tensors.get(piece.tensor)
        if tensor is None:
            report.add("recorded-tensor-lost", piece.tensor, f"{piece.tensor}: recorded by the run, absent here")
        elif piece.offset - begins[piece.tensor] + piece.nbytes <= tensor.nbytes:
            covered[piece.tensor] += piece.nbytes
            here.append(piece)
    with ThreadPoolExecutor(default_threads()) as pool:  # reading and hashing both let others run
        for piece, wrong in zip(here, pool.map(differs, here), strict=True):
            if wrong:
                text = f"{piece.tensor}: its bytes are not those that the run wrote (SHA-256 differs)"
                report.add("hash-differs", piece.tensor, text)
    for name, tensor in result.tensors.items():
        if covered[name] != tensor.nbytes:
            text = f"{name}: the run recorded hashes for {covered[name]} of {tensor.nbytes} bytes"
            report.add("hash-missing", name, text)
    return f"{sum(covered.values()):,} bytes of tensors: SHA-256 as recorded by the run"


def check_numbers(result: Checkpoint, report: Report) -> str:
    """No NaN among FP8 values (E4M3: 0x7F and 0xFF), no NaN or infinity among BF16, F16 and F32 values."""
    import numpy

    masks = {dtype: ({"H": "<u2", "I": "<u4"}[code], infinity) for dtype, (code, infinity) in FORMATS.items()}
    counted = 0
    for name, tensor in result.tensors.items():
        if tensor.dtype not in masks and tensor.dtype != FP8:
            continue
        counted += 1
        for start in range(0, tensor.nbytes, CHUNK):
            data = read_tensor(result, tensor, start, min(CHUNK, tensor.nbytes - start))
            if tensor.dtype == FP8:
                bad = bool(((numpy.frombuffer(data, numpy.uint8) & 0x7F) == 0x7F).any())
            else:
                kind, mask = masks[tensor.dtype]
                bad = bool(((numpy.frombuffer(data, kind) & mask) == mask).any())
            if bad:
                report.add("value-not-finite", name, f"{name}: it holds values that are no finite numbers")
                break
    return f"{counted} tensors: every value is a finite number"


def _check_files(result: Checkpoint, report: Report) -> None:
    """The small files against the hashes of their run."""
    path = result.root / FILES
    if not path.exists():
        text = f"{FILES}: it is absent, although the run's journal is here; it has the files' hashes"
        report.add("file-hashes-missing", FILES, text)
        return
    changed = changed_files(result.root)
    for name, what in changed.items():
        report.add("file-hash-differs", name, f"{name}: {what}")
    if not changed:
        report.checked.append("small files: SHA-256 as recorded by the run")


def check_bytes(result: Checkpoint, source: Checkpoint, method: Format | None, report: Report) -> str | None:
    """What stays against the source; what is quantized against the source quantized once more.

    Weights of a layout that is not made here, and those outside the language model that somebody quantized, are
    dequantized and compared as numbers, where their scales say how.
    """
    selection, same, cast, again, other, near, unread = select(source), 0, 0, 0, 0, 0, 0
    fewest = 8  # bits of a value
    identity = read_identity(result.root)
    scheme = of_result(method, identity) if method is not None else None
    ours = identity is not None and (scheme is None or scheme.repeats(identity))
    options: Mapping[str, Any] = (identity or {}).get("backend_options") or {}
    powers = _powers(result)
    reaches: dict[str, tuple[float, float]] = {}
    report, whole = report.beside(), report
    for name, tensor in source.tensors.items():
        if is_cache_scale(tensor):  # the result's own are held against what the run measured
            continue
        found, role = result.tensors.get(name), selection.choices[name].role
        if found is not None and (found.dtype, found.shape) == (tensor.dtype, tensor.shape):
            same += 1
            if not _equal(source, tensor, result, found) and not _scaled(source, tensor, result, found, powers):
                text = f"{name}: it was to stay as it is, but its bytes differ from the source's"
                report.add("bytes-differ", name, text)
        elif found is not None and found.shape == tensor.shape and {found.dtype, tensor.dtype} <= {*FLOAT_DTYPES}:
            kind = found.dtype
            cast += 1
            if _as_dtype(read_tensor(source, tensor), tensor.dtype, kind) != read_tensor(result, found):
                text = f"{name}: it holds other numbers than the source's, rounded to {kind}"
                report.add("rounded-values-differ", name, text)
        elif tensor.dtype not in FLOAT_DTYPES:
            continue
        elif role in ("linear", "experts") and scheme is not None and scheme.format.can_repeat(tensor.dtype, ours):
            again += 1
            try:
                wrong, far = _quantize_again(source, tensor, result, role, selection, scheme, options, powers, reaches)
            except NonFiniteWeight:
                report.add("source-not-finite", name, f"{name}: NaN or Inf in the source")
                continue
            if wrong and not ours and not far:
                other += 1  # whoever made it may have used a GPU, whose kernels round otherwise
            elif wrong:
                how = f"{scheme.numerics} numerics on a CPU"
                text = f"{wrong}: not what the source's {name} gives when it is quantized ({how})"
                report.add("requantized-differs", wrong, text)
        elif (distance := distance_from(source, tensor, result)) is None:
            unread += (found is not None and found.dtype not in FLOAT_DTYPES) or (
                found is None and any(packed in result.tensors for packed in packed_names(name))
            )
        else:
            near, fewest = near + 1, min(fewest, distance.bits)
            if distance.far:
                report.add(
                    "weight-far-from-source",
                    name,
                    f"{name}: what the checkpoint holds for it is {distance.share:.0%} away from the source's weight; "
                    f"{distance.cost}",
                )
    if (different := by_contents(report, same + cast, again + near, source)) is not None:
        whole.take(different)
        return None
    _check_coarse_scales(reaches, report)
    if unread:
        text = f"the codes of {unread} weights are in a layout whose numbers are not compared here"
        report.add("contents-not-compared", "", text)
    if powers:
        report.checked.append(
            f"{len(powers)} modules were equalized: the source times a power of two, against each other"
        )
    whole.merge(report)
    bits = f"the same bits, but {other} made elsewhere and one rounding apart" if other else "the same bits"
    quantized = [f"{again} source tensors quantized once more: {bits}"] if again else []
    quantized += [f"{near} weights dequantized: within {FAR[fewest]:.0%} of the source's"] if near else []
    return "; ".join([f"{same} tensors that stay as they are: byte for byte the source's", *quantized])


def _check_coarse_scales(reaches: dict[str, tuple[float, float]], report: Report) -> None:
    """Scales that hold much more than their weights, or what vLLM fuses them with, reach: small weights are lost."""
    widest = {module: largest for module, (largest, _) in reaches.items()}
    for group in fused_groups(reaches):
        widest.update(dict.fromkeys(group, max(reaches[module][0] for module in group)))
    for module, (_, held) in reaches.items():
        if widest[module] and held > widest[module] * COARSE:
            report.add(
                "weight-scale-coarse",
                f"{module}.weight_scale",
                f"{module}.weight_scale: it holds up to {held:.4g}, the source's weight reaches {widest[module]:.4g}: "
                "small weights are lost",
            )


def _powers(result: Checkpoint) -> dict[str, int]:
    """By module, the power of two that the run says it scaled the rows by, or minus that of the columns."""
    path = result.root / CALIBRATION
    if not path.exists():
        return {}
    powers: dict[str, int] = {}
    for layer in read_json(path).get("layers", []):
        for one, against, exponent in layer.get("balanced", []):
            powers[one] = powers.get(one, 0) + exponent
            powers[against] = powers.get(against, 0) - exponent
    return powers


def _scaled(a: Checkpoint, tensor: Tensor, b: Checkpoint, other: Tensor, powers: dict[str, int]) -> bool:
    """Whether a bias is the source's times its module's power of two."""
    import torch

    power = powers.get(tensor.name.removesuffix(".bias"), 0)
    kind = _kind(tensor.dtype)
    if not power or not tensor.name.endswith(".bias") or kind is None:
        return False
    before, after = (torch.frombuffer(bytearray(read_tensor(c, t)), dtype=kind) for c, t in ((a, tensor), (b, other)))
    return bool(torch.equal(before * 2.0**power, after))


def _quantize_again(
    source: Checkpoint,
    tensor: Tensor,
    result: Checkpoint,
    role: str,
    selection: Selection,
    scheme: Scheme,
    options: Mapping[str, Any],
    powers: dict[str, int],
    reaches: dict[str, tuple[float, float]],
) -> tuple[str | None, bool]:
    """The first output tensor that is not what `tensor` gives when it is quantized again, and whether one is far off.

    `reaches` gets, by module, the weight's amax and the largest magnitude that the stored scale can hold, where scales
    are not made from the weight itself.

    Raises:
        NonFiniteWeight: the source's weight is not finite.
    """
    wrong: str | None = None
    width = DTYPE_BYTES[tensor.dtype]
    layout = selection.expert_layouts.get(tensor.name.rpartition(".")[0])
    modules = list(expected_modules(tensor.name, tensor, role, selection))
    each = len(modules) // layout.experts if layout else 1
    position = 0
    for first in range(0, len(modules), each):
        stacked = modules[first : first + each]
        rows, columns = sum(module[1] for module in stacked), stacked[0][2]
        data = bytearray(read_tensor(source, tensor, position, rows * columns * width))
        position += len(data)
        if layout is not None and layout.transposed:
            flat, data = data, bytearray(len(data))
            transpose(flat, data, columns, rows, width)
        top = 0
        for module, height, _ in stacked:
            part = memoryview(data)[top * columns * width : (top + height) * columns * width]
            top += height
            stored = _stored(result, module, scheme, tensor.dtype)
            power = powers.get(module, 0)
            made = scheme.requantize(part, tensor.dtype, height, columns, stored, power, options)
            if made.reach is not None:
                reaches[module] = made.reach
            if made.unusable is not None:
                return f"{module}.{made.unusable}", True
            for suffix, expected in made.tensors.items():
                if suffix not in stored or stored[suffix][1] == expected:
                    continue
                wrong = wrong or f"{module}.{suffix}"
                kind, there = stored[suffix]
                if _far(expected, there, scheme.format.weight_dtype if suffix == "weight" else kind):
                    return f"{module}.{suffix}", True
    return wrong, False


def _stored(result: Checkpoint, module: str, scheme: Scheme, dtype: str) -> dict[str, tuple[str, bytes]]:
    """A module's tensors by suffix, as dtype and bytes; scales that should be of the source's dtype are cast to it."""
    found = {}
    for output in scheme.format.outputs(dtype, 1, 1):
        tensor = result.tensors.get(f"{module}.{output.suffix}")
        if tensor is None:
            continue
        raw, kind = read_tensor(result, tensor), tensor.dtype
        if output.suffix != "weight" and kind != output.dtype and scheme.format.scale_dtype is None:
            raw, kind = _as_dtype(raw, kind, output.dtype), output.dtype
        found[output.suffix] = kind, raw
    return found


def _equal(a: Checkpoint, tensor: Tensor, b: Checkpoint, other: Tensor) -> bool:
    starts = range(0, tensor.nbytes, CHUNK)
    sizes = [min(CHUNK, tensor.nbytes - start) for start in starts]
    return all(read_tensor(a, tensor, s, n) == read_tensor(b, other, s, n) for s, n in zip(starts, sizes, strict=True))


def _far(made: bytes, found: bytes, kind: str) -> bool:
    """Whether two arrays are further apart than one rounding: a step of E4M3 or INT8 values, or of a scale's last bit.

    Values of which more than `MOST_OTHER` are a step off are so for another reason than a device's rounding.
    The patterns of floating-point numbers of one sign are ordered as the numbers are.
    """
    import torch

    widths = {FP8: torch.uint8, "I8": torch.int8, "BF16": torch.int16, "F16": torch.int16, "F32": torch.int32}
    if len(made) != len(found) or kind not in widths:
        return True
    a, b = (torch.frombuffer(bytearray(data), dtype=widths[kind]).to(torch.int64) for data in (made, found))
    if kind != "I8":
        sign = {FP8: 0x80, "BF16": 0x8000, "F16": 0x8000, "F32": 0x80000000}[kind]
        a, b = (torch.where((v & sign) != 0, -(v & (sign - 1)), v & (sign - 1)) for v in (a, b))
    nan = kind == FP8 and bool((b.abs() == 0x7F).any())
    apart = (a - b).abs()
    many = kind in (FP8, "I8") and a.numel() > SMALL and float((apart > 0).float().mean()) > MOST_OTHER
    return nan or many or bool(apart.max() > 1)


def _as_dtype(raw: bytes, kind: str, wanted: str) -> bytes:
    """Values that are stored in another dtype, in the one that they are wanted in."""
    import torch

    old, new = _kind(kind), _kind(wanted)
    if old is None or new is None or not raw:
        return raw
    made: bytes = torch.frombuffer(bytearray(raw), dtype=old).to(new).view(torch.uint8).numpy().tobytes()
    return made


def _kind(dtype: str) -> Any:
    """Torch's name for a floating-point dtype of safetensors; None for any other."""
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}.get(dtype)
