"""Bytes that a causal language model needs, computed from its config alone; no weights are loaded.

Counted are tensors that are alive at one time. The allocator's rounding, fragmentation and the device's own
context (about 1 GB on a GPU) come on top. Tests compare the formulas with the live tensors of real steps on a
CPU, to 10 %; `benchmarks/gpu.sh` prints them beside the peaks of a GPU.

Activations of one decoder layer, bytes a token. d is the width, q and kv are heads x
head width and key-value heads x head width, f the width of the MLP, h the heads. Attention is a kernel that
keeps queries, keys, values, its output and one float32 log-sum a head (flash kernels on a GPU). Keys and
values are there once more, those of a prompt before those of its completion. A loop over sequences (on a CPU,
and in float32) keeps a mask as well, 4 bytes for a completion's token and each before it; it is not counted.

    float32             16 d   input of both norms, and both before their weight
                         8 d   both norms' outputs, the inputs of the linear layers
                         4 (2 q + 4 kv) + 4 h     attention; its output is the input of the next layer
                        16 f   gate, its SiLU, up, and their product
    bfloat16 autocast   16 d   the residual stream and the norms are float32, whatever the weights
                        10 d   each of five linear layers keeps a bfloat16 copy of its own of its input
                         2 (2 q + 4 kv) + 4 h
                         8 f
    compiled            10 d   under autocast: the float32 input, and in bfloat16 both norms' outputs and the
                               attention's projection; the rest is computed again
                         2 (2 q + 4 kv) + 4 h
                         6 f   gate, up and their product
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Families whose layers are counted exactly. Others of the same shape differ by some per cent; those with
#: experts, state spaces or absolute positions have other layers, and no figures.
_KNOWN = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite")

#: What a config names if it has layers of other kinds.
_OTHER = ("num_local_experts", "num_experts", "n_routed_experts", "ssm_cfg", "mamba_d_state", "n_embd")


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a config that decide memory.

    mlp : width of the gated MLP. positions : the longest sequence, 0 if the config does not say.
    qk_norm : whether queries and keys are normalised for each head.
    known : whether the family's layers are counted exactly.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp: int
    vocabulary: int
    tied: bool
    positions: int
    qk_norm: bool = False
    known: bool = True

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> ModelShape | None:
        """The shape in a `config.json`; None for layers of other kinds (experts, state spaces, GPT-2)."""
        found = config.get("text_config") or config
        family = str(found.get("model_type", ""))
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
        if any(found.get(name) for name in _OTHER) or not all(isinstance(found.get(n), int) for n in names):
            return None
        layers, width, heads, mlp, vocabulary = (int(found[name]) for name in names)
        return cls(
            layers,
            width,
            heads,
            int(found.get("num_key_value_heads") or heads),
            int(found.get("head_dim") or width // heads),
            mlp,
            vocabulary,
            # transformers leaves the key out where it has the value of its base class.
            bool(config.get("tie_word_embeddings", found.get("tie_word_embeddings", True))),
            int(found.get("max_position_embeddings") or 0),
            qk_norm=family.startswith("qwen3"),
            known=family in _KNOWN,
        )

    @property
    def queries(self) -> int:
        """Width of all heads' queries."""
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        """Width of all heads' keys, and of their values."""
        return self.kv_heads * self.head_width

    @property
    def linear_sides(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of a decoder layer's linear layers."""
        d, q, kv, f = self.width, self.queries, self.keys, self.mlp
        return ((d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d))

    @property
    def layer_parameters(self) -> int:
        """Parameters of a decoder layer's matrices; norms and biases are thousandths of them."""
        return sum(inputs * outputs for inputs, outputs in self.linear_sides)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding; those of the output head, if it is not tied, are as many."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """Parameters of the model, a tied head counted once."""
        return self.layers * self.layer_parameters + self.embedding_parameters * (1 if self.tied else 2)

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of LoRA adapters of this rank on all linear layers but the head."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.linear_sides)

    def layer_activations(self, *, mixed: bool, lora_rank: int | None = None, compiled: bool = False) -> int:
        """Bytes that a decoder layer keeps a token for its backward pass; see the head of this module.

        mixed : under bfloat16 autocast; else float32. lora_rank : of adapters on all linear layers. Frozen
            weights need no inputs, and each adapter keeps a copy of its own. compiled : by torch.compile.
        """
        d, q, kv, f = self.width, self.queries, self.keys, self.mlp
        item = 2 if mixed else 4
        kept = item * (2 * q + 4 * kv + (3 if compiled else 4) * f) + 4 * self.heads + 8
        if compiled:
            adapters = 0 if lora_rank is None else item * (d + 7 * lora_rank)
            return kept + (4 + 3 * item) * d + adapters + item * self.qk_norm * (q + kv)
        if lora_rank is not None:
            inputs = 5 * d + q if mixed else 2 * d
            return kept + 8 * d + item * (inputs + 7 * lora_rank)
        if self.qk_norm:  # float32 input, result before the weight, and the rounded output
            kept += (4 + item) * (q + kv)
        return kept + (26 if mixed else 24) * d

    def inference_activations(self, *, mixed: bool) -> int:
        """Bytes a token of a layer without gradients, in its MLP; the next layer uses them again."""
        return 16 * self.width + 3 * (2 if mixed else 4) * self.mlp

    def cache_bytes(self, tokens: int, item: int) -> int:
        """Bytes of the keys and values of this many tokens. item : bytes of a number."""
        return 2 * self.layers * self.keys * tokens * item
