"""FaceChain-SuDe (CVPR 2024) for ComfyUI: one-shot subject fine-tuning that inherits its category's attributes."""

__version__ = "0.1.0"
