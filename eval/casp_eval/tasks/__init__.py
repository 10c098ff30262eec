"""The built-in questions about pictures as tasks of lmms-eval and lm-eval: folders for their --include-path."""

from pathlib import Path

LMMS_EVAL = Path(__file__).parent / "lmms_eval"
LM_EVAL = Path(__file__).parent / "lm_eval"
