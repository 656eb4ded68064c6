"""PackedRows: rows of embedding tables in 32, 16, 8 or 4 bits per value, read-only.

At 8 and 4 bits a value is a code of b bits. A *stretch*, the rows that one table stores at one width, is quantised
uniformly, column by column:

    out = code * scale + offset,   code = round((value - offset) / scale) in 0 .. 2^b - 1

The codes span the range of the column, shrunk towards its mean by the factor in CLIPS with the smallest squared error; a
value outside this range gets the code of its nearer end. A byte holds two codes of 4 bits: column j of
the first half in the low bits, column j of the second half in the high bits.

Axes: N rows, W columns, T stretches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Shares of the way from a column's mean to its largest and its smallest value that the codes may span; 1 clips nothing.
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
# Rows coded at a time, which bounds the memory that coding takes.
CHUNK_ROWS = 65_536


class PackedRows(nn.Module):
    """Rows of one width and precision, from one table or several. They are zero until they are stored.

    Args:
        num_rows: Number of rows, N.
        width: Columns of each row, W.
        bits: Bits per value: 32, 16, 8 or 4.
        num_stretches: Number of stretches, T. At 8 and 4 bits each has a scale and an offset for every column.

    Attributes:
        values: (N, W) stored values; uint8 codes at 8 bits, and (N, (W + 1) // 2) bytes of two codes at 4 bits.
        scale: (T, W) step from one code to the next; only at 8 and 4 bits.
        offset: (T, W) value of code 0; only at 8 and 4 bits.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, num_rows: int, width: int, bits: int, num_stretches: int) -> None:
        super().__init__()
        self.width, self.bits = width, bits
        dtype = {32: torch.float32, 16: torch.float16}.get(bits, torch.uint8)
        columns = (width + 1) // 2 if bits == 4 else width
        self.register_buffer("values", torch.zeros(num_rows, columns, dtype=dtype))
        if bits <= 8:
            self.register_buffer("scale", torch.zeros(num_stretches, width))
            self.register_buffer("offset", torch.zeros(num_stretches, width))

    @torch.no_grad()
    def store(self, stretch: int, rows_N: Tensor, values_NW: Tensor) -> None:
        """Pack all rows of a stretch.

        Args:
            stretch: Number of the stretch.
            rows_N: int64 rows to write to.
            values_NW: Values of these rows.
        """
        if self.bits > 8:
            self.values[rows_N] = values_NW.to(self.values.dtype)
            return
        values_NW = values_NW.float()
        scale_W, offset_W = fit_codes(values_NW, self.bits)
        self.scale[stretch], self.offset[stretch] = scale_W, offset_W
        for place_N, part_NW in zip(rows_N.split(CHUNK_ROWS), values_NW.split(CHUNK_ROWS), strict=True):
            codes_NW = codes_of(part_NW, scale_W, offset_W, self.bits).to(torch.uint8)
            if self.bits == 4:
                low, high = codes_NW.split([self.values.shape[1], self.width // 2], 1)
                codes_NW = low
                codes_NW[:, : high.shape[1]] += high << 4
            self.values[place_N] = codes_NW

    def forward(self, index: Tensor, stretch_C: Tensor) -> Tensor:
        """fp32 rows (.., C, W) for row numbers `index` (.., C); column c of `index` reads rows of stretch `stretch_C[c]`."""
        found = self.values.index_select(0, index.reshape(-1)).view(*index.shape, self.values.shape[1])
        if self.bits > 8:
            return found.float()
        found = found.float()
        if self.bits == 4:  # in floats, where ONNX has all the operators
            high = (found / 16).floor()
            found = torch.cat([found - 16 * high, high], -1)[..., : self.width]
        return found * self.scale.index_select(0, stretch_C) + self.offset.index_select(0, stretch_C)


def fit_codes(values_NW: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and offset (W,) of the columns, chosen for the smallest squared error. A constant column has scale 0."""
    if not len(values_NW):
        return values_NW.new_zeros(values_NW.shape[1]), values_NW.new_zeros(values_NW.shape[1])
    low_W, high_W = torch.aminmax(values_NW, dim=0)
    mean_W = values_NW.mean(0).clamp(low_W, high_W)
    best_scale_W, best_offset_W, least_W = torch.zeros_like(low_W), low_W, torch.full_like(low_W, torch.inf)
    for clip in CLIPS:
        # lerp is exact at weight 1, so the offset of a range that is not clipped is the smallest value itself.
        offset_W = torch.lerp(mean_W, low_W, clip)
        scale_W = (torch.lerp(mean_W, high_W, clip) - offset_W) / (2**bits - 1)
        error_W = torch.zeros_like(low_W)
        for part in values_NW.split(CHUNK_ROWS):
            error_W += (as_coded(part, scale_W, offset_W, bits) - part).square().sum(0)
        better_W = error_W < least_W
        best_scale_W = torch.where(better_W, scale_W, best_scale_W)
        best_offset_W = torch.where(better_W, offset_W, best_offset_W)
        least_W = torch.where(better_W, error_W, least_W)
    return best_scale_W, best_offset_W


def codes_of(values_NW: Tensor, scale_W: Tensor, offset_W: Tensor, bits: int) -> Tensor:
    """Codes (N, W), as floats: whole numbers from 0 to 2^bits - 1."""
    steps_NW = (values_NW - offset_W) / torch.where(scale_W > 0, scale_W, 1.0)
    return steps_NW.round().clamp(0, 2**bits - 1)


def as_coded(values_NW: Tensor, scale_W: Tensor, offset_W: Tensor, bits: int) -> Tensor:
    """Values (N, W) as their codes read."""
    return codes_of(values_NW, scale_W, offset_W, bits) * scale_W + offset_W
