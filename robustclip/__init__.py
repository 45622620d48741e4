"""Fine-tune CLIP-like models so that they stay robust, and measure whether they did."""

__version__ = "0.1.0"
