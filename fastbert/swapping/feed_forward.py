"""What runs in place of HuggingFace's norms and feed-forward modules.

Letters as in `steps.py`.
"""

import torch.nn.functional as F

from .. import ops
from .steps import (
    Replacement,
    gated,
    gelu_norm,
    has_plain_parameters,
    layer_norm,
    linear,
    linear_gelu,
    refuses_activation,
)


class TokenWise(Replacement):
    """Of a module that acts on each token alone."""

    TOKENWISE = True


class BertSelfOutput(TokenWise):
    """LayerNorm(dropout(dense(x)) + residual)."""

    RUNS = {"layer_norm": "linear, fused dropout, add and norm"}

    def forward(self, hidden_states, input_tensor):
        return layer_norm(self.LayerNorm, linear(self.dense, hidden_states), input_tensor, self.dropout)


class MPNetAttention(TokenWise):
    RUNS = {"layer_norm": "fused dropout, add and norm"}

    def forward(self, hidden_states, attention_mask=None, position_bias=None, output_attentions=False, **kwargs):
        attended, *rest = self.attn(hidden_states, attention_mask, position_bias, output_attentions=output_attentions)
        return layer_norm(self.LayerNorm, attended, hidden_states, self.dropout), *rest


class DebertaLayerNorm(TokenWise):
    RUNS = {"layer_norm": "fused norm"}

    def forward(self, hidden_states):
        if not has_plain_parameters(self):
            return super().forward(hidden_states)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return ops.layer_norm(rows, self.weight, self.bias, eps=self.variance_epsilon).view(hidden_states.shape)


class EuroBertRMSNorm(TokenWise):
    RUNS = {"layer_norm": "fused norm"}

    def forward(self, hidden_states):
        # for another dtype the original returns the wider of the two
        if not has_plain_parameters(self) or self.weight.dtype != hidden_states.dtype:
            return super().forward(hidden_states)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return ops.rms_norm(rows, self.weight, eps=self.variance_epsilon).view(hidden_states.shape)


class BertIntermediate(TokenWise):
    """gelu(dense(x))."""

    RUNS = {"gelu": "linear, fused bias and GELU"}
    refuses = refuses_activation("intermediate_act_fn")

    def forward(self, hidden_states):
        return linear_gelu(self.dense, self.intermediate_act_fn, hidden_states)


class RobertaPreLayerNormIntermediate(BertIntermediate):
    """gelu(dense(LayerNorm(x)))."""

    def forward(self, hidden_states):
        return super().forward(layer_norm(self.LayerNorm, hidden_states))


class EsmIntermediate(TokenWise):
    RUNS = {"gelu": "linear, fused bias and GELU"}

    def forward(self, hidden_states):
        return linear_gelu(self.dense, F.gelu, hidden_states)


class FFN(TokenWise):
    """DistilBERT's."""

    RUNS = {"gelu": "linear, fused bias and GELU"}
    refuses = refuses_activation("activation")

    def forward(self, input):
        if self.chunk_size_feed_forward or "ff_chunk" in vars(self):
            return super().forward(input)
        return self.dropout(linear(self.lin2, linear_gelu(self.lin1, self.activation, input)))


class TransformerBlock(TokenWise):
    """DistilBERT's."""

    RUNS = {"layer_norm": "fused add and norm"}

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        attended, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        x = layer_norm(self.sa_layer_norm, attended, hidden_states)
        return layer_norm(self.output_layer_norm, self.ffn(x), x)


class AlbertLayer(TokenWise):
    RUNS = {"gelu": "linear, fused bias and GELU", "layer_norm": "fused add and norm"}
    refuses = refuses_activation("activation")

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        if self.chunk_size_feed_forward or "ff_chunk" in vars(self):
            return super().forward(hidden_states, attention_mask, **kwargs)
        x, _ = self.attention(hidden_states, attention_mask, **kwargs)
        if self.fastbert_options.gelu:
            y = linear(self.ffn_output, linear_gelu(self.ffn, self.activation, x))
        else:
            y = self.ff_chunk(x)
        if self.fastbert_options.layer_norm:
            return layer_norm(self.full_layer_layer_norm, y, x)
        return self.full_layer_layer_norm(y + x)


class ModernBertMLP(TokenWise):
    RUNS = {"gelu": "linear, fused GELU and product"}
    refuses = refuses_activation("act")

    def forward(self, hidden_states):
        return linear(self.Wo, self.drop(gated(self.act, linear(self.Wi, hidden_states))))


class GteLayer(TokenWise):
    """And nomic-embed's, jina-embeddings-v3's. Their gated feed-forwards have two linear layers apart: to join their
    results or weights takes as long as the fused product saves."""

    RUNS = {"layer_norm": "fused dropout, add and norm"}

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        attended, _ = self.self_attn(
            hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
        )
        x = layer_norm(self.post_attention_layernorm, attended, hidden_states, self.post_attention_dropout)
        return layer_norm(self.post_mlp_layernorm, self.mlp(x), x, self.post_mlp_dropout)


class JinaEmbeddingsV3MLP(TokenWise):
    RUNS = {"gelu": "linear, fused bias and GELU"}
    refuses = refuses_activation("activation_fn")

    def forward(self, hidden_states):
        return linear(self.fc2, linear_gelu(self.fc1, self.activation_fn, hidden_states))


class BertPredictionHeadTransform(TokenWise):
    """LayerNorm(gelu(dense(x))), the first step of a masked-LM head."""

    RUNS = {"gelu": "linear, fused bias and GELU", "layer_norm": "fused norm"}
    refuses = refuses_activation("transform_act_fn")

    def forward(self, hidden_states):
        if self.fastbert_options.gelu and self.fastbert_options.layer_norm:
            return gelu_norm(self.dense, self.transform_act_fn, self.LayerNorm, hidden_states)
        if self.fastbert_options.gelu:
            return self.LayerNorm(linear_gelu(self.dense, self.transform_act_fn, hidden_states))
        return layer_norm(self.LayerNorm, self.transform_act_fn(self.dense(hidden_states)))
