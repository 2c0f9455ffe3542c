"""What the command line runs: ``check``, ``demo``, ``benchmark``, ``resnet`` and ``study``. Needs the extra ``cli``.

It is written against the public API alone, as a user's code is, and nothing in the package imports it.
"""
