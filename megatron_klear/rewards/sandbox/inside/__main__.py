"""The zygote's start: `python -P inside CONTROL_DESCRIPTOR USER NAMESPACES READ_ALL PACKAGE...`."""

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Python's own library alone, whatever was installed into this interpreter.
sys.path[:] = [path for path in sys.path if path != str(HERE) and not path.endswith("-packages")]
sys.path.append(str(HERE.parent))
_zygote = importlib.import_module(f"{HERE.name}.zygote")
sys.path.remove(str(HERE.parent))  # programs find nothing of this
_zygote.main(sys.argv[1:])
