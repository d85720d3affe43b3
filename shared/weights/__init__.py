"""What lies in a file of weights, told without loading any of them.

  headers.py   safetensors: the names, types, shapes and places of the tensors
  pickles.py   torch's pickles: the same, read symbolically; nothing in them is ever run
  onnx.py      ONNX models, told from something else
  kinds.py     what a file is: checkpoint, LoRA, VAE, … and of which family

The registry looks at files before anybody may use them, the worker before it loads them.
"""

from __future__ import annotations


class BrokenFile(Exception):
    """A file that can't be what it says it is. The text is for its user, and names no file."""


class UnsafeFile(Exception):
    """A pickle that would run something. The text is for its user, and names no file."""
