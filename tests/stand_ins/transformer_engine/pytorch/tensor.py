"""No quantized tensors."""


class QuantizedTensor:
    """Base class of quantized tensors, of which there are none."""
