"""The decoders of transformers whose feed-forward networks we can cut, as data.

A new architecture is one row here: where its layers are, where in a layer the feed-forward
network stands and what its matrices are called. `tests/models` then proves the row.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesaic._errors import InputError
from moesaic._registry import unknown_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One architecture.

    Attributes:
        model_type: As in its config.json.
        name: Prefix of its classes in transformers: `{name}{config}` and `{name}{head}`.
        config: Suffix of its config class.
        head: Suffix of its causal language model class.
        layers: Path of the list of decoder layers.
        ffn: Path, in a layer, of the module that an MoE layer replaces.
        gate: Path of the gate matrix; empty for a plain network.
        up: Path of the up matrix; with `fused`, it holds the gate rows first.
        down: Path of the down matrix.
        fused: Whether `up` is gate and up in one.
        transposed: Whether matrices are stored in x out (GPT-2's Conv1D).
        identities: Modules of a layer that the replacement makes pointless.
        activation: Name of the config field with the activation.
    """

    model_type: str
    name: str
    config: str = "Config"
    head: str = "ForCausalLM"
    layers: str = "model.layers"
    ffn: str = "mlp"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    fused: bool = False
    transposed: bool = False
    identities: tuple[str, ...] = ()
    activation: str = "hidden_act"

    @property
    def gated(self) -> bool:
        """Whether the network has a gate matrix."""
        return bool(self.gate) or self.fused

    @property
    def moesaic_type(self) -> str:
        """The model type of its converted models."""
        return f"moesaic_{self.model_type}"


_ROWS = (
    Architecture(model_type="gemma2", name="Gemma2", activation="hidden_activation"),
    Architecture(
        model_type="gemma3_text",
        name="Gemma3",
        config="TextConfig",
        activation="hidden_activation",
    ),
    # The network's dropout stays: only its first product is replaced.
    Architecture(
        model_type="gpt2",
        name="GPT2",
        head="LMHeadModel",
        layers="transformer.h",
        ffn="mlp.c_fc",
        gate="",
        up="mlp.c_fc",
        down="mlp.c_proj",
        transposed=True,
        identities=("mlp.act", "mlp.c_proj"),
        activation="activation_function",
    ),
    Architecture(
        model_type="gpt_neox",
        name="GPTNeoX",
        layers="gpt_neox.layers",
        gate="",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    ),
    Architecture(model_type="llama", name="Llama"),
    Architecture(model_type="mistral", name="Mistral"),
    Architecture(model_type="olmo2", name="Olmo2"),
    # OPT has no module for the network: its layer calls the two products itself.
    Architecture(
        model_type="opt",
        name="OPT",
        layers="model.decoder.layers",
        ffn="fc1",
        gate="",
        up="fc1",
        down="fc2",
        identities=("activation_fn", "fc2"),
        activation="activation_function",
    ),
    Architecture(model_type="phi3", name="Phi3", gate="", up="mlp.gate_up_proj", fused=True),
    Architecture(model_type="qwen2", name="Qwen2"),
    Architecture(model_type="qwen3", name="Qwen3"),
    Architecture(model_type="smollm3", name="SmolLM3"),
)

ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in _ROWS}


def architecture_of(model_type: str) -> Architecture:
    """Find the row of a dense or converted model type.

    Raises:
        InputError: If there is none; says which there are and what to add.
    """
    dense_type = model_type.removeprefix("moesaic_")
    if dense_type not in ARCHITECTURES:
        raise InputError(
            f"{unknown_name('architecture', dense_type, ARCHITECTURES)}; supported are "
            f"{', '.join(ARCHITECTURES)}, and a decoder with another name needs one row in "
            "moesaic/models/architectures.py"
        )
    return ARCHITECTURES[dense_type]


def dense_architecture(model_type: str) -> Architecture:
    """Find the row of a dense model type.

    Raises:
        InputError: If there is none, or the type is a converted one.
    """
    row = architecture_of(model_type)
    if model_type not in ARCHITECTURES:
        raise InputError("the model is converted already; give its dense parent")
    return row
