"""The tools import each other from their own folder, as they do when one is run as a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
