"""Part of layerscope."""
