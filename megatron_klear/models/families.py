"""The families there are, by `model_type`."""

from megatron_klear.models.family import Family
from megatron_klear.models.llama import LLAMA
from megatron_klear.models.qwen2 import QWEN2
from megatron_klear.models.qwen3 import QWEN3
from megatron_klear.models.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {family.model_type: family for family in (QWEN3, QWEN2, LLAMA, QWEN3_MOE)}
