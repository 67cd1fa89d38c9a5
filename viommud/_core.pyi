# The cffi extension built from csrc/viommu.h: its types are C's, and viommud.engine is where they end.
from typing import Any

ffi: Any
lib: Any
