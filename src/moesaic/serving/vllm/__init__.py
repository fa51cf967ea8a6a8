"""vLLM serves our checkpoints as they are; needs the extra `vllm`.

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`. It
then knows converted models of the decoders in `SERVED` by the architecture that their config.json
names, so that `vllm serve DIR` needs no remote code and runs its own attention and fused experts.
"""

from __future__ import annotations

from typing import Any

from moesaic.models.architectures import ARCHITECTURES

# Dense model types whose class in vLLM keeps its networks in `model.layers[i].mlp`, all of SiLU.
SERVED = ("llama", "mistral", "qwen2", "qwen3")


def register() -> None:
    """Make vLLM know converted models, without importing what runs them."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.transformers_utils import model_arch_config_convertor as convertors

    from moesaic.models.export._obstacles import read_layers
    from moesaic.serving.vllm.obstacles import check_config

    class Check(VerifyAndUpdateConfig):
        """Refuses what cannot be served before a process is started for it."""

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            check_config(model_config.hf_config)

    class Facts(convertors.ModelArchConfigConvertorBase):
        """Says that there are experts, which expert parallelism asks for."""

        def get_num_experts(self) -> int:
            return max(layer.num_experts for layer in read_layers(self.hf_config))

    for model_type in SERVED:
        row = ARCHITECTURES[model_type]
        name = f"Moesaic{row.name}ForCausalLM"
        ModelRegistry.register_model(name, f"moesaic.serving.vllm.model:{name}")
        MODELS_CONFIG_MAP[name] = Check
        convertors.MODEL_ARCH_CONFIG_CONVERTORS[row.moesaic_type] = Facts
