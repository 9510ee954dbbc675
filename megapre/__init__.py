"""megapre: pretraining of large language models over tensor-, pipeline- and data-parallel ranks.

Start reading at ``megapre/train.py``.
"""

__version__ = "0.1.0"
