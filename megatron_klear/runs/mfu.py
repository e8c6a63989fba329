"""Model FLOPs utilisation: the share of a device's dense peak that the model's arithmetic made use of."""

from __future__ import annotations

from megatron_klear.models.architecture import Architecture

PEAK_BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200", 989.4),
    ("H100 PCIE", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 6000 ADA", 364.2),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)
"""Dense bf16 peak with fp32 accumulation, from the makers' data sheets, without sparsity; matched in this order."""


def peak_tflops(device_name: str | None) -> float | None:
    """Dense bf16 peak of the GPU that CUDA calls `device_name`; None for unknown ones and where there is no GPU."""
    words = f" {(device_name or '').upper().replace('-', ' ')} "
    if " LAPTOP " in words:
        return None
    return next((peak for name, peak in PEAK_BF16_TFLOPS if f" {name} " in words), None)


def utilisation(
    architecture: Architecture,
    tokens_per_second: float,
    mean_context: float,
    peak_tflops: float,
    num_devices: int,
    *,
    frozen: bool = False,
) -> float:
    """MFU of a run, 0 to 1.

    `mean_context` is what a token attends to on average, over a step: sum(length * (length + 1) / 2) / tokens. The
    matrices of a `frozen` model take two products a token and not three: they have no gradient; its adapters, some per
    cent, are not counted.
    """
    flops = architecture.flops_per_token(mean_context)
    if frozen:
        flops -= architecture.flops_per_token(0.0) / 3
    achieved = flops * tokens_per_second
    return achieved / (peak_tflops * 1e12 * num_devices)
