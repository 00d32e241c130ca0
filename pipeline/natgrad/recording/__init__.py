"""Record training runs from inside the training process. This package needs only NumPy and safetensors."""

from natgrad.recording.recorder import Recorder

__all__ = ["Recorder"]
