"""Low-precision products that only filter: an estimate of each dot, and a proven bound on it.

Rows are put down once as an Operand, in the form that one precision multiplies; `product` fills a
tile with numbers v such that the exact dot of row i of `a` and row j of `b` is

    a.unit(b) * v_ij + a.offset_i   +-   slack_ij
    slack_ij = a.error_i * b.length_j + b.error_j * a.length_i + a.slop_i + b.slop_j

Nothing here decides: what lies within the slack of a decision is computed again exactly.

    int8   rows less a centre m, divided by a step and rounded: x - m = step * q + e. The integer
           dots are exact, and |(x-m).(y-m) - step^2 q_x.q_y| <= |e_x| |y-m| + |e_y| |step q_x|
           (Cauchy-Schwarz), with |e| known for each row. x.y follows by adding m.x and m.y. Where
           a few dimensions are much larger than the rest, and would set the step for all, both
           sides are rotated first (`rotation`), which changes no dot.
    fp32   no centre; gamma_d |x| |y| (see exact.fp32_dot_error_bound)
    bf16   as fp32, and the rounding of both inputs (known) and of the output (2^-8 |x| |y|)
    fp16   CUDA: inputs exact, sums in float32 by tensor cores, which truncate: 4 gamma_d |x| |y|

Which is fastest depends on the machine (`fastest_precision` measures it); results never do.
Legend: N, M rows, D dimensions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from curate.vectors.exact import Float16Rows, fp32_dot_error_bound, full_precision_gemm
from curate.vectors.rotation import rotated, rotation_error

if TYPE_CHECKING:
    import torch

Precision: TypeAlias = Literal["auto", "fp32", "bf16", "int8", "fp16"]

THREADS = "WARREN_THREADS"
"""Environment variable: how many threads the engine may use in this process."""
ROWS_PER_BLOCK = 512  # of the conversion: what fits a core's cache
FITTED_ROWS = 2048
CLIPPED_SHARE = 0.01  # of the rows may have an entry that the step does not reach
FEWEST_FOR_INT8 = 4096
"""Rows that each is compared with, from which int8 is worth the making of its operands."""
WORTH_ROTATING = 1.25  # times finer must the step be: turning costs some 2 us a row
_MAX_SHIFT = 2.0**28  # leaves int32 room for the dot beside it
_UNIT_ROUNDOFF = 2.0**-24


@dataclass(frozen=True, slots=True)
class Operand:
    """Rows as one side of a product; all fields on one device.

    values [n, d]; step: what one unit of a value is worth; offset, error, length, slop: float32
    [n], see the module; error and slop are upper bounds, length is one of |x - m|.
    """

    values: torch.Tensor
    step: float
    offset: torch.Tensor
    error: torch.Tensor
    length: torch.Tensor
    slop: torch.Tensor

    def __len__(self) -> int:
        return len(self.values)

    def unit(self, other: Operand) -> float:
        """Return what one unit of a tile is worth."""
        return self.step * other.step

    def part(self, which: slice) -> Operand:
        """Return some of the rows, without copying."""
        fields = (self.offset, self.error, self.length, self.slop)
        return Operand(self.values[which], self.step, *(field[which] for field in fields))


@dataclass(frozen=True, slots=True)
class Frame:
    """How rows become operands: a precision; for int8 a centre (float32 [d]), step, rotation."""

    precision: Precision
    center_D: torch.Tensor | None = None
    step: float = 1.0
    is_rotated: bool = False

    @property
    def bytes_per_value(self) -> int:
        """Return how large one value of an operand is."""
        return {"int8": 1, "bf16": 2, "fp16": 2}.get(self.precision, 4)

    def operand(self, rows_ND: Float16Rows | NDArray[np.float32] | torch.Tensor) -> Operand:
        """Return the rows as an operand. Rows are finite float16, or float32 on the grid 2^-24."""
        import torch

        rows = as_tensor(rows_ND)
        num_rows, dim = rows.shape
        kind = {"int8": torch.int8, "bf16": torch.bfloat16, "fp16": torch.float16}
        values = torch.empty(
            (num_rows, dim), dtype=kind.get(self.precision, torch.float32), device=rows.device
        )
        figures = torch.empty((4, num_rows), device=rows.device)
        fill = self._quantize if self.precision == "int8" else self._round
        step = ROWS_PER_BLOCK if rows.device.type == "cpu" else 1 << 16
        for start in range(0, num_rows, step):
            part = slice(start, start + step)
            fill(rows[part].float(), values[part], figures[:, part])
        return Operand(values, self.step, *figures)

    def _quantize(self, x_ND: torch.Tensor, out: torch.Tensor, figures: torch.Tensor) -> None:
        import torch

        assert self.center_D is not None, "int8 needs a centre"
        offset, error, length, slop = figures
        off_center = x_ND - self.center_D
        size = torch.linalg.vector_norm(off_center, dim=1)
        center_size = float(torch.linalg.vector_norm(self.center_D)) * 1.001
        torch.mv(off_center, self.center_D, out=offset)
        offset += 0.5 * center_size_squared(self.center_D)
        if self.is_rotated:
            off_center = rotated(off_center)
        levels = (off_center / self.step).round_().clamp_(-127, 127)
        out.copy_(levels)
        rest = off_center.sub_(levels, alpha=self.step)
        # norms in float32 are good to one part in a thousand; x - m was rounded once, 2^-24 of it
        lost = 3 * _UNIT_ROUNDOFF + (rotation_error(x_ND.shape[1]) if self.is_rotated else 0.0)
        error.copy_(torch.linalg.vector_norm(rest, dim=1) * 1.001 + lost * size)
        length.copy_(size * 1.001 + error)
        gamma = fp32_dot_error_bound(x_ND.shape[1] + 8, center_size, 1.01)
        slop.copy_(gamma * (size + center_size) + self.step**2)

    def _round(self, x_ND: torch.Tensor, out: torch.Tensor, figures: torch.Tensor) -> None:
        import torch

        offset, error, length, slop = figures
        out.copy_(x_ND)
        size = torch.linalg.vector_norm(x_ND, dim=1) * 1.001
        gamma = fp32_dot_error_bound(x_ND.shape[1] + 8, 1.0, 1.0)
        share = {"fp16": 2 * gamma, "bf16": gamma / 2 + 2.0**-9}.get(self.precision, gamma / 2)
        lost = torch.linalg.vector_norm(x_ND - out.float(), dim=1) * 1.001
        error.copy_(share * size + lost)
        length.copy_(size + lost)
        offset.zero_()
        slop.fill_(2.0**-40)


def center_size_squared(center_D: torch.Tensor) -> float:
    """Return |m|^2 in float64."""
    return float(center_D.double().square().sum())


def fit(
    rows_ND: Float16Rows | torch.Tensor,
    precision: Precision = "auto",
    *,
    num_compared: int = FEWEST_FOR_INT8,
) -> Frame:
    """Return a frame that suits these rows: their mean, and a step that reaches all but a few.

    Looks at FITTED_ROWS of them at most. Other rows may be put down in it as well: the bound is
    measured row by row, and is only wider for rows that are unlike these.

    Args:
        num_compared: how many rows each is compared with, where the precision is "auto".
    """
    import torch

    few = rows_ND[:: max(1, -(-len(rows_ND) // FITTED_ROWS))]
    sample = as_tensor(few).float()
    chosen = precision
    if precision == "auto":
        chosen = fastest_precision(sample.device.type, is_brief=num_compared < FEWEST_FOR_INT8)
    if chosen != "int8":
        return Frame(chosen)
    center = sample.mean(dim=0) if len(sample) else torch.zeros(sample.shape[1])
    return int8_frame(sample - center, center)


def int8_frame(centered_ND: torch.Tensor, center_D: torch.Tensor) -> Frame:
    """Return the frame for rows like these, less their centre: rotated if that pays."""
    plain = fitted_step(centered_ND, center_D)
    finer = fitted_step(rotated(centered_ND), center_D)
    is_rotated = plain > WORTH_ROTATING * finer
    return Frame("int8", center_D, finer if is_rotated else plain, is_rotated)


def fitted_step(centered_ND: torch.Tensor, center_D: torch.Tensor) -> float:
    """Return the int8 step for rows less their centre.

    Not so small that an offset of |m| times their length would overflow an int32 tile.
    """
    import torch

    if not len(centered_ND):
        return 1.0
    largest = centered_ND.abs().amax(dim=1)
    reach = float(torch.quantile(largest, 1.0 - CLIPPED_SHARE))
    length = float(torch.linalg.vector_norm(centered_ND, dim=1).max())
    offsets = (float(torch.linalg.vector_norm(center_D)) + length + 1.0) ** 2
    return max(reach / 127, float(np.sqrt(8 * offsets / _MAX_SHIFT)))


def product(a: Operand, b: Operand, buffer: torch.Tensor) -> torch.Tensor:
    """Return the tile of all pairs, [len(a), len(b)], in the head of a flat buffer.

    The buffer is `tile_buffer`'s. For int8 the offsets of `b` are added, rounded to one unit (which
    `slop` covers), so that the whole tile has one scale and only the rows have offsets.
    """
    import torch

    tile = buffer[: len(a) * len(b)].view(len(a), len(b))
    if a.values.dtype == torch.int8:
        torch._int_mm(a.values, b.values.T, out=tile)
        shift = (b.offset.double() / a.unit(b)).round_().clamp_(-_MAX_SHIFT, _MAX_SHIFT)
        return tile.add_(shift.to(torch.int32))
    if a.values.dtype == torch.float16:
        return torch.mm(a.values, b.values.T, out_dtype=torch.float32, out=tile)
    return torch.mm(a.values, b.values.T, out=tile)


def tile_buffer(frame: Frame, num_pairs: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return a flat buffer for tiles of up to `num_pairs` pairs."""
    import torch

    kinds = {"int8": torch.int32, "bf16": torch.bfloat16}
    return torch.empty(
        num_pairs, dtype=kinds.get(frame.precision, torch.float32), device=torch.device(device)
    )


