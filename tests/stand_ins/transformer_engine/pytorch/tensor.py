"""No quantized tensors."""


class QuantizedTensor:
    """Of which there are none."""
