"""AdaDiff's uncertainty estimation modules, UEM (2309.17074, section 3.1): how certain a layer's prediction is.

A head is one linear map from the tokens after a layer to the values of their patches, and a sigmoid. Its result is a
*certainty* c = 1 - u everywhere in this code base, as in AdaDiff's released code: the image leaves where the mean of c
is above the threshold. The paper writes the uncertainty u, and its threshold is 1 minus ours.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import UserError

FORMS = ("released", "paper")  # paper: the timestep embedding is an input too
HEAD = re.compile(r"lte_classifer\.(\d+)\.lte\.weight")


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


class MeanCertainty:
    """What the heads of a network say of whole rows, one layer at a time, for a decision while sampling.

    heads        of all layers; what of them is used is taken once, so a loop makes a new one
    first_patch  tokens before the patches, whose certainty does not count

    A batch waits for it after every layer, where caches are cold and each operation shows. So there are few, and tokens
    are read as they are: a copy of them in autocast's precision would take as long as the product. Results that are
    written to a given place are what autocast leaves alone.
    """

    def __init__(self, heads: UEMHeads, first_patch: int):
        self.first_patch = first_patch
        weights = [head.lte.weight.detach().split(heads.dim, dim=1) for head in heads]  # of tokens, and of time
        biases = [head.lte.bias.detach() for head in heads]
        self.parameters = {weights[0][0].dtype: [(*each, bias) for each, bias in zip(weights, biases, strict=True)]}

    def __call__(self, layer: int, tokens: Tensor, time: Tensor | None = None) -> list[float]:
        """Mean certainty of the patches of each row, on the host, by the head of `layer` (0 is the first).

        tokens: (b, first_patch + patches, d) after that layer. time: (b, d) timestep embedding, for the form `paper`.
        """
        weight, *of_time, bias = self._in(tokens.dtype)[layer]
        tokens = tokens.detach()
        logits = _linear(tokens.flatten(0, 1), weight, bias).view(*tokens.shape[:2], -1).float()
        for each in of_time:
            logits += _linear(time.to(each.dtype), each)[:, None]
        patches = logits.sigmoid_()[:, self.first_patch:]  # cutting the tokens would copy them
        count = patches[0].numel()
        return [total / count for total in patches.sum(dim=(1, 2)).tolist()]

    def _in(self, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        """Weight of the tokens (out, d), in the form `paper` that of time too, and bias (out,) of all layers."""
        if dtype not in self.parameters:
            known = next(iter(self.parameters.values()))
            self.parameters[dtype] = [tuple(part.to(dtype) for part in head) for head in known]
        return self.parameters[dtype]


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(n, d) rows, (out, d) weight -> (n, out)."""
    out = rows.new_empty(len(rows), len(weight))
    return torch.mm(rows, weight.mT, out=out) if bias is None else torch.addmm(bias, rows, weight.mT, out=out)


def infer_form(tensors: Mapping[str, Tensor], dim: int, layers: int) -> str:
    """The form of a state dict's heads, "" where it has none. Raises UserError for heads of another network than one of
    so many layers with tokens of width `dim`.
    """
    shapes = {int(m[1]): tuple(each.shape) for name, each in tensors.items() if (m := HEAD.fullmatch(name))}
    if not shapes:
        return ""
    if shapes.keys() != {*range(layers)}:
        missing = next((f" ({i} is missing)" for i in range(len(shapes)) if i not in shapes), "")
        raise UserError(f"these weights have uncertainty heads (lte_classifer) of {len(shapes)} layers{missing}; this "
                        f"network has {layers}")
    forms = {(dim,): "released", (2 * dim,): "paper"}
    if shapes[0][1:] not in forms:
        raise UserError(f"these weights have uncertainty heads (lte_classifer) of shape {shapes[0]}; this network's "
                        f"take {dim} values, or {2 * dim} in the paper's form")
    return forms[shapes[0][1:]]
