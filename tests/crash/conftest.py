"""Makes the modules beside the tests importable, for the processes that the tests start too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
