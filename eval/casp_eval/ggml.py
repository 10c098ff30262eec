"""A matrix product of llama.cpp's ggml in IQ2_XXS, its format of about 2 bits, to hold our kernels against.

IQ2_XXS is of the same kind as ours: for 8 weights an entry of a table of 256 and 7 signs, the eighth their parity, and
a scale for each 256 weights; 2.06 bits a weight. ggml rounds the activations to 8 bits and runs on the CPU only. The
library is called through its C interface, from a folder where somebody built it.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from casp.errors import UserError

IQ2_XXS = 16  # number of the type in ggml.h
BLOCK, BLOCK_BYTES = 256, 66  # weights that share a scale: a float16, then 64 bytes of entries, signs and small scales
_GRAPH_BYTES = 1 << 20  # for the headers of a few tensors and a graph
_LIBRARIES = ("libggml-base.so", "libggml-cpu.so")


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Library:
    """ggml's functions, from the folder of a build (searched as a whole); UserError where they are not there."""

    def __init__(self, folder: Path) -> None:
        files = [next(folder.rglob(name), None) for name in _LIBRARIES]
        if None in files:
            raise UserError(
                f"--ggml {folder} holds no {' and '.join(_LIBRARIES)}; build llama.cpp's folder ggml with "
                "`cmake -S ggml -B DIR -DBUILD_SHARED_LIBS=ON && cmake --build DIR` and name that DIR."
            )
        try:
            self.base, self.cpu = (ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL) for file in files)
            pointer, count = ctypes.c_void_p, ctypes.c_int64
            for library, name, result, arguments in (
                (self.base, "ggml_init", pointer, (_InitParams,)),
                (self.base, "ggml_free", None, (pointer,)),
                (self.base, "ggml_new_tensor_2d", pointer, (pointer, ctypes.c_int, count, count)),
                (self.base, "ggml_get_data", pointer, (pointer,)),
                (self.base, "ggml_nbytes", ctypes.c_size_t, (pointer,)),
                (self.base, "ggml_mul_mat", pointer, (pointer, pointer, pointer)),
                (self.base, "ggml_new_graph", pointer, (pointer,)),
                (self.base, "ggml_build_forward_expand", None, (pointer, pointer)),
                (self.base, "ggml_backend_graph_compute", ctypes.c_int, (pointer, pointer)),
                (self.cpu, "ggml_backend_cpu_init", pointer, ()),
                (self.cpu, "ggml_backend_cpu_set_n_threads", None, (pointer, ctypes.c_int)),
            ):
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise UserError(f"--ggml {folder} cannot be used ({error}); build a current llama.cpp's ggml.") from error
        self.backend = self.cpu.ggml_backend_cpu_init()
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, torch.get_num_threads())


def random_blocks(out_features: int, in_features: int) -> Tensor:
    """Weights of IQ2_XXS, all bits random but those of the scales, which are 1/64: (out, in / 256, 66) uint8."""
    blocks = torch.randint(0, 256, (out_features, in_features // BLOCK, BLOCK_BYTES), dtype=torch.uint8)
    blocks[..., :2] = torch.tensor([1 / 64], dtype=torch.float16).view(torch.uint8)
    return blocks


class Product:
    """`x W^T` with W in IQ2_XXS, `blocks` (out, in / 256, 66) uint8, for x (batch, in) float32."""

    def __init__(self, library: Library, blocks: Tensor, x: Tensor) -> None:
        self.library, base = library, library.base
        out_features, in_features, batch = len(blocks), blocks.shape[1] * BLOCK, len(x)
        size = blocks.nbytes + x.nbytes + 4 * batch * out_features + _GRAPH_BYTES
        self.context = base.ggml_init(_InitParams(size, None, False))
        weight = base.ggml_new_tensor_2d(self.context, IQ2_XXS, in_features, out_features)
        inputs = base.ggml_new_tensor_2d(self.context, 0, in_features, batch)
        self.result = base.ggml_mul_mat(self.context, weight, inputs)
        for tensor, values in ((weight, blocks), (inputs, x.float())):
            ctypes.memmove(base.ggml_get_data(tensor), values.contiguous().data_ptr(), base.ggml_nbytes(tensor))
        self.graph = base.ggml_new_graph(self.context)
        base.ggml_build_forward_expand(self.graph, self.result)
        self.shape = (batch, out_features)

    def __call__(self) -> Tensor:
        """Compute it: (batch, out) float32, which the next call overwrites."""
        base = self.library.base
        if base.ggml_backend_graph_compute(self.library.backend, self.graph):
            raise UserError("ggml could not compute a product; leave --ggml away or build it again.")
        memory = (ctypes.c_float * (self.shape[0] * self.shape[1])).from_address(base.ggml_get_data(self.result))
        return torch.frombuffer(memory, dtype=torch.float32).view(self.shape)

    def __del__(self) -> None:
        self.library.base.ggml_free(self.context)
