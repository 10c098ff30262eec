"""Imports what every stage needs: processes forked from one that has imported this begin with the stage's work."""

import importlib

import torch

STAGES = ("casp_svd", "casp_gptq", "casp_quip_sharp", "casp_aqlm", "casp.moments", "casp.plan")
for name in ("small_stages", "casp.job", *(f"{stage}.__main__" for stage in STAGES)):
    importlib.import_module(name)
torch.set_num_threads(1)
