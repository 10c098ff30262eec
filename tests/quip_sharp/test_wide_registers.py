"""The kernels' code for registers of 16 floats, which AVX-512 runs, on any CPU: the compiler splits the registers."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from casp_quip_sharp.codebooks import STAGES
from casp_quip_sharp.kernels import _tables, decoded

SOURCES = Path(__file__).resolve().parents[2] / "quip-sharp/quiptools/csrc"
BLOCK = 16  # kBlock of cpu_kernels.h

PROGRAM = """
#define QUIPTOOLS_ISA wide
#define QUIPTOOLS_LANES 16
#define QUIPTOOLS_LANE_SHIFTS 1
#include "cpu_kernels_source.h"
using namespace quiptools;
extern "C" void run(int book, int residual_book, const void* codes, const void* residual, float residual_scale,
                    const float* patterns, const float* points, int64_t groups, int64_t rows, float* decoded,
                    const float* x, const float* quarter_sums, int64_t batch, float* y) {
  Matrix m{Book(book), Book(residual_book), codes, residual, residual_scale, patterns, points, groups};
  wide::kKernels.decode(m, 0, rows, decoded);
  wide::kKernels.product(m, x, quarter_sums, batch, 0, rows, rows, y);
}
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    (folder / "wide.cpp").write_text(PROGRAM)
    command = [
        "c++",
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        "-Wno-psabi",
        f"-I{SOURCES}",
        "wide.cpp",
        "-o",
        "wide.so",
    ]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "wide.so"))


def quarter_sums(x, groups):
    """As `Kernels::product` wants them: in whole blocks those of even number first."""
    sums = x.view(len(x), groups, 8).sum(-1) / 4
    whole = groups // BLOCK * BLOCK
    blocks = sums[:, :whole].view(len(x), -1, BLOCK // 2, 2).transpose(2, 3).reshape(len(x), -1)
    return torch.cat([blocks, sums[:, whole:]], 1).contiguous()


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("groups", [5, 16, 37])  # at the edge of a block of codes, in one, in several
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_wide_registers_compute_the_same(wide, bits, groups):
    rows, books = 13, []
    codes = []
    for stage in STAGES[bits]:
        whole_range = (0, 256) if stage.dtype == torch.uint8 else (-(2**15), 2**15)
        codes.append(torch.randint(*whole_range, (rows, groups)).to(stage.dtype))
        books.append(1 if stage.dtype == torch.uint8 else 2)
    codes, books = [*codes, None][:2], [*books, 0][:2]
    points = decoded(*codes, bits)
    patterns, small = (tensor.float().contiguous() for tensor in _tables(torch.device("cpu")))
    scale = STAGES[bits][-1].scale if codes[1] is not None else 0.0

    def pointer(tensor):
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

    for batch in (1, 2, 4, 7):
        x = torch.randn(batch, 8 * groups)
        sums, out, y = quarter_sums(x, groups), torch.empty(rows, 8 * groups), torch.empty(batch, rows)
        wide.run(
            *books,
            *(pointer(code) for code in codes),
            ctypes.c_float(scale),
            pointer(patterns),
            pointer(small),
            *(ctypes.c_int64(size) for size in (groups, rows)),
            pointer(out),
            pointer(x),
            pointer(sums),
            ctypes.c_int64(batch),
            pointer(y),
        )
        assert torch.equal(out, points)
        exact = x.double() @ points.double().T
        assert (y - exact).abs().max() <= 1e-6 * (x.abs() @ points.abs().T).amax()
