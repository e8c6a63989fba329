"""The zygote's start: `python -I inside CONTROL_DESCRIPTOR USER NAMESPACES READ_ALL`."""

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if path != str(HERE)] + [str(HERE.parent)]
_zygote = importlib.import_module(f"{HERE.name}.zygote")
sys.path.remove(str(HERE.parent))  # programs find nothing of this
_zygote.main(sys.argv[1:])
