"""AdaDiff's uncertainty estimation modules, UEM (2309.17074, section 3.1): how certain a layer's prediction is.

A head is one linear map from the tokens after a layer to the values of their patches, and a sigmoid. Its result is a
*certainty* c = 1 - u everywhere in this code base, as in AdaDiff's released code: the image leaves where the mean of c
is above the threshold. The paper writes the uncertainty u, and its threshold is 1 minus ours.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

FORMS = ("released", "paper")  # paper: the timestep embedding is an input too


class UEM(nn.Module):
    """One layer's head; `lte` is the published parameter name."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.lte = nn.Linear(dim, out)


class UEMHeads(nn.ModuleList):
    """The heads of all layers of a U-ViT.

    dim      width d of the tokens
    out      values of a patch, p1 p2 c
    layers   one head each: in-blocks, mid block, out-blocks
    form     released: c = sigmoid(W x + b); paper: c = sigmoid(W [x, timestep embedding] + b)

    Weights start as a U-ViT's: truncated normal of std 0.02, zero biases.
    """

    def __init__(self, dim: int, out: int, layers: int, form: str = "released"):
        if form not in FORMS:
            raise ValueError(f"U-ViT: uem={form!r}; choose from {', '.join(FORMS)}")
        super().__init__([UEM(dim * (1 + (form == "paper")), out) for _ in range(layers)])
        self.dim, self.form = dim, form
        for head in self:
            nn.init.trunc_normal_(head.lte.weight, std=0.02)
            nn.init.zeros_(head.lte.bias)

    def forward(self, tokens: Tensor, time: Tensor | None = None, first: int = 0) -> Tensor:
        """Certainty of every value of every patch, (n, b, l, out) in float32, from 0 to 1, in one batched product.

        tokens: (n, b, l, d) of n layers, of which `first` is the first. time: (b, d) timestep embedding, for the form
        `paper`.
        """
        n, b, l, d = tokens.shape
        heads = [*self][first:first + n]
        weight = torch.stack([head.lte.weight for head in heads])  # n out d (or 2d)
        bias = torch.stack([head.lte.bias for head in heads])[:, None]  # n 1 out
        if self.form == "paper":
            weight, of_time = weight.split(self.dim, dim=2)
            bias = bias + time.to(of_time.dtype) @ of_time.mT  # n b out; W [x, e] = W_x x + W_e e
        logits = (tokens.reshape(n, b * l, d) @ weight.mT).view(n, b, l, -1) + bias[:, :, None]
        return logits.float().sigmoid()


def infer_form(tensors: Mapping[str, Tensor], dim: int) -> str:
    """The form of a state dict's heads, "" where it has none."""
    weight = tensors.get("lte_classifer.0.lte.weight")
    if weight is None:
        return ""
    return "released" if weight.shape[1] == dim else "paper"
