"""Build quiptools: the CPU kernels always, the CUDA kernels where a CUDA device and nvcc are found."""

from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

HERE = Path(__file__).resolve().parent
with_cuda = torch.cuda.is_available() and CUDA_HOME is not None and (Path(CUDA_HOME) / "bin" / "nvcc").is_file()
patterns = ["csrc/cpu_*.cpp", *(["csrc/cuda_*.cpp", "csrc/cuda_*.cu"] if with_cuda else [])]
flags = ["-O3", "-std=c++20", "-Wall", "-Wno-psabi"]
extension = (CUDAExtension if with_cuda else CppExtension)(
    "quiptools._library",
    sorted(str(path.relative_to(HERE)) for pattern in patterns for path in HERE.glob(pattern)),
    include_dirs=[str(HERE / "csrc")],
    extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++20"]},
)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)})
