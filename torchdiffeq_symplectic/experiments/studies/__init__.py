"""The experiments of the paper on residual networks and ODEs, each small enough to run in minutes.

Each study is a function ``run`` that computes what it found, ``sheets`` and ``summary`` that put it into rows and
words, and ``draw`` that makes its picture. Pictures need matplotlib, tables need rich, and the digits need
scikit-learn.

M. Sander, P. Ablin, G. Peyré, Do Residual Neural Networks Discretize Neural Ordinary Differential Equations?, NeurIPS
2022, https://arxiv.org/abs/2205.14612
"""

from torchdiffeq_symplectic.resnet.studies import depth, linear, memory_free, tied

__all__ = ["depth", "linear", "memory_free", "tied"]
