"""What the CUDA kernels decode, on the host: every weight of every kind of scheme, to the byte where rows end."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from casp_aqlm.linear import AQLMLinear, decode
from casp_aqlm.packing import pack
from casp_aqlm.scheme import Scheme

SOURCES = Path(__file__).resolve().parents[2] / "quip-sharp/quiptools/csrc"

#: Reads bits, codebooks, group, rows, columns, bytes of a row, then codes and codebooks; writes the sums of codewords.
PROGRAM = """
#include <cstdio>
#include <vector>
#include "cuda_aqlm_decode.h"
using namespace quiptools;
int main(int, char** names) {
  FILE* in = std::fopen(names[1], "rb");
  int32_t head[6];
  if (std::fread(head, sizeof head, 1, in) != 1) return 1;
  int64_t rows = head[3], columns = head[4], bytes = head[5], groups = (columns + head[2] - 1) / head[2];
  std::vector<float> words((static_cast<size_t>(head[1]) << head[0]) * head[2]), out(rows * columns);
  CudaAQLM m{nullptr, words.data(), head[0], head[1], head[2], rows, columns, bytes, groups};
  std::vector<std::vector<uint8_t>> codes(rows, std::vector<uint8_t>(bytes));  // a row each: its end is the end
  for (auto& row : codes) std::fread(row.data(), 1, bytes, in);
  std::fread(words.data(), sizeof(float), words.size(), in);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t n = 0; n < columns; n++)
      for (int k = 0; k < m.count; k++)
        out[r * columns + n] += word_at(m, words.data(), codes[r].data(), n / m.group, k)[n % m.group];
  return std::fwrite(out.data(), sizeof(float), out.size(), std::fopen(names[2], "wb")) != out.size();
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_every_weight_is_exact_on_the_host(tmp_path: Path):
    (tmp_path / "program.cpp").write_text(PROGRAM)
    program = tmp_path / "program"
    command = ["c++", "-std=c++17", "-O1", f"-I{SOURCES}"]
    looks = ["c++", "-fsanitize=address", "-x", "c++", "-", "-o", str(tmp_path / "nothing")]
    if subprocess.run(looks, input=b"int main() {}", capture_output=True).returncode == 0:
        command.append("-fsanitize=address")  # where it is there, what is read behind a row is told
    subprocess.run([*command, str(tmp_path / "program.cpp"), "-o", str(program)], check=True)
    generator = torch.Generator().manual_seed(0)
    for name in ("2x8g8", "1x8g4", "4x8g8", "3x8g12", "2x5g8", "1x3g5", "2x6g4", "1x10g4", "2x12g8", "1x16g8", "3x7g3"):
        scheme = Scheme.parse(name, "float16")
        for rows, columns in ((33, 136), (5, 17), (1, 1)):
            shape = (rows, scheme.groups(columns), scheme.codebooks)
            codes = torch.randint(0, scheme.size, shape, generator=generator)
            words = torch.randn(scheme.codebooks, scheme.size, scheme.group, generator=generator)
            packed = pack(codes.flatten(1), scheme.code_bits)
            sizes = (scheme.code_bits, scheme.codebooks, scheme.group, rows, columns, packed.shape[1])
            assert packed.shape == AQLMLinear(rows, columns, False, scheme.format).codes.shape
            parts = (torch.tensor(sizes, dtype=torch.int32), packed, words)
            (tmp_path / "matrix").write_bytes(b"".join(part.numpy().tobytes() for part in parts))
            subprocess.run([program, tmp_path / "matrix", tmp_path / "weights"], check=True)
            found = torch.frombuffer(bytearray((tmp_path / "weights").read_bytes()), dtype=torch.float32)
            assert torch.equal(found.view(rows, columns), decode(codes, words)[:, :columns]), (name, rows, columns)
