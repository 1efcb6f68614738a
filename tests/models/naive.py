"""DeltaNet, Gated DeltaNet and softmax attention token by token, from their published definitions.

Independent of everything in refine_kernels and of the model files: only parameters, by name, and settings are taken
from the model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def hidden(model, tokens_T):
    """Final hidden states [T, D] of one text."""
    config = model.config
    x_TD = model.model.embeddings.weight[tokens_T]
    mix = {"delta_net": delta_net, "gated_deltanet": gated_deltanet}[config.model_type]
    entries = [] if config.attn is None else config.attn if isinstance(config.attn, list) else [config.attn]
    for i, block in enumerate(model.model.layers):
        spec = next((entry for entry in entries if i in entry["layers"]), None)
        y_TD = norm(x_TD, block.attn_norm.weight, config.norm_eps)
        x_TD = x_TD + (mix(block.attn, config, y_TD) if spec is None else attention(block.attn, spec, y_TD))
        y_TD = norm(x_TD, block.mlp_norm.weight, config.norm_eps)
        inner = F.silu(y_TD @ block.mlp.gate_proj.weight.T) * (y_TD @ block.mlp.up_proj.weight.T)
        x_TD = x_TD + inner @ block.mlp.down_proj.weight.T
    return norm(x_TD, model.model.norm.weight, config.norm_eps)


def norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def projected(layer, name, config, y_TD):
    """After the projection and, if there is one, the convolution."""
    z_TC = y_TD @ getattr(layer, f"{name}_proj").weight.T
    if not config.use_short_conv:
        return z_TC
    weight = getattr(layer, f"{name}_conv1d").weight
    padded = F.pad(z_TC.T[None], (config.conv_size - 1, 0))
    return F.conv1d(padded, weight, groups=weight.shape[0])[0].T


def delta_net(layer, config, y_TD):
    H = config.num_heads
    activation = {
        "silu": F.silu,
        "relu": F.relu,
        "elu": lambda z: torch.where(z > 0, z + 1, z.clamp(max=0).exp()),
        "identity": lambda z: z,
    }[config.qk_activation]
    q, k = (activation(projected(layer, name, config, y_TD)).view(len(y_TD), H, -1) for name in "qk")
    v = F.silu(projected(layer, "v", config, y_TD)).view(len(y_TD), H, -1)
    if config.qk_norm == "l2":
        q, k = l2(q), l2(k)
    else:
        q, k = (z / z.abs().sum(-1, keepdim=True) for z in (q, k))
    beta = torch.sigmoid(y_TD @ layer.b_proj.weight.T) if config.use_beta else torch.ones_like(q[..., 0])
    if config.allow_neg_eigval:
        beta = 2 * beta
    return output(layer, config, y_TD, memory(q, k, v, beta, torch.zeros_like(beta)), F.silu)


def gated_deltanet(layer, config, y_TD):
    T, G = len(y_TD), config.num_heads
    H = config.num_v_heads or G
    q, k = (l2(F.silu(projected(layer, name, config, y_TD)).view(T, G, -1)) for name in "qk")
    q, k = (torch.stack([z[:, h // (H // G)] for h in range(H)], 1) for z in (q, k))
    v = F.silu(projected(layer, "v", config, y_TD)).view(T, H, -1)
    beta = torch.sigmoid(y_TD @ layer.b_proj.weight.T) * (2 if config.allow_neg_eigval else 1)
    step = torch.log(1 + torch.exp(y_TD @ layer.a_proj.weight.T + layer.dt_bias))
    gate = torch.sigmoid if config.output_gate_activation == "sigmoid" else F.silu
    return output(layer, config, y_TD, memory(q, k, v, beta, -layer.A_log.exp() * step), gate)


def l2(z):
    return z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def memory(q, k, v, beta, g):
    S, out = torch.zeros(*k.shape[1:], v.shape[-1], dtype=v.dtype), []
    for t in range(len(q)):
        S = S * g[t].exp()[:, None, None]
        error = v[t] - torch.einsum("hkv,hk->hv", S, k[t])
        S = S + torch.einsum("h,hk,hv->hkv", beta[t], k[t], error)
        out.append(torch.einsum("hkv,hk->hv", S, q[t]) * q.shape[-1] ** -0.5)
    return torch.stack(out)


def output(layer, config, y_TD, o_THV, gate):
    o_THV = norm(o_THV, layer.o_norm.weight, config.norm_eps)
    if config.use_gate:
        o_THV = o_THV * gate((y_TD @ layer.g_proj.weight.T).view_as(o_THV))
    return o_THV.flatten(1) @ layer.o_proj.weight.T


def attention(layer, spec, y_TD):
    T, H = len(y_TD), spec["num_heads"]
    G = spec.get("num_kv_heads") or H
    q, k, v = (getattr(layer, f"{name}_proj")(y_TD).view(T, -1, y_TD.shape[1] // H) for name in "qkv")
    q, k = (turned(z, spec.get("rope_theta", 10000.0)) for z in (q, k))
    out = []
    for t in range(T):
        first = max(0, t - (spec.get("window_size") or T) + 1)
        for h in range(H):
            g = h // (H // G)
            weights = torch.softmax(k[first : t + 1, g] @ q[t, h] * q.shape[-1] ** -0.5, 0)
            out.append(weights @ v[first : t + 1, g])
    return torch.stack(out).view(T, -1) @ layer.o_proj.weight.T


def turned(z_THD, theta):
    """Each pair (i, i + D / 2) as a complex number, turned by its position times its frequency."""
    T, _, D = z_THD.shape
    pairs = torch.complex(z_THD[..., : D // 2], z_THD[..., D // 2 :])
    angles = torch.arange(T)[:, None] * theta ** (-torch.arange(0, D, 2, dtype=z_THD.dtype) / D)
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((pairs.real, pairs.imag), -1)
