"""The CUDA kernels where there is no GPU: they compile, and what decodes a code on the device is right on the host."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from casp_quip_sharp.codebooks import STAGES, decode, table
from casp_quip_sharp.kernels import _tables
from casp_quip_sharp.trellis.layout import STRIP, to_storage
from casp_quip_sharp.trellis.walks import walk_states

SOURCES = Path(__file__).resolve().parents[2] / "quip-sharp/quiptools/csrc"

#: Prints nothing: reads the tables, writes the points of all codes as float32.
PROGRAM = """
#include <cstdio>
#include "cuda_decode.h"
using namespace quiptools;
int main(int, char** names) {
  static float tables[2][256][8], out[65536 + 256][8];
  FILE* in = std::fopen(names[1], "rb");
  if (std::fread(tables, sizeof tables, 1, in) != 1) return 1;
  for (uint32_t code = 0; code < 65536; code++) add_e8p(code, pack(tables[0][code & 255]), 1.0f, out[code]);
  for (uint32_t code = 0; code < 256; code++) add_e8(pack(tables[1][code]), 31 / 64.0f, out[65536 + code]);
  return std::fwrite(out, sizeof out, 1, std::fopen(names[2], "wb")) != 1;
}
"""


#: Reads rate, states, count of masks, rows, columns, sizes, then codes, table and masks; writes the weights in units.
TRELLIS_PROGRAM = """
#include <cstdio>
#include <vector>
#include "cuda_trellis_decode.h"
using namespace quiptools;
int main(int, char** names) {
  FILE* in = std::fopen(names[1], "rb");
  int32_t head[7];
  if (std::fread(head, sizeof head, 1, in) != 1) return 1;
  std::vector<uint8_t> codes(head[5]), masks(head[2] + 1);
  std::vector<int8_t> table(head[6]);
  std::fread(codes.data(), 1, codes.size(), in);
  std::fread(table.data(), 1, table.size(), in);
  std::fread(masks.data(), 1, head[2], in);
  const uint8_t* picked = head[2] ? masks.data() : nullptr;
  CudaTrellis m{codes.data(), table.data(), picked, head[0], head[1], head[2], head[3], head[4]};
  std::vector<int8_t> out(m.rows * m.columns);
  for (int64_t r = 0; r < m.rows; r++)
    for (int64_t g = 0; g * kCudaWay < m.columns; g++) {
      uint32_t windows[kCudaWay];
      CudaGroup group = group_of(m, r / kCudaStrip, g);
      windows_of(m, group, r % kCudaStrip, windows);
      for (int j = 0; j < group.way; j++) out[r * m.columns + g * kCudaWay + j] = entry_of(m, windows[j]);
    }
  return std::fwrite(out.data(), 1, out.size(), std::fopen(names[2], "wb")) != out.size();
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, the CUDA compiler")
@pytest.mark.parametrize(
    ("source", "kernels"),
    [
        ("cuda_kernels.cu", 20),  # four formats, each to decode and for 1, 2, 4 and 8 vectors
        ("cuda_aqlm.cu", 13),  # to decode, and groups of 8, 4 and any number for 1, 2, 4 and 8 vectors
        ("cuda_trellis.cu", 12),  # narrow and wide states, each to decode and for 1, 2, 4, 8 and 16 vectors
    ],
)
def test_nvcc_compiles_the_kernels_and_they_fit_the_registers(tmp_path: Path, source, kernels):
    command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_80", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command += ["-c", str(SOURCES / source), "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill" in line]
    assert len(spills) == kernels
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)


def parities(windows, masks):
    """Bit i is the parity of each window's bits in masks[i]."""
    bits = windows[..., None, None] >> torch.arange(8) & masks[:, None].long() >> torch.arange(8) & 1
    return ((bits.sum(-1) & 1) << torch.arange(len(masks))).sum(-1)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_every_code_is_exact_on_the_host(tmp_path: Path):
    (tmp_path / "program.cpp").write_text(PROGRAM)
    program = tmp_path / "program"
    command = ["c++", "-std=c++17", "-O1", f"-I{SOURCES}", str(tmp_path / "program.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    torch.stack(_tables(torch.device("cpu"))).numpy().tofile(tmp_path / "tables")
    subprocess.run([program, tmp_path / "tables", tmp_path / "points"], check=True)
    points = torch.frombuffer(bytearray((tmp_path / "points").read_bytes()), dtype=torch.float32).view(-1, 8)
    assert torch.equal(points[:65536], table("e8p").float() / 4)
    assert torch.equal(points[65536:], decode(torch.arange(256).to(torch.uint8), STAGES[3][1]))


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_every_weight_of_the_trellis_is_exact_on_the_host(tmp_path: Path):
    (tmp_path / "program.cpp").write_text(TRELLIS_PROGRAM)
    program = tmp_path / "program"
    command = ["c++", "-std=c++17", "-O1", f"-I{SOURCES}", str(tmp_path / "program.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    for bits in range(1, 7):
        for states, count in ((8, 4), (8, 6), (10, 0), (12, 0)):
            for rows, columns in ((300, 30), (264, 12), (33, 7), (8, 3), (1, 5)):
                symbols = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
                table = torch.randint(-128, 128, (1 << (count or states),)).to(torch.int8)
                masks = torch.randint(1, 256, (count,)).to(torch.uint8)
                windows = torch.cat([walk_states(strip, bits, states) for strip in symbols.split(STRIP)])
                numbers = parities(windows, masks) if count else windows
                codes = to_storage(symbols, bits)
                head = torch.tensor([bits, states, count, rows, columns, len(codes), len(table)], dtype=torch.int32)
                parts = (head.numpy(), codes.numpy(), table.numpy(), masks.numpy())
                (tmp_path / "matrix").write_bytes(b"".join(part.tobytes() for part in parts))
                subprocess.run([program, tmp_path / "matrix", tmp_path / "weights"], check=True)
                found = torch.frombuffer(bytearray((tmp_path / "weights").read_bytes()), dtype=torch.int8)
                assert torch.equal(found.view(rows, columns), table[numbers]), (bits, states, rows, columns)
