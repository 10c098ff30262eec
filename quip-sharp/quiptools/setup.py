"""Build quiptools: the CPU kernels always, the CUDA kernels where a CUDA device and nvcc are found."""

import subprocess
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler

HERE = Path(__file__).resolve().parent
with_cuda = torch.cuda.is_available() and CUDA_HOME is not None and (Path(CUDA_HOME) / "bin" / "nvcc").is_file()
patterns = ["csrc/cpu_*.cpp", *(["csrc/cuda_*.cpp", "csrc/cuda_*.cu"] if with_cuda else [])]
flags = ["-O3", "-std=c++20", "-Wall", "-Wno-psabi"]
# at::parallel_for is one thread without OpenMP. GCC's calls are answered by the runtime that PyTorch brings along,
# which is not linked a second time, so that torch.set_num_threads holds here too; Clang's calls are to another one.
macros = subprocess.run(
    [get_cxx_compiler(), "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True, check=True
).stdout
if torch.backends.openmp.is_available() and "__clang__" not in macros:
    flags.append("-fopenmp")
extension = (CUDAExtension if with_cuda else CppExtension)(
    "quiptools._library",
    sorted(str(path.relative_to(HERE)) for pattern in patterns for path in HERE.glob(pattern)),
    include_dirs=[str(HERE / "csrc")],
    extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++20"]},
)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)})
