"""Recorders that run inside a training process. They need only NumPy and safetensors."""
