# Run at the start of every Python process of an environment that has CASP; the build backend packs it into a .pth file.
# It looks up no file and imports nothing: it compares names, until one of the libraries below is imported.
import os
import sys

CASP_WAITS_FOR = {
    "transformers.quantizers.auto",
    "accelerate.big_modeling",
    "peft.tuners.tuners_utils",
    "peft.tuners.lora.model",
}


class CaspFinder:
    def find_spec(self, name, path=None, target=None):
        if name not in CASP_WAITS_FOR:
            return None
        try:
            from casp_entry import hook
        except ImportError:  # an editable CASP that was moved away: transformers then refuses our checkpoints
            return None
        return hook.spec_with_sequel(name, path, target)


# Python reads the .pth files of a virtual environment twice.
if not os.environ.get("CASP_NO_HOOK") and not any(type(one).__name__ == "CaspFinder" for one in sys.meta_path):
    sys.meta_path.insert(0, CaspFinder())
