"""How well images fit their prompts: the cosine of CLIP's two embeddings (CLIPScore, 2104.08718)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..files import reason
from ..hub import find_model, quiet
from .features import full_precision

CHUNK = 32  # images, or prompts, in one call of the network
CLIPSCORE_WEIGHT = 2.5  # w of CLIPScore = w max(cos, 0), chosen so that it fills 0 to 1


class CLIPFeatures:
    """The embeddings of a CLIP model, of unit length, in float32.

    model: a folder or a hub id of a transformers `CLIPModel` with its tokenizer and image processor.
    Raises UserError, naming `field`, where there is none.

    name, dim, distance_name, device as of every extractor.
    """

    def __init__(self, model: str, device: torch.device | str = "cpu", field: str = "eval.clip_model"):
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
        from transformers.utils import logging

        folder = find_model(model, field)
        try:
            with quiet(logging):
                self.net = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
                self.tokenizer = AutoTokenizer.from_pretrained(folder)
                self.processor = CLIPImageProcessor.from_pretrained(folder)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise UserError(f"{field}={model!r} holds no CLIP model with its tokenizer and image processor "
                            f"({reason(error)})") from error
        self.device = torch.device(device)
        self.net = self.net.to(self.device).eval().requires_grad_(False)
        self.dim = self.net.config.projection_dim
        self.name, self.distance_name = f"clip {model}", "frechet_clip"

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (b, h, w, 3) -> (b, dim): resized to the model's size, cropped to the centre square."""
        assert images.dtype == torch.uint8, images.dtype
        parts = []
        for part in images.split(CHUNK):
            pixels = self.processor(list(part.cpu().numpy()), return_tensors="pt", input_data_format="channels_last")
            with full_precision(self.device):
                pooled = self.net.vision_model(pixels["pixel_values"].to(self.device)).pooler_output
                parts.append(F.normalize(self.net.visual_projection(pooled), dim=1))
        return torch.cat(parts)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (b, dim); what is longer than the model's context is cut off."""
        length = self.net.config.text_config.max_position_embeddings
        parts = []
        for start in range(0, len(prompts), CHUNK):
            tokens = self.tokenizer(list(prompts[start:start + CHUNK]), padding=True, truncation=True,
                                    max_length=length, return_tensors="pt").to(self.device)
            with full_precision(self.device):
                pooled = self.net.text_model(tokens["input_ids"], tokens["attention_mask"]).pooler_output
                parts.append(F.normalize(self.net.text_projection(pooled), dim=1))
        return torch.cat(parts)
