"""Matrix products: torch's as it was found, or the fastest float32-accurate one of the machine."""

from layerscope.products.choice import ProductChoice, Products, choose, products

__all__ = ["ProductChoice", "Products", "choose", "products"]