def as_tensor(rows_ND: Float16Rows | NDArray[np.float32] | torch.Tensor) -> torch.Tensor:
    """Return an array as a tensor, copied only where torch could not share it."""
    import torch

    if isinstance(rows_ND, torch.Tensor):
        return rows_ND
    return torch.from_numpy(np.require(rows_ND, requirements=("C", "W")))


def own_device() -> str:
    """Return where this process's products are made fastest: "cuda" where it has a GPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def engine_threads(device: str | None = None) -> Iterator[None]:
    """Let torch use the threads that WARREN_THREADS grants, in full precision, without gradients.

    Without the variable torch's own setting holds. Args: device: as torch names it; "cpu" if None.
    """
    import torch

    before = torch.get_num_threads()
    granted = os.environ.get(THREADS)
    if granted:
        torch.set_num_threads(max(1, int(granted)))
    try:
        with full_precision_gemm(torch.device(device or "cpu").type):
            yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=4)
def fastest_precision(device_type: str = "cpu", *, is_brief: bool = False) -> Precision:
    """Return the precision whose product is the fastest on this machine, measured once.

    Args:
        is_brief: too few products for int8, whose operands are the dearest to make.
    """
    if device_type == "cuda":
        return "fp16"
    rates = {kind: rate for kind, rate in _rates().items() if kind != "int8" or not is_brief}
    best = max(rates, key=lambda precision: rates[precision])
    return best if rates[best] > 1.3 * rates["fp32"] else "fp32"


@lru_cache(maxsize=1)
def _rates() -> dict[Precision, float]:
    """Return products per second of one thread in each precision, by its own CPU time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {precision: _rate(precision) for precision in _usable_on_cpu()}
    finally:
        torch.set_num_threads(before)


def _usable_on_cpu() -> list[Precision]:
    import torch

    usable: list[Precision] = ["fp32"]
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        usable.append("bf16")
    if torch.cpu._is_vnni_supported() and _int8_is_exact():
        usable.append("int8")
    return usable


def _int8_is_exact() -> bool:
    """Tell whether integer products are free of saturation, which old instruction sets have."""
    import torch

    rows = torch.tensor([127, -127], dtype=torch.int8).repeat_interleave(32)[:, None]
    rows = rows.expand(64, 768).contiguous()
    truth = rows.double() @ rows.double().T
    return bool((torch._int_mm(rows, rows.T).double() == truth).all())


def _rate(precision: Precision, *, side: int = 1024, dim: int = 768) -> float:
    """Return products per second of one tile."""
    import torch

    frame = Frame(precision, torch.zeros(dim), 1.0)
    rows = torch.arange(side * dim, dtype=torch.float32).remainder_(7).view(side, dim)
    operand, buffer = frame.operand(rows), tile_buffer(frame, side * side)
    seconds = []
    for _ in range(4):
        started = time.thread_time()
        product(operand, operand, buffer)
        seconds.append(time.thread_time() - started)
    return 1.0 / min(seconds[1:])
