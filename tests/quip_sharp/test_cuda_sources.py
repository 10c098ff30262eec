"""The CUDA kernels where there is no GPU: they compile, and what decodes a code on the device is right on the host."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from casp_quip_sharp.codebooks import STAGES, decode, table
from casp_quip_sharp.kernels import _tables

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


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, the CUDA compiler")
def test_nvcc_compiles_the_kernels_and_they_fit_the_registers(tmp_path: Path):
    command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_80", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command += ["-c", str(SOURCES / "cuda_kernels.cu"), "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill" in line]
    assert len(spills) == 20  # four formats, each to decode and for 1, 2, 4 and 8 vectors
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)


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
