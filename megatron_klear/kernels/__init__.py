"""The fused policy loss beside its plain-torch reference."""

from megatron_klear.kernels.extension import Availability, KernelUnavailable, available

__all__ = ["Availability", "KernelUnavailable", "available"]
