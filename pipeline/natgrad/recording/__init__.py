"""Recorders that run inside a training process. They need only NumPy and safetensors."""

from natgrad.recording.recorder import Recorder

__all__ = ["Recorder"]
