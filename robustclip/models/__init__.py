"""Vision-language models and the layers that methods train."""

from robustclip.models.clip import CLIPModel

__all__ = ["CLIPModel"]
